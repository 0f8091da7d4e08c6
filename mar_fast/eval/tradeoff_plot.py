"""The picture of a trade-off: agreement with the dense model against what a setting costs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .mask_settings import DENSE, MaskKind
from .plot import MARKERS, OTHERS, OURS, legend_below, new_figure, save, time_scale
from .tradeoff import Point, Tradeoff, many

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = dict(zip(map(str, MaskKind), (OURS, *OTHERS), strict=False))
MARKER = dict(zip(map(str, MaskKind), MARKERS, strict=False))
GREY = "#555555"
LEAST_KL = 1e-6  # nats; less is rounding

Value = Callable[[Point], float]


def draw(tradeoff: Tradeoff, path: Path) -> None:
    """A PNG: top-1 agreement and KL against multiply-adds and latency; a line for each kind of mask."""
    points = tradeoff.points
    figure = new_figure(figsize=(11, 8.4))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    env = tradeoff.environment
    title = f"{tradeoff.model}, {tradeoff.dtype}: agreement of masked answers with the dense model's, {tradeoff.seen}\n"
    title += f"{env['device']}, torch {env['torch']}" + (f", commit {env['commit']}" if env["commit"] else "")
    figure.suptitle(title, fontsize=10, parse_math=False)  # a file name may have dollars
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    factor, unit = time_scale(_latency(point, "p80") for point in points)
    power = 9 if max(point.multiply_adds or 0 for point in points) >= 1e9 else 6

    def work(point: Point) -> float:
        return (point.multiply_adds or 0) / 10**power

    def time(point: Point) -> float:
        return factor * _latency(point, "p50")

    for row, value in zip(axes, (_top1, _kl), strict=True):
        for axis, cost in zip(row, (work, time), strict=True):
            _panel(axis, points, cost, value)
            axis.grid(alpha=0.3)
        for point in points:
            low, high = (factor * _latency(point, percentile) for percentile in ("p20", "p80"))
            colour = COLOURS.get(point.kind, "black")
            row[1].plot([low, high], [value(point)] * 2, "|-", color=colour, markersize=7, linewidth=1, alpha=0.7)
    _keep_ratios(axes[0, 0], points, work)
    views = many(tradeoff.timed_views, "view")
    axes[0, 0].set(ylabel="views with the dense model's class, %")
    axes[1, 0].set(ylabel="mean KL(dense || masked), nats", xlabel=f"multiply-adds of a view, all passes, 10$^{power}$")
    axes[1, 0].set_xlim(0, 1.06 * max(map(work, points)))
    axes[1, 1].set(xlabel=f"latency of a call with {views}, {unit}: median, p20 to p80")
    axes[1, 1].set_xlim(0, 1.06 * factor * max(_latency(point, "p80") for point in points))
    lost = 100 - min(map(_top1, points))
    axes[0, 0].set_ylim(99 - 1.1 * lost, 101 + 0.06 * lost)
    _kl_scale(axes[1, 0], [_kl(point) for point in points])
    legend_below(figure, axes.flatten())
    save(figure, path)


def _latency(point: Point, percentile: str) -> float:
    """Seconds."""
    return float(getattr(point.latency, percentile))


def _top1(point: Point) -> float:
    return 100 * (point.top1_agreement or 0.0)


def _kl(point: Point) -> float:
    return point.kl or 0.0


def _panel(axis: "Axes", points: list[Point], cost: Value, value: Value) -> None:
    """A line from the dense model through the single masks of each kind, and its ensembles beside it."""

    def plot(shown: list[Point], *style: str, **look: Any) -> None:
        axis.plot([*map(cost, shown)], [*map(value, shown)], *style, **look)

    dense, *others = points
    for kind in dict.fromkeys(point.kind for point in others):
        own = sorted((point for point in others if point.kind == kind), key=lambda point: -point.keep)
        single, many = ([p for p in own if (p.passes > 1) == several] for several in (False, True))
        look: dict[str, Any] = dict(color=COLOURS[kind], marker=MARKER[kind])
        plot([dense, *single], label=kind, linewidth=1.6, markersize=6, **look)
        if many:
            look |= dict(linestyle="none", markerfacecolor="white", markeredgewidth=1.6, markersize=8)
            plot(many, label=f"{kind}, complementary views", **look)
        for point in many:
            start = [p for p in single if p.keep == point.keep]  # a line to what the other passes bring
            plot([*start, point], ":", color=COLOURS[kind], linewidth=1, alpha=0.6, zorder=1)
    plot([dense], "*", color="black", markersize=13, linestyle="none", label=DENSE, zorder=5)


def _keep_ratios(axis: "Axes", points: list[Point], cost: Value) -> None:
    """Above the panel, where the single masks of each keep ratio lie; as many as have room."""
    room = 0.08 * max(map(cost, points))
    ticks: dict[float, str] = {}
    for point in sorted(points, key=lambda point: -point.keep):
        if point.kind != DENSE and point.passes == 1 and all(abs(cost(point) - tick) > room for tick in ticks):
            ticks[cost(point)] = f"{point.keep * 100:g} %"
    upper = axis.secondary_xaxis("top")
    upper.set_xticks([*ticks], [*ticks.values()], fontsize=9, color=GREY)
    upper.set_xlabel("share of patches that a pass sees", fontsize=9, color=GREY)


def _power_of_ten(value: float, _: int) -> str:
    return f"$10^{{{round(math.log10(value))}}}$" if value else "0"


def _kl_scale(axis: "Axes", values: list[float]) -> None:
    """Logarithmic, but for the lowest decade, which reaches down to the dense model's 0."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    above = [value for value in values if value > 0] or [LEAST_KL]
    low = max(LEAST_KL, 10.0 ** math.floor(math.log10(min(above))))
    top = max(*above, 2 * low)
    decades = range(round(math.log10(low)), math.ceil(math.log10(top)) + 1)
    axis.set_yscale("symlog", linthresh=low, linscale=0.5)
    axis.yaxis.set_major_locator(FixedLocator([0.0, *(10.0**decade for decade in decades)]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))
    axis.set_ylim(-0.2 * low, 1.5 * top)
