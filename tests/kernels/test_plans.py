"""Plans never serve a wrong call: what is another call has another plan, or none. TRITON_INTERPRET=1."""

import json
from collections import namedtuple
from functools import partial

import oracle
import pytest
import torch
from op_cases import cropped, gather_operands, loss_operands, scatter_operands, strided
from plan_cases import (
    PATCH,
    assert_planned_as_unplanned,
    assert_same,
    every_op,
    floating,
    misaligned,
    outcome,
    small_call,
    tensors,
    unplanned,
)

from mar_fast import kernels
from mar_fast.kernels import device, plan
from mar_fast.kernels.jit import launch
from mar_fast.kernels.jit.launch import Launch, LaunchConfig, forced
from mar_fast.kernels.plan import Plans

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("few_tiles")]


@pytest.fixture
def made(monkeypatch):
    """A list of all launches that are worked out."""
    launches, initialise = [], Launch.__init__

    def spy(self, *arguments, **constants):
        initialise(self, *arguments, **constants)
        launches.append(self)

    monkeypatch.setattr(Launch, "__init__", spy)
    return launches


# That there are plans at all.


@every_op
def test_a_second_call_works_nothing_out(name, made):
    """Neither forward nor backward; without plans both do each time."""
    op, operands = small_call(name)
    for run in (lambda: outcome(op, operands), lambda: op(**operands)):
        run()
        assert made
        made.clear()
        run()
        assert not made
    with unplanned():
        for run in (lambda: outcome(op, operands), lambda: op(**operands)):
            run()
            assert made
            made.clear()


# The key: each tensor's layout.


def other_dtype(value):
    return value.half()


CHANGES = {"strided": strided, "cropped": cropped, "misaligned": misaligned, "other dtype": other_dtype}


def changed_calls(name, change):
    """An ordinary call, and calls that each change one tensor of it, where the op takes that."""
    op, operands = small_call(name)
    calls = [(op, operands)]
    for key, value in operands.items():
        if not torch.is_tensor(value):
            continue
        one_dtype = not value.is_floating_point() or name == "linear_gelu"
        one_dtype |= name == "gather_patch_embed" and key in ("weight", "bias")
        if CHANGES[change] is other_dtype and one_dtype:
            continue
        calls.append((op, operands | {key: CHANGES[change](value)}))
    return calls


@pytest.fixture
def nothing_runs(poisoned):
    """For a test that launches nothing."""
    yield
    assert not poisoned.allocated
    poisoned.allocated = None


RAGGED = {
    "gather_patch_embed": partial(gather_operands, torch.float32, patch=PATCH, grid=(1, 3, 4), width=9),
    "scatter_tokens": partial(scatter_operands, torch.float32, width=9),
    "masked_patch_loss": partial(loss_operands, torch.float32),
}


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_and_equal_batches(name, made):
    """Packed tokens never take the plan of an equal batch, and other lengths of as many tokens are no new plan."""
    op = partial(getattr(kernels, name), **({"patch_size": PATCH} if name == "masked_patch_loss" else {}))
    every = [RAGGED[name](lengths=lengths) for lengths in ((2, 0, 4), (3, 2, 1))]
    assert_planned_as_unplanned(name, [(op, operands) for operands in (*every, RAGGED[name](batch=3, count=2))])
    for operands in every:
        made.clear()
        outcome(op, operands)
        assert not made


@pytest.mark.usefixtures("nothing_runs")
@every_op
@pytest.mark.parametrize("change", CHANGES)
def test_the_key_tells_layouts_apart(name, change):
    """Also where an interpreted kernel would not care."""
    plans = Plans()
    keys = [plans.find(*operands.values())[0] for _, operands in changed_calls(name, change)]
    assert None not in keys and len(set(keys)) == len(keys)


@every_op
@pytest.mark.parametrize("change", CHANGES)
def test_another_layout_of_each_tensor(name, change):
    assert_planned_as_unplanned(name, changed_calls(name, change))


@pytest.mark.usefixtures("nothing_runs")
def test_the_key_tells_devices_apart():
    """There is only one device here: it is in the key; a call on meta tensors has no key."""
    x = torch.randn(3, 4)
    key, _ = Plans().find(x)
    assert x.device in key
    assert Plans().find(x, x)[0] != Plans().find(x, x.to("meta"))[0]
    assert Plans().find(x.to("meta"))[0] is None


@every_op
def test_meta_tensors_after_a_planned_call(name):
    op, operands = small_call(name)
    op(**operands)
    abstract = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in operands.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_forced", None)
        assert all(out.is_meta for out in tensors(op(**abstract)))
    (first, *_), rest = [key for key, value in operands.items() if torch.is_tensor(value)], operands
    for key, value in abstract.items():
        if torch.is_tensor(value) and key != first:
            with pytest.raises(ValueError, match=r"on (meta|cpu)"):
                op(**rest | {key: value})


# The key: modes.

