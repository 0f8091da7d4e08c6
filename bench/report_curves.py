"""Curves of a report: latency and memory against keep ratio, scaling laws, the roofline."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mar_fast.eval.plot import legend_below, new_figure, save, time_scale

from . import rows
from .records import Record
from .report_style import Look, heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

PERCENTILES = ("p20", "p50", "p80")
SCALING_LABELS = {"tokens": "visible tokens of a clip", "batch": "clips", "resolution": "side of a frame, pixels"}


def draw_keep_ratio(found: list[Record], looks: dict[str, Look], title: str, path: Path) -> None:
    """Time of one case against keep ratio, and peak memory beside it if that was measured."""
    memory = [row for row in found if row.metric == "peak memory"]
    times = [row for row in found if row.metric == "time"]
    figure = new_figure(figsize=(11 if memory else 7, 6))
    heading(figure, title, found[0])
    axes = figure.subplots(1, 2 if memory else 1, squeeze=False)[0]
    factor, unit = time_scale(row.p80 for row in times)
    _curves(axes[0], times, looks, factor)
    axes[0].set(ylabel=f"time of a call, {unit}: median, p20 to p80")
    if memory:
        _curves(axes[1], memory, looks, 1e-6)
        axes[1].set(ylabel="peak memory beyond what is held before, MB")
    for axis in axes:
        axis.set(xlabel="keep ratio (share of visible tokens)", xlim=(0, 1.05))
        axis.set_ylim(0, 1.06 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    legend_below(figure, axes)
    save(figure, path)


def _curves(axis: "Axes", found: list[Record], looks: dict[str, Look], factor: float) -> None:
    for provider, points in rows.grouped(found, lambda row: row.provider).items():
        points = sorted(points, key=lambda row: row.x)
        look = looks[provider]
        low, middle, high = (
            np.array([getattr(row, name) for row in points]) * factor for name in ("p20", "p50", "p80")
        )
        axis.errorbar(
            [row.x for row in points], middle, yerr=(middle - low, high - middle), label=provider, capsize=3,
            color=look.colour, marker=look.marker, linestyle=look.dash, linewidth=look.width, markersize=5,
        )  # fmt: skip


def draw_scaling(found: list[Record], looks: dict[str, Look], title: str, path: Path) -> None:
    """Time against each quantity in turn, both axes logarithmic; the fitted exponent is in the legend."""
    times = rows.grouped((row for row in found if row.metric == "time"), lambda row: row.case)
    exponents = {(row.case, row.provider): row.p50 for row in found if row.metric == "exponent"}
    columns = min(3, len(times))
    lines = -(-len(times) // columns)
    figure = new_figure(figsize=(max(6.5, 4.6 * columns), 4.2 * lines + 0.6))
    heading(figure, title, found[0])
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(times) :]:
        axis.axis("off")
    for axis, (case, points) in zip(axes, times.items(), strict=False):
        factor, unit = time_scale(row.p50 for row in points)
        for provider, own in rows.grouped(points, lambda row: row.provider).items():
            own = sorted(own, key=lambda row: row.x)
            look = looks[provider]
            exponent = exponents.get((case, provider))
            label = provider if exponent is None else f"{provider}: exponent {exponent:.2f}"
            x, y = ([getattr(row, name) for row in own] for name in ("x", "p50"))
            axis.plot(
                x, np.array(y) * factor, label=label, color=look.colour, marker=look.marker,
                linestyle="none" if exponent is not None else look.dash, markersize=5,
            )  # fmt: skip
            if exponent is not None:
                _law(axis, np.array(x), np.array(y) * factor, exponent, look)
        axis.set(xscale="log", yscale="log", ylabel=f"time of a call, {unit}", xlabel=SCALING_LABELS.get(case, case))
        _plain_ticks(axis, [row.x for row in points])
        axis.set_title(case, fontsize=10)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=1)
    save(figure, path)


def _law(axis: "Axes", x: "np.ndarray", y: "np.ndarray", exponent: float, look: Look) -> None:
    """The power law with this exponent that lies best among the points."""
    factor = np.exp(np.mean(np.log(y) - exponent * np.log(x)))
    ends = np.array([x.min(), x.max()])
    axis.plot(ends, factor * ends**exponent, color=look.colour, linestyle=look.dash, linewidth=look.width)


def _plain_ticks(axis: "Axes", values: list[float]) -> None:
    """Ticks at the measured values, in plain numbers, as far as they have room on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    shown: list[float] = []
    room = (max(values) / min(values)) ** (1 / 7)
    for value in sorted(set(values)):
        if not shown or value / shown[-1] >= room:
            shown.append(value)
    axis.xaxis.set_major_locator(FixedLocator(shown))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    _plain_numbers(axis.yaxis)


