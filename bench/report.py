"""The report: record files as one Markdown page with tables and pictures."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mar_fast import files
from mar_fast.eval import plot

from . import rows
from .records import Record
from .report_plots import KEEP_RATIO_SUITES, Picture, pictures

PAGE = "report.md"
ROOFLINE = "roofline"
# What is measured in rounds comes first; whatever else the rows hold follows in its own order.
METRICS = ("time", "throughput", "peak memory", "error", "compile time")
X_NAMES = {
    "encoder": "keep ratio", "training": "keep ratio", "pipeline": "keep ratio", "flops": "keep ratio",
    "curve": "keep ratio", "dropin": "keep ratio", "kernels": "tokens", "waterfall": "step",
}  # fmt: skip
TEXT_COLUMNS = (
    "provider", "case", "step", "quantity", "clip", "stage", "what", "dtype", "note", "device", "torch", "triton",
    "commits", "dates", "suites",
)  # fmt: skip


@dataclass
class Line:
    """One line of a table: a provider at one x, its rows by metric."""

    x: float
    provider: str
    rows: dict[str, Record] = field(default_factory=dict)

    def median(self, metric: str) -> float | None:
        """The median of a metric; None if it is not there, or nothing can be divided by it."""
        row = self.rows.get(metric)
        return row.p50 if row is not None and row.p50 > 0 else None


def write(
    found: list[Record],
    out: Path,
    *,
    force: bool = False,
    baseline: str | None = None,
    on_step: Callable[[str, float], None] = lambda what, share: None,
) -> list[Path]:
    """Write the page and its pictures.

    Args:
        found: Rows of any suites, devices and dates; of a row measured several times the newest is taken.
        out: The folder.
        force: Replace files that are there.
        baseline: The provider that speed-ups are over; by default the first of `rows.BASELINES` that a case has.
        on_step: Told what is going on and which share of the whole is done.

    Returns:
        The files, the page first. It is written last, so that it never names a picture that is not there.

    Raises:
        FileExistsError: a file is there and ``force`` is not set.
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: no row has the provider ``baseline``.
    """
    providers = rows.distinct(row.provider for row in found if row.metric == "time")
    if baseline is not None and baseline not in providers:
        raise ValueError(f"baseline: got {baseline!r}, expected one of {', '.join(providers)}")
    plot.new_figure()  # without matplotlib, say so before anything is written
    latest = rows.newest(found)
    planned = pictures(latest, baseline)
    paths = [out / PAGE, *(out / picture.name for picture in planned)]
    files.may_write(paths, force)
    for number, (picture, path) in enumerate(zip(planned, paths[1:], strict=True)):
        on_step(f"drawing {picture.name}", number / len(paths))
        picture.draw(path)
    text = page(latest, planned, baseline, older=len(found) - len(latest))
    files.write_whole(paths[0], lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return paths


def page(found: list[Record], planned: Iterable[Picture], baseline: str | None = None, older: int = 0) -> str:
    """The page as Markdown: for each device its suites, for each suite its tables and pictures."""
    planned = list(planned)
    lines = ["# Measurements", ""]
    lines += [
        "Times are medians over interleaved rounds, p20 - p80 the 20th and 80th percentile. Speed-ups divide medians. "
        "The floor is the least time by arithmetic at this machine's own measured ceilings.", "",
    ]  # fmt: skip
    if older:
        lines += [f"{older} older rows of the same identity are left out.", ""]
    lines += [*_origins(found), ""]
    for device, own in rows.grouped(found, lambda row: row.device).items():
        lines += [f"## {escaped(device)}", ""]
        for suite, group in rows.grouped(own, lambda row: row.suite).items():
            lines += [f"### {escaped(suite)}", ""]
            for (case, mode, _), table_ in rows.grouped(group, _table_name).items():
                dtypes = "" if suite == "machine" else rows.dtypes(table_)
                lines += [f"#### {escaped(', '.join(part for part in (case, mode, dtypes) if part))}", ""]
                lines += _case(suite, table_, baseline)
            for picture in planned:
                if (picture.suite, picture.device) == (suite, device):
                    lines += [f"![{escaped(picture.title)}]({picture.name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _table_name(row: Record) -> tuple[str, str, str]:
    if row.suite == "machine":
        return ("measured ceilings", "", "")
    return (row.case, row.mode, rows.shared_dtype(row))


def _origins(found: list[Record]) -> list[str]:
    body = []
    for (device, torch, triton), own in rows.grouped(found, lambda row: (row.device, row.torch, row.triton)).items():
        commits = rows.distinct(row.commit or "unknown" for row in own)
        dates = sorted({row.date[:10] for row in own})
        suites = rows.distinct(row.suite for row in own)
        period = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        body.append([device, torch, triton, ", ".join(commits), period, ", ".join(suites), str(len(own))])
    return table(["device", "torch", "triton", "commits", "dates", "suites", "rows"], body)


def lines_of(found: list[Record]) -> list[Line]:
    """The lines of a table, in the order in which the rows come."""
    made: dict[tuple[float, str], Line] = {}
    for row in found:
        line = made.setdefault((row.x, row.provider), Line(row.x, row.provider))
        line.rows[row.metric] = row
    return list(made.values())


def _case(suite: str, found: list[Record], wanted: str | None) -> list[str]:
    """Table of one case, then what stands below it: arithmetic, exponents, who is missing and why."""
    if suite == "machine":
        return [*table(["what", "dtype", "rate"], [[row.case, row.dtype, _words(row)] for row in found]), ""]
    apart = ("exponent", *rows.NO_TIME)
    measured = [row for row in found if row.provider != ROOFLINE and row.metric not in apart]
    by_arithmetic = {line.x: line for line in lines_of([row for row in found if row.provider == ROOFLINE])}
    lines = []
    if measured:
        lines += [*_table(suite, found[0].case, lines_of(measured), by_arithmetic, wanted), ""]
    for x, line in by_arithmetic.items():
        said = [f"{metric} {_words(row)}" for metric, row in line.rows.items()]
        lines.append(f"- By arithmetic, {_x_name(suite, found[0].case)} {x:g}: {', '.join(said)}")
    for row in found:
        if row.metric == "exponent":
            lines.append(f"- Fitted exponent, {escaped(row.provider)}: {_words(row)}")
    for (provider, metric, note), own in rows.grouped(
        (row for row in found if row.metric in rows.NO_TIME), lambda row: (row.provider, row.metric, row.note)
    ).items():
        places = f"{_x_name(suite, own[0].case)} {', '.join(f'{row.x:g}' for row in own)}"
        lines.append(f"- {metric.capitalize()}: {escaped(provider)}, {places}: {escaped(note or 'no reason given')}")
    return [*lines, ""] if lines and lines[-1] else lines


def _x_name(suite: str, case: str) -> str:
    return X_NAMES.get(suite, case if suite == "scaling" else "x")


Column = tuple[str, Callable[[Line], str]]


def _table(suite: str, case: str, lines: list[Line], by_arithmetic: dict[float, Line], wanted: str | None) -> list[str]:
    present = rows.distinct(metric for line in lines for metric in line.rows)
    columns: list[Column] = [
        (_x_name(suite, case), lambda line: f"{line.x:g}"),
        ("provider", lambda line: line.provider),
    ]
    if "time" in present:
        columns += [("time", _cell("time")), ("p20 - p80", _span), ("rounds", _rounds)]
        columns += _steps(lines) if suite == "waterfall" else _gains(suite, lines, wanted)
        floors = {x: line.median("floor") for x, line in by_arithmetic.items()}
        if any(floors.values()):
            columns.append(("of the floor's speed", lambda line: _share(floors.get(line.x), line.median("time"))))
    for metric in [*(name for name in METRICS if name in present), *(name for name in present if name not in METRICS)]:
        if metric != "time":
            columns.append((metric, _cell(metric)))
    if any(row.note for line in lines for row in line.rows.values()):
        columns.append(("note", lambda line: "; ".join(rows.distinct(r.note for r in line.rows.values() if r.note))))
    return table([name for name, _ in columns], [[cell(line) for _, cell in columns] for line in lines])


def _gains(suite: str, lines: list[Line], wanted: str | None) -> list[Column]:
    timed = [line for line in lines if line.median("time")]
    against = rows.baseline((line.provider for line in timed), wanted)
    base = {line.x: line.median("time") for line in timed if line.provider == against}
    columns: list[Column] = []
    if against and len({line.provider for line in timed}) > 1:
        columns.append((f"speed-up over {against}", lambda line: _times(base.get(line.x), line.median("time"))))
    dense = {line.provider: line.median("time") for line in timed if line.x == 1}
    if suite in (*KEEP_RATIO_SUITES, "pipeline") and dense:
        columns.append(
            ("over itself at keep ratio 1", lambda line: _times(dense.get(line.provider), line.median("time")))
        )
    return columns


def _steps(lines: list[Line]) -> list[Column]:
    ordered = sorted((line for line in lines if line.median("time")), key=lambda line: line.x)
    before = {id(line): earlier for earlier, line in itertools.pairwise(ordered)}

    def step(line: Line) -> str:
        earlier = before.get(id(line))
        return _times(earlier.median("time"), line.median("time")) if earlier else ""

    return [
        ("gain of the step", step),
        ("gain in all", lambda line: _times(ordered[0].median("time"), line.median("time")) if ordered else ""),
    ]


def _times(base: float | None, own: float | None) -> str:
    return f"{base / own:.2f}x" if base and own else ""


def _share(floor: float | None, own: float | None) -> str:
    return f"{floor / own:.0%}" if floor and own else ""


def _words(row: Record) -> str:
    return rows.in_words(row.p50, row.unit, row.metric)


def _cell(metric: str) -> Callable[[Line], str]:
    return lambda line: _words(line.rows[metric]) if metric in line.rows else ""


def _span(line: Line) -> str:
    return rows.span(line.rows["time"]) if "time" in line.rows else ""


def _rounds(line: Line) -> str:
    return str(line.rows["time"].n) if "time" in line.rows else ""


def table(names: list[str], body: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; columns of numbers are set to the right."""
    sides = ["---" if name in TEXT_COLUMNS else "---:" for name in names]
    cells = [[escaped(cell) for cell in line] for line in (names, *body)]
    return [f"| {' | '.join(line)} |" for line in (cells[0], sides, *cells[1:])]


def escaped(text: str) -> str:
    """Text that stays as it is in Markdown, also within a table."""
    plain = " ".join(text.split())
    return "".join(f"\\{sign}" if sign in "\\|*`<>[]" else sign for sign in plain)
