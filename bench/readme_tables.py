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
