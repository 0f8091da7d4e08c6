"""mar-fast demo: what masking saves on this machine, at a glance."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import files, machine
from ..data import read_clip, sample_clip
from ..eval import plot, savings
from ..eval.measured import FP32_TOLERANCE
from . import common, options


def demo(
    clip: options.Clip = None,
    model: Annotated[common.Size, typer.Option(help="Size of the ViT.")] = common.Size.base,
    batch: Annotated[int, typer.Option(help="Clips a call.")] = 1,
    dtype: options.DtypeOption = common.Dtype.auto,
    device: options.DeviceOption = common.Device.auto,
    stride: options.Stride = 4,
    seconds: options.Seconds = 30.0,
    out: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = Path("mar-fast-results"),
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Time a dense ViT against MAR at 50 % and 75 % masking, checked against the reference first."""
    written = [out / "results.json", out / "results.png"]
    files.may_write(written, force)
    plot.new_figure()  # without matplotlib, say so now and not after the measurement
    path = clip if clip is not None else sample_clip()
    config = savings.model_config(model, "dense")
    video = read_clip(path, config.num_frames, size=config.image_size, stride=stride)
    with common.progress() as step:
        result = savings.measure(
            model, video, batch=batch, device=machine.device(device), dtype=dtype, budget=seconds, on_step=step
        )
    content = {"clip": path.name, **asdict(result)}
    common.write_json(content, written[0])
    if result.correct:
        savings.draw(result, video, written[1])
    else:
        written[1].unlink(missing_ok=True)  # of an earlier run, and so not of these results
    if as_json:
        common.print_json(content)
    else:
        _print(result, path, written)
    if not result.correct:
        common.show_error(common.WRONG_MODEL)
        raise typer.Exit(common.CHECK_FAILED)


def _print(result: savings.Savings, clip: Path, written: list[Path]) -> None:
    env = result.environment
    title = f"MAR, ViT-{result.model.capitalize()}, {clip.name}, batch {result.batch}, {result.dtype}"
    table = Table("", title=title, title_justify="left")
    for row in result.rows:
        table.add_column(row.case, justify="right")
    rate = result.matmul_rates[result.dtype]
    lines: list[tuple[str, Callable[[Any], str]]] = [
        ("visible tokens", lambda row: f"{row.visible_tokens}"),
        ("multiply-adds, G", lambda row: f"{row.multiply_adds / 1e9:.2f}"),
    ]
    if result.correct:
        lines += [
            ("latency, ms: median", lambda row: common.ms(row.latency.p50)),
            ("  p20 - p80", lambda row: f"{common.ms(row.latency.p20)} - {common.ms(row.latency.p80)}"),
            ("clips per second", lambda row: f"{row.clips_per_second:.2f}"),
            ("peak memory, MB", lambda row: common.megabytes(row.peak_memory)),
            ("speed-up over dense", lambda row: f"{row.speedup:.2f}x"),
            (f"of {rate / 1e9:,.0f} GFLOP/s matmul rate", lambda row: f"{row.rate_fraction:.0%}"),
        ]
    lines.append(("difference, fp32", lambda row: f"{row.difference_fp32:.0e}"))
    if result.dtype != "fp32":
        lines.append((f"difference, {result.dtype}", lambda row: f"{row.difference:.0e}"))
        lines.append((f"  (reference's own, {result.dtype})", lambda row: f"{row.reference_difference:.0e}"))
    for name, cell in lines:
        table.add_row(name, *map(cell, result.rows))
    common.results.print(table)
    for note in (
        f"{env['device']}; torch {env['torch']}, {env['threads']} threads. dtype: {result.dtype_reason}.",
        "Random weights: speed does not depend on them. dense is a plain ViT classifier, the others are MAR.",
        f"Differences: of the logits, relative to the reference model in fp32 (allowed in fp32: {FP32_TOLERANCE:.0e}).",
        f"Written: {', '.join(str(path) for path in written if path.exists())}",
    ):
        common.show(note, style="dim")
