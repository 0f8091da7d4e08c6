"""Measurements as tidy rows: one JSON line for each, appended as they are made and complete at every moment."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mar_fast.files import write_whole
from mar_fast.timing import Spread

OURS = "mar_fast"
# All steps and stages of these suites run this project's code, whatever they are called.
OWN_SUITES = ("waterfall", "pipeline")


def is_ours(suite: str, provider: str) -> bool:
    """Whether a provider of a suite runs this project's code; all others are peers."""
    return suite in OWN_SUITES or provider == OURS or provider.startswith(f"{OURS}, ")


@dataclass(frozen=True)
class Record:
    """One measurement: ``metric`` of ``provider`` on ``case`` of ``suite``; ``x`` is for the x axis of a plot.

    ``note`` is for words that belong to it, such as why a provider is absent.
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

    @classmethod
    def of(
        cls,
        environment: Mapping[str, str | int],
        spread: Spread,
        *,
        suite: str,
        case: str,
        provider: str,
        mode: str,
        metric: str,
        unit: str,
        dtype: str,
        x: float,
        note: str = "",
    ) -> "Record":
        """A record of ``spread``, measured in ``environment`` (see `machine.environment`)."""
        device, torch, triton, commit, date = (
            str(environment[key]) for key in ("device", "torch", "triton", "commit", "date")
        )
        return cls(
            suite, case, provider, mode, metric, unit, x, spread.p20, spread.p50, spread.p80, spread.n,
            device, dtype, torch, triton, commit, date, note,
        )  # fmt: skip


def write(path: Path, records: Iterable[Record]) -> None:
    """Write all records to ``path``, whole or not at all."""
    text = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    write_whole(path, lambda temporary: temporary.write_text(text))


def read(path: Path) -> list[Record]:
    """The records of a file.

    Raises:
        ValueError: a line is no record; the message names file and line.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            records.append(Record(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: got {line[:60]!r}, expected a measurement ({error})") from error
    return records
