"""Calls of ops at real size that reach every kernel and launch choice: what `matrix` compiles and `tune` times."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from mar_fast import kernels
from mar_fast.kernels.jit.compile_check import recorded
from mar_fast.kernels.jit.launch import Launch

from . import op_cases
from .op_cases import SIZES, TOKENS, OpCase, Operands
from .suites.kernels import results

BF16, FLOATS = torch.bfloat16, (torch.bfloat16, torch.float16, torch.float32)
CLIPS, VISIBLE = 32, 784
PASSES = ("forward", "backward")
Change = Callable[[Operands], Operands]
Recorded = tuple[Launch, tuple[torch.Tensor | None, ...]]


@cache
def calls(device: str) -> dict[str, OpCase]:
    """All of them by what they are in words, the most usual of each op first."""
    every = (_elementwise, _rows, _masked_patch_loss, _gather_patch_embed, _attention)
    found = [call for op in every for call in op(torch.device(device))]
    return {f"{call.op}, {call.label}, {str(call.dtype).removeprefix('torch.')}": call for call in found}


def launches(call: str, target: str, passes: Sequence[str] = PASSES) -> list[Recorded]:
    """What a call launches on a target: "forward" is without gradients, "backward" with them, and both ways."""
    case = calls("meta")[call]
    return recorded(lambda: [results(case.ours, case.operands(), case.differentiated, mode) for mode in passes], target)


def launched(key: Callable[..., Any], targets: Sequence[str], names: Sequence[str] = ()) -> dict[Any, list[str]]:
    """What is launched, by ``key(launch, tensors, target)``, with all calls that do; of all ops and kernels or of some.

    Raises:
        ValueError: no op or kernel has such a name.
    """
    found = dict[Any, dict[str, str]]()
    for call, case in calls("meta").items():
        for target in targets:
            for launch, tensors in launches(call, target):
                found.setdefault(key(launch, tensors, target), {})[call] = case.op
    known = {one: {one.kernel, *made_by.values()} for one, made_by in found.items()}
    every = set[str]().union(*known.values())
    if unknown := set(names) - every:
        raise ValueError(f"--kernel: got {min(unknown)!r}, expected an op or a kernel of {', '.join(sorted(every))}")
    return {one: [*made_by] for one, made_by in found.items() if not names or known[one] & set(names)}


def _changed(case: OpCase, more: str, *changes: Change, also: tuple[str, ...] = (), autocast: bool = False) -> OpCase:
    """With operands changed, one change after the other, and others that get a gradient ``also``."""

    def operands() -> Operands:
        made = case.operands()
        for change in changes:
            made |= change(made)
        return made

    ours, label = case.ours, f"{case.label}{more}{', autocast' * autocast}"
    ours, differentiated = _autocast()(ours) if autocast else ours, (*case.differentiated, *also)
    return replace(case, label=label, operands=operands, ours=ours, differentiated=differentiated)


@contextmanager
def _autocast() -> Iterator[None]:
    """bfloat16 autocast of a GPU, which torch.autocast refuses where there is none."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", BF16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def _elementwise(device: torch.device) -> Iterator[OpCase]:
    """GELU's ops, scatter_tokens and add_layer_norm; the last also with the float32 stream of autocast."""

    def biased(o: Operands) -> Operands:
        return dict(x_bias=torch.ones_like(o["weight"]))

    def scaled(o: Operands) -> Operands:
        return dict(layer_scale=torch.ones_like(o["weight"]), row_scale=torch.ones(CLIPS, device=device))

    def single(o: Operands) -> Operands:
        return {name: value.float() for name, value in o.items() if name != "x"}

    for dtype in FLOATS:
        yield op_cases.bias_gelu(device, dtype, CLIPS, VISIBLE, 3072)
        yield op_cases.linear_gelu(device, dtype, CLIPS, VISIBLE, 768, 3072)
        yield op_cases.mlp(device, dtype, CLIPS, VISIBLE, 768, 3072)
        for width in (384, 512):
            case = op_cases.scatter_tokens(device, dtype, CLIPS, VISIBLE, width)
            yield from (case, _changed(case, ", learnt positions", also=("pos_embed",)))
        yield _changed(case, ", ragged", _ragged)
        for width in (*(width for width, _ in SIZES.values()), *([4096] if dtype == BF16 else ())):
            case = op_cases.add_layer_norm(device, dtype, CLIPS, VISIBLE, width)
            with_bias = partial(_changed, case, ", bias of x", also=("x_bias",))
            factors = ", bias of x, layer scale and drop path"
            with_factors = partial(_changed, case, factors, also=("x_bias", "layer_scale"))
            yield from (case, with_factors(biased, scaled))
            if dtype == BF16:
                yield from (
                    with_bias(single, biased, autocast=True),
                    with_factors(single, biased, scaled, autocast=True),
                )
    case = replace(op_cases.add_layer_norm(device, BF16, CLIPS, VISIBLE, 768), differentiated=("x", "weight", "bias"))
    yield _changed(case, ", no residual", lambda o: dict(residual=None))


def _rows(device: torch.device) -> Iterator[OpCase]:
    """Activations in fp8, for which sm_80 and AMD have no kernels: before qkv or fc1, and before fc2."""
    for dtype in FLOATS:
        for width in (384, 768, 3072):
            sizes = (device, dtype, CLIPS, VISIBLE, width)
            norm, gelu = op_cases.add_layer_norm(*sizes), op_cases.bias_gelu(*sizes)
            for op, case in (("quantize_rows", gelu), ("bias_gelu_rows", gelu), ("add_layer_norm_rows", norm)):
                yield _in_fp8(op, case)


