"""Any sequence of calls gives with plans, bit for bit, what each call gives without them. TRITON_INTERPRET=1."""

import functools
from contextlib import ExitStack

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import cropped, strided
from plan_cases import CALLS, CONFIGS, assert_same, misaligned, small_call, tensors, unplanned

from mar_fast import kernels
from mar_fast.kernels.jit.launch import forced

pytestmark = pytest.mark.interpreter

LAYOUTS = {"as it is": torch.clone, "strided": strided, "cropped": cropped, "misaligned": misaligned}
MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
OPTIONS = {
    "gather_patch_embed": [dict(video=torch.uint8), dict(mean=None, std=None), {}],
    "attention": [dict(scale=1), dict(scale=True), dict(scale=0.3), dict(return_lse=True), {}],
    "attention_varlen": [dict(max_seqlen=12), dict(max_seqlen=12.0), dict(scale=1.0), dict(scale=1), {}],
    "attention_kvpacked": [dict(scale=1), dict(scale=0.3), {}],
    "add_layer_norm": [dict(eps=1), dict(eps=1.0), dict(eps=True), dict(residual=None), {}],
    "bias_gelu": [{}],
    "linear_gelu": [{}],
    "mlp": [dict(fc2_bias=None), {}],
    "scatter_tokens": [{}],
    "masked_patch_loss": [
        dict(normalize=False),
        dict(normalize=1),
        dict(patch_size=(2, 3.0, 5)),
        dict(video=torch.uint8),
        {},
    ],
}


@functools.cache
def operands_of(name, dtype, count, **changes):
    torch.manual_seed(count)
    return small_call(name, dtype, count=count, **changes)


# Of what a call is made; few values each.
PARTS = {
    "name": st.sampled_from(list(CALLS)),
    "option": st.integers(0, 4),
    "dtype": st.sampled_from([torch.float32, torch.float32, torch.float16, torch.float64]),
    "count": st.sampled_from([3, 4]),
    "layout": st.tuples(st.integers(0, 5), st.sampled_from(list(LAYOUTS))),
    "wanted": st.sampled_from(["all", "first", "last", "none"]),
    "mode": st.sampled_from(["grad", *MODES]),
    "autocast": st.sampled_from([None, None, torch.float16, torch.bfloat16]),
    "backend": st.sampled_from([None, None, "triton", "eager"]),
    "backward": st.sampled_from(["first", "sum", "strided"]),
}


@st.composite
def sequences(draw):
    """Calls, most of which are an earlier one with one part changed: so they could be taken for it."""
    calls = [draw(st.fixed_dictionaries(PARTS))]
    for _ in range(draw(st.integers(1, 5))):
        part = draw(st.sampled_from(list(PARTS)))
        calls.append(draw(st.sampled_from(calls)) | {part: draw(PARTS[part])})
    return [call_of(**parts) for parts in calls]


def call_of(name, option, dtype, count, layout, wanted, mode, autocast, backend, backward):
    """What `run` takes."""
    options = OPTIONS[name][option % len(OPTIONS[name])]
    video = options.get("video")
    op, operands = operands_of(name, dtype, count, **({} if video is None else dict(video=video)))
    if "residual" in options:
        options = dict.fromkeys(("residual", "layer_scale", "row_scale"))
    operands = operands | {key: value for key, value in options.items() if key != "video"}
    names = [key for key, value in operands.items() if torch.is_tensor(value)]
    floats = [key for key in names if operands[key].is_floating_point()]
    return dict(
        op=op,
        operands=operands,
        layouts={names[layout[0] % len(names)]: layout[1]},
        wanted={"all": floats, "first": floats[:1], "last": floats[-1:], "none": []}[wanted],
        mode=mode,
        autocast=autocast,
        backend=backend,
        backward=backward,
    )


def run(op, operands, layouts, wanted, mode, autocast, backend, backward):
    """Outputs and gradients, or the error."""
    leaves = {
        key: LAYOUTS[layouts.get(key, "as it is")](value).requires_grad_(key in wanted)
        if torch.is_tensor(value)
        else value
        for key, value in operands.items()
    }
    with ExitStack() as modes:
        modes.enter_context(MODES[mode]())
        if autocast is not None:
            modes.enter_context(torch.autocast("cpu", autocast))
        if backend is not None:
            modes.enter_context(kernels.use_backend(backend))
        try:
            outputs = tensors(op(**leaves))
        except (ValueError, TypeError, RuntimeError) as error:
            return repr(error)
    differentiable = [out for out in outputs if out.requires_grad][: 1 if backward == "first" else None]
    if differentiable:
        seeds = [torch.ones((), dtype=out.dtype).expand(out.shape) for out in differentiable]
        if backward == "strided":
            seeds = [strided(seed) if seed.ndim else seed for seed in seeds]
        torch.autograd.backward(differentiable, seeds)
    return [*outputs, *(leaves[key].grad for key in wanted)]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(sequences())
def test_any_sequence(calls):
    with pytest.MonkeyPatch.context() as patch, forced(CONFIGS):
        patch.setattr(kernels.device, "_forced", None)
        patch.setattr(kernels.device, "REFUSED", ())  # bits are compared, whatever their values
        want = []
        with unplanned():
            want = [run(**call) for call in calls]
        for place, (call, expected) in enumerate([*zip(calls, want, strict=True)] * 2):
            got = run(**call)
            if isinstance(expected, str):
                assert got == expected
            else:
                assert not isinstance(got, str), got
                assert_same(got, expected, f"call {place}")
