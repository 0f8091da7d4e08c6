"""mar-fast eval: top-1 and top-5 accuracy over a list of videos."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.annotations import FORMATS, read_annotations, read_labels
from ..eval import accuracy
from ..kernels import checks
from .answers import Precision, SamplingName, Short, ShortName, Stride, load, parse_views, reader
from .common import CHECK_FAILED, Device, errors, print_json, progress, results

Format = StrEnum("Format", ["auto", "list", "kinetics", "ssv2", "ucf101", "hmdb51"])
# The usual test of each data set: (clips x crops, sampling).
USUAL = {"ssv2": ("2x3", "uniform")}
SHOWN_ERRORS = 5


def evaluate(
    videos: Annotated[Path, typer.Argument(metavar="LIST", help="The list of videos; for HMDB51 the split's folder.")],
    checkpoint: Annotated[str, typer.Option(help="A file, a folder or a hub id, of any layout.")],
    root: Annotated[Path | None, typer.Option(help="Folder of the videos; without it, that of the list.")] = None,
    form: Annotated[Format, typer.Option("--format", help="Of the list; auto tells and says which.")] = Format.auto,
    labels: Annotated[Path | None, typer.Option(help="Names of the classes, for lists that name them.")] = None,
    split: Annotated[int, typer.Option(min=1, help="Of HMDB51.")] = 1,
    views: Annotated[str | None, typer.Option(help="Clips x crops; default 5x3, for ssv2 2x3.")] = None,
    sampling: Annotated[
        SamplingName | None, typer.Option(help="stride: every n-th frame (default); uniform (default for ssv2).")
    ] = None,
    stride: Stride = 4,
    short: Short = ShortName.error,
    keep: Annotated[float | None, typer.Option(help="Share of visible patches; without it the checkpoint's.")] = None,
    out: Annotated[Path, typer.Option(help="A JSON line for each video; a second run goes on where it ends.")] = Path(
        "results.jsonl"
    ),
    force: Annotated[bool, typer.Option(help="Start anew, over results that are there.")] = False,
    allow_broken: Annotated[bool, typer.Option(help="Exit code 0 although videos could not be read.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="The most views in a forward pass.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Videos that are read at once.")] = 2,
    dtype: Annotated[Precision, typer.Option(help="Of weights and activations.")] = Precision.fp32,
    device: Annotated[Device, typer.Option(help="auto: the GPU, where there is one.")] = Device.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the accuracy of a checkpoint over a list of videos."""
    names = None if labels is None else read_labels(labels)
    listed = read_annotations(videos, root=root, labels=names, format=form, split=split)
    count = len(listed.samples)
    usual_views, usual_sampling = USUAL.get(listed.format, ("5x3", "stride"))
    views = views or usual_views
    sampling = sampling or SamplingName(usual_sampling)
    clips_crops = parse_views(views)
    how = sampling if sampling == SamplingName.uniform else f"stride {stride}"
    say(f"{videos}: {count} videos, read as {listed.format} ({FORMATS[listed.format]}); {views} views, {how}")
    model = load(checkpoint, keep, dtype, device)
    config = model.config
    if listed.classes not in (None, config.num_classes):
        argument = "LIST" if labels is None else "--labels"
        raise checks.bad(argument, f"{listed.classes} classes", f"{config.num_classes}, as the checkpoint has")
    read = reader(config, clips_crops, sampling, stride, short)
    settings: dict[str, Any] = {
        "model": accuracy.fingerprint(model),
        "list": accuracy.list_fingerprint(listed.samples),
        "mask_ratio": config.mask_ratio,
        "views": views,
        "sampling": sampling.value,
        "stride": stride if sampling == SamplingName.stride else None,
        "short": short.value,
        "dtype": dtype.value,
    }
    accuracy.check(model, listed.samples)
    journal = accuracy.Journal(out, settings, force=force)
    if journal.rows:
        say(f"{out}: goes on with {journal.done} videos finished before")
    try:
        with progress() as step:
            outcome = accuracy.evaluate(
                model, listed.samples, read, journal, batch=batch, workers=workers,
                on_video=lambda so_far: step(_title(so_far), so_far.finished / count),
            )  # fmt: skip
    except KeyboardInterrupt:
        say(f"{out}: {journal.done} of {count} videos finished; the same command goes on there")
        raise
    finally:
        journal.close()
    broken = [row for row in journal.rows.values() if "error" in row]
    for row in broken[:SHOWN_ERRORS]:
        say(f"error: {row['video']}: {row['error']}", style="red")
    if len(broken) > SHOWN_ERRORS:
        say(f"and {len(broken) - SHOWN_ERRORS} more, all in {out}", style="red")
    if as_json:
        print_json({**settings, "format": listed.format, **asdict(outcome), "results": str(out)})
    else:
        results.print(_summary(outcome, config.mask_ratio, out), highlight=False, markup=False, soft_wrap=True)
    if broken and not allow_broken:
        raise typer.Exit(CHECK_FAILED)


def say(text: str, style: str | None = None) -> None:
    """A line on stderr."""
    errors.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _title(so_far: accuracy.Accuracy) -> str:
    top1 = "" if so_far.top1 is None else f", top-1 {so_far.top1:.1%}"
    return f"{so_far.finished} of {so_far.videos}{top1}"


def _summary(outcome: accuracy.Accuracy, mask_ratio: float, out: Path) -> str:
    read = outcome.finished - outcome.broken
    lines = [f"{outcome.broken} of {outcome.videos} videos could not be read"] if outcome.broken else []
    if outcome.top1 is not None and outcome.top5 is not None:
        visible = f"{1 - mask_ratio:.0%} of patches visible"
        lines.insert(0, f"top-1 {outcome.top1:.2%}, top-5 {outcome.top5:.2%} of {read} videos, {visible}")
    return "\n".join([*lines, f"Written: {out}"])
