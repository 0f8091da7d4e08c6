"""Measurements as flat records, one JSON line each: made, written, read, and their figures in words."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mar_fast.files import write_whole
from mar_fast.timing import Spread

OURS = "mar_fast"
# All steps and stages of these suites run this project's code, whatever they are called.
OWN_SUITES = ("waterfall", "pipeline")
# Metrics in place of a time: of a provider that cannot run here, or whose results are wrong.
NO_TIME = ("unavailable", "withheld")
FLOOR = "roofline"  # the provider of what follows from arithmetic
SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Record:
    """One figure: ``metric`` of ``provider`` on ``case`` of ``suite``.

    Attributes:
        x: Keep ratio, tokens, step: where it belongs on an axis.
        p20, p50, p80: Percentiles of ``n`` rounds; all three are the figure where ``n`` is 1.
        note: Words that belong to it, such as why a provider is unavailable.
        baseline: The provider that the others of its case are held against.
    """

    suite: str
    case: str
    provider: str
    mode: str
    metric: str
    unit: str
    x: float
    p20: float
    p50: float
    p80: float
    n: int
    device: str
    dtype: str
    torch: str
    triton: str
    commit: str
    date: str
    note: str = ""
    baseline: str = ""

    @classmethod
    def of(cls, environment: Mapping[str, str | int], value: Spread | float, **names: Any) -> "Record":
        """A record of a spread or a single figure, measured in ``environment`` (see `machine.environment`)."""
        spread = value if isinstance(value, Spread) else Spread(float(value), float(value), float(value), 1)
        origin = {key: str(environment[key]) for key in ("device", "torch", "triton", "commit", "date")}
        fields: dict[str, Any] = {"mode": "", "unit": "1", "x": 0.0, "dtype": ""} | asdict(spread) | origin | names
        return cls(**fields)

    @property
    def ours(self) -> bool:
        """Whether it is of this project's code; all other providers are peers."""
        return self.suite in OWN_SUITES or self.provider.startswith(OURS)

    @property
    def workload(self) -> tuple[str, str, str, float, str, str]:
        """What all providers of a case share: they were measured in turn. Steps of a waterfall differ in x."""
        x = 0.0 if self.suite == "waterfall" else self.x
        return self.suite, self.case, self.mode, x, self.dtype, self.device

    @property
    def key(self) -> tuple[str, str, str, str, str, float, str, str]:
        """What tells it from all others of a run."""
        return self.suite, self.case, self.provider, self.mode, self.metric, self.x, self.dtype, self.device

    @property
    def words(self) -> str:
        """The figure with its unit: "12.3 ms"."""
        return in_words(self.p50, self.unit, self.metric)

    @property
    def spread(self) -> str:
        """Its range, p20 to p80: "12.1 ms - 12.6 ms"."""
        return " - ".join(in_words(value, self.unit, self.metric) for value in (self.p20, self.p80))


def write(path: Path, found: Iterable[Record]) -> None:
    """Write all records to ``path``, whole or not at all."""
    text = "".join(json.dumps(asdict(record)) + "\n" for record in found)
    write_whole(path, lambda temporary: temporary.write_text(text))


def read(path: Path) -> list[Record]:
    """The records of a file.

    Raises:
        ValueError: it has none, or a line is no measurement; the message names file and line.
    """
    found = [_record(line, f"{path}, line {number}") for number, line in enumerate(path.read_text().splitlines(), 1)]
    if not found:
        raise ValueError(f"{path}: got no records, expected measurements, one JSON line each")
    return found


def _record(line: str, where: str) -> Record:
    try:
        record = Record(**json.loads(line))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{where}: got {line[:60]!r}, expected a measurement ({error})") from error
    for name, value in vars(record).items():
        wanted = Record.__annotations__[name]
        if isinstance(value, bool) or not isinstance(value, str if wanted is str else int | float):
            raise ValueError(f"{where}, {name}: got {value!r}, expected {'text' if wanted is str else 'a number'}")
    if record.p20 > record.p50 or record.p50 > record.p80:  # NaN, as an error may be, is neither
        got = f"p20 {record.p20:g}, p50 {record.p50:g}, p80 {record.p80:g}"
        raise ValueError(f"{where}: got {got}, expected them in ascending order")
    return record


def load(paths: Iterable[Path]) -> list[Record]:
    """All records of files, and of the files in folders and in the folders below them.

    Raises:
        FileNotFoundError: there is no such file or folder, or no record file in a folder.
        ValueError: see `read`.
    """
    found: list[Record] = []
    for path in paths:
        files = sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            got = "a folder without such files" if path.is_dir() else "no such file"
            raise FileNotFoundError(f"{path}: got {got}, expected a record file or a folder of files *{SUFFIX}")
        found += [record for file in files for record in read(file)]
    return found


def newest(found: Sequence[Record]) -> list[Record]:
    """One record for each key: of several the one with the latest date, at the position of the first."""
    latest = {record.key: record for record in sorted(found, key=lambda record: record.date)}
    return [latest[key] for key in dict.fromkeys(record.key for record in found)]


def grouped(found: Iterable[Record], name: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Records by name, groups and records in the order in which they come."""
    groups: dict[Any, list[Record]] = {}
    for record in found:
        groups.setdefault(name(record), []).append(record)
    return groups


_LARGE = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))


def in_words(value: float, unit: str, metric: str = "") -> str:
    """A figure with its unit and the prefix that suits it: "12.3 ms", "85.3 G", "3e-03" for an error."""
    if metric in ("error", "exponent"):
        return f"{value:.0e}" if metric == "error" else f"{value:.2f}"
    counted = metric in ("multiply-adds", "parameters")
    if not counted and unit not in ("s", "B", "B/s", "FLOP/s"):
        return f"{number(value)} {unit if unit != '1' else ''}".rstrip()
    prefixes = _SMALL if unit == "s" else _LARGE
    scale, prefix = next((pair for pair in prefixes if abs(value) >= pair[0]), prefixes[-1] if value else (1.0, ""))
    if counted:
        return f"{value / scale:.2f} {prefix}".rstrip()
    return f"{number(value / scale)} {prefix}{unit}"


def number(value: float) -> str:
    """Three significant digits from 1 to a million, three decimals from 0.001 to 1."""
    size = abs(value)
    if not 1e-3 <= size < 1e6:
        return f"{value:.2e}" if value else "0"
    return f"{value:,.{sum(size < limit for limit in (99.95, 9.995, 0.9995))}f}"
