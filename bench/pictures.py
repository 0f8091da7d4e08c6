"""The four pictures of a report: peers, keep ratio, roofline, waterfall. Which there are follows from the records."""

import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mar_fast.eval.plot import MARKERS, OTHERS, OURS, legend_below, new_figure, save, time_scale

from .records import FLOOR, Record, grouped, in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEEP_RATIO_SUITES = ("encoder", "training", "dropin")
PANELS = 8  # on one picture of peers; more would not fit a page
SAVED, ADDED, WHISKER = "#56B4E9", "#D55E00", "#444444"
DASHES, HATCHES = ("-", "--", ":"), ("", "///", "...")  # where there are more providers than colours
Looks = dict[str, dict[str, Any]]


class Picture(NamedTuple):
    """A picture to be drawn: its file name, its suite and device, and how it is drawn."""

    name: str
    suite: str
    device: str
    draw: Callable[[Path], None]


def pictures(found: list[Record]) -> list[Picture]:
    """All pictures for these records, which may be of any suites and devices."""
    planned: list[Picture] = []
    devices = grouped(found, lambda record: record.device)
    for device, own in devices.items():
        for suite, title, draw in _of_device(own):
            words = f"{device if len(devices) > 1 else ''} {suite} {title}".lower().replace("%", "percent")
            name = re.sub(r"[^a-z0-9.]+", "-", words).strip("-.")
            end = f"-{len(planned)}" if f"{name}.png" in [one.name for one in planned] else ""  # differs in signs only
            planned.append(Picture(f"{name}{end}.png", suite, device, partial(draw, title)))
    return planned


def _of_device(found: list[Record]) -> Iterator[tuple[str, str, Callable[[str, Path], None]]]:
    """Suite, title and drawing function of each picture."""
    rates = {record.dtype or record.case: record.p50 for record in found if record.metric == "rate"}

    def together(record: Record) -> tuple[str, str, str, str]:
        op = record.case.partition(":")[0] if record.suite == "kernels" else ""
        return record.suite, record.mode, record.dtype, op

    for (suite, mode, dtype, op), own in grouped(found, together).items():
        times = [record for record in own if record.metric == "time" and record.p50 > 0]
        if not times:
            continue
        looks = _looks(record.provider for record in found if (record.suite, record.metric) == (suite, "time"))
        what = f"{mode}, {dtype}"
        for case, points in grouped(own, lambda record: record.case).items():
            if suite == "waterfall":
                yield suite, f"{case}, {what}: step by step", partial(_waterfall, points)
            if suite in KEEP_RATIO_SUITES and len({point.x for point in points if point.metric == "time"}) > 1:
                yield suite, f"{case}, {what}: time and memory by keep ratio", partial(_keep_ratio, points, looks)
        if suite in (*KEEP_RATIO_SUITES, "kernels"):
            what = f"{op or suite}, {what}"
            panels = list(grouped(times, lambda record: record.workload).values())
            for page in range(0, len(panels), PANELS):
                of = f", page {page // PANELS + 1}" if len(panels) > PANELS else ""
                yield suite, f"{what}: peers{of}", partial(_peers, panels[page : page + PANELS], looks)
            if "copy" in rates and dtype in rates and intensities(own):
                yield suite, f"{what}: roofline", partial(_roofline, own, (rates["copy"], rates[dtype]), looks)


def _looks(providers: Iterable[str]) -> Looks:
    """How each provider is drawn: variants of mar_fast in one blue, others in colours of their own."""
    # Ours and others each take their colours in turn, then these again with the next dashes or hatches.
    blue, others = (itertools.cycle(itertools.product(range(len(DASHES)), colours)) for colours in ((OURS,), OTHERS))
    looks: Looks = {}
    for name, marker in zip(dict.fromkeys(providers), itertools.cycle(MARKERS), strict=False):
        again, colour = next(blue if name.startswith("mar_fast") else others)
        looks[name] = dict(color=colour, marker=marker, again=again)
    return looks


