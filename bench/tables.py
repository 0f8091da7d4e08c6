"""Tables of records, by pandas: all that a suite measured, and the short ones of this room's README."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from .op_cases import PART
from .records import NO_TIME, Record

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

KEYS = ["case", "dtype", "x", "provider"]
COLUMNS = ["time", "p20 - p80", "rounds", "speed-up", "over its dense", "of the step", "of the floor"]
# Columns of words; those of numbers are set to the right.
TEXT = (*KEYS, "pass", "best peer", "note", "device", "torch", "triton", "commits", "dates", "suites")
KEPT = {1.0: "dense", 0.5: "50 % masked", 0.25: "75 % masked"}


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


def origins(table: "pd.DataFrame") -> list[str]:
    """Which records there are: device, versions, commits, dates, suites."""

    def distinct(values: "pd.Series") -> str:
        return ", ".join(dict.fromkeys(value for value in values if value))

    groups = table.assign(date=table.date.str[:10]).groupby(["device", "torch", "triton"], sort=False)
    made = groups.agg(commits=("commit", distinct), dates=("date", distinct), suites=("suite", distinct))
    return markdown(made.assign(records=groups.size().astype(str)).reset_index())


def of_suite(table: "pd.DataFrame") -> Iterator[tuple[str, list[str]]]:
    """(mode, lines) of a suite's tables: what was timed, then all other figures; every record is in one of them."""
    for mode, part in table.groupby("mode", sort=False):
        words = part.pivot(index=KEYS, columns="metric", values="words").drop(columns="time", errors="ignore")
        words["note"] = part[part.note != ""].groupby(KEYS).note.agg("; ".join)
        lines = part.sort_values("timed", ascending=False, kind="stable").drop_duplicates(KEYS)
        both = [markdown(own[[*KEYS, *COLUMNS]].join(words, on=KEYS)) for _, own in lines.groupby("timed", sort=False)]
        yield str(mode), [line for made in both for line in (*made, "")]


def savings(table: "pd.DataFrame") -> list[str]:
    """A line for each case and provider, a column for each keep ratio, and how much less time than the dense model."""
    times = table[table.timed].copy()
    times["cell"] = times.time + times["speed-up"].map(lambda gain: f" ({gain})" if gain else "")
    made = times.pivot(index=["case", "provider"], columns="x", values=["cell", COLUMNS[4]])
    order = times[["case", "provider"]].drop_duplicates()
    columns = {("cell", x): name for x, name in KEPT.items()}
    columns |= {(COLUMNS[4], x): f"dense / {KEPT[x][:4]}" for x in (0.5, 0.25)}
    made = made.loc[:, [name for name in columns if name in made.columns]]
    made.columns = [columns[name] for name in made.columns]
    return markdown(order.join(made, on=["case", "provider"]))


def kernels(table: "pd.DataFrame") -> list[str]:
    """A line for each op and pass, at the op's longest case: ours, the best peer, their ratio, share of the floor."""
    times = table[table.timed & (table.provider != PART)].sort_values("p50")
    longest = times[times.ours].groupby(times.case.str.partition(":")[0], sort=False).case.last()
    best = times[~times.ours].drop_duplicates(["case", "mode"]).set_index(["case", "mode"])
    own = times[times.ours & times.case.isin(longest)].sort_index()
    made = own.join(best[["provider", "time", "p50"]].add_suffix(" of the best peer"), on=["case", "mode"])
    made["ratio"] = (made["p50 of the best peer"] / made.p50).map("{:.2f}x".format)
    names = ["case", "pass", "mar_fast", "best peer", "its time", "ratio", "of the floor"]
    made = made[["case", "mode", "time", "provider of the best peer", "time of the best peer", "ratio", "of the floor"]]
    return markdown(made.set_axis(names, axis=1))
