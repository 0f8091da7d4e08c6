"""``python -m mar_fast.bench.readme_tables``: the tables of bench/README.md, from the records kept with the code.

They are written between ``<!-- TABLE: FILE of bench/results -->`` and ``<!-- end -->``. With ``--check`` nothing is
written, and the exit code is 1 if they are not what the records say.
"""

import argparse
import difflib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mar_fast.files import write_whole

from . import records
from .op_cases import PART
from .report import frame, markdown

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

ROOM = Path(__file__).resolve().parent
KEPT = {1.0: "dense", 0.5: "50 % masked", 0.25: "75 % masked"}
BLOCK = re.compile(r"(<!-- (\S+): (\S+) -->)\n(.*?)(<!-- end -->|(?=<!-- )|\Z)", re.DOTALL)


def savings(table: "pd.DataFrame") -> list[str]:
    """A line for each case and provider, a column for each keep ratio, and how much less time than the dense model."""
    times = table[table.timed].copy()
    times["cell"] = times.time + times["speed-up"].map(lambda gain: f" ({gain})" if gain else "")
    made = times.pivot(index=["case", "provider"], columns="x", values=["cell", "over its dense"])
    order = times[["case", "provider"]].drop_duplicates()
    columns = {("cell", x): name for x, name in KEPT.items()}
    columns |= {("over its dense", x): f"dense / {KEPT[x][:4]}" for x in (0.5, 0.25)}
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


TABLES = {"savings": savings, "kernels": kernels}


def replaced(text: str, results: Path) -> str:
    """``text`` with fresh tables between all markers.

    Raises:
        ValueError: a marker has an unknown table or no end.
        OSError: its file cannot be read.
    """

    def fresh(found: re.Match[str]) -> str:
        start, name, file, _, end = found.groups()
        if name not in TABLES:
            raise ValueError(f"{start}: got table {name!r}, expected one of {', '.join(TABLES)}")
        if not end:
            raise ValueError(f"{start}: got no end, expected <!-- end --> after it")
        measured = records.read(results / file)
        row = next(record for record in measured if record.metric == "time")
        origin = f"{row.device}, torch {row.torch}, {row.dtype}, commit {row.commit}, {row.date[:10]}."
        return "\n".join([start, "", *TABLES[name](frame(measured)), "", origin, "", end])

    return BLOCK.sub(fresh, text)


def main(arguments: list[str] | None = None, room: Path = ROOM) -> int:
    """Write or check the tables of ``room``/README.md; exit code 1 if they are stale, 2 if they cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench.readme_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is stale")
    check, readme = parser.parse_args(arguments).check, room / "README.md"
    try:
        text = readme.read_text(encoding="utf-8")
        fresh = replaced(text, room / "results")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not check:
        write_whole(readme, lambda temporary: temporary.write_text(fresh, encoding="utf-8"))
    elif fresh != text:
        print(*difflib.unified_diff(text.split("\n"), fresh.split("\n"), "README.md", "results", lineterm=""), sep="\n")
        print("bench/README.md is stale: python -m mar_fast.bench.readme_tables writes it anew", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
