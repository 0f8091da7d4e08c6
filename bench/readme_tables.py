"""The README's tables of results, written from the record files that are kept with the code.

``python -m mar_fast.bench.readme_tables`` writes them between ``<!-- results: NAME -->`` and ``<!-- end results -->``;
with ``--check`` it writes nothing and ends with exit code 1 if they are not what the newest record files say.
"""

import argparse
import difflib
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

from mar_fast.files import write_whole

from . import rows
from .records import Record
from .report import table

END = "<!-- end results -->"
START = re.compile(r"<!-- *results: *(.*?) *-->")
NOT_MEASURED = "Not measured yet."


def checkout() -> Path:
    """The root of the checkout that this file is in.

    Raises:
        FileNotFoundError: it is in no checkout, as when the package was installed.
    """
    root = Path(__file__).resolve().parent.parent
    if not all((root / name).is_file() for name in ("README.md", "setup.py", "bench/records.py")):
        raise FileNotFoundError(
            f"checkout: {root} is none, expected the folder of the project's sources, with README.md and bench/results "
            "(an installed package has neither)"
        )
    return root


def newest_by_suite(folder: Path) -> dict[str, list[list[Record]]]:
    """For each suite the newest run on each device, devices in the order of the files' paths.

    A run is what one file holds of a suite on a device, as old as its latest row.
    """
    runs: dict[tuple[str, str], list[Record]] = {}
    for path in sorted(folder.glob(f"**/*{rows.SUFFIX}")):
        for name, run in rows.grouped(rows.load([path]), lambda row: (row.suite, row.device)).items():
            if name not in runs or max(row.date for row in run) > max(row.date for row in runs[name]):
                runs[name] = run
    found: dict[str, list[list[Record]]] = {}
    for (suite, _), run in runs.items():
        found.setdefault(suite, []).append(rows.newest(run))
    return found


def replaced(text: str, results: dict[str, list[list[Record]]]) -> str:
    """``text`` with fresh tables between all markers.

    Raises:
        ValueError: a marker has an unknown name, no end, or no beginning; the message names the line.
    """
    lines, made = text.split("\n"), []
    opened: tuple[int, str] | None = None
    for number, line in enumerate(lines, 1):
        start = START.fullmatch(line.strip())
        if start:
            if opened:
                raise _no_end(*opened)
            if start[1] not in TABLES:
                raise ValueError(f"line {number}: got results {start[1]!r}, expected one of {', '.join(TABLES)}")
            opened = (number, start[1])
            made += [line, *block(start[1], results.get(start[1], []))]
        elif line.strip() == END:
            if not opened:
                raise ValueError(
                    f"line {number}: got {END!r} without a beginning, expected <!-- results: NAME --> first"
                )
            opened = None
        elif START.search(line) or END in line:
            raise ValueError(f"line {number}: got a marker within a line, expected it on a line of its own")
        if not opened and not start:
            made.append(line)
    if opened:
        raise _no_end(*opened)
    return "\n".join(made)


def _no_end(number: int, name: str) -> ValueError:
    return ValueError(f"line {number}: got <!-- results: {name} --> without an end, expected {END!r} after it")


def block(name: str, runs: list[list[Record]]) -> list[str]:
    """The lines between two markers: for each device, mode and dtype a table and its caption."""
    lines = []
    for run in runs:
        for (mode, _), own in rows.grouped(run, _group).items():
            made = TABLES[name](own)
            if made is not None:
                content, said = made
                lines += ["", *content, "", _caption(own, mode, said)]
    return [*(lines or ["", NOT_MEASURED]), ""]


def _group(row: Record) -> tuple[str, str]:
    # Both passes of a kernel stand in one table.
    return ("" if row.suite == "kernels" else row.mode, rows.shared_dtype(row))


