"""mar-fast reconstruct: a picture of what a pixel decoder makes of the patches that it does not see."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import machine
from ..eval import reconstruct as fill
from ..kernels import checks
from .answers import Precision
from .common import Device, check_png, clip_for, print_json, progress, results
from .loading import Given, ModelKey, Position, load
from .mask_kinds import Kind, by_content, check_seed, drawn

# What is written on the picture: where mean and contrast of the dropped patches come from.
STATISTICS = {
    "visible": "mean and contrast of dropped patches estimated from visible ones nearby; no dropped pixel is used",
    "ground truth": "mean and contrast of each patch taken from the clip itself",
    "predicted": "the decoder predicts pixels; no dropped pixel is used",
}


def reconstruct(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    checkpoint: Annotated[str, typer.Option(help="A file, a folder or a hub id with a pixel decoder, of any layout.")],
    kind: Annotated[Kind, typer.Option(help="How visible patches are chosen.")] = Kind.running,
    ratio: Annotated[float, typer.Option(help="Share of masked patches, in (0, 1).")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of everything random; running and content have nothing random.")] = 0,
    stride: Annotated[int, typer.Option(help="Frames of the file from one frame of the clip to the next.")] = 4,
    frames: Annotated[
        int | None, typer.Option(help="Columns of the picture, evenly chosen; without it all tubelets.")
    ] = None,
    ground_truth_statistics: Annotated[
        bool, typer.Option("--ground-truth-statistics", help="Mean and contrast of each patch from the clip itself.")
    ] = False,
    given: Given = None,
    position: Position = None,
    model_key: ModelKey = None,
    dtype: Annotated[Precision, typer.Option(help="Of weights and activations.")] = Precision.fp32,
    device: Annotated[Device, typer.Option(help="auto: the GPU, where there is one.")] = Device.auto,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("reconstruct.png"),
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Draw a clip, what a mask leaves of it, and what the pixel decoder makes of the rest.

    A decoder predicts patches without their mean and contrast; the picture says where these come from.
    """
    from ..eval import plot

    check_seed(seed)
    check_png(out, force)
    # The classifier, where there is one, has no part in this; --set of the caller goes last, and counts.
    model = load(checkpoint, ["classifier=none", *(given or ())], position=position, model_key=model_key)
    config = model.config
    if model.decoder is None:
        accepted = "one from pre-training, or from MAR's training; a fine-tuned classifier has none"
        raise checks.bad("--checkpoint", f"{checkpoint!r}, without a pixel decoder", accepted)
    if ground_truth_statistics and not config.norm_pix_loss:
        raise checks.bad("--ground-truth-statistics", "it with a decoder that predicts pixels", "neither: none needed")
    if frames is not None and not 1 <= frames <= config.grid[0]:
        raise checks.bad("--frames", frames, f"1 to {config.grid[0]}, the tubelets of a clip in time")
    mask = drawn(kind, config, ratio, seed)
    model = model.to(machine.device(device), machine.DTYPES[dtype]).eval()
    with progress() as step:
        step(f"reading {video.name}", 0.1)
        clip = clip_for(video, config, stride)
        mask = by_content(clip, config, ratio) if mask is None else mask
        if not mask.drop_idx.numel():
            raise checks.bad("--ratio", f"{ratio}, by which no patch is masked", "a larger one, below 1")
        step("reconstructing", 0.3)
        where = next(model.parameters()).device
        filled = fill(model, clip[None].to(where), mask.to(where), ground_truth_statistics=ground_truth_statistics)
        source = "ground truth" if ground_truth_statistics else "visible" if config.norm_pix_loss else "predicted"
        seen = f"{mask.num_visible} of {mask.num_tokens} patches visible"
        title = f"{video.name}, {kind} masking, {ratio:.0%}: {seen}, reconstruction loss {filled.loss:.4f}"
        step("drawing", 0.7)
        plot.draw_reconstruction(clip, filled.video[0].cpu(), mask, config, (title, STATISTICS[source]), out, frames)
    if as_json:
        answer: dict[str, Any] = {"checkpoint": checkpoint, "video": str(video), "kind": kind, "ratio": ratio}
        answer |= {"visible": mask.num_visible, "tokens": mask.num_tokens, "statistics": source}
        print_json({**answer, "reconstruction_loss": filled.loss, "png": str(out)})
    else:
        results.print(f"{title}\n{STATISTICS[source]}\nWritten: {out}", highlight=False, markup=False, soft_wrap=True)
