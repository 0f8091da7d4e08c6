"""A comparison in print: what changed first, then how much of the rest could have been seen."""

import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from . import rows
from .compare import TIMED, Change, Verdict
from .records import Record

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLOURS = {Verdict.WORSE: "red", Verdict.BETTER: "green", Verdict.MACHINE: "yellow"}
# A change that a row should be able to show; rows with more noise than this are counted aloud.
WANTED = 0.2


def print_changes(changes: list[Change], *, console: "Console | None" = None, notices: Sequence[str] = ()) -> None:
    """Print the rows that changed, those that only one run has, and what the noise allowed to see.

    Args:
        changes: As `compare.compare` gives them.
        console: Where to print; standard output by default.
        notices: What differs between the runs besides the code, said first.
    """
    from rich.console import Console
    from rich.text import Text

    out = console or Console()
    for notice in notices:
        out.print(Text(f"CAUTION: {notice}; a change below may be due to that", style="bold yellow"), soft_wrap=True)
    flagged = [change for verdict in COLOURS for change in changes if change.verdict is verdict]
    both = [change for change in flagged if change.before is not None and change.after is not None]
    if both:
        out.print(_table(both))
    for line, style in _remarks(changes, flagged):
        out.print(Text(line, style=style), soft_wrap=True)
    out.print(Text(summary(changes)), soft_wrap=True)


def summary(changes: list[Change]) -> str:
    """One line: how many rows were judged, with what outcome, and how fine the judgement was."""
    judged = [change for change in changes if change.before is not None and change.after is not None]
    if not judged:
        return "0 rows are in both runs: nothing to compare"
    counts = {verdict: sum(change.verdict is verdict for change in judged) for verdict in Verdict}
    said = [f"{counts[Verdict.WORSE]} worse", f"{counts[Verdict.BETTER]} better"]
    if counts[Verdict.MACHINE]:
        said.append(f"{counts[Verdict.MACHINE]} changed as the machine did")
    said.append(f"{counts[Verdict.STEADY]} within the noise")
    line = f"{len(judged)} rows compared: {', '.join(said)}."
    timed = [change.noise for change in judged if change.record.metric in TIMED and math.isfinite(change.noise)]
    if timed:
        line += f" Times: a change of {median(timed):.0%} could be told from noise in half of the rows"
        coarse = sum(noise > WANTED for noise in timed)
        line += f"; {coarse} are too noisy for one of {WANTED:.0%}." if coarse else "."
    if counts[Verdict.UNKNOWN]:
        line += f" {counts[Verdict.UNKNOWN]} rows of one round only have no spread to judge by."
    return line


def _table(changes: list[Change]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("row", "metric", "before", "after", "change", "noise", "against peer", "verdict"):
        table.add_column(name, justify="left" if name in ("row", "metric", "verdict") else "right", overflow="fold")
    for change in changes:
        before, after = change.before, change.after
        assert before is not None and after is not None
        peer = ""
        if change.peer:
            relative, noise = percent(change.peer_ratio - 1, sign=True), percent(change.peer_noise)
            peer = f"{relative} (noise {noise}) over {change.peer}"
        cells = (
            where(after), after.metric, _value(before), _value(after), percent(change.ratio - 1, sign=True),
            percent(change.noise), peer, str(change.verdict),
        )  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells), style=COLOURS[change.verdict])
    return table


def _remarks(changes: list[Change], flagged: list[Change]) -> list[tuple[str, str]]:
    lines = [
        (f"worse: {where(change.record)} is withheld now: {change.record.note or 'no reason given'}", "red")
        for change in flagged
        if change.before is None
    ]
    if any(change.verdict is Verdict.MACHINE for change in flagged):
        lines.append(
            ("machine: by as much as the machine's own measured rates changed, and not against the peer", "yellow")
        )
    for verdict in (Verdict.ONLY_BEFORE, Verdict.ONLY_AFTER):
        alone = [change.record for change in changes if change.verdict is verdict]
        for name, found in rows.grouped(alone, _source).items():
            lines.append((f"{verdict}: {name}, {len(found)} rows ({', '.join(_metrics(found))})", "dim"))
    return lines


def where(record: Record) -> str:
    """Which row it is, without what all rows of a file have in common."""
    parts = (record.suite, record.case, record.mode, f"x {record.x:g}", record.dtype, record.provider)
    return ", ".join(part for part in parts if part)


def _source(record: Record) -> str:
    return ", ".join(part for part in (record.suite, record.case, record.provider, record.mode) if part)


def _metrics(found: list[Record]) -> list[str]:
    return rows.distinct(f"absent: {record.note}" if record.metric == "absent" else record.metric for record in found)


def _value(record: Record) -> str:
    text = rows.in_words(record.p50, record.unit, record.metric)
    if record.n > 1 and record.p80 > record.p20:
        text += f" ({rows.span(record)})"
    return text


def percent(share: float, *, sign: bool = False) -> str:
    """A share in percent, "+20 %" with ``sign``."""
    if not math.isfinite(share):
        return "?"
    return f"{share * 100:{'+' if sign else ''}.{0 if abs(share) >= 0.0995 else 1}f} %"
