"""Two runs of the benchmarks set side by side: what has changed beyond the noise of both.

A run gives the median of n rounds with the 20th and 80th percentile. How far that median is from the true one follows
without assuming a distribution: the standard error of a median is 1 / (2 f sqrt(n)), where f is the density there,
and 60 % of the rounds lie between p20 and p80, so that f is about 0.6 / (p80 - p20). All in logarithms, so that widths
are relative. Percentiles of few rounds understate the width and vary themselves, which `FEW_ROUNDS` makes up for.

Two runs of the same code differ by more than their rounds do: memory is laid out otherwise, clocks are another. Each
row is therefore taken to be off by a further `RUN_TO_RUN`. The allowance is z standard errors of the difference, z such
that all ratios of a comparison together give a false alarm once in twenty comparisons, and never below `LEAST_Z`.

A shared machine also drifts as a whole. Providers of a case are timed in turn, so drift hits them alike, and the ratio
of our time to a peer's in the same run does not feel it. Both are judged. A row is worse if its time is longer beyond
the noise, or the ratio to its peer is. It is laid to the machine only where the ratio to the peer has not become worse
and the machine's own measured rates fell, beyond their noise, enough to explain it: time lost by ours and by the peer
alike, on a machine that is as fast as before, is still a loss.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

from . import rows
from .records import Record, is_ours
from .rows import Key

if TYPE_CHECKING:
    from rich.console import Console

RUN_TO_RUN = 0.02
FEW_ROUNDS = 12.0
LEAST_Z, FALSE_ALARMS = 3.0, 0.05

# Peak memory has no rounds. On a CPU the kernel counts resident pages in batches and the allocator keeps some.
MEMORY_SHARE, MEMORY_BYTES = 0.1, 8 * 2**20
# An error is the same at every run of the same code; another order of summation moves it, rarely twofold.
ERROR_FACTOR, ERROR_FLOOR = 2.0, 1e-7

TIMED = {"time": 1, "throughput": -1}  # the sign of the logarithm of a change that is a loss
JUDGED = (*TIMED, "peak memory", "error")


class Verdict(StrEnum):
    """What became of a row."""

    WORSE = "worse"
    BETTER = "better"
    MACHINE = "machine"
    STEADY = "steady"
    UNKNOWN = "cannot tell"
    ONLY_BEFORE = "only before"
    ONLY_AFTER = "only after"


@dataclass(frozen=True)
class Change:
    """One row in both runs, or in one of them.

    Attributes:
        before: The row of the first run, None if it has none.
        after: That of the second.
        verdict: What became of it. MACHINE: slower or faster, as the machine itself and the peer are.
        ratio: After over before, of the medians; NaN if it is in one run only.
        noise: A ratio up to 1 + noise, or down to 1 / (1 + noise), may be chance.
        peer: The provider that was measured in turn with it and that it is also judged by; "" if there is none.
        peer_ratio: After over before of its time in units of the peer's.
        peer_noise: As ``noise``, for ``peer_ratio``.
    """

    before: Record | None
    after: Record | None
    verdict: Verdict
    ratio: float = math.nan
    noise: float = math.nan
    peer: str = ""
    peer_ratio: float = math.nan
    peer_noise: float = math.nan

    @property
    def record(self) -> Record:
        """The row after, or the one before where that is all there is."""
        found = self.after or self.before
        assert found is not None
        return found

    @property
    def regression(self) -> bool:
        """Whether this project's own code got worse: a peer may, and a step that was not there before may not."""
        return is_ours(self.record.suite, self.record.provider) and self.verdict is Verdict.WORSE


