"""mar-fast tradeoff: what masking costs and saves, for one checkpoint on given videos."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from .. import MAR, create_model, files, machine
from ..eval.tradeoff import Best, Point, Tradeoff, measure
from ..eval.tradeoff_settings import Ensembles, choose, usual_keep
from ..kernels import checks
from .answers import (
    Labels,
    Sampling,
    SamplingName,
    Short,
    ShortName,
    Stride,
    Videos,
    class_name,
    label_names,
    load,
    names_for,
    parse_views,
    reader,
)
from .common import BAD_INPUT, CHECK_FAILED, Device, Dtype, Size, errors, ms, print_json, progress, wide_results
from .mask_kinds import Kind

USUAL_KINDS = [Kind.running, Kind.random, Kind.content]
SHOWN_CHANGES = 4


def tradeoff(
    videos: Videos,
    checkpoint: Annotated[str | None, typer.Option(help="A file, a folder or a hub id, of any layout.")] = None,
    random_weights: Annotated[
        Size | None, typer.Option(help="Instead of a checkpoint, a MAR of this size with random weights: costs only.")
    ] = None,
    labels: Labels = None,
    keep: Annotated[
        list[float] | None, typer.Option(help="Share of visible patches; repeatable. Usual: 0.75, 0.5, 0.25.")
    ] = None,
    kind: Annotated[
        list[Kind] | None, typer.Option(help="Of the masks; repeatable. Usual: running, random, content.")
    ] = None,
    ensembles: Annotated[
        Ensembles,
        typer.Option(
            help="Views whose masks together see every patch once (50 % twice, 25 % four times); all: also those that "
            "see it several times (75 % four times)."
        ),
    ] = Ensembles.ONCE,
    views: Annotated[str, typer.Option(help="Clips x crops of each video.")] = "4x1",
    sampling: Sampling = SamplingName.stride,
    stride: Stride = 4,
    short: Short = ShortName.error,
    batch: Annotated[int, typer.Option(min=1, help="The most views in a forward pass; so many are timed.")] = 4,
    dtype: Annotated[Dtype, typer.Option(help="auto: bf16 where its matrix products are clearly faster.")] = Dtype.auto,
    device: Annotated[Device, typer.Option(help="auto: the GPU, where there is one.")] = Device.auto,
    seconds: Annotated[float, typer.Option(help="Time for the timed rounds; at least 5 are done.")] = 30.0,
    seed: Annotated[int, typer.Option(min=0, help="Of random masks and weights.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for tradeoff.json and tradeoff.png.")] = Path("mar-fast-tradeoff"),
    force: Annotated[bool, typer.Option(help="Replace results that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure what masking costs and saves: latency and agreement with the dense model, for your model and videos."""
    from ..eval import plot, tradeoff_plot

    clips_crops = parse_views(views)
    checks.positive("--seconds", seconds)
    names = label_names(labels)
    written = [out / "tradeoff.json", out / "tradeoff.png"]
    files.may_write(written, force)
    plot.new_figure()  # without matplotlib, say so now and not after the measurement
    model, title = _model(checkpoint, random_weights, device, seed)
    config = model.config
    names = names_for(model, names)
    settings, absent = choose(config, kind or USUAL_KINDS, keep or usual_keep(config), ensembles)
    with progress() as step:
        result = measure(
            model, title, videos, reader(config, clips_crops, sampling, stride, short), settings,
            dtype=dtype, batch=batch, seed=seed, budget=seconds, on_step=step,
        )  # fmt: skip
    result = replace(result, absent=absent)
    content = {"views_of_a_video": views, **_named(asdict(result), names)}
    files.write_whole(written[0], lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))
    if result.correct:
        tradeoff_plot.draw(result, written[1])
    elif written[1].exists():
        written[1].unlink()  # of an earlier run, and so not of these results
    if as_json:
        print_json(content)
    else:
        _print(result, views, names, written)
    for error in result.broken.values():
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
    if not result.correct:
        errors.print("error: the fast model differs from the reference beyond rounding; no speed is given", style="red")
        raise typer.Exit(CHECK_FAILED)
    if result.broken:
        raise typer.Exit(BAD_INPUT)


