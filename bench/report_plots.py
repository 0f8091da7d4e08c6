"""Which pictures a report has: decided from the rows alone, before anything is drawn."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import rows
from .records import Record
from .report_bars import draw_peers, draw_waterfall
from .report_curves import draw_keep_ratio, draw_roofline, draw_scaling, roofline_points
from .report_style import Look, looks, slug

KEEP_RATIO_SUITES = ("encoder", "training", "dropin")
PEER_SUITES = (*KEEP_RATIO_SUITES, "kernels")
PANELS = 8  # on one picture of peers; more would not fit a page


@dataclass(frozen=True)
class Picture:
    """A PNG that is to be: its file name, what it shows, the suite it belongs to, and how it is drawn."""

    name: str
    title: str
    suite: str
    device: str
    draw: Callable[[Path], None]


def pictures(found: list[Record], wanted: str | None = None) -> list[Picture]:
    """All pictures for these rows.

    Args:
        found: Rows of any suites and devices, each once.
        wanted: The baseline that speed-ups are over, None for the usual one.
    """
    devices = rows.grouped(found, lambda row: row.device)
    planned: list[Picture] = []
    names: dict[str, int] = {}
    for device, own in devices.items():
        for suite, title, parts, draw in _of_device(own, wanted):
            name = slug(*((device,) if len(devices) > 1 else ()), *parts)
            names[name] = names.get(name, 0) + 1
            if names[name] > 1:  # names that differ only in signs
                name = f"{name}-{names[name]}"
            planned.append(Picture(f"{name}.png", title, suite, device, draw))
    return planned


Planned = tuple[str, str, tuple[str, ...], Callable[[Path], None]]


def _of_device(found: list[Record], wanted: str | None) -> Iterator[Planned]:
    rates = {(row.case, row.dtype): row.p50 for row in found if row.suite == "machine" and row.metric == "rate"}
    copy = next((rate for (case, _), rate in rates.items() if case == "copy"), None)
    for (suite, mode, dtype), own in rows.grouped(found, _shared).items():
        times = [row for row in own if row.metric == "time" and row.p50 > 0]
        if not times:
            continue
        what = ", ".join(part for part in (mode, rows.dtypes(own)) if part)
        look = looks(row.provider for row in found if row.suite == suite and row.metric == "time")
        if suite in KEEP_RATIO_SUITES:
            for case, group in rows.grouped(own, lambda row: row.case).items():
                if len({row.x for row in group if row.metric == "time"}) > 1:
                    title = f"{case}, {what}: time and memory against keep ratio"
                    draw: Callable[[Path], None] = functools.partial(draw_keep_ratio, group, look, title)
                    yield suite, title, (suite, case, mode, dtype, "keep ratio"), draw
        if suite in PEER_SUITES:
            yield from _peers(suite, times, look, wanted, what)
        if suite == "waterfall":
            for case, group in rows.grouped(own, lambda row: row.case).items():
                if any(row.metric == "time" for row in group):
                    title = f"{case}, {what}: one step after the other"
                    yield suite, title, (suite, case, mode, dtype), functools.partial(draw_waterfall, group, title)
        if suite == "scaling":
            title = f"How time grows, {what}"
            yield suite, title, (suite, mode, dtype), functools.partial(draw_scaling, own, look, title)
        peak = rates.get(("matrix product", dtype))
        for op, group in rows.grouped(own, _op).items():
            if copy and peak and roofline_points(group):
                title = f"{op or suite}, {what}: attained rate under the machine's measured ceilings"
                draw = functools.partial(draw_roofline, group, copy, peak, look, title)
                yield suite, title, (suite, op, mode, dtype, "roofline"), draw


def _op(row: Record) -> str:
    """The op of a kernel's row, which is what stands before the colon; "" in all other suites."""
    return row.case.partition(":")[0] if row.suite == "kernels" else ""


def _shared(row: Record) -> tuple[str, str, str]:
    return row.suite, row.mode, rows.shared_dtype(row)


def _peers(suite: str, times: list[Record], look: dict[str, Look], wanted: str | None, what: str) -> Iterator[Planned]:
    """Pages of panels; for the kernels those of each op are on their own."""
    for op, own in rows.grouped(times, _op).items():
        panels = [
            (_panel(suite, case, x), group)
            for (case, x), group in rows.grouped(own, lambda row: (row.case, row.x)).items()
        ]
        for page, first in enumerate(range(0, len(panels), PANELS), 1):
            of = f", page {page}" if len(panels) > PANELS else ""
            title = f"{op or suite}, {what}: peers{of}"
            parts = (suite, op, what, "peers", str(page) if of else "")
            draw = functools.partial(draw_peers, panels[first : first + PANELS], look, wanted, title)
            yield suite, title, parts, draw


def _panel(suite: str, case: str, x: float) -> str:
    return f"{case}, keep ratio {x:g}" if suite in KEEP_RATIO_SUITES else case.partition(": ")[2] or case