MODES = {
    "grad": lambda: torch.enable_grad(),
    "no_grad": lambda: torch.no_grad(),
    "inference_mode": lambda: torch.inference_mode(),
    "grad within inference_mode": lambda: torch.inference_mode(False),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
}


@pytest.mark.usefixtures("bfloat16_too")
@every_op
def test_modes_one_after_the_other(name):
    """Outputs are those of this mode: dtype, whether they require gradients, whether they are inference tensors."""
    op, operands = small_call(name)
    leaves = {key: value.requires_grad_() if key in floating(operands) else value for key, value in operands.items()}
    with unplanned():
        want = {}
        for mode in MODES:
            with MODES[mode]():
                want[mode] = tensors(op(**leaves))
    for first in MODES:
        plan.forget()
        for mode in (first, *MODES, first):
            with MODES[mode]():
                got = tensors(op(**leaves))
            assert_same(got, want[mode], f"{mode} after {first}")
    assert not want["no_grad"][0].requires_grad and want["grad"][0].requires_grad
    assert want["inference_mode"][0].is_inference()


@every_op
def test_who_requires_gradients(name):
    """None, one tensor at a time, all: each time exactly these have one."""
    op, operands = small_call(name)
    names = floating(operands)
    _, seeds, every = oracle.outcome(op, operands)
    plan.forget()
    for _ in range(2):
        for wanted in ([], *([key] for key in names), names):
            leaves = {k: v.detach().requires_grad_(k in wanted) if k in names else v for k, v in operands.items()}
            outputs = tensors(op(**leaves))
            pairs = [(out, seed) for out, seed in zip(outputs, seeds, strict=True) if out.requires_grad]
            if name == "masked_patch_loss":
                assert bool(pairs) == ("pixels" in wanted)
            else:
                assert bool(pairs) == bool(wanted)
            if pairs:
                torch.autograd.backward(*zip(*pairs, strict=True))
            for key in names:
                gradient = leaves[key].grad
                if key in wanted and every[key] is not None:
                    assert torch.equal(gradient, every[key])
                else:
                    assert gradient is None


@every_op
def test_autocast_toggled_with_gradients(name):
    op, operands = small_call(name)

    def cast(**rest):
        with torch.autocast("cpu", torch.float16):
            return op(**rest)

    assert_planned_as_unplanned(name, [(op, operands), (cast, operands)])


# The key: options.

Triple = namedtuple("Triple", "t h w")


def options_of(name):
    """Options that are equal, or nearly, but of another type or value."""
    return {
        "attention": [dict(scale=s) for s in (None, 1.0, 1, True, 0.25)] + [dict(return_lse=r) for r in (True, 1, 0)],
        "attention_varlen": [dict(max_seqlen=m) for m in (12, 13)] + [dict(scale=s) for s in (None, 1, 1.0, True)],
        "add_layer_norm": [dict(eps=e) for e in (1, 1.0, True, 1e-6)],
        "gather_patch_embed": [
            dict(mean=m, std=s)
            for m, s in (
                (None, None),
                ((0, 1, 0), (1, 1, 1)),
                ((0.0, 1.0, 0.0), (1.0, 1.0, True)),
                ([0, 1, 0], [1, 1, 2]),
            )
        ],
        "masked_patch_loss": [dict(normalize=n) for n in (True, 1, False, 0)]
        + [dict(patch_size=PATCH), dict(patch_size=Triple(*PATCH)), dict(mean=(0, 1, 0), std=(1, 2, 1))],
    }[name]


@pytest.mark.parametrize(
    "name", ["attention", "attention_varlen", "add_layer_norm", "gather_patch_embed", "masked_patch_loss"]
)
def test_options(name):
    op, operands = small_call(name)
    assert_planned_as_unplanned(name, [(op, operands | options) for options in options_of(name)])


BAD_OPTIONS = [
    ("attention_varlen", dict(max_seqlen=12), dict(max_seqlen=12.0), "max_seqlen"),
    ("attention_varlen", dict(scale=1), dict(scale="1"), "scale"),
    ("attention", dict(scale=1.0), dict(scale=-1.0), "scale"),
    ("add_layer_norm", dict(eps=1.0), dict(eps=0), "eps"),
    ("masked_patch_loss", dict(patch_size=PATCH), dict(patch_size=(2, 3.0, 5)), "patch_size"),
    ("masked_patch_loss", dict(patch_size=PATCH), dict(patch_size=[2, 3, 5]), "patch_size"),
    ("masked_patch_loss", dict(patch_size=Triple(*PATCH)), dict(patch_size=Triple(2, 3.0, 5)), "patch_size"),
    ("gather_patch_embed", {}, dict(mean=None), "mean and std"),
]


@pytest.mark.parametrize(("name", "good", "bad", "argument"), BAD_OPTIONS)
def test_a_bad_option_that_is_equal_to_a_planned_one(name, good, bad, argument):
    op, operands = small_call(name)
    for _ in range(2):
        op(**operands | good)
        with pytest.raises(ValueError, match=rf"^{argument}: got "):
            op(**operands | bad)