def _in_fp8(op: str, case: OpCase) -> OpCase:
    def ours(**operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if op == "quantize_rows":
            return kernels.quantize_rows(operands["x"])[:2]
        result = getattr(kernels, op)(**operands)
        return result[:2] if op == "bias_gelu_rows" else (*result[0][:2], result[1])

    return replace(case, op=op, ours=ours, differentiated=())


def _other_layout(o: Operands) -> Operands:
    """Planar for channels last, and the other way round."""
    video = o["video"]
    if not video.is_contiguous():
        return dict(video=video.contiguous())
    return dict(video=video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3))


def _ragged(o: Operands) -> Operands:
    """Rows packed as in a ragged batch, with the clip of each or with the offsets of clips."""
    index = "drop_idx" if "drop_idx" in o else "keep_idx"
    clips, count = o[index].shape
    packed = {name: o[name].flatten(0, 1) for name in (index, "visible", "pixels") if name in o}
    clip = torch.arange(clips + 1, dtype=torch.int32, device=o[index].device)
    if "visible" in o:
        return packed | dict(cu_seqlens=clip * count)
    return packed | dict(clip_idx=clip[:-1].repeat_interleave(count))


def _masked_patch_loss(device: torch.device) -> Iterator[OpCase]:
    changes: dict[str, Change] = {
        "": lambda o: {},
        ", floating": lambda o: dict(video=o["video"].to(o["pixels"].dtype)),
        ", tubelets of one frame": lambda o: dict(pixels=o["pixels"][..., :768].contiguous(), patch_size=(1, 16, 16)),
        ", tubelets of four frames": lambda o: dict(pixels=o["pixels"].repeat(1, 1, 2), patch_size=(4, 16, 16)),
    }
    for dtype in FLOATS:
        case = op_cases.masked_patch_loss(device, dtype, CLIPS, VISIBLE)
        for more, change in changes.items():
            yield from (_changed(case, more, change), _changed(case, f"{more}, planar", change, _other_layout))
        yield _changed(case, ", ragged", _ragged)


def _misaligned(o: Operands) -> Operands:
    """A weight that TMA cannot read."""
    values = o["weight"].flatten()
    return dict(weight=torch.cat([values[:1], values])[1:].view_as(o["weight"]))


def _gather_patch_embed(device: torch.device) -> Iterator[OpCase]:
    kinds = ((32, 768, torch.uint8), (32, 768, BF16), (1, 768, torch.uint8), (4, 384, BF16), (32, 384, BF16))
    for clips, width, pixels in kinds:
        case = op_cases.gather_patch_embed(device, BF16, clips, VISIBLE, width, pixels)
        yield _changed(case, ", learnt positions", also=("pos_embed",))
        yield _changed(case, ", other layout", _other_layout)
    for dtype in FLOATS:
        case = op_cases.gather_patch_embed(device, dtype, CLIPS, VISIBLE, 768, dtype)
        yield from (case, _changed(case, ", gradient of the clip", also=("video",)))
        yield _changed(case, ", ragged", _ragged, also=("video",))
    case = op_cases.gather_patch_embed(device, BF16, CLIPS, VISIBLE, 768, torch.uint8)
    yield _changed(case, ", misaligned weight", _misaligned)
    case = op_cases.gather_patch_embed(device, torch.float32, CLIPS, VISIBLE, 768, torch.uint8)
    yield from (_changed(case, "", autocast=True), _changed(case, ", ragged", _ragged, autocast=True))


def _attention(device: torch.device) -> Iterator[OpCase]:
    """Head sizes of ViT-B and L (64), H (80), g (88) and others; 50 %, 75 % and none masked; 4 frames of 112 x 112."""
    shapes = [(64, 12, tokens, dtype) for tokens in (VISIBLE, 392, TOKENS) for dtype in FLOATS[:2]]
    shapes += [(size, 16, VISIBLE, BF16) for size in (32, 80, 88, 96, 128)]
    shapes += [(size, 16, VISIBLE, torch.float32) for size in (64, 32, 80, 88, 96, 128)]
    for size, heads, tokens, dtype in [*shapes, (64, 12, 49, BF16), (64, 12, 49, torch.float32)]:

        def ragged(o: Operands, tokens: int = tokens) -> Operands:
            offsets = torch.arange(17, dtype=torch.int32, device=device) * tokens
            return dict(qkv=o["qkv"].flatten(0, 1), cu_seqlens=offsets, max_seqlen=tokens)

        def biased(o: Operands) -> Operands:
            return dict(bias=op_cases.random(device, torch.float32, 3, *next(iter(o.values())).shape[-2:]))

        def expanded(o: Operands) -> Operands:
            """TMA does not take it, nor inductor TMA: so torch.compile gets what this launches."""
            return dict(qkv=o["qkv"][..., :1, :].expand(o["qkv"].shape))

        case = op_cases.attention(device, dtype, 16, tokens, heads, size)
        varlen = replace(case, op="attention_varlen", ours=kernels.attention_varlen)
        yield from (case, _changed(varlen, "", ragged), _changed(case, ", bias", biased, also=("bias",)))
        if dtype == BF16:
            yield _changed(case, ", one head expanded", expanded)
        if size == 64 and tokens == VISIBLE:  # the last decoder block: dropped tokens attend to all
            last = op_cases.attention_kvpacked(device, dtype, 16, TOKENS - VISIBLE, TOKENS, heads // 2)
            yield _changed(varlen, ", one head expanded", ragged, expanded)
            yield _changed(case, ", one head expanded, bias", expanded, biased, also=("bias",))
            yield from (last, _changed(last, ", bias", biased, also=("bias",)))
