"""``python -m mar_fast.bench matrix``: every kernel compiled for each architecture, and what the code looks like.

No GPU is needed. The calls of ops, at real size, reach every kernel and launch choice; ``tune`` times them.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from mar_fast import kernels
from mar_fast.kernels.jit.compile_check import STRICT, TARGETS, TRITON, check_all, code, recorded
from mar_fast.kernels.jit.launch import Recorded

from . import op_cases
from .op_cases import SIZES, TOKENS, OpCase, Operands
from .suites.kernels import results

BF16, FLOATS = torch.bfloat16, (torch.bfloat16, torch.float16, torch.float32)
CLIPS, VISIBLE = 32, 784
PASSES = ("forward", "backward")


@cache
def calls(device: str) -> dict[str, OpCase]:
    """All of them by what they are in words, the most usual of each op first."""
    cases = _cases(torch.device(device))
    return {f"{case.op}, {case.label}, {str(case.dtype).removeprefix('torch.')}": case for case in cases}


def launches(call: str, target: str, passes: Sequence[str] = PASSES) -> list[Recorded]:
    """What a call launches on a target: "forward" is one pass without gradients, "backward" both passes with them."""
    case = calls("meta")[call]
    return recorded(lambda: [results(case.ours, case.operands(), case.differentiated, mode) for mode in passes], target)


def launched(key: Callable[..., Any], targets: Sequence[str], names: Sequence[str] = ()) -> dict[Any, list[str]]:
    """``key(launch, tensors, target)`` of a launch -> the calls that make it; of all ops and kernels or of ``names``.

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


# Changes of a call by which one more operand gets a gradient.
ALSO_DIFFERENTIATED = {
    "learnt positions": "pos_embed",
    "gradient of the clip": "video",
    "bias of x": "x_bias",
    "layer scale and drop path": "layer_scale",
    "bias": "bias",
}


def _changed(case: OpCase, *changes: str) -> OpCase:
    """With these changes, one after the other; the label names them."""

    def operands() -> Operands:
        made = case.operands()
        for change in changes:
            made |= _change(made, change)
        return made

    also = [ALSO_DIFFERENTIATED[change] for change in changes if change in ALSO_DIFFERENTIATED]
    case = replace(case, ours=_autocast()(case.ours)) if "autocast" in changes else case
    label, differentiated = ", ".join([case.label, *changes]), (*case.differentiated, *also)
    return replace(case, label=label, operands=operands, differentiated=differentiated)


def _change(o: Operands, change: str) -> Operands:
    """What a change adds to the operands ``o``, or puts in their place."""
    match change:
        case "other layout" if o["video"].is_contiguous():
            return dict(video=o["video"].permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3))
        case "other layout":
            return dict(video=o["video"].contiguous())
        case "ragged":  # rows packed, with the clip of each or with the offsets of clips
            name = next(name for name in ("qkv", "drop_idx", "keep_idx") if name in o)
            clips, tokens = o[name].shape[:2]
            packed = {name: o[name].flatten(0, 1) for name in (name, "visible", "pixels") if name in o}
            clip = torch.arange(clips + 1, dtype=torch.int32, device=o[name].device)
            if name == "qkv":
                return packed | dict(cu_seqlens=clip * tokens, max_seqlen=tokens)
            if "visible" in o:
                return packed | dict(cu_seqlens=clip * tokens)
            return packed | dict(clip_idx=clip[:-1].repeat_interleave(tokens))
        case "misaligned weight":  # TMA cannot read it
            values = o["weight"].flatten()
            return dict(weight=torch.cat([values[:1], values])[1:].view_as(o["weight"]))
        case "one head expanded":  # TMA does not take it, nor inductor TMA: so torch.compile gets what this launches
            return dict(qkv=o["qkv"][..., :1, :].expand(o["qkv"].shape))
        case "bias":
            query = next(iter(o.values()))
            return dict(bias=op_cases.random(query.device, torch.float32, 3, *query.shape[-2:]))
        case "floating":
            return dict(video=o["video"].to(o["pixels"].dtype))
        case "tubelets of one frame":
            return dict(pixels=o["pixels"][..., :768].contiguous(), patch_size=(1, 16, 16))
        case "tubelets of four frames":
            return dict(pixels=o["pixels"].repeat(1, 1, 2), patch_size=(4, 16, 16))
        case "autocast":  # what stays in float32
            return {name: value.float() for name, value in o.items() if name in ("residual", "weight", "bias")}
        case "bias of x":
            return dict(x_bias=torch.ones_like(o["weight"]))
        case "layer scale and drop path":
            return dict(layer_scale=torch.ones_like(o["weight"]), row_scale=torch.ones(CLIPS, device=o["x"].device))
        case "no residual":
            return dict(residual=None)
    return {}


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


