"""``python -m mar_fast.bench.readme_tables``: the tables of bench/README.md, from the records kept with the code.

They are written between ``<!-- TABLE: FILE of bench/results -->`` and ``<!-- end -->``. With ``--check`` nothing is
written, and the exit code is 1 if they are not what the records say.
"""

import argparse
import difflib
import re
import sys
from pathlib import Path

from mar_fast.files import write_whole

from . import records, tables

ROOM = Path(__file__).resolve().parent
TABLES = {"savings": tables.savings, "kernels": tables.kernels}
BLOCK = re.compile(r"(<!-- (\S+): (\S+) -->)\n(.*?)(<!-- end -->|(?=<!-- )|\Z)", re.DOTALL)


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
        return "\n".join([start, "", *TABLES[name](tables.frame(measured)), "", origin, "", end])

    return BLOCK.sub(fresh, text)


def update(room: Path, *, check: bool) -> int:
    """Bring README.md in ``room`` up to date with its results; with ``check`` say what is stale and return 1 if any."""
    readme = room / "README.md"
    text = readme.read_text(encoding="utf-8")
    fresh = replaced(text, room / "results")
    if fresh != text and check:
        print(*difflib.unified_diff(text.split("\n"), fresh.split("\n"), "README.md", "results", lineterm=""), sep="\n")
        print("bench/README.md is stale: python -m mar_fast.bench.readme_tables writes it anew", file=sys.stderr)
        return 1
    if fresh != text:
        write_whole(readme, lambda temporary: temporary.write_text(fresh, encoding="utf-8"))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Write the tables, or check them; exit code 1 if they are stale, 2 where they cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench.readme_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is stale")
    try:
        return update(ROOM, check=parser.parse_args(arguments).check)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
