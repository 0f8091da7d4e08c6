"""mar-fast masks: a picture of what a mask leaves of a clip."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import TokenMask, masking, named_config
from ..bench import files
from .common import clip_for, print_json, progress, results

Kind = StrEnum("Kind", ["running", "random", "tube", "frame", "content"])


def masks(
    clip: Annotated[Path | None, typer.Argument(help="A video file; without one, a short real clip.")] = None,
    kind: Annotated[Kind, typer.Option(help="How visible patches are chosen.")] = Kind.running,
    ratio: Annotated[float, typer.Option(help="Share of masked patches, in [0, 1).")] = 0.5,
    train: Annotated[bool, typer.Option(help="running: random phase and temporal shuffle, as in training.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything random; content has nothing random.")] = 0,
    stride: Annotated[int, typer.Option(help="Frames of the file from one frame of the clip to the next.")] = 4,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("masks.png"),
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: counts and the visible indices.")] = False,
) -> None:
    """Draw a mask over a clip's frames (16 frames of 224 x 224, patches of 2 x 16 x 16)."""
    from ..bench import plot

    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed: got {seed}, expected a whole number from 0 to 2^63 - 1")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out: got {str(out)!r}, expected a file name that ends with .png")
    files.may_write([out], force)
    config = named_config("mar_vit_base")
    mask = _drawn(kind, config.grid, ratio, train, seed)
    path = clip if clip is not None else files.sample_clip()
    with progress() as step:
        step(f"reading {path.name}", 0.1)
        video = clip_for(path, config, stride)
        if mask is None:
            masked = masking.content(video[None], config.grid, budget=1 - ratio).bool_masked()
            mask = TokenMask.from_bool_masked(masked.view(1, *config.grid))
        form = ", training form" if train else ""
        title = f"{kind} masking, {ratio:.0%}{form}: {mask.num_visible} of {mask.num_tokens} patches visible"
        step("drawing", 0.4)
        plot.draw_masks(video, mask, config, title, out)
    if as_json:
        keep = mask.keep_idx[0].tolist()
        print_json(
            {"clip": path.name, "kind": kind, "ratio": ratio, "grid": mask.grid, "keep_idx": keep, "png": str(out)}
        )
    else:
        results.print(f"{title}\nWritten: {out}", highlight=False, soft_wrap=True)


def _drawn(kind: Kind, grid: tuple[int, int, int], ratio: float, train: bool, seed: int) -> TokenMask | None:
    """The mask, or None for the one that goes by the clip."""
    if train and kind != Kind.running:
        raise ValueError(f"--train: got it with --kind {kind}, expected --kind running")
    if kind == Kind.content:
        if not 0 <= ratio < 1:
            raise ValueError(f"--ratio: got {ratio}, expected a number in [0, 1)")
        return None
    generator = torch.Generator().manual_seed(seed)
    if kind == Kind.running:
        phase = None if train else 0
        return masking.cell_running(1, grid, ratio, phase=phase, temporal_shuffle=train, generator=generator)
    draw = {Kind.random: masking.random, Kind.tube: masking.tube, Kind.frame: masking.frame}[kind]
    return draw(1, grid, ratio, generator=generator)
