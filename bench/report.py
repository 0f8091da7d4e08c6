"""The report: records as one Markdown page with tables, by pandas, and pictures."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mar_fast import files
from mar_fast.eval import plot

from . import records
from .pictures import Picture, pictures
from .records import NO_TIME, Record

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

PAGE = "report.md"
ABOUT = """# Measurements

Times are medians over interleaved rounds, p20 - p80 the 20th and 80th percentile. A speed-up is over the baseline of
the case, which has 1.00x; "over its dense" is over the same provider at keep ratio 1, "of the step" over the step
above. The floor is the least time by arithmetic at this machine's own measured ceilings.
"""
KEYS = ["case", "dtype", "x", "provider"]
COLUMNS = ["time", "p20 - p80", "rounds", "speed-up", "over its dense", "of the step", "of the floor"]
# Columns of words; those of numbers are set to the right.
TEXT = (*KEYS, "pass", "best peer", "note", "device", "torch", "triton", "commits", "dates", "suites")


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
        found: Records of any suites, devices and dates; of what was measured several times the newest is taken.
        out: The folder.
        force: Replace files that are there.
        baseline: The provider that speed-ups are over; by default each case's own.
        on_step: Told what is going on and which share of the whole is done.

    Returns:
        The files, the page first. It is written last, so that it never names a picture that is not there.

    Raises:
        FileExistsError: a file is there and ``force`` is not set.
        ModuleNotFoundError: pandas or matplotlib is not installed.
        ValueError: no time is of the provider ``baseline``.
    """
    providers = dict.fromkeys(record.provider for record in found if record.metric == "time")
    if baseline is not None and baseline not in providers:
        raise ValueError(f"baseline: got {baseline!r}, expected one of {', '.join(providers)}")
    latest = [replace(one, baseline=baseline or one.baseline) for one in records.newest(found)]
    plot.new_figure()  # without matplotlib, say so before anything is written
    planned = pictures(latest)
    text = page(latest, planned)
    paths = [out / PAGE, *(out / picture.name for picture in planned)]
    files.may_write(paths, force)
    for number, picture in enumerate(planned):
        on_step(f"drawing {picture.name}", number / len(planned))
        picture.draw(out / picture.name)
    files.write_whole(paths[0], lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return paths


def page(found: list[Record], planned: list[Picture]) -> str:
    """The page as Markdown: for each device its suites, for each suite its tables and pictures."""
    table = frame(found)
    lines = [ABOUT, *origins(table), ""]
    for device, own in table.groupby("device", sort=False):
        lines += [f"## {escaped(device)}", ""]
        for suite, group in own.groupby("suite", sort=False):
            lines += [f"### {escaped(suite)}", ""]
            for mode, part in group.groupby("mode", sort=False):
                lines += [*([f"#### {escaped(mode)}", ""] if mode else []), *measured(part)]
            own_pictures = [picture.name for picture in planned if (picture.suite, picture.device) == (suite, device)]
            lines += [f"![{name}]({name})\n" for name in own_pictures]
    return "\n".join(lines).rstrip() + "\n"


def origins(table: "pd.DataFrame") -> list[str]:
    """Which records there are: device, versions, commits, dates, suites."""

    def distinct(values: "pd.Series") -> str:
        return ", ".join(dict.fromkeys(value for value in values if value))

    groups = table.assign(date=table.date.str[:10]).groupby(["device", "torch", "triton"], sort=False)
    made = groups.agg(commits=("commit", distinct), dates=("date", distinct), suites=("suite", distinct))
    return markdown(made.assign(records=groups.size().astype(str)).reset_index())


def measured(part: "pd.DataFrame") -> list[str]:
    """What was timed in one mode of a suite, then all other figures; every record is in one of these tables."""
    words = part.pivot(index=KEYS, columns="metric", values="words").drop(columns="time", errors="ignore")
    words["note"] = part[part.note != ""].groupby(KEYS).note.agg("; ".join)
    rows = part.sort_values("timed", ascending=False, kind="stable").drop_duplicates(KEYS)
    both = [markdown(own[[*KEYS, *COLUMNS]].join(words, on=KEYS)) for _, own in rows.groupby("timed", sort=False)]
    return [line for made in both for line in (*made, "")]


def frame(found: list[Record]) -> "pd.DataFrame":
    """Records as a data frame, a line each, with the words of `COLUMNS` for each time.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("tables need pandas: pip install 'mar-fast[report]'") from error
    times = [one for one in found if one.metric == "time" and one.p50 > 0]
    base = {one.workload: one.p50 for one in times if one.provider == one.baseline}
    floor = {one.workload: one.p50 for one in found if one.metric == "floor"}
    dense = {replace(one, x=0).key: one.p50 for one in times if one.x == 1 and one.suite != "waterfall"}
    steps = {(one.workload, one.x): one.p50 for one in times if one.suite == "waterfall"}

    def words(one: Record) -> dict[str, str]:
        slower = base.get(one.workload), dense.get(replace(one, x=0).key), steps.get((one.workload, one.x - 1))
        gains = [f"{other / one.p50:.2f}x" if other else "" for other in slower]
        least = floor.get(one.workload)
        share = f"{least / one.p50:.0%}" if least else ""
        return dict(zip(COLUMNS, (one.words, one.spread, str(one.n), *gains, share), strict=True))

    timed = set(times)
    return pd.DataFrame(
        asdict(one)
        | {"ours": one.ours, "timed": one in timed, "words": "yes" if one.metric in NO_TIME else one.words}
        | (words(one) if one in timed else dict.fromkeys(COLUMNS, ""))
        for one in found
    )


def markdown(table: "pd.DataFrame") -> list[str]:
    """The columns of a data frame that are not empty, as lines of Markdown."""
    table = table.loc[:, ~(table.isna() | (table == "")).all()]
    cells = [
        ["" if value != value else f"{value:g}" if isinstance(value, float) else escaped(str(value)) for value in line]
        for line in table.to_numpy(object)
    ]
    sides = ["---" if name in TEXT else "---:" for name in table.columns]
    return [f"| {' | '.join(line)} |" for line in (map(escaped, table.columns), sides, *cells)]


def escaped(text: str) -> str:
    """Text that stays as it is in Markdown, also within a table."""
    return "".join(f"\\{sign}" if sign in "\\|*`<>[]" else sign for sign in " ".join(text.split()))
