"""mar-fast extract: features of the windows that slide over videos."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import mar_fast

from .. import machine
from ..data.windows import MOST_FPS, Sliding, Tail
from ..eval import accuracy, feature_files
from ..eval.extraction import Extractor
from ..files import write_whole
from ..kernels import checks
from . import common, options

BROKEN = "broken.jsonl"


def extract(
    checkpoint: options.Checkpoint,
    videos: Annotated[
        list[Path] | None, typer.Argument(metavar="[VIDEO]...", help="Video files, or folders of pictures.")
    ] = None,
    listed: Annotated[Path | None, typer.Option("--list", help="A list of videos, with or without labels.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that --out mirrors. Default: that of the list.")] = None,
    form: options.ListFormat = "auto",
    labels: options.ListLabels = None,
    out: Annotated[Path, typer.Option(help="Folder for the features; a second run continues there.")] = Path(
        "features"
    ),
    window: Annotated[int | None, typer.Option(min=1, help="Frames of a window. Default: the checkpoint's.")] = None,
    stride: Annotated[int, typer.Option(min=1, help="Frames from the start of a window to that of the next.")] = 4,
    frame_stride: Annotated[int, typer.Option(min=1, help="Frames from one to the next within a window.")] = 4,
    fps: Annotated[
        float | None, typer.Option(help=f"Count frames at this rate, up to {MOST_FPS}, and not those of the file.")
    ] = None,
    tail: Annotated[Tail, typer.Option(help="An end short of a window: repeat the last frame, or drop it.")] = "repeat",
    layer: Annotated[
        list[int] | None, typer.Option(help="Features after this block, 1 to the depth; repeatable. Default: the last.")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of visible patches, by cell running; 1 is dense.")] = 1.0,
    complementary: Annotated[
        bool, typer.Option("--complementary", help="Average over masks that together see every token.")
    ] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Features of every token, and not their mean.")] = False,
    npy: Annotated[bool, typer.Option("--npy", help="Write .npy and not .safetensors: one layer, pooled.")] = False,
    force: options.Anew = False,
    allow_broken: options.AllowBroken = False,
    batch: Annotated[int, typer.Option(min=1, help="Windows in a forward pass; always so many.")] = 8,
    workers: options.Workers = 2,
    dtype: Annotated[
        options.Precision | None, typer.Option(help="Of weights and activations. Default: bf16 on a GPU, else fp32.")
    ] = None,
    quantize: options.QuantizeOption = None,
    device: options.DeviceOption = common.Device.auto,
    as_json: options.Json = False,
) -> None:
    """Write features of all windows of videos, for detection in time, retrieval and linear probes."""
    if npy and (tokens or len(layer or ()) > 1):
        raise checks.bad("--npy", "--tokens" if tokens else f"{len(layer or ())} layers", "one layer, pooled")
    paths, root = _chosen(videos or [], listed, root, form, labels)
    films = feature_files.plan_films(paths, root, out, "npy" if npy else "safetensors")
    place = machine.device(device)
    dtype = dtype or ("bf16" if place.type == "cuda" else "fp32")
    sizes: dict[str, Any] = {} if window is None else {"num_frames": window}
    model = mar_fast.from_pretrained(checkpoint, classifier=None, decoder_depth=0, **sizes)
    model = options.placed(model, dtype, place, quantize)
    sliding = Sliding(model.config.num_frames, stride, frame_stride, fps, tail)
    extractor = Extractor(model, layers=layer, keep=keep, complementary=complementary, pooled=not tokens, batch=batch)
    settings = {
        "model": accuracy.fingerprint(model),
        **asdict(sliding),
        "layers": list(extractor.layers),
        "keep": extractor.keep,
        "complementary": complementary,
        "pooled": not tokens,
        "dtype": dtype,
        "quantize": quantize,
    }
    left = feature_files.unfinished(films, settings, force=force)
    if len(left) < len(films):
        common.tell(f"{out}: {len(films) - len(left)} of {len(films)} videos were finished before; continuing")
    content: dict[str, Any] = {"settings": settings, "checkpoint": checkpoint, "batch": batch}
    content |= {"token_idx": extractor.token_idx, "environment": machine.environment(place)}

    def on_batch(so_far: feature_files.Extraction) -> None:
        ended = so_far.finished + len(so_far.broken)
        step(f"{ended} of {so_far.films} videos, {so_far.windows} windows", ended / max(so_far.films, 1))

    with common.progress() as step:
        outcome = feature_files.extract_films(extractor, left, sliding, content, workers=workers, on_batch=on_batch)
    _report(outcome, out, as_json, settings)
    if outcome.broken and not allow_broken:
        raise typer.Exit(common.CHECK_FAILED)


def _chosen(
    videos: list[Path], listed: Path | None, root: Path | None, form: options.Format, labels: Path | None
) -> tuple[list[Path], Path | None]:
    """The videos that are named or listed, and the folder that --out mirrors; None is that of each video."""
    if bool(videos) == (listed is not None):
        raise checks.bad("VIDEO", "both videos and --list" if videos else "none", "videos or --list")
    if listed is not None:
        found = options.read_list(listed, root, form, labels)
        common.tell(f"{listed}: {len(found.samples)} videos, read as {found.format}")
        videos = [sample.path for sample in found.samples]
        root = root or (listed if listed.is_dir() else listed.parent)
    if not any(path.exists() for path in videos):
        got = f"none of the {len(videos)} videos; the first would be {str(videos[0])!r}"
        raise checks.bad("VIDEO" if listed is None else "--root", got, "videos that are there")
    return videos, root


def _report(outcome: feature_files.Extraction, out: Path, as_json: bool, settings: dict[str, Any]) -> None:
    rows = [{"video": name, "error": error} for name, error in outcome.broken.items()]
    if rows:
        write_whole(out / BROKEN, lambda file: file.write_text("".join(json.dumps(row) + "\n" for row in rows)))
        common.show_broken(rows, out / BROKEN)
    else:
        (out / BROKEN).unlink(missing_ok=True)
    seconds = max(outcome.seconds, 1e-9)
    rates = {
        "windows_per_second": outcome.windows / seconds,
        "video_seconds_per_second": outcome.video_seconds / seconds,
        "model_share": outcome.model_seconds / seconds,
    }
    if as_json:
        common.print_json({**settings, **asdict(outcome), **rates, "bound": outcome.bound, "out": str(out)})
        return
    if outcome.windows:
        common.show(
            f"{outcome.windows} windows in {outcome.seconds:.1f} s: {rates['windows_per_second']:.2f} windows and "
            f"{rates['video_seconds_per_second']:.1f} s of video a second, {outcome.bound}-bound "
            f"(the model ran {rates['model_share']:.0%} of the time)"
        )
    if rows:
        common.show(f"{len(rows)} of {outcome.films} videos could not be read")
    common.show(f"Written: {out}")
