"""Rows of record files as the comparison, the report and the README's tables need them: read, identified, in words."""

import math
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from . import records
from .records import Record

SUFFIX = ".jsonl"
NO_TIME = ("absent", "withheld")
# Whom the others of a case are set against: code that is not this project's, the plainest good choice first.
BASELINES = (
    "PyTorch SDPA",
    "SDPA",
    "PyTorch",
    "reshape + index + linear",
    "reference, autocast",
    "reference",
    "transformers",
)

Name = TypeVar("Name", bound=Hashable)


class Key(NamedTuple):
    """What tells one row from all others."""

    suite: str
    case: str
    provider: str
    mode: str
    metric: str
    x: float
    dtype: str
    device: str

    def __str__(self) -> str:
        parts = (self.suite, self.case, self.provider, self.mode, self.metric, f"x {self.x:g}", self.dtype, self.device)
        return ", ".join(part for part in parts if part)


class Setting(NamedTuple):
    """What all providers of a comparison share: they were measured in turn."""

    suite: str
    case: str
    mode: str
    x: float
    dtype: str
    device: str


def key(record: Record) -> Key:
    """The identity of a row."""
    return Key(*(getattr(record, name) for name in Key._fields))


def setting(record: Record) -> Setting:
    """Where a row was measured, whoever the provider was and whatever the metric."""
    return Setting(*(getattr(record, name) for name in Setting._fields))


def shared_dtype(record: Record) -> str:
    """The dtype that tables and pictures are set apart by; "" where one of them goes from one dtype to another."""
    return "" if record.suite == "waterfall" else record.dtype


def dtypes(found: Iterable[Record]) -> str:
    """The dtypes of some rows in words."""
    return " and ".join(distinct(row.dtype for row in found if row.dtype))


def load(paths: Iterable[Path]) -> list[Record]:
    """All rows of record files, and of the record files in folders (not in folders below them).

    Raises:
        FileNotFoundError: there is no such file or folder, or no record file in a folder.
        ValueError: a file has no rows, or a line that is no record.
    """
    found: list[Record] = []
    for path in paths:
        for file in _files(path):
            rows = records.read(file)
            if not rows:
                raise ValueError(f"{file}: got no rows, expected measurements, one JSON line each")
            for number, row in enumerate(rows, 1):
                _check(row, f"{file}, row {number}")
            found += rows
    return found


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        inside = sorted(path.glob(f"*{SUFFIX}"))
        if not inside:
            raise FileNotFoundError(f"{path}: got a folder without record files, expected files named *{SUFFIX}")
        return inside
    if not path.is_file():
        raise FileNotFoundError(f"{path}: got no such file, expected a record file or a folder of files *{SUFFIX}")
    return [path]


def _check(row: Record, place: str) -> None:
    """Types are checked where files come in: a word where a number belongs would surface far from its cause."""
    for name, value in vars(row).items():
        wanted = Record.__annotations__[name]
        good = isinstance(value, str) if wanted is str else isinstance(value, int | float)
        if not good or isinstance(value, bool):
            raise ValueError(f"{place}, {name}: got {value!r}, expected {'text' if wanted is str else 'a number'}")
    if row.p20 > row.p50 or row.p50 > row.p80:  # NaN, as an error may be, is neither
        got = f"p20 {row.p20:g}, p50 {row.p50:g}, p80 {row.p80:g}"
        raise ValueError(f"{place}: got {got}, expected them in ascending order")


def newest(rows: Iterable[Record]) -> list[Record]:
    """One row for each identity: of several the one with the latest date, in the place of the first."""
    latest: dict[Key, Record] = {}
    for row in rows:
        known = latest.get(key(row))
        if known is None or row.date >= known.date:
            latest[key(row)] = row
    return list(latest.values())


def grouped(rows: Iterable[Record], name: Callable[[Record], Name]) -> dict[Name, list[Record]]:
    """Rows by name, groups and rows in the order in which they come."""
    groups: dict[Name, list[Record]] = {}
    for row in rows:
        groups.setdefault(name(row), []).append(row)
    return groups


def distinct(values: Iterable[Name]) -> list[Name]:
    """Each value once, in the order in which they come."""
    return list(dict.fromkeys(values))


def baseline(providers: Iterable[str], wanted: str | None = None) -> str | None:
    """Whom the others are set against: ``wanted``, else the first of `BASELINES` that is there."""
    present = set(providers)
    return next((name for name in ((wanted,) if wanted else BASELINES) if name in present), None)


def number(value: float) -> str:
    """Three significant digits without an exponent from 0.001 to a million."""
    size = abs(value)
    if not math.isfinite(value) or size == 0:
        return f"{value:g}"
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2e}"
    decimals = max(0, 2 - math.floor(math.log10(float(f"{size:.2e}"))))
    return f"{value:,.{decimals}f}"


def span(record: Record) -> str:
    """p20 and p80 of a row with one unit, which both have: "11.9 - 13.1 ms"."""
    low, high = (in_words(value, record.unit, record.metric) for value in (record.p20, record.p80))
    unit = high.partition(" ")[2]
    return f"{low.removesuffix(f' {unit}') if unit else low} - {high}"


_LARGE = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))


def in_words(value: float, unit: str, metric: str) -> str:
    """A value with its unit and the prefix that suits it: "12.3 ms", "85.3 G", "3e-03" for an error."""
    if metric == "error":
        return f"{value:.0e}"
    if metric == "exponent":
        return f"{value:.2f}"
    if unit == "1" and metric not in ("multiply-adds", "parameters"):
        return number(value)
    if unit not in ("s", "B", "B/s", "FLOP/s", "1"):
        return f"{number(value)} {unit}"
    prefixes = _SMALL if unit == "s" else _LARGE
    scale, prefix = next((pair for pair in prefixes if abs(value) >= pair[0]), (1.0, "") if not value else prefixes[-1])
    if unit == "1":
        return f"{value / scale:.2f} {prefix}".rstrip()
    return f"{number(value / scale)} {prefix}{unit}"