def _cases(device: torch.device) -> Iterator[OpCase]:
    sizes = [width for width, _ in SIZES.values()]
    for dtype in FLOATS:
        yield op_cases.bias_gelu(device, dtype, CLIPS, VISIBLE, 3072)
        yield op_cases.linear_gelu(device, dtype, CLIPS, VISIBLE, 768, 3072)
        yield op_cases.mlp(device, dtype, CLIPS, VISIBLE, 768, 3072)
        for width in (384, 512):
            case = op_cases.scatter_tokens(device, dtype, CLIPS, VISIBLE, width)
            yield from (case, _changed(case, "learnt positions"))
        yield _changed(case, "ragged")
        for width in (*sizes, 4096) if dtype == BF16 else sizes:
            case = op_cases.add_layer_norm(device, dtype, CLIPS, VISIBLE, width)
            yield from (case, _changed(case, "bias of x", "layer scale and drop path"))
            if dtype == BF16:
                yield _changed(case, "autocast", "bias of x")
                yield _changed(case, "autocast", "bias of x", "layer scale and drop path")
        for width in (384, 768, 3072):  # in fp8, for which sm_80 and AMD have no kernels: before qkv or fc1, and fc2
            case = replace(op_cases.bias_gelu(device, dtype, CLIPS, VISIBLE, width), differentiated=())
            yield replace(case, op="quantize_rows", ours=lambda x, bias: kernels.quantize_rows(x))
            yield replace(case, op="bias_gelu_rows", ours=kernels.bias_gelu_rows)
            case = replace(op_cases.add_layer_norm(device, dtype, CLIPS, VISIBLE, width), differentiated=())
            yield replace(case, op="add_layer_norm_rows", ours=kernels.add_layer_norm_rows)
        case = op_cases.masked_patch_loss(device, dtype, CLIPS, VISIBLE)
        for changes in ((), ("floating",), ("tubelets of one frame",), ("tubelets of four frames",)):
            yield from (_changed(case, *changes), _changed(case, *changes, "other layout"))
        yield _changed(case, "ragged")
    case = replace(op_cases.add_layer_norm(device, BF16, CLIPS, VISIBLE, 768), differentiated=("x", "weight", "bias"))
    yield _changed(case, "no residual")

    kinds = ((32, 768, torch.uint8), (32, 768, BF16), (1, 768, torch.uint8), (4, 384, BF16), (32, 384, BF16))
    for clips, width, pixels in kinds:
        case = op_cases.gather_patch_embed(device, BF16, clips, VISIBLE, width, pixels)
        yield from (_changed(case, "learnt positions"), _changed(case, "other layout"))
    for dtype in FLOATS:
        case = op_cases.gather_patch_embed(device, dtype, CLIPS, VISIBLE, 768, dtype)
        yield from (case, _changed(case, "gradient of the clip"), _changed(case, "gradient of the clip", "ragged"))
    case = op_cases.gather_patch_embed(device, BF16, CLIPS, VISIBLE, 768, torch.uint8)
    yield _changed(case, "misaligned weight")
    case = op_cases.gather_patch_embed(device, torch.float32, CLIPS, VISIBLE, 768, torch.uint8)
    yield from (_changed(case, "autocast"), _changed(case, "autocast", "ragged"))

    # Heads of ViT-B and L (64), H (80), g (88) and others; 50 %, 75 % and none masked; 4 frames of 112 x 112.
    shapes = [(64, 12, tokens, dtype) for tokens in (VISIBLE, 392, TOKENS) for dtype in FLOATS[:2]]
    shapes += [(size, 16, VISIBLE, BF16) for size in (32, 80, 88, 96, 128)]
    shapes += [(size, 16, VISIBLE, torch.float32) for size in (64, 32, 80, 88, 96, 128)]
    for size, heads, tokens, dtype in [*shapes, (64, 12, 49, BF16), (64, 12, 49, torch.float32)]:
        case = op_cases.attention(device, dtype, 16, tokens, heads, size)
        varlen = replace(case, op="attention_varlen", ours=kernels.attention_varlen)
        yield from (case, _changed(varlen, "ragged"), _changed(case, "bias"))
        if dtype == BF16:
            yield _changed(case, "one head expanded")
        if size == 64 and tokens == VISIBLE:  # the last decoder block: dropped tokens attend to all
            last = op_cases.attention_kvpacked(device, dtype, 16, TOKENS - VISIBLE, TOKENS, heads // 2)
            yield _changed(varlen, "ragged", "one head expanded")
            yield from (_changed(case, "one head expanded", "bias"), last, _changed(last, "bias"))


def main(arguments: Sequence[str]) -> int:
    """The command: exit code 1 if anything does not compile, or has a fault on sm_80, sm_90 or sm_100."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench matrix", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="an architecture; may be given again")
    parser.add_argument("--kernel", action="append", default=[], help="an op or a kernel; may be given again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile; 0: this one")
    options = parser.parse_args(arguments)
    if options.jobs < 0:
        parser.error(f"--jobs: got {options.jobs}, expected a number of processes, or 0")
    try:
        entries = launched(code, options.target or TARGETS, options.kernel)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(f"{'kernel':38} {'target':7} {'configuration':43} figures, call")
    faults, failed = [], 0
    for report in check_all([*entries], options.jobs):
        told, call = report.code, entries[report.code][0]
        figures = ", ".join(f"{what} {value}" for what, value in report.figures.items())
        print(f"{told.kernel:38} {told.target:7} {told.config!s:43} {figures:75} {call}", flush=True)
        faults += [f"{told.kernel}, {call}, {told.target}: {fault}" for fault in report.faults]
        failed += report.failed
    print(*faults, sep="\n")
    print(
        f"{len(entries)} compiled with Triton {TRITON}, {failed} failed. Local and shared memory in bytes. "
        f"On {', '.join(STRICT)} no fault is allowed, elsewhere everything must compile."
    )
    return int(failed > 0)