def _caption(own: list[Record], mode: str, said: str) -> str:
    parts = [own[0].device, f"torch {own[0].torch}", rows.dtypes(own), mode]
    commits = " and ".join(rows.distinct(row.commit for row in own if row.commit))
    parts.append(f"commit {commits}" if commits else "")
    parts.append(max(row.date for row in own)[:10])
    return f"{', '.join(part for part in parts if part)}. {said}"


Made = tuple[list[str], str] | None


def _timed(own: list[Record]) -> list[Record]:
    return [row for row in own if row.metric == "time" and row.p50 > 0]


def _keep_ratios(own: list[Record], *, memory: bool = False) -> Made:
    """A line for each case and provider, a column for each keep ratio; in brackets the gain over the baseline.

    With ``memory`` the peak of a call follows.
    """
    timed = _timed(own)
    if not timed:
        return None
    ratios = sorted({row.x for row in timed}, reverse=True)
    against = rows.baseline(row.provider for row in timed)
    base = {(row.case, row.x): row.p50 for row in timed if row.provider == against}
    at_peak = {
        (row.case, row.provider, row.x): rows.in_words(row.p50, row.unit, row.metric)
        for row in own
        if row.metric == "peak memory"
    }
    body = []
    for case, group in rows.grouped(timed, lambda row: row.case).items():
        for number, (provider, mine) in enumerate(rows.grouped(group, lambda row: row.provider).items()):
            at = {row.x: row.p50 for row in mine}
            cells = [_gain(at.get(x), base.get((case, x)), 1e3) for x in ratios]
            if memory:
                peaks = [at_peak.get((case, provider, x), "") for x in ratios]
                cells = [f"{cell}, {peak}" if cell and peak else cell for cell, peak in zip(cells, peaks, strict=True)]
            body.append([case if number == 0 else "", provider, *cells])
    heads = ["case", "provider", *(f"{x:.0%} kept" for x in ratios)]
    brackets = f" (in brackets: speed-up over {against})" if against else ""
    return table(heads, body), f"Median ms of a call{brackets}{', peak memory' if memory else ''}."


def _gain(seconds: float | None, base: float | None, factor: float) -> str:
    if seconds is None:
        return ""
    return rows.number(seconds * factor) + (f" ({base / seconds:.2f}x)" if base else "")


def _kernels(own: list[Record]) -> Made:
    """For each op its longest case, a line for each provider, a column for each pass."""
    timed = _timed(own)
    if not timed:
        return None
    modes = rows.distinct(row.mode for row in timed)
    body = []
    for group in rows.grouped(timed, lambda row: row.case.partition(":")[0]).values():
        longest = max((row for row in group if row.provider == "mar_fast"), key=lambda row: row.p50, default=group[0])
        chosen = [row for row in group if row.case == longest.case]
        against = rows.baseline(row.provider for row in chosen)
        base = {row.mode: row.p50 for row in chosen if row.provider == against}
        for number, (provider, mine) in enumerate(rows.grouped(chosen, lambda row: row.provider).items()):
            at = {row.mode: row.p50 for row in mine}
            cells = [_gain(at.get(mode), base.get(mode), 1e6) for mode in modes]
            body.append([longest.case if number == 0 else "", provider, *cells])
    said = (
        "Median us of a call (in brackets: speed-up over the line with 1.00x); of each op the case that takes longest."
    )
    return table(["case", "provider", *modes], body), said


def _waterfall(own: list[Record]) -> Made:
    """A line for each step: time, its gain, the gain so far, memory and error."""
    body = []
    for case, group in rows.grouped(own, lambda row: row.case).items():
        first = before = None
        for _, step in sorted(rows.grouped(group, lambda row: row.x).items()):
            at = {row.metric: row for row in step}
            time = at.get("time")
            if time is None or time.p50 <= 0:
                continue
            memory, error = (
                rows.in_words(at[name].p50, at[name].unit, name) if name in at else ""
                for name in ("peak memory", "error")
            )
            gains = [f"{base / time.p50:.2f}x" if base else "" for base in (before, first or time.p50)]
            name = time.provider if first else f"{time.provider} ({case})"
            body.append([name, rows.number(time.p50 * 1e3), *gains, memory, error])
            first, before = first or time.p50, time.p50
    if not body:
        return None
    heads = ["step", "time", "gain of the step", "gain in all", "peak memory", "error"]
    return table(heads, body), "Median ms of a call; each step is added to those above it."


