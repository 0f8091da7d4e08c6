"""mar-fast savings: what masking saves on this machine, at a glance."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import files, machine
from ..data import sample_clip
from ..eval.savings import FP32_BOUND, Savings, measure, model_config
from .common import CHECK_FAILED, Device, Dtype, Size, clip_for, errors, ms, print_json, progress, results


def savings(
    clip: Annotated[Path | None, typer.Argument(help="A video file; without one, a short real clip.")] = None,
    model: Annotated[Size, typer.Option(help="Size of the ViT.")] = Size.base,
    batch: Annotated[int, typer.Option(help="Clips a call.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="auto: bf16 where its matrix products are clearly faster.")] = Dtype.auto,
    device: Annotated[Device, typer.Option(help="auto: the GPU, where there is one.")] = Device.auto,
    stride: Annotated[int, typer.Option(help="Frames of the file from one frame of the clip to the next.")] = 4,
    seconds: Annotated[float, typer.Option(help="Time for the timed rounds; at least 5 are done.")] = 30.0,
    out: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = Path("mar-fast-results"),
    force: Annotated[bool, typer.Option(help="Replace results that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Time a dense ViT against MAR at 50 % and 75 % masking, checked against the reference first."""
    from ..eval import plot

    written = [out / "results.json", out / "results.png"]
    files.may_write(written, force)
    plot.new_figure()  # without matplotlib, say so now and not after the measurement
    path = clip if clip is not None else sample_clip()
    video = clip_for(path, model_config(model, "dense"), stride)
    where = machine.device(device)
    with progress() as step:
        result = measure(model, video, batch=batch, device=where, dtype=dtype, budget=seconds, on_step=step)
    content = {"clip": path.name, **asdict(result)}
    files.write_whole(written[0], lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))
    if result.correct:
        plot.draw_savings(result, video, written[1])
    if as_json:
        print_json(content)
    else:
        _print(result, path, written)
    if not result.correct:
        errors.print("error: the fast model differs from the reference beyond rounding; no speed is given", style="red")
        raise typer.Exit(CHECK_FAILED)


def _print(result: Savings, clip: Path, written: list[Path]) -> None:
    env = result.environment
    title = f"MAR, ViT-{result.model.capitalize()}, {clip.name}, batch {result.batch}, {result.dtype}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for row in result.rows:
        table.add_column(row.case, justify="right")
    rate = result.matmul_rates[result.dtype]
    lines: list[tuple[str, Any]] = [
        ("visible tokens", lambda row: f"{row.visible_tokens}"),
        ("multiply-adds, G", lambda row: f"{row.multiply_adds / 1e9:.2f}"),
        ("latency, ms: median", lambda row: ms(row.latency.p50)),
        ("  p20 - p80", lambda row: f"{ms(row.latency.p20)} - {ms(row.latency.p80)}"),
        ("clips per second", lambda row: f"{row.clips_per_second:.2f}"),
        ("peak memory, MB", lambda row: "not measured" if row.peak_memory is None else f"{row.peak_memory / 1e6:.0f}"),
        ("speed-up over dense", lambda row: f"{row.speedup:.2f}x"),
        (f"of {rate / 1e9:,.0f} GFLOP/s matmul rate", lambda row: f"{row.rate_fraction:.0%}"),
    ]
    if not result.correct:
        lines = lines[:2]
    lines.append(("difference, fp32", lambda row: f"{row.difference_fp32:.0e}"))
    if result.dtype != "fp32":
        lines.append((f"difference, {result.dtype}", lambda row: f"{row.difference:.0e}"))
        lines.append((f"  (reference's own, {result.dtype})", lambda row: f"{row.reference_difference:.0e}"))
    for name, cell in lines:
        table.add_row(name, *(cell(row) for row in result.rows))
    results.print(table)
    notes = [
        f"{env['device']}; torch {env['torch']}, {env['threads']} threads. dtype: {result.dtype_reason}.",
        "Random weights: speed does not depend on them. dense is a plain ViT classifier, the others are MAR.",
        f"Differences: of the logits, relative to the reference model in fp32 (allowed in fp32: {FP32_BOUND:.0e}).",
        f"Written: {', '.join(str(path) for path in written if path.exists())}",
    ]
    for note in notes:
        results.print(note, style="dim", highlight=False, soft_wrap=True)