def compare(before: list[Record], after: list[Record], *, allow_other_device: bool = False) -> list[Change]:
    """Every row that is judged ("time", "throughput", "peak memory", "error"), and rows that only one run has.

    Args:
        before: The rows of one run.
        after: Those of the other.
        allow_other_device: Set rows of different devices side by side; without it these are an error.

    Returns:
        Changes in the order of ``before``, then what is only in ``after``. A provider that is newly withheld, because
        its results are wrong, is WORSE.

    Raises:
        ValueError: the devices differ, or a run has a row twice.
    """
    devices = [sorted({record.device for record in run}) for run in (before, after)]
    if devices[0] != devices[1] and not allow_other_device:
        raise ValueError(
            f"after: got measurements on {'; '.join(devices[1]) or 'nothing'}, expected them on "
            f"{'; '.join(devices[0]) or 'nothing'} as before (times of different devices do not show a change of code)"
        )
    old, new = (_by_key(run, name, allow_other_device) for run, name in ((before, "before"), (after, "after")))
    timed = [name for name in old if name in new and name.metric in TIMED]
    z = critical(sum(1 if _peer(name, old, new) is None else 2 for name in timed))
    same_software = _software(before) == _software(after)
    changes = []
    for name, row in old.items():
        if name in new:
            if name.metric in JUDGED:
                changes.append(_judge(name, old, new, z, same_software))
        else:
            changes.append(Change(row, None, Verdict.ONLY_BEFORE))
    for name, row in new.items():
        if name not in old:
            wrong = name.metric == "withheld"
            changes.append(Change(None, row, Verdict.WORSE if wrong else Verdict.ONLY_AFTER))
    return changes


def critical(count: int) -> float:
    """How many standard errors are beyond chance where ``count`` ratios are looked at together (Bonferroni's bound)."""
    return max(LEAST_Z, NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * max(count, 1))))


def median_error(record: Record) -> float:
    """The relative standard error of a row's median; infinite where one round, or no width at all, tells nothing."""
    if record.n < 2 or not 0 < record.p20 <= record.p50 <= record.p80 < math.inf:
        return math.inf
    width = math.log(record.p80 / record.p20)
    return width / (1.2 * math.sqrt(record.n)) * (1 + FEW_ROUNDS / record.n**2)


def notices(before: list[Record], after: list[Record]) -> list[str]:
    """What differs between the surroundings of two runs and may explain a change as well as the code does."""
    said = []
    for name in ("device", "torch", "triton"):
        values = [sorted({getattr(record, name) for record in run}) for run in (before, after)]
        if values[0] != values[1]:
            said.append(f"{name} differs: {'; '.join(values[0])} before, {'; '.join(values[1])} after")
    return said


def run(
    a: Path, b: Path, *, fail_on_regression: bool, allow_other_device: bool = False, console: "Console | None" = None
) -> int:
    """Compare two record files (or folders of them) and print what changed.

    Args:
        a: The run before.
        b: The run after.
        fail_on_regression: Whether a regression is exit code 1.
        allow_other_device: Go on where the devices differ.
        console: Where to print; standard output by default.

    Returns:
        The exit code: 1 if ``fail_on_regression`` and this project's code got worse anywhere, else 0.

    Raises:
        ValueError: the devices differ, a row is there twice, or a file holds no measurements.
        OSError: a file cannot be read.
    """
    from .compare_table import print_changes

    before, after = rows.load([a]), rows.load([b])
    changes = compare(before, after, allow_other_device=allow_other_device)
    print_changes(changes, console=console, notices=notices(before, after))
    return int(fail_on_regression and any(change.regression for change in changes))


def _by_key(run: Iterable[Record], name: str, any_device: bool) -> dict[Key, Record]:
    found: dict[Key, Record] = {}
    for record in run:
        identity = rows.key(record)
        if any_device:
            identity = identity._replace(device="")
        if identity in found:
            raise ValueError(f"{name}: got two rows for {identity}, expected one")
        found[identity] = record
    return found


def _software(run: Iterable[Record]) -> set[tuple[str, str]]:
    return {(record.torch, record.triton) for record in run}


Rows = Mapping[Key, Record]