def _scaling(own: list[Record]) -> Made:
    """A line for each quantity and provider: the range, the time at its ends, the fitted exponent."""
    timed = _timed(own)
    exponents = {(row.case, row.provider): row.p50 for row in own if row.metric == "exponent"}
    body = []
    for (case, provider), group in rows.grouped(timed, lambda row: (row.case, row.provider)).items():
        ends = min(group, key=lambda row: row.x), max(group, key=lambda row: row.x)
        exponent = exponents.get((case, provider))
        body.append([
            case, provider, " to ".join(f"{row.x:g}" for row in ends),
            " to ".join(rows.number(row.p50 * 1e3) for row in ends), "" if exponent is None else f"{exponent:.2f}",
        ])  # fmt: skip
    if not body:
        return None
    said = "Median ms of a call at both ends; time grows as the quantity to the power of the exponent, fitted over all."
    return table(["quantity", "provider", "range", "time", "exponent"], body), said


def _pipeline(own: list[Record]) -> Made:
    """A line for each stage, a column for each keep ratio; what bounds the whole is beside it."""
    timed = _timed(own)
    if not timed:
        return None
    ratios = sorted({row.x for row in timed}, reverse=True)
    rates = {(row.case, row.provider, row.x): row.p50 for row in own if row.metric == "throughput"}
    body = []
    for case, group in rows.grouped(timed, lambda row: row.case).items():
        for number, (stage, mine) in enumerate(rows.grouped(group, lambda row: row.provider).items()):
            cells = []
            for x in ratios:
                row = next((row for row in mine if row.x == x), None)
                rate = rates.get((case, stage, x))
                more = [rows.number(rate) if rate else "", row.note if row else ""]
                said = ", ".join(part for part in more if part)
                cells.append("" if row is None else rows.number(row.p50 * 1e3) + (f" ({said})" if said else ""))
            body.append([case if number == 0 else "", stage, *cells])
    heads = ["clip", "stage", *(f"{x:.0%} kept" for x in ratios)]
    return table(heads, body), "Median ms of a call (in brackets: clips per second, and what bounds the whole)."


TABLES: dict[str, Callable[[list[Record]], Made]] = {
    "encoder": _keep_ratios,
    "training": _keep_ratios,
    "dropin": functools.partial(_keep_ratios, memory=True),
    "kernels": _kernels,
    "waterfall": _waterfall,
    "scaling": _scaling,
    "pipeline": _pipeline,
}


def main(arguments: list[str] | None = None) -> int:
    """Write the tables, or check them; exit code 1 if they are stale, 2 where they cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench.readme_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is stale")
    options = parser.parse_args(arguments)
    try:
        return update(checkout(), check=options.check)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def update(root: Path, *, check: bool) -> int:
    """Bring README.md of a checkout up to date with its bench/results, or with ``check`` say what is stale.

    Returns:
        1 if ``check`` and a table is stale, else 0.

    Raises:
        ValueError: a marker or a record file is wrong; the message names the file.
        OSError: a file cannot be read or written.
    """
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    results = newest_by_suite(root / "bench" / "results")
    try:
        fresh = replaced(text, results)
    except ValueError as error:
        raise ValueError(f"{readme.name}, {error}") from error
    if fresh == text:
        return 0
    if check:
        print(
            *difflib.unified_diff(text.split("\n"), fresh.split("\n"), "README.md", "bench/results", lineterm=""),
            sep="\n",
        )
        print("README.md is stale: python -m mar_fast.bench.readme_tables writes it anew", file=sys.stderr)
        return 1
    write_whole(readme, lambda temporary: temporary.write_text(fresh, encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
