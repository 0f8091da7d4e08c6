"""Two runs of the benchmarks set side by side: a table of ratios, ours against the baseline of the same run.

A machine drifts as a whole. The providers of a case are timed in turn, so drift hits them alike, and the ratio
baseline / ours of one run does not feel it. Ours is worse where that ratio fell by more than 5 % and the ranges of the
two ratios, p20 to p80, do not meet; better where it rose by as much. What is newly withheld or unavailable is worse.

Records hold percentiles, not rounds, so the range of a ratio is put together from those of both times as if rounds
scattered independently: in logarithms, the root of the sum of squares on each side. Percentiles of few rounds
understate a range: `FEW_ROUNDS` widens it by 80 % for 5 rounds, 20 % for 10, 5 % for 20.

Tested with drawn runs of 30 cases whose true ratio moves by 0.75 % (one sigma) from run to run, and whose rounds
scatter by 1 % with 5 rounds, 1.5 % with 10, 2 % with 20 or more: fewer than 5 % of comparisons of unchanged code raise
an alarm, more than 95 % of cases that became 10 % slower are found. Where rounds scatter more, less is found; where
the ratio itself moves more from run to run, there are more false alarms.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from mar_fast.timing import Spread

from .records import NO_TIME, Record

LEAST = 0.05  # of the ratio before
FEW_ROUNDS = 20.0


class Change(NamedTuple):
    """One of our times in both runs: the baseline's over it, with the ranges of these ratios."""

    record: Record
    before: Spread
    after: Spread

    @property
    def share(self) -> float:
        """By how much the ratio changed: -0.1 is 10 % slower against the baseline."""
        return self.after.p50 / self.before.p50 - 1

    @property
    def verdict(self) -> str:
        """ "worse", "better" or ""."""
        if self.share < -LEAST and self.after.p80 < self.before.p20:
            return "worse"
        return "better" if 1 / (1 + self.share) < 1 - LEAST and self.after.p20 > self.before.p80 else ""


@dataclass(frozen=True)
class RunComparison:
    """What two runs say of our code.

    Attributes:
        changes: Our times that have a baseline in both runs.
        lost: What is newly withheld or unavailable of ours.
        unjudged: How many of our times are in one run only or have no baseline.
        notices: What differs between the runs besides our code.
    """

    changes: list[Change]
    lost: list[Record]
    unjudged: int
    notices: list[str]

    @property
    def regressed(self) -> bool:
        """Whether anything of ours got worse."""
        return bool(self.lost) or any(change.verdict == "worse" for change in self.changes)

    def __str__(self) -> str:
        cells = [["ours", "baseline", "before (p20 - p80)", "after (p20 - p80)", "change", ""]]
        for one in sorted(self.changes, key=lambda change: ("worse", "better", "").index(change.verdict)):
            spreads = (f"{spread.p50:.2f}x ({spread.p20:.2f} - {spread.p80:.2f})" for spread in one[1:])
            cells.append([_where(one.record), one.record.baseline, *spreads, f"{one.share:+.1%}", one.verdict])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        verdicts = [change.verdict for change in self.changes]
        lines = [f"CAUTION: {notice}; a change below may be due to that" for notice in self.notices]
        lines += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        lines += [f"worse: {_where(record)} is {record.metric} now: {record.note}" for record in self.lost]
        worse = verdicts.count("worse") + len(self.lost)
        lines.append(f"{len(verdicts)} ratios compared: {worse} worse, {verdicts.count('better')} better.")
        if self.unjudged:
            lines.append(f"{self.unjudged} times of ours are in one run only, or have no baseline there.")
        return "\n".join(lines)


def compare(before: list[Record], after: list[Record], *, allow_other_device: bool = False) -> RunComparison:
    """Set the records of two runs side by side, also of two devices if that is asked for.

    Raises:
        ValueError: the devices differ, or a run has a record twice.
    """
    notices = []
    for name in ("device", "torch", "triton"):
        values = ["; ".join(sorted({getattr(record, name) for record in run})) for run in (before, after)]
        if name == "device" and values[0] != values[1] and not allow_other_device:
            raise ValueError(f"after: got measurements on {values[1]}, expected them on {values[0]} as before")
        if values[0] != values[1]:
            notices.append(f"{name} differs: {values[0]} before, {values[1]} after")
    old, new = (_by_key(run, name, allow_other_device) for run, name in ((before, "before"), (after, "after")))
    ratios, later = _ratios(old), _ratios(new)
    changes = [Change(new[key], ratio, later[key]) for key, ratio in ratios.items() if key in later]
    lost = [record for key, record in new.items() if record.ours and record.metric in NO_TIME and key not in old]
    ours = [one for one in (old | new).values() if one.ours and one.metric == "time" and one.provider != one.baseline]
    return RunComparison(changes, lost, len(ours) - len(changes), notices)


def _by_key(run: list[Record], name: str, any_device: bool) -> dict[object, Record]:
    """Times, and why there is none, by what tells them apart."""
    found: dict[object, Record] = {}
    for record in run:
        if record.metric in ("time", *NO_TIME):
            key = replace(record, device="").key if any_device else record.key
            if key in found:
                raise ValueError(f"{name}: got two records of {_where(record)}, {record.metric}; expected one")
            found[key] = record
    return found


def _ratios(run: dict[object, Record]) -> dict[object, Spread]:
    times = {key: record for key, record in run.items() if record.metric == "time" and record.p20 > 0}
    baselines = {record.workload: record for record in times.values() if record.provider == record.baseline}
    return {
        key: ratio(record, baselines[record.workload])
        for key, record in times.items()
        if record.ours and record.provider != record.baseline and record.workload in baselines
    }


def ratio(ours: Record, baseline: Record) -> Spread:
    """The baseline's time over ours; the range is unlimited where a single round tells none."""
    rounds, middle = min(ours.n, baseline.n), baseline.p50 / ours.p50
    if rounds < 2:
        return Spread(0.0, middle, math.inf, rounds)
    low = math.hypot(math.log(baseline.p50 / baseline.p20), math.log(ours.p80 / ours.p50))
    high = math.hypot(math.log(baseline.p80 / baseline.p50), math.log(ours.p50 / ours.p20))
    wider = 1 + FEW_ROUNDS / rounds**2
    return Spread(middle * math.exp(-low * wider), middle, middle * math.exp(high * wider), rounds)


def _where(record: Record) -> str:
    parts = (record.suite, record.case, record.mode, f"x {record.x:g}", record.dtype, record.provider)
    return ", ".join(part for part in parts if part)