# Values.


def bad_values():
    index, offsets = torch.tensor([[0, 1, 12]] * 2), torch.tensor([0, 5, 4, 12])
    yield "gather_patch_embed", dict(keep_idx=index.int()), "keep_idx: got values from 0 to 12"
    yield "gather_patch_embed", dict(keep_idx=index.clamp(max=1).int()), "keep_idx: got rows with repeated"
    yield "scatter_tokens", dict(keep_idx=index.int()), "keep_idx: got values from 0 to 12"
    yield "scatter_tokens", dict(keep_idx=index.clamp(max=11).flip(1).int()), "keep_idx: got rows that are not strictly"
    yield "masked_patch_loss", dict(drop_idx=-index.int()), "drop_idx: got values from -12 to 0"
    yield "attention_varlen", dict(cu_seqlens=offsets.int()), "cu_seqlens: got offsets from 0 to 12"
    yield "attention_varlen", dict(cu_seqlens=torch.tensor([0, 0, 0, 11]).int()), "cu_seqlens: got offsets from 0 to 11"
    yield "attention_varlen", dict(cu_seqlens=torch.tensor([0, 0, 12, 12]).int(), max_seqlen=11), "max_seqlen: got 11"


@pytest.mark.parametrize(("name", "bad", "message"), bad_values())
def test_bad_values_in_a_planned_call(name, bad, message, made):
    """They are looked at on a CPU each time. The good call of before is of the same key."""
    op, operands = small_call(name)
    operands |= {key: value for key, value in bad.items() if not torch.is_tensor(value)}
    bad = {key: value for key, value in bad.items() if torch.is_tensor(value)}
    for key, value in bad.items():
        assert Plans().find(value)[0] == Plans().find(operands[key])[0]
    good = outcome(op, operands)
    op(**operands)
    made.clear()
    for call in (op, lambda **rest: outcome(op, rest)):
        with pytest.raises(ValueError, match=rf"^{message}"):
            call(**operands | bad)
    assert_same(outcome(op, operands, good[1])[0], good[0])
    assert not made


@every_op
def test_other_values_under_the_same_key(name, made):
    """Nothing of a tensor's values is kept, nor what was folded from them after they changed."""
    op, operands = small_call(name)
    for wrap in (torch.enable_grad, torch.no_grad):
        with wrap():
            op(**operands)
            made.clear()
            with torch.no_grad():
                for value in (operands[key] for key in floating(operands)):
                    value.copy_(torch.randn(value.shape))
            got = tensors(op(**operands))
            assert not made
            with unplanned():
                assert_same(got, tensors(op(**operands)))


# Launch choices.


def chosen(made):
    return {entry.choice.kernel: entry.choice.config.block_m for entry in made}


def test_overrides_read_again(made, monkeypatch, tmp_path):
    """The plans of before are gone with the choices of before, backward's too."""
    op, operands = small_call("bias_gelu")
    file = tmp_path / "mine.json"
    monkeypatch.setenv("MAR_FAST_CONFIGS", str(file))
    launch.forget_choices()
    try:
        outcome(op, operands)
        before = chosen(made)
        for block_m in (64, 32):
            row = dict(config=dict(block_m=block_m, block_n=32), origin="a test")
            content = {"interpreter": {"bias_gelu_forward": [row], "bias_gelu_backward": [row]}}
            file.write_text(json.dumps(content))
            made.clear()
            outcome(op, operands)
            assert not made  # as is said: only when they are forgotten
            launch.forget_choices()
            outcome(op, operands)
            assert chosen(made) == before | dict.fromkeys(("bias_gelu_forward", "bias_gelu_backward"), block_m)
    finally:
        monkeypatch.undo()
        launch.forget_choices()


def test_forced_configurations(made):
    op, operands = small_call("add_layer_norm")
    want, seeds = outcome(op, operands)
    before = chosen(made)
    names = ("add_layer_norm_forward", "add_layer_norm_backward")
    for rows in (16, 8):
        made.clear()
        with forced(dict.fromkeys(names, LaunchConfig(rows))):
            outcome(op, operands, seeds)
            assert chosen(made) == before | dict.fromkeys(names, rows)
    made.clear()
    assert_same(outcome(op, operands, seeds)[0], want)
    assert chosen(made) == before


@every_op
def test_backends_one_after_the_other(name, poisoned):
    op, operands = small_call(name)
    results = {}
    for _ in range(2):
        for backend in ("triton", "eager"):
            with kernels.use_backend(backend):
                poisoned.allocated = 0
                got, seeds = outcome(op, operands, results.get(backend, (None, None))[1])
                assert bool(poisoned.allocated) == (backend == "triton")
                assert_same(got, results.setdefault(backend, (got, seeds))[0])
    poisoned.allocated = 1
