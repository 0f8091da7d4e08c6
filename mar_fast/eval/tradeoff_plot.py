"""The picture of a trade-off: agreement with the dense model against what a setting costs."""

import math
from collections.abc import Mapping, Sequence
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

Values = Mapping[Point, float]


def draw(tradeoff: Tradeoff, path: Path) -> None:
    """A PNG: top-1 agreement and KL against multiply-adds and latency; a line for each kind of mask."""
    points: list[Any] = [*tradeoff.points]  # no value is None: of a model that is wrong no picture is drawn
    figure = new_figure(figsize=(11, 8.4))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    env = tradeoff.environment
    title = f"{tradeoff.model}, {tradeoff.dtype}: agreement of masked answers with the dense model's, {tradeoff.seen}\n"
    title += f"{env['device']}, torch {env['torch']}" + (f", commit {env['commit']}" if env["commit"] else "")
    figure.suptitle(title, fontsize=10, parse_math=False)  # a file name may have dollars
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    factor, unit = time_scale(point.latency.p80 for point in points)
    power = 9 if max(point.multiply_adds for point in points) >= 1e9 else 6
    work = {point: point.multiply_adds / 10**power for point in points}
    time = {point: factor * point.latency.p50 for point in points}
    top1 = {point: 100 * point.top1_agreement for point in points}
    kl = {point: point.kl for point in points}
    for row, value in zip(axes, (top1, kl), strict=True):
        for axis, cost in zip(row, (work, time), strict=True):
            _panel(axis, points, cost, value)
            axis.grid(alpha=0.3)
        for point in points:
            spread = [factor * point.latency.p20, factor * point.latency.p80]
            colour = COLOURS.get(point.kind, "black")
            row[1].plot(spread, [value[point]] * 2, "|-", color=colour, markersize=7, linewidth=1, alpha=0.7)
    _keep_ratios(axes[0, 0], work)
    views = many(tradeoff.timed_views, "view")
    axes[0, 0].set(ylabel="views with the dense model's class, %")
    axes[1, 0].set(ylabel="mean KL(dense || masked), nats", xlabel=f"multiply-adds of a view, all passes, 10$^{power}$")
    axes[1, 0].set_xlim(0, 1.06 * max(work.values()))
    axes[1, 1].set(xlabel=f"latency of a call with {views}, {unit}: median, p20 to p80")
    axes[1, 1].set_xlim(0, 1.06 * factor * max(point.latency.p80 for point in points))
    lost = 100 - min(top1.values())
    axes[0, 0].set_ylim(99 - 1.1 * lost, 101 + 0.06 * lost)
    # Logarithmic, but for the lowest decade, which reaches down to the dense model's 0.
    above = [value for value in kl.values() if value > 0] or [LEAST_KL]
    low = max(LEAST_KL, 10.0 ** math.floor(math.log10(min(above))))
    axes[1, 0].set_yscale("symlog", linthresh=low, linscale=0.5)
    axes[1, 0].set_ylim(-0.2 * low, 1.5 * max(*above, 2 * low))
    legend_below(figure, axes.flatten())
    save(figure, path)


def _panel(axis: "Axes", points: Sequence[Point], cost: Values, value: Values) -> None:
    """A line from the dense model through the single masks of each kind, and its ensembles beside it."""

    def plot(shown: Sequence[Point], *style: str, **look: Any) -> None:
        axis.plot([cost[point] for point in shown], [value[point] for point in shown], *style, **look)

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


def _keep_ratios(axis: "Axes", cost: Values) -> None:
    """Above the panel, where the single masks of each keep ratio lie; as many as have room."""
    room = 0.08 * max(cost.values())
    ticks: dict[float, str] = {}
    for point in sorted(cost, key=lambda point: -point.keep):
        if point.kind != DENSE and point.passes == 1 and all(abs(cost[point] - tick) > room for tick in ticks):
            ticks[cost[point]] = f"{point.keep * 100:g} %"
    upper = axis.secondary_xaxis("top")
    upper.set_xticks([*ticks], [*ticks.values()], fontsize=9, color=GREY)
    upper.set_xlabel("share of patches that a pass sees", fontsize=9, color=GREY)