def _plain_numbers(numbers: "Axis") -> None:
    """Numbers without powers of ten on a logarithmic axis, as many to a decade as its range leaves room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(numbers.get_view_interval())
    each = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0) if high > 5 * low else (1.0, 1.5, *map(float, range(2, 10)))
    numbers.set_major_locator(LogLocator(subs=each))
    numbers.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.10g}"))
    numbers.set_minor_formatter(NullFormatter())


def roofline_points(found: list[Record]) -> dict[str, list[tuple[float, float]]]:
    """(FLOP a byte, FLOP/s) of every timed row whose work is known, by provider. A multiply-add is two FLOP."""
    work = {(rows.setting(row), row.metric): row.p50 for row in found if row.provider == "roofline"}
    points: dict[str, list[tuple[float, float]]] = {}
    for row in found:
        flops = 2 * work.get((rows.setting(row), "multiply-adds"), 0.0)
        moved = work.get((rows.setting(row), "bytes moved"), 0.0)
        if row.metric == "time" and flops > 0 and moved > 0 and row.p50 > 0:
            points.setdefault(row.provider, []).append((flops / moved, flops / row.p50))
    return points


def draw_roofline(
    found: list[Record], copy: float, peak: float, looks: dict[str, Look], title: str, path: Path
) -> None:
    """Attained FLOP/s against arithmetic intensity, below the machine's measured ceilings.

    Args:
        found: Rows of one suite, mode and dtype.
        copy: Measured bytes per second of a copy.
        peak: Measured FLOP/s of a matrix product in this dtype.
        looks: How providers are drawn.
        title: Its first line.
        path: The PNG.
    """
    points = roofline_points(found)
    every = np.array([point for own in points.values() for point in own])
    ridge = peak / copy
    low, high = min(every[:, 0].min(), ridge) / 3, max(every[:, 0].max(), ridge) * 3
    figure = new_figure(figsize=(9, 6.5))
    heading(figure, title, found[0])
    axis = figure.subplots()
    ends = np.array([low, ridge, high])
    axis.plot(ends, np.minimum(copy * ends, peak) / 1e9, color="black", linewidth=1.5)
    bottom = min(every[:, 1].min(), copy * low) / 1e9
    axis.set(
        xscale="log", yscale="log", xlim=(low, high), ylim=(bottom / 2, 2.5 * peak / 1e9),
        xlabel="arithmetic intensity, FLOP a byte moved", ylabel="attained rate, GFLOP/s",
    )  # fmt: skip
    said = f"matrix product, {found[0].dtype}: {rows.in_words(peak, 'FLOP/s', 'rate')}"
    axis.annotate(said, (high, peak / 1e9), xytext=(-6, 5), textcoords="offset points", ha="right", fontsize=9)
    middle = (low * ridge) ** 0.5
    axis.annotate(
        f"copy: {rows.in_words(copy, 'B/s', 'rate')}", (middle, copy * middle / 1e9), xytext=(8, -4),
        textcoords="offset points", ha="left", va="top", fontsize=9,
    )  # fmt: skip
    for provider, own in points.items():
        look = looks[provider]
        x, y = np.array(own).T
        inside = look.colour if look.dash == "-" else "white"
        axis.plot(
            x, y / 1e9, label=provider, color=look.colour, marker=look.marker, linestyle="none", markersize=7,
            markerfacecolor=inside, alpha=0.8,
        )  # fmt: skip
    for numbers in (axis.xaxis, axis.yaxis):
        _plain_numbers(numbers)
    axis.grid(alpha=0.3, which="both")
    legend_below(figure, [axis])
    save(figure, path)
