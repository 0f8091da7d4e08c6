"""mar-fast tradeoff: what masking costs and saves, for one checkpoint on given videos."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from .. import MAR, create_model, files, machine
from ..eval import plot, tradeoff_plot
from ..eval.mask_settings import Ensembles, MaskKind, choose, usual_keep
from ..eval.tradeoff import Best, Tradeoff, many, measure
from ..kernels import checks
from . import common, options

USUAL_KINDS = [MaskKind.running, MaskKind.random, MaskKind.content]
SHOWN_CHANGES = 4


def tradeoff(
    videos: options.Videos,
    checkpoint: options.OptionalCheckpoint = None,
    random_weights: Annotated[
        common.Size | None,
        typer.Option(help="Instead of a checkpoint, a MAR of this size with random weights: costs only."),
    ] = None,
    labels: options.Labels = None,
    keep: Annotated[
        list[float] | None, typer.Option(help="Share of visible patches; repeatable. Default: 0.75, 0.5, 0.25.")
    ] = None,
    kind: Annotated[
        list[MaskKind] | None, typer.Option(help="Of the masks; repeatable. Default: running, random, content.")
    ] = None,
    ensembles: Annotated[
        Ensembles,
        typer.Option(
            help="Views whose masks together show every patch once (50 % twice, 25 % four times); all: also those "
            "that show it several times (75 % four times)."
        ),
    ] = "once",
    views: Annotated[str, typer.Option(help="Clips x crops of each video.")] = "4x1",
    sampling: options.SamplingOption = "stride",
    stride: options.Stride = 4,
    short: options.ShortOption = "error",
    batch: Annotated[int, typer.Option(min=1, help="Views in a forward pass, at most, and in a timed call.")] = 4,
    dtype: options.DtypeOption = common.Dtype.auto,
    device: options.DeviceOption = common.Device.auto,
    seconds: options.Seconds = 30.0,
    seed: options.Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for tradeoff.json and tradeoff.png.")] = Path("mar-fast-tradeoff"),
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Measure what masking costs and saves: latency and agreement with the dense model, for your model and videos."""
    checks.positive("--seconds", seconds)
    written = [out / "tradeoff.json", out / "tradeoff.png"]
    files.may_write(written, force)
    plot.new_figure()  # without matplotlib, say so now and not after the measurement
    model, title = _model(checkpoint, random_weights, device, seed)
    names = options.read_class_names(model, labels)
    read = options.view_reader(model.config, views, sampling, stride, short)
    settings, unavailable = choose(model.config, kind or USUAL_KINDS, keep or usual_keep(model.config), ensembles)
    with common.progress() as step:
        how: dict[str, Any] = dict(dtype=dtype, batch=batch, seed=seed, budget=seconds, on_step=step)
        result = measure(model, title, videos, read, settings, names=names, **how)
    result.unavailable = unavailable
    content = {"views_of_a_video": views, **asdict(result)}
    common.write_json(content, written[0])
    if result.correct:
        tradeoff_plot.draw(result, written[1])
    else:
        written[1].unlink(missing_ok=True)  # of an earlier run, and so not of these results
    if as_json:
        common.print_json(content)
    else:
        _print(result, views, written)
    for error in result.broken.values():
        common.show_error(error)
    if not result.correct:
        common.show_error(common.WRONG_MODEL)
        raise typer.Exit(common.CHECK_FAILED)
    if result.broken:
        raise typer.Exit(common.BAD_INPUT)


def _model(checkpoint: str | None, size: common.Size | None, device: str, seed: int) -> tuple[MAR, str]:
    """The dense model in float32, and what it is called."""
    if (checkpoint is None) == (size is None):
        got = "neither" if checkpoint is None else "both"
        raise checks.bad("--checkpoint and --random-weights", got, "one of them")
    if checkpoint is not None:
        return options.load_classifier(checkpoint, 1.0, "fp32", device), Path(checkpoint).name
    torch.manual_seed(seed)
    model = create_model(f"mar_vit_{size}", mask_ratio=0.0, decoder_depth=0)
    return model.to(machine.device(device)).eval(), f"ViT-{str(size).capitalize()}, random weights"


def _print(result: Tradeoff, views: str, written: list[Path]) -> None:
    common.results.print(_points(result))
    if result.answers:
        common.results.print(_answers(result))
    env = result.environment
    commit = f", commit {env['commit']}" if env["commit"] else ""
    notes = [
        f"{env['device']}; torch {env['torch']}, {env['threads']} threads{commit}. dtype: {result.dtype_reason}.",
        f"{result.seen} ({views} each), at most {result.batch} in a pass. "
        f"Latency: of a call with {result.timed_views} of them, all passes and drawn masks included. "
        "Multiply-adds: of one view.",
        "agreeing: with the class that the same weights give on all patches. KL: mean of KL(dense || masked) over the "
        "views. Views of a video are much alike: go by the number of videos.",
        "difference: of the logits, relative to the reference model on the same masks.",
    ]
    if result.random_weights:
        notes.append("Random weights: the agreement tells nothing about a trained model.")
    notes += [f"Not available: {label}: {why}" for label, why in result.unavailable.items()]
    notes.append(f"Written: {', '.join(str(path) for path in written if path.exists())}")
    for note in notes:
        common.show(note, style="dim")


def _points(result: Tradeoff) -> Table:
    title = escape(f"{result.model}, {result.dtype}: masked against dense")
    table = Table("mask", title=title, title_justify="left")
    columns: dict[str, Callable[[Any], str]] = {}
    if result.correct:
        columns = {
            "visible tokens": lambda p: f"{p.visible_tokens:.0f}" + (f" x {p.passes}" if p.passes > 1 else ""),
            "multiply-adds": lambda p: f"{p.multiply_adds / 1e9:.2f} G",
            f"latency of {many(result.timed_views, 'view')}, ms": lambda p: common.ms(p.latency.p50),
            "p20 - p80": lambda p: f"{common.ms(p.latency.p20)} - {common.ms(p.latency.p80)}",
            "speed-up": lambda p: f"{p.speedup:.2f}x",
            "memory, MB": lambda p: common.megabytes(p.peak_memory),
            "views agreeing": lambda p: f"{p.top1_agreement:.1%}",
            "KL, nats": lambda p: f"{p.kl:.3g}",
            "videos agreeing": lambda p: f"{p.same_answers:.1%}",
        }
    columns["difference"] = lambda p: f"{max(p.difference, p.difference_fp32):.0e}" + ("" if p.correct else ", wrong")
    for heading in columns:
        table.add_column(heading, justify="right")
    for point in result.points:
        table.add_row(point.setting, *(cell(point) for cell in columns.values()))
    return table


def _answers(result: Tradeoff) -> Table:
    def text(best: Best) -> str:
        return f"{options.class_name(best.name, best.number)} ({best.probability:.1%})"

    table = Table(title="Answers, and what changes them", title_justify="left")
    for column in ("video", "dense answer", "changed by"):
        table.add_column(column, overflow="fold")
    for answer in result.answers:
        changes = [f"{label}: {text(best)}" for label, best in answer.changed.items()]
        if len(changes) > SHOWN_CHANGES:
            changes[SHOWN_CHANGES:] = [f"and {len(changes) - SHOWN_CHANGES} more"]
        table.add_row(*map(escape, (Path(answer.video).name, text(answer.dense), "\n".join(changes) or "none")))
    return table
