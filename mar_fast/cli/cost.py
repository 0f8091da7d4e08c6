"""mar-fast cost: parameters, multiply-adds and time floors of a model, without running it."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from ..config import named_config
from ..cost import count
from ..kernels import checks
from . import common, options


def cost(
    model: Annotated[str, typer.Argument(help="A named model, for example mar_vit_base or videomae_vit_large.")],
    mask_ratio: Annotated[list[float] | None, typer.Option(help="Repeatable. Default: 0, 0.5, 0.75.")] = None,
    classes: Annotated[int, typer.Option(help="Output classes.")] = 174,
    batch: Annotated[int, typer.Option(help="Clips.")] = 1,
    training: Annotated[bool, typer.Option("--training", help="Forward with pixel decoder, and backward.")] = False,
    peak_tflops: Annotated[float | None, typer.Option(help="Peak rate of a device, TFLOP/s: for a time floor.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Its memory bandwidth, GB/s.")] = None,
    as_json: options.Json = False,
) -> None:
    """Print what a model costs at several mask ratios, counted our way and the original's."""
    config = named_config(model, num_classes=classes)
    how: dict[str, Any] = dict(batch=batch, reconstruct=training and config.decoder_depth > 0, training=training)
    rows: list[dict[str, Any]] = []
    for ratio in mask_ratio or (0.0, 0.5, 0.75):
        ours = count(config, ratio, **how)
        rows.append(
            {
                "mask_ratio": ratio,
                "parameters": ours.parameters,
                "multiply_adds": ours.multiply_adds,
                "multiply_adds_original": count(config, ratio, method="original", **how).multiply_adds,
                "bytes_moved": ours.bytes_moved,
                "parts": [asdict(part) for part in ours.parts],
            }
        )
        if peak_tflops is not None and bandwidth is not None:
            rows[-1]["floor_seconds"] = ours.floor_seconds(peak_tflops * 1e12, bandwidth * 1e9)
        elif peak_tflops is not None or bandwidth is not None:
            got = f"--peak-tflops {peak_tflops}, --bandwidth {bandwidth}"
            raise checks.bad("--peak-tflops and --bandwidth", got, "both or neither")
    if as_json:
        common.print_json({"model": model, "rows": rows})
        return
    title = f"{model}, {classes} classes, batch {batch}{', training step' if training else ''}"
    table = Table("multiply-adds, G", title=title)
    for row in rows:
        table.add_column(f"{row['mask_ratio']:.0%} masked" if row["mask_ratio"] else "dense", justify="right")
    for parts in zip(*(row["parts"] for row in rows), strict=True):
        if any(part["multiply_adds"] for part in parts):
            table.add_row(parts[0]["name"], *(f"{part['multiply_adds'] / 1e9:.2f}" for part in parts))
    table.add_section()
    table.add_row("all", *(f"{row['multiply_adds'] / 1e9:.2f}" for row in rows), style="bold")
    table.add_row("all, the original's way", *(f"{row['multiply_adds_original'] / 1e9:.2f}" for row in rows))
    table.add_section()
    table.add_row("parameters, M", *(f"{row['parameters'] / 1e6:.2f}" for row in rows))
    table.add_row("bytes moved, GB (16 bit)", *(f"{row['bytes_moved'] / 1e9:.2f}" for row in rows))
    if "floor_seconds" in rows[0]:
        table.add_row("time floor, ms", *(f"{row['floor_seconds'] * 1e3:.3f}" for row in rows))
    common.results.print(table)