def _model(checkpoint: str | None, size: Size | None, device: str, seed: int) -> tuple[MAR, str]:
    """The dense model in float32, and what it is called."""
    if (checkpoint is None) == (size is None):
        got = "neither" if checkpoint is None else "both"
        raise checks.bad("--checkpoint and --random-weights", got, "one of them")
    if checkpoint is not None:
        return load(checkpoint, 1.0, "fp32", device), Path(checkpoint).name
    torch.manual_seed(seed)
    model = create_model(f"mar_vit_{size}", mask_ratio=0.0, decoder_depth=0)
    return model.to(machine.device(device)).eval(), f"ViT-{str(size).capitalize()}, random weights"


def _named(content: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """With the names of classes beside their numbers."""
    for answer in content["answers"]:
        for best in (answer["dense"], *answer["changed"].values()):
            best["name"] = None if names is None else names[best["number"]]
    return content


def _print(result: Tradeoff, views: str, names: list[str] | None, written: list[Path]) -> None:
    wide_results.print(_points(result))
    if result.answers:
        wide_results.print(_answers(result, names))
    env = result.environment
    commit = f", commit {env['commit']}" if env["commit"] else ""
    notes = [
        f"{env['device']}; torch {env['torch']}, {env['threads']} threads{commit}. dtype: {result.dtype_reason}.",
        f"{_many(len(result.answers), 'video')}, {_many(result.views, 'view')} ({views} each), "
        f"at most {result.batch} in a pass. "
        f"Latency: of a call with {result.timed_views} of them, all passes and drawn masks included. "
        "Multiply-adds: of one view.",
        "agreeing: with the class that the same weights give on all patches. KL: mean of KL(dense || masked) over the "
        "views. Views of a video are much alike: go by the number of videos.",
        "difference: of the logits, relative to the reference model on the same masks.",
    ]
    if result.random_weights:
        notes.append("Random weights: the agreement tells nothing about a trained model.")
    notes += [f"Absent: {label}: {why}" for label, why in result.absent.items()]
    notes.append(f"Written: {', '.join(str(path) for path in written if path.exists())}")
    for note in notes:
        wide_results.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)


def _points(result: Tradeoff) -> Table:
    title = escape(f"{result.model}, {result.dtype}: masked against dense")
    table = Table(title=title, title_justify="left")
    table.add_column("mask")
    latency = f"latency of {_many(result.timed_views, 'view')}, ms"
    columns = ["visible tokens", "multiply-adds", latency, "p20 - p80", "speed-up", "memory, MB",
               "views agreeing", "KL, nats", "videos agreeing", "difference"]  # fmt: skip
    for column in columns if result.correct else columns[-1:]:
        table.add_column(column, justify="right")
    for point in result.points:
        wrong = "" if point.correct else ", wrong"
        difference = f"{point.difference if point.difference_fp32 <= point.difference else point.difference_fp32:.0e}"
        table.add_row(point.setting, *(_cells(point) if result.correct else ()), difference + wrong)
    return table


def _cells(point: Point) -> list[str]:
    time = point.latency
    assert time is not None
    tokens = f"{point.visible_tokens:.0f}" + (f" x {point.passes}" if point.passes > 1 else "")
    memory = "not measured" if point.peak_memory is None else f"{point.peak_memory / 1e6:.0f}"
    assert point.multiply_adds is not None and point.kl is not None
    adds = f"{point.multiply_adds / 1e9:.2f} G"
    return [
        tokens, adds, ms(time.p50), f"{ms(time.p20)} - {ms(time.p80)}", f"{point.speedup:.2f}x", memory,
        f"{point.top1_agreement:.1%}", f"{point.kl:.3g}", f"{point.same_answers:.1%}",
    ]  # fmt: skip


def _answers(result: Tradeoff, names: list[str] | None) -> Table:
    table = Table(title="Answers, and what changes them", title_justify="left")
    for column in ("video", "dense answer", "changed by"):
        table.add_column(column, overflow="fold")
    for answer in result.answers:
        changes = [f"{label}: {_best(best, names)}" for label, best in answer.changed.items()]
        more = [f"and {len(changes) - SHOWN_CHANGES} more"] if len(changes) > SHOWN_CHANGES else []
        said = "\n".join([*changes[:SHOWN_CHANGES], *more]) or "none"
        table.add_row(*map(escape, (Path(answer.video).name, _best(answer.dense, names), said)))
    return table


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _best(best: Best, names: list[str] | None) -> str:
    return f"{class_name(names, best.number)} ({best.probability:.1%})"
