"""mar-fast visualize: a picture of what a mask leaves of a clip, and of what a pixel decoder makes of the rest."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import MAR, files, machine, named_config
from ..data import read_clip, sample_clip
from ..eval import plot, reconstruct
from ..eval.mask_settings import MaskKind, draw
from ..kernels import checks
from . import common, options

# What is written on the picture: where mean and contrast of the dropped patches come from.
STATISTICS = {
    "visible": "mean and contrast of dropped patches estimated from visible ones nearby; no dropped pixel is used",
    "ground truth": "mean and contrast of each patch taken from the clip itself",
    "predicted": "the decoder predicts pixels; no dropped pixel is used",
}


def visualize(
    clip: options.Clip = None,
    checkpoint: options.OptionalCheckpoint = None,
    kind: Annotated[MaskKind, typer.Option(help="How visible patches are chosen.")] = MaskKind.running,
    ratio: Annotated[float, typer.Option(help="Share of masked patches, in [0, 1).")] = 0.5,
    train: Annotated[bool, typer.Option("--train", help="running: its training form: random phase, shuffled.")] = False,
    seed: options.Seed = 0,
    stride: options.Stride = 4,
    frames: Annotated[int | None, typer.Option(help="Columns, evenly chosen. Default: one for each tubelet.")] = None,
    ground_truth: Annotated[
        bool, typer.Option("--ground-truth-statistics", help="With --checkpoint: the clip's own mean and contrast.")
    ] = False,
    given: options.Given = None,
    position: options.Position = None,
    model_key: options.ModelKey = None,
    dtype: Annotated[options.Precision | None, typer.Option(help="With --checkpoint. Default: fp32.")] = None,
    device: Annotated[common.Device | None, typer.Option(help="With --checkpoint. Default: the GPU, if any.")] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("visualize.png"),
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Draw a clip and what a mask leaves of it; with --checkpoint also what the pixel decoder makes of the rest.

    Without a checkpoint the clip has 16 frames of 224 x 224 in patches of 2 x 16 x 16. A decoder usually predicts
    patches without their mean and contrast; the picture says where these come from.
    """
    if out.suffix.lower() != ".png":
        raise checks.bad("--out", repr(str(out)), "a file name that ends with .png")
    files.may_write([out], force)
    if not 0 <= ratio < 1:
        raise checks.bad("--ratio", ratio, "a number in [0, 1)")
    if train and kind != MaskKind.running:
        raise checks.bad("--train", f"it with --kind {kind}", "--kind running")
    how = dict(position=position, model_key=model_key)
    others = dict(dtype=dtype, device=device, ground_truth_statistics=ground_truth)
    options.only_with("--checkpoint", checkpoint, set=given, **how, **others)
    model = None
    if checkpoint is not None:
        model = _load(checkpoint, given, ground_truth, **how)
        model = model.to(machine.device(device or "auto"), machine.DTYPES[dtype or "fp32"]).eval()
    config = model.config if model is not None else named_config("mar_vit_base")
    if frames is not None and not 1 <= frames <= config.grid[0]:
        raise checks.bad("--frames", frames, f"1 to {config.grid[0]}, the tubelets of a clip in time")
    path = clip if clip is not None else sample_clip()
    with common.progress() as step:
        step(f"reading {path.name}", 0.1)
        video = read_clip(path, config.num_frames, size=config.image_size, stride=stride)
        mask = draw(kind, video[None], config, ratio, torch.Generator().manual_seed(seed), train=train)
        masked = mask.bool_masked()[0]
        visible = int((~masked).sum())
        form = ", training form" if train else ""
        title = f"{path.name}, {kind} masking, {ratio:.0%}{form}: {visible} of {len(masked)} patches visible"
        rows = {"clip": plot.frames(video, config), "masked": plot.frames(video, config, masked)}
        note, answer = "", dict[str, Any]()
        if model is not None:
            if not bool(masked.any()):
                raise checks.bad("--ratio", f"{ratio}, by which no patch is masked", "a larger one, below 1")
            step("reconstructing", 0.3)
            where = next(model.parameters()).device
            filled = reconstruct(model, video[None].to(where), mask.to(where), ground_truth_statistics=ground_truth)
            rows["reconstruction"] = plot.frames(filled.video[0], config)
            source = "ground truth" if ground_truth else "visible" if config.norm_pix_loss else "predicted"
            title += f", reconstruction loss {filled.loss:.4f}"
            note = f"reconstruction: {STATISTICS[source]}"
            answer = {"checkpoint": checkpoint, "statistics": source, "reconstruction_loss": filled.loss}
        step("drawing", 0.7)
        plot.draw_frames(rows, config, out, title=title, note=note, columns=frames)
    if as_json:
        answer |= {"clip": str(path), "kind": kind, "ratio": ratio, "visible": visible, "tokens": len(masked)}
        answer |= {"grid": config.grid, "keep_idx": (~masked).nonzero().flatten().tolist(), "png": str(out)}
        common.print_json(answer)
    else:
        common.show("\n".join(filter(None, (title, note, f"Written: {out}"))))


def _load(checkpoint: str, given: list[str] | None, ground_truth: bool, **how: str | None) -> MAR:
    """A model with a pixel decoder."""
    # A classifier has no part in this, so it is left out, unless --set asks for it: the last one counts.
    model = options.load(checkpoint, ["classifier=none", *(given or ())], **how)
    if model.decoder is None:
        accepted = "one from pre-training, or from MAR's training; a fine-tuned classifier has none"
        raise checks.bad("--checkpoint", f"{checkpoint!r}, without a pixel decoder", accepted)
    if ground_truth and not model.config.norm_pix_loss:
        raise checks.bad("--ground-truth-statistics", "it with a decoder that predicts pixels", "neither: none needed")
    return model
