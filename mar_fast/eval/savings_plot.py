"""The picture of the demo: what masking saves, above the clip's frames under each mask."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .. import masking
from .frame_plot import frames, show_frames
from .plot import new_figure, save, time_scale
from .savings import CASES, Savings, model_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COST, TIME = "#4c78a8", "#e45756"


def draw(result: Savings, clip: Tensor, path: Path) -> None:
    """A PNG: multiply-adds and latency against the keep ratio, above the frames of the clip (C, T, H, W) uint8."""
    figure = new_figure(figsize=(11, 8.6))
    env = result.environment
    figure.suptitle(
        f"MAR on ViT-{result.model[0].upper()}, {result.dtype}, batch {result.batch}: what masking saves\n"
        f"{env['device']}, torch {env['torch']}",
        fontsize=11,
    )
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 1.25)), dtype=object)
    left, right = upper.subplots(1, 2)
    keep = [1 - row.mask_ratio for row in result.rows]
    work = [row.multiply_adds / 1e9 / result.batch for row in result.rows]
    left.plot(keep, work, "o-", color=COST, label="multiply-adds")
    left.set(title="Cost", ylabel="multiply-adds of a clip, 10$^9$")
    _finish(left, keep, work, [f"{value:.1f} G" for value in work])

    spreads = [row.latency for row in result.rows if row.latency is not None]
    factor, unit = time_scale(spread.p80 for spread in spreads)
    low, middle, high = factor * np.array([(spread.p20, spread.p50, spread.p80) for spread in spreads]).T
    errors = (middle - low, high - middle)
    right.errorbar(keep, middle, yerr=errors, fmt="o-", capsize=4, color=TIME, label="median, p20 to p80")
    right.set(title="Latency, and speed-up over dense", ylabel=f"latency of a batch of {result.batch}, {unit}")
    labels = [f"{value:.3g} {unit}, {row.speedup:.2f}x" for value, row in zip(middle, result.rows, strict=True)]
    _finish(right, keep, middle, labels)

    rows, config = {}, model_config(result.model, "dense")
    for case in CASES:
        config = model_config(result.model, case)
        mask = masking.cell_running(1, config.grid, config.mask_ratio, cell=config.cell, phase=0)  # the model's own
        rows[f"{case}\n{config.num_visible} tokens"] = frames(clip, config, mask.bool_masked()[0])
    show_frames(lower, rows, {number: number * config.patch_size[0] for number in range(config.grid[0])})
    save(figure, path)


def _finish(axis: "Axes", keep: Sequence[float], values: Sequence[float], labels: Sequence[str]) -> None:
    """Labels at the points, the line of proportional cost, scales and legend."""
    axis.plot([0, keep[0]], [0, values[0]], ":", color="grey", label="proportional to visible tokens")
    for x, y, label in zip(keep, values, labels, strict=True):
        # Below and right of a point, where no line runs; left of the last one, which is at the edge.
        offset, side = ((9, -11), "left") if x < 1 else ((-10, 9), "right")
        axis.annotate(label, (x, y), xytext=offset, textcoords="offset points", ha=side, fontsize=9)
    axis.set(xlabel="keep ratio (share of visible tokens)", xlim=(0, 1.08))
    axis.set_ylim(0, 1.12 * axis.get_ylim()[1])
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left")
