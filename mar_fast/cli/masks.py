"""mar-fast masks: a picture of what a mask leaves of a clip."""

from pathlib import Path
from typing import Annotated

import typer

from .. import named_config
from ..data import sample_clip
from .common import check_png, clip_for, print_json, progress, results
from .mask_kinds import Kind, by_content, check_seed, drawn


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
    from ..eval import plot

    check_seed(seed)
    check_png(out, force)
    config = named_config("mar_vit_base")
    mask = drawn(kind, config, ratio, seed, train)
    path = clip if clip is not None else sample_clip()
    with progress() as step:
        step(f"reading {path.name}", 0.1)
        video = clip_for(path, config, stride)
        if mask is None:
            mask = by_content(video, config, ratio)
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
