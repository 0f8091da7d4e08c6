"""mar-fast cost: parameters, multiply-adds and time floors of a model, without running it."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from ..config import named_config
from ..cost import Cost, count
from .common import print_json, results


def cost(
    model: Annotated[str, typer.Argument(help="A named model, for example mar_vit_base or videomae_vit_large.")],
    mask_ratio: Annotated[list[float] | None, typer.Option(help="Repeatable; default 0, 0.5, 0.75.")] = None,
    classes: Annotated[int, typer.Option(help="Output classes.")] = 174,
    batch: Annotated[int, typer.Option(help="Clips.")] = 1,
    training: Annotated[bool, typer.Option(help="Forward with pixel decoder, and backward.")] = False,
    peak_tflops: Annotated[float | None, typer.Option(help="Peak rate of a device, TFLOP/s, for the floor.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Its memory bandwidth, GB/s.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Print what a model costs at several mask ratios, counted our way and the original's."""
    if (peak_tflops is None) != (bandwidth is None):
        got = f"--peak-tflops {peak_tflops}, --bandwidth {bandwidth}"
        raise ValueError(f"--peak-tflops and --bandwidth: got {got}, expected both or neither")
    config = named_config(model, num_classes=classes)
    reconstruct = training and config.decoder_depth > 0
    options: dict[str, Any] = dict(batch=batch, reconstruct=reconstruct, training=training)
    ratios = mask_ratio or [0.0, 0.5, 0.75]
    ours = {ratio: count(config, ratio, **options) for ratio in ratios}
    original = {ratio: count(config, ratio, method="original", **options) for ratio in ratios}
    floors: dict[float, float] = {}
    if peak_tflops is not None and bandwidth is not None:
        floors = {ratio: cost_.floor_seconds(peak_tflops * 1e12, bandwidth * 1e9) for ratio, cost_ in ours.items()}
    if as_json:
        print_json({"model": model, "rows": [_row(ratio, ours, original, floors) for ratio in ratios]})
        return

    table = Table(title=f"{model}, {classes} classes, batch {batch}{', training step' if training else ''}")
    table.add_column("multiply-adds, G")
    for ratio in ratios:
        table.add_column(f"{ratio:.0%} masked" if ratio else "dense", justify="right")
    for name in [part.name for part in ours[ratios[0]].parts]:
        by_name = [{part.name: part for part in cost_.parts}[name].multiply_adds for cost_ in ours.values()]
        if any(by_name):
            table.add_row(name, *(f"{value / 1e9:.2f}" for value in by_name))
    table.add_section()
    table.add_row("all", *(f"{cost_.multiply_adds / 1e9:.2f}" for cost_ in ours.values()), style="bold")
    table.add_row("all, the original's way", *(f"{cost_.multiply_adds / 1e9:.2f}" for cost_ in original.values()))
    table.add_section()
    table.add_row("parameters, M", *(f"{cost_.parameters / 1e6:.2f}" for cost_ in ours.values()))
    table.add_row("bytes moved, GB (16 bit)", *(f"{cost_.bytes_moved / 1e9:.2f}" for cost_ in ours.values()))
    if floors:
        table.add_row("time floor, ms", *(f"{seconds * 1e3:.3f}" for seconds in floors.values()))
    results.print(table)


def _row(
    ratio: float, ours: dict[float, Cost], original: dict[float, Cost], floors: dict[float, float]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "mask_ratio": ratio,
        "parameters": ours[ratio].parameters,
        "multiply_adds": ours[ratio].multiply_adds,
        "multiply_adds_original": original[ratio].multiply_adds,
        "bytes_moved": ours[ratio].bytes_moved,
        "parts": [asdict(part) for part in ours[ratio].parts],
    }
    if floors:
        row["floor_seconds"] = floors[ratio]
    return row
