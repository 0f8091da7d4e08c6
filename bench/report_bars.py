"""Bars of a report: peers side by side, and the waterfall from the plain model to the fast one."""

import itertools
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mar_fast.eval.plot import new_figure, save, time_scale

from . import rows
from .records import Record
from .report_style import Look, heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR, PANEL = 0.27, 0.65  # inches
SAVED, TAKEN, ADDED, WHISKER = "#56B4E9", "#0072B2", "#D55E00", "#444444"


def draw_peers(
    panels: list[tuple[str, list[Record]]], looks: dict[str, Look], wanted: str | None, title: str, path: Path
) -> None:
    """Horizontal bars of time, one panel for each case, with the speed-up over the baseline beside each bar.

    Args:
        panels: Name and "time" rows of each case; every provider once in a panel.
        looks: How providers are drawn.
        wanted: The baseline asked for, None for the usual one.
        title: First line of the picture's heading.
        path: The PNG.
    """
    heights = [BAR * len(found) + PANEL for _, found in panels]
    figure = new_figure(figsize=(9.5, sum(heights) + 0.9))
    heading(figure, title, panels[0][1][0])
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, found) in zip(axes, panels, strict=True):
        against = rows.baseline((row.provider for row in found), wanted)
        base = next((row.p50 for row in found if row.provider == against), None)
        said = f"{name}: in brackets the speed-up over {against}" if against and len(found) > 1 else name
        axis.set_title(said, fontsize=9, loc="left")
        _bars(axis, found, looks, base if len(found) > 1 else None)
    save(figure, path)


def _bars(axis: "Axes", found: list[Record], looks: dict[str, Look], base: float | None) -> None:
    factor, unit = time_scale(row.p80 for row in found)
    low, middle, high = (np.array([getattr(row, name) for row in found]) * factor for name in ("p20", "p50", "p80"))
    places = np.arange(len(found))
    colours = [looks[row.provider].colour for row in found]
    bars = axis.barh(
        places, middle, xerr=(middle - low, high - middle), height=0.72, color=colours, ecolor=WHISKER, capsize=2,
        error_kw=dict(elinewidth=1),
    )  # fmt: skip
    for bar, row in zip(bars, found, strict=True):
        bar.set(hatch=looks[row.provider].hatch, edgecolor="white", linewidth=0)
    for place, row, end in zip(places, found, high, strict=True):
        gain = f" ({base / row.p50:.2f}x)" if base else ""
        axis.annotate(
            rows.in_words(row.p50, row.unit, row.metric) + gain, (end, place), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axis.set_yticks(places, [row.provider for row in found], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.3 * high.max()), xlabel=f"time of a call, {unit}: median, p20 to p80")
    axis.xaxis.label.set_fontsize(8)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def steps(found: list[Record]) -> list[dict[str, Record]]:
    """The steps of one waterfall in order: for each, its rows by metric."""
    numbered = rows.grouped(found, lambda row: row.x)
    return [{row.metric: row for row in numbered[number]} for number in sorted(numbered)]


def draw_waterfall(found: list[Record], title: str, path: Path) -> None:
    """One bar for each step; the gain of the step and of all so far, memory and error in columns beside it."""
    timed = [step for step in steps(found) if "time" in step]
    times = [step["time"] for step in timed]
    factor, unit = time_scale(row.p80 for row in times)
    figure = new_figure(figsize=(11, 0.42 * len(times) + 1.7))
    heading(figure, title, found[0])
    axis, columns = figure.subplots(1, 2, width_ratios=(1, 0.75), sharey=True)
    low, middle, high = (np.array([getattr(row, name) for row in times]) * factor for name in ("p20", "p50", "p80"))
    places = np.arange(len(times))
    before = np.concatenate((middle[:1], middle[:-1]))
    # What the step takes away, pale, from its own time to that of the step before; what it adds, hatched.
    axis.barh(places, np.maximum(before - middle, 0), left=middle, height=0.66, color=SAVED, alpha=0.35)
    axis.barh(places, middle, height=0.66, color=TAKEN, xerr=(middle - low, high - middle), ecolor=WHISKER, capsize=2)
    added = np.maximum(middle - before, 0)
    axis.barh(places, added, left=before, height=0.66, color=ADDED, hatch="///", edgecolor="white", linewidth=0)
    axis.set_yticks(places, [textwrap.fill(row.provider, 28) for row in times], fontsize=9)
    axis.invert_yaxis()
    said = f"time of a call, {unit}: median, p20 to p80\npale: saved by the step, hatched: added by it"
    axis.set(xlim=(0, 1.08 * max(high.max(), before.max())), xlabel=said)
    axis.spines[["top", "right"]].set_visible(False)
    cells = [
        ("time", [rows.in_words(row.p50, row.unit, row.metric) for row in times]),
        ("this step", ["", *(f"{first / second:.2f}x" for first, second in itertools.pairwise(middle))]),
        ("in all", [f"{middle[0] / value:.2f}x" for value in middle]),
        *((name, [_cell(step, name) for step in timed]) for name in ("peak memory", "error")),
    ]
    edges = (1.0, 2.2, 3.2, 4.9, 5.9)  # on the right of each column, by its widest text
    columns.axis("off")
    columns.set_xlim(0, 6)
    for (name, values), edge in zip(cells, edges, strict=True):
        if not any(values):
            continue
        columns.annotate(
            name, (edge, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
            ha="right", fontsize=9, fontweight="bold",
        )  # fmt: skip
        for place, value in enumerate(values):
            columns.text(edge, place, value, ha="right", va="center", fontsize=9)
    save(figure, path)


def _cell(step: dict[str, Record], metric: str) -> str:
    row = step.get(metric)
    return "" if row is None else rows.in_words(row.p50, row.unit, row.metric)
