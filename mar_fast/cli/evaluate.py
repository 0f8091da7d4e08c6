"""mar-fast eval: top-1 and top-5 accuracy over a list of videos."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.annotations import FORMATS, check_samples
from ..data.video import Sampling
from ..eval import accuracy
from ..kernels import checks
from . import common, options

# The usual test of each data set: (clips x crops, sampling).
USUAL: dict[str, tuple[str, Sampling]] = {"ssv2": ("2x3", "uniform")}


def evaluate(
    videos: Annotated[Path, typer.Argument(metavar="LIST", help="The list of videos; for HMDB51 the split's folder.")],
    checkpoint: options.Checkpoint,
    root: Annotated[Path | None, typer.Option(help="Folder of the videos. Default: that of the list.")] = None,
    form: options.ListFormat = "auto",
    labels: options.ListLabels = None,
    split: options.Split = 1,
    views: Annotated[str | None, typer.Option(help="Clips x crops. Default: 5x3, for ssv2 2x3.")] = None,
    sampling: Annotated[
        Sampling | None, typer.Option(help="Default: stride (every n-th frame), for ssv2 uniform (over the video).")
    ] = None,
    stride: options.Stride = 4,
    short: options.ShortOption = "error",
    keep: options.Keep = None,
    out: Annotated[
        Path, typer.Option(help="Results, a JSON line for each video; a second run continues the file.")
    ] = Path("results.jsonl"),
    force: options.Anew = False,
    allow_broken: options.AllowBroken = False,
    batch: options.Batch = 8,
    workers: options.Workers = 2,
    dtype: options.PrecisionOption = "fp32",
    quantize: options.QuantizeOption = None,
    device: options.DeviceOption = common.Device.auto,
    as_json: options.Json = False,
) -> None:
    """Measure the accuracy of a checkpoint over a list of videos."""
    listed = options.read_list(videos, root, form, labels, split)
    count = len(listed.samples)
    usual_views, usual_sampling = USUAL.get(listed.format, ("5x3", "stride"))
    views, sampling = views or usual_views, sampling or usual_sampling
    how = sampling if sampling == "uniform" else f"stride {stride}"
    common.tell(f"{videos}: {count} videos, read as {listed.format} ({FORMATS[listed.format]}); {views} views, {how}")
    model = options.load_classifier(checkpoint, keep, dtype, device, quantize)
    config = model.config
    if listed.classes not in (None, config.num_classes):
        argument = "LIST" if labels is None else "--labels"
        raise checks.bad(argument, f"{listed.classes} classes", f"{config.num_classes}, as the checkpoint has")
    read = options.view_reader(config, views, sampling, stride, short)
    check_samples(listed.samples, model.config.num_classes)
    settings: dict[str, Any] = {
        "model": accuracy.fingerprint(model),
        "list": accuracy.list_fingerprint(listed.samples),
        "mask_ratio": config.mask_ratio,
        "views": views,
        "sampling": sampling,
        "stride": stride if sampling == "stride" else None,
        "short": short,
        "dtype": dtype,
        "quantize": quantize,
    }
    journal = accuracy.Journal(out, settings, force=force)
    if journal.rows:
        common.tell(f"{out}: {journal.done} videos were finished before; continuing")

    def on_video(so_far: accuracy.Accuracy) -> None:
        top1 = "" if so_far.top1 is None else f", top-1 {so_far.top1:.1%}"
        step(f"{so_far.finished} of {count}{top1}", so_far.finished / count)

    work: dict[str, Any] = dict(batch=batch, workers=workers, on_video=on_video)
    try:
        with common.progress() as step:
            outcome = accuracy.evaluate(model, listed.samples, read, journal, **work)
    except KeyboardInterrupt:
        common.tell(f"{out}: {journal.done} of {count} videos finished; the same command continues there")
        raise
    broken = [row for row in journal.rows.values() if "error" in row]
    common.show_broken(broken, out)
    if as_json:
        common.print_json({**settings, "format": listed.format, **asdict(outcome), "results": str(out)})
    else:
        if outcome.top1 is not None:
            readable = f"{outcome.finished - outcome.broken} videos, {1 - config.mask_ratio:.0%} of patches visible"
            common.show(f"top-1 {outcome.top1:.2%}, top-5 {outcome.top5:.2%} of {readable}")
        if broken:
            common.show(f"{len(broken)} of {count} videos could not be read")
        common.show(f"Written: {out}")
    if broken and not allow_broken:
        raise typer.Exit(common.CHECK_FAILED)
