"""Calls of ops at real size that reach every kernel and launch choice: what `matrix` compiles and `tune` times."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mar_fast import kernels

from . import op_cases
from .op_cases import SIZES, TOKENS, OpCase, Operands

BF16, FLOATS = torch.bfloat16, (torch.bfloat16, torch.float16, torch.float32)
CLIPS, VISIBLE = 32, 784
Change = Callable[[Operands], Operands]


@dataclass(frozen=True)
class Call:
    """One op at one shape in one dtype, with the operands that get a gradient."""

    op: str
    label: str
    dtype: torch.dtype
    function: Callable[..., Any]
    operands: Callable[[], Operands]
    differentiated: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.op}, {self.label}, {str(self.dtype).removeprefix('torch.')}"

    def outputs(self, operands: Operands) -> list[Tensor]:
        """Run it."""
        outputs = self.function(**operands)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    def training(self, operands: Operands) -> tuple[list[Tensor], Callable[[], tuple[Tensor, ...]]]:
        """Run it with gradients: the outputs, and the backward pass, which can be run once."""
        wanted = [operands[name].requires_grad_() for name in self.differentiated]
        outputs = [output for output in self.outputs(operands) if output.requires_grad]
        return outputs, lambda: torch.autograd.grad(outputs, wanted, [torch.ones_like(output) for output in outputs])

    def inference(self, operands: Operands | None = None) -> list[Tensor]:
        """Run it without gradients."""
        with torch.no_grad():
            return self.outputs(operands or self.operands())

    def everything(self) -> None:
        """Run all of it, to be recorded."""
        self.inference()
        self.training(self.operands())[1]()


def _call(case: OpCase, more: str = "", change: Change = lambda operands: {}, also: str = "") -> Call:
    """Our own provider of a case, with some operands changed, and another one that gets a gradient."""
    wanted = (*case.differentiated, *([also] if also else ()))
    operands = lambda: (values := case.operands()) | change(values)  # noqa: E731
    return Call(case.op, f"{case.label}{more}", case.dtype, case.providers["mar_fast"], operands, wanted)


def _autocast(call: Call) -> Call:
    """The same under bfloat16 autocast of a GPU, which torch.autocast refuses where there is none."""

    def function(**operands: Any) -> Any:
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", BF16)
        try:
            return call.function(**operands)
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])

    return replace(call, label=f"{call.label}, autocast", function=function)


def _other_layout(operands: Operands) -> Operands:
    """Planar for channels last, and the other way round."""
    video = operands["video"]
    if not video.is_contiguous():
        return dict(video=video.contiguous())
    return dict(video=video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3))


def _packed(operands: Operands) -> Operands:
    """As a ragged batch: rows packed, with the clip of each, or with the offsets of clips."""
    index = "drop_idx" if "drop_idx" in operands else "keep_idx"
    clips, count = operands[index].shape
    rows = {name: operands[name].flatten(0, 1) for name in (index, "visible", "pixels") if name in operands}
    offsets = torch.arange(clips + 1, dtype=torch.int32, device=operands[index].device) * count
    if "visible" in rows:
        return rows | dict(cu_seqlens=offsets)
    return rows | dict(clip_idx=(offsets[:-1] // count).repeat_interleave(count))


@functools.cache
def calls(device: str) -> tuple[Call, ...]:
    """All of them, the most usual of each op first."""
    ops = (_elementwise, _masked_patch_loss, _gather_patch_embed, _attention)
    return tuple(call for op in ops for call in op(torch.device(device)))


def _elementwise(device: torch.device) -> Iterator[Call]:
    """bias_gelu, scatter_tokens and add_layer_norm; the last also with the float32 stream of autocast."""

    def scaled(operands: Operands) -> Operands:
        return dict(layer_scale=torch.ones_like(operands["weight"]), row_scale=torch.ones(CLIPS, device=device))

    def single(operands: Operands) -> Operands:
        return {name: value.float() for name, value in operands.items() if name != "x"}

    scales = ", layer scale and drop path"
    for dtype in FLOATS:
        yield _call(op_cases.bias_gelu(device, dtype, CLIPS, VISIBLE, 3072))
        for width in (384, 512):
            case = op_cases.scatter_tokens(device, dtype, CLIPS, VISIBLE, width)
            yield from (_call(case), _call(case, ", learnt positions", also="pos_embed"))
        for width in (*(width for width, _ in SIZES.values()), *([4096] if dtype == BF16 else ())):
            case = op_cases.add_layer_norm(device, dtype, CLIPS, VISIBLE, width)
            yield from (_call(case), _call(case, scales, scaled, "layer_scale"))
            if dtype == BF16:
                yield _autocast(_call(case, "", single))
                yield _autocast(_call(case, scales, lambda o: single(o) | scaled(single(o)), "layer_scale"))
    yield _call(op_cases.scatter_tokens(device, BF16, CLIPS, VISIBLE, 512), ", ragged", _packed, "pos_embed")
    case = replace(op_cases.add_layer_norm(device, BF16, CLIPS, VISIBLE, 768), differentiated=("x", "weight", "bias"))
    yield _call(case, ", no residual", lambda operands: dict(residual=None))


def _planar(change: Change, operands: Operands) -> Operands:
    return change(operands) | _other_layout(operands | change(operands))


def _masked_patch_loss(device: torch.device) -> Iterator[Call]:
    changes: dict[str, Change] = {
        "": lambda o: {},
        ", floating": lambda o: dict(video=o["video"].to(o["pixels"].dtype)),
        ", tubelets of one frame": lambda o: dict(pixels=o["pixels"][..., :768].contiguous(), patch_size=(1, 16, 16)),
        ", tubelets of four frames": lambda o: dict(pixels=o["pixels"].repeat(1, 1, 2), patch_size=(4, 16, 16)),
    }
    for dtype in FLOATS:
        case = op_cases.masked_patch_loss(device, dtype, CLIPS, VISIBLE)
        for more, change in changes.items():
            yield _call(case, more, change)
            yield _call(case, f"{more}, planar", functools.partial(_planar, change))
        yield _call(case, ", ragged", _packed)


def _gather_patch_embed(device: torch.device) -> Iterator[Call]:
    kinds = ((32, 768, torch.uint8), (32, 768, BF16), (1, 768, torch.uint8), (4, 384, BF16), (32, 384, BF16))
    for clips, width, pixels in kinds:
        case = op_cases.gather_patch_embed(device, BF16, clips, VISIBLE, width, pixels)
        yield from (_call(case, also="pos_embed"), _call(case, ", other layout", _other_layout))
    for dtype in FLOATS:
        case = op_cases.gather_patch_embed(device, dtype, CLIPS, VISIBLE, 768, dtype)
        yield from (_call(case), _call(case, ", gradient of the clip", also="video"))
        yield _call(case, ", ragged", _packed, "video")
    yield _call(op_cases.gather_patch_embed(device, BF16, CLIPS, VISIBLE, 768, torch.uint8), ", ragged", _packed)
    yield _autocast(_call(op_cases.gather_patch_embed(device, torch.float32, CLIPS, VISIBLE, 768, torch.uint8)))


def _attention(device: torch.device) -> Iterator[Call]:
    """Head sizes of ViT-B and L (64), H (80), g (88) and others; 50 %, 75 % and none masked; 4 frames of 112 x 112."""
    shapes = [(64, 12, tokens, dtype) for tokens in (VISIBLE, 392, TOKENS) for dtype in FLOATS[:2]]
    shapes += [(size, 16, VISIBLE, BF16) for size in (32, 80, 88, 96, 128)]
    shapes += [(size, 16, VISIBLE, torch.float32) for size in (64, 32, 80, 88, 96, 128)]
    for size, heads, tokens, dtype in [*shapes, (64, 12, 49, BF16), (64, 12, 49, torch.float32)]:
        yield (call := _call(op_cases.attention(device, dtype, 16, tokens, heads, size)))

        def ragged(call: Call = call, tokens: int = tokens) -> Operands:
            offsets = torch.arange(17, dtype=torch.int32, device=device) * tokens
            return dict(qkv=call.operands()["qkv"].flatten(0, 1), cu_seqlens=offsets, max_seqlen=tokens)

        yield replace(call, op="attention_varlen", function=kernels.attention_varlen, operands=ragged)