def _figure(title: str, record: Record, width: float, height: float) -> "Figure":
    figure = new_figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)  # inches; long names would touch the edge
    commit = f", commit {record.commit}" if record.commit else ""
    figure.suptitle(f"{title}\n{record.device}, torch {record.torch}{commit}", fontsize=10)
    return figure


def _percentiles(found: list[Record], factor: float) -> tuple[Any, tuple[Any, Any]]:
    """Medians, and how far p20 and p80 lie below and above them."""
    low, middle, high = (np.array([getattr(one, name) for one in found]) * factor for name in ("p20", "p50", "p80"))
    return middle, (middle - low, high - middle)


def _bars(axis: "Axes", times: list[Record], texts: list[str], widest: float = 0.0, **style: Any) -> Any:
    """A horizontal bar for each time, and a text beside it, not nearer than ``widest`` seconds; returns the lengths."""
    factor, unit = time_scale([widest, *(one.p80 for one in times)])
    middle, errors = _percentiles(times, factor)
    axis.barh(range(len(times)), middle, xerr=errors, height=0.72, ecolor=WHISKER, capsize=2, **style)
    for row, (text, end) in enumerate(zip(texts, np.maximum(middle + errors[1], widest * factor), strict=True)):
        axis.annotate(text, (end, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(times)), [textwrap.fill(one.provider, 36) for one in times], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * max(widest * factor, *(middle + errors[1])))
    axis.set_xlabel(f"time of a call, {unit}: median, p20 to p80", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return middle


def _peers(panels: list[list[Record]], looks: Looks, title: str, path: Path) -> None:
    """Bars of time, a panel for each case, with the speed-up over the baseline beside each bar."""
    heights = [0.27 * len(times) + 0.65 for times in panels]  # inches
    said = f"{title}; in brackets the speed-up over {panels[0][0].baseline}"
    figure = _figure(said, panels[0][0], 9.5, sum(heights) + 0.9)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, times in zip(axes, panels, strict=True):
        first = times[0]
        base = next((one.p50 for one in times if one.provider == first.baseline), None)
        texts = [one.words + (f" ({base / one.p50:.2f}x)" if base else "") for one in times]
        own = [looks[one.provider] for one in times]
        hatches = [HATCHES[look["again"]] for look in own]
        _bars(axis, times, texts, color=[look["color"] for look in own], hatch=hatches, edgecolor="white", linewidth=0)
        kept = f", keep ratio {first.x:g}" if first.suite in KEEP_RATIO_SUITES else ""
        axis.set_title(first.case + kept, fontsize=9, loc="left")
    save(figure, path)


def _waterfall(found: list[Record], title: str, path: Path) -> None:
    """A bar for each step, with its gain, that of all so far, memory and error beside it."""
    times = sorted((one for one in found if one.metric == "time"), key=lambda one: one.x)
    more = {(one.x, one.metric): f", {one.metric} {one.words}" for one in found}
    texts = [
        f"{one.words}, {before.p50 / one.p50:.2f}x by the step, {times[0].p50 / one.p50:.2f}x in all"
        + "".join(more.get((one.x, metric), "") for metric in ("peak memory", "error"))
        for before, one in zip([times[0], *times], times, strict=False)
    ]
    figure = _figure(title, times[0], 12, 0.42 * len(times) + 1.7)
    axis = figure.subplots()
    longest = max(one.p80 for one in times)
    middle = _bars(axis, times, texts, longest, color=OURS)
    axis.set_xlim(0, 2.2 * axis.get_xlim()[1] / 1.3)
    earlier = np.concatenate((middle[:1], middle[:-1]))
    rows, pale, hatched = range(len(times)), np.maximum(earlier - middle, 0), np.maximum(middle - earlier, 0)
    axis.barh(rows, pale, left=middle, height=0.72, color=SAVED, alpha=0.35)
    axis.barh(rows, hatched, left=earlier, height=0.72, color=ADDED, hatch="///", edgecolor="white", linewidth=0)
    axis.set_xlabel(f"{axis.get_xlabel()}; pale: saved by the step, hatched: added by it", fontsize=8)
    save(figure, path)


def _keep_ratio(found: list[Record], looks: Looks, title: str, path: Path) -> None:
    """Time of one case by keep ratio, and peak memory beside it if that was measured."""
    factor, unit = time_scale(one.p80 for one in found if one.metric == "time")
    drawn = {"time": (factor, f"time of a call, {unit}: median, p20 to p80")}
    if any(one.metric == "peak memory" for one in found):
        drawn["peak memory"] = 1e-6, "peak memory beyond what is held before, MB"
    figure = _figure(title, found[0], 1 + 5 * len(drawn), 6)
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axis, (metric, (scale, label)) in zip(axes, drawn.items(), strict=True):
        own = sorted((one for one in found if one.metric == metric), key=lambda one: one.x)
        for provider, look in looks.items():
            points = [one for one in own if one.provider == provider]
            if points:
                middle, errors = _percentiles(points, scale)
                style = dict(color=look["color"], marker=look["marker"], linestyle=DASHES[look["again"]], markersize=5)
                axis.errorbar([one.x for one in points], middle, errors, label=provider, capsize=3, **style)
        axis.set(xlabel="keep ratio (share of visible tokens)", ylabel=label, xlim=(0, 1.05))
        axis.set_ylim(0, 1.06 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    legend_below(figure, axes)
    save(figure, path)


def intensities(found: list[Record]) -> dict[str, list[tuple[float, float]]]:
    """(FLOP a byte, FLOP/s) of every time whose work is known, by provider. A multiply-add is two FLOP."""
    work = {(one.workload, one.metric): one.p50 for one in found if one.provider == FLOOR}
    points: dict[str, list[tuple[float, float]]] = {}
    for one in found:
        flops, moved = (work.get((one.workload, metric), 0.0) for metric in ("multiply-adds", "bytes moved"))
        if one.metric == "time" and min(flops, moved, one.p50) > 0:
            points.setdefault(one.provider, []).append((2 * flops / moved, 2 * flops / one.p50))
    return points


def _roofline(found: list[Record], rates: tuple[float, float], looks: Looks, title: str, path: Path) -> None:
    """Attained FLOP/s against arithmetic intensity, below the measured rates of a copy and of a matrix product."""
    from matplotlib.ticker import LogLocator, NullFormatter

    points, (copy, peak) = intensities(found), rates
    x, y = np.array(list(itertools.chain(*points.values()))).T
    ridge = peak / copy
    low, high = min(*x, ridge) / 3, max(*x, ridge) * 3
    unit, name = (1e12, "TFLOP/s") if peak >= 1e12 else (1e9, "GFLOP/s")
    figure = _figure(title, found[0], 9, 6.5)
    axis = figure.subplots()
    ends = np.array([low, ridge, high])
    axis.plot(ends, np.minimum(copy * ends, peak) / unit, color="black", linewidth=1.5)
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(*y, copy * low) / unit / 2, 2.5 * peak / unit))
    axis.set(xlabel="arithmetic intensity, FLOP a byte moved", ylabel=f"attained rate, {name}")
    axis.text(high / 1.1, 1.1 * peak / unit, f"matrix product: {in_words(peak, 'FLOP/s')}", ha="right", fontsize=9)
    middle = (low * ridge) ** 0.5
    axis.text(1.2 * middle, copy * middle / unit, f"copy: {in_words(copy, 'B/s')}", va="top", fontsize=9)
    for provider, own in points.items():
        x, y = np.array(own).T
        look = looks[provider]
        style = dict(color=look["color"], marker=look["marker"], fillstyle="none" if look["again"] else "full")
        axis.plot(x, y / unit, label=provider, linestyle="none", markersize=7, alpha=0.8, **style)
    for numbers in (axis.xaxis, axis.yaxis):  # without powers of ten, as many as there is room for
        near, far = numbers.get_view_interval()
        numbers.set_major_locator(LogLocator(subs=(1.0,) if far > 300 * near else (1.0, 2.0, 5.0)))
        numbers.set_major_formatter("{x:,.10g}")
        numbers.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3, which="both")
    legend_below(figure, [axis])
    save(figure, path)