def _judge(name: Key, old: Rows, new: Rows, z: float, same_software: bool) -> Change:
    before, after = old[name], new[name]
    if name.metric == "peak memory":
        return _judge_memory(before, after)
    if name.metric == "error":
        return _judge_error(before, after)
    sign = TIMED[name.metric]
    change, noise = _difference([after], [before], z)
    if not math.isfinite(noise):
        return Change(before, after, Verdict.UNKNOWN, _ratio(before, after), noise)
    peer = _peer(name, old, new)
    relative, relative_noise = math.nan, math.nan
    if peer is not None:
        relative, relative_noise = _difference([after, old[peer]], [before, new[peer]], z)
    rate_noise = z * math.sqrt(2) * RUN_TO_RUN  # of the machine's own rates, which are medians of long calls
    verdict = Verdict.STEADY
    for direction, found in ((sign, Verdict.WORSE), (-sign, Verdict.BETTER)):
        # A peer is a measure only while its own code is the same; NaN, for no peer, is never beyond anything.
        against_peer = same_software and direction * relative > relative_noise
        if direction * change > noise:
            shift = _machine_change(name, old, new, direction * sign)
            explained = shift > rate_noise and direction * change - shift <= math.hypot(noise, rate_noise)
            verdict = Verdict.MACHINE if explained and not against_peer else found
        elif against_peer:
            verdict = found
    return Change(
        before, after, verdict, math.exp(change), math.expm1(noise),
        peer.provider if peer else "", math.exp(relative), math.expm1(relative_noise),
    )  # fmt: skip


def _difference(numerator: list[Record], denominator: list[Record], z: float) -> tuple[float, float]:
    """The logarithm of a ratio of medians, and how far from 0 it may be by chance."""
    every = [*numerator, *denominator]
    if any(not 0 < record.p50 < math.inf for record in every):
        return math.nan, math.inf
    change = sum(math.log(record.p50) for record in numerator) - sum(math.log(record.p50) for record in denominator)
    variance = sum(median_error(record) ** 2 + RUN_TO_RUN**2 for record in every)
    return change, z * math.sqrt(variance)


def _ratio(before: Record, after: Record) -> float:
    return after.p50 / before.p50 if before.p50 else math.nan


def _peer(name: Key, old: Rows, new: Rows) -> Key | None:
    for provider in rows.BASELINES:
        peer = name._replace(provider=provider)
        if peer in old and peer in new:
            return peer if peer != name else None
    return None


def _machine_change(name: Key, old: Rows, new: Rows, direction: int) -> float:
    """The logarithm of how much slower (direction 1) or faster (-1) the machine itself became; 0 if unknown."""
    changes = [0.0]
    for rate, before in old.items():
        after = new.get(rate)
        if after is None or (rate.suite, rate.metric, rate.device) != ("machine", "rate", name.device):
            continue
        if (rate.case == "copy" or rate.dtype == name.dtype) and min(before.p50, after.p50) > 0:
            changes.append(direction * math.log(before.p50 / after.p50))
    return max(changes)


def _judge_memory(before: Record, after: Record) -> Change:
    allowed = max(MEMORY_SHARE * before.p50, MEMORY_BYTES)
    difference = after.p50 - before.p50
    verdict = Verdict.STEADY if abs(difference) <= allowed else Verdict.WORSE if difference > 0 else Verdict.BETTER
    return Change(before, after, verdict, _ratio(before, after), allowed / before.p50 if before.p50 else math.inf)


def _judge_error(before: Record, after: Record) -> Change:
    def beyond(larger: float, smaller: float) -> bool:
        return not larger <= max(ERROR_FACTOR * smaller, ERROR_FLOOR)  # NaN is beyond anything

    if beyond(after.p50, before.p50) and not math.isnan(before.p50):
        verdict = Verdict.WORSE
    else:
        verdict = Verdict.BETTER if beyond(before.p50, after.p50) and not math.isnan(after.p50) else Verdict.STEADY
    return Change(before, after, verdict, _ratio(before, after), ERROR_FACTOR - 1)
