"""Timing for a shared machine: warm, interleaved, medians with spread."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch


@dataclass(frozen=True)
class Spread:
    """Percentiles of ``n`` measurements."""

    p20: float
    p50: float
    p80: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Percentiles of a list with at least one value."""
        p20, p50, p80 = (float(value) for value in np.percentile(values, (20, 50, 80)))
        return cls(p20, p50, p80, len(values))


# A GPU first waits for this many cycles (about 0.3 ms), so that all launches of a call are queued by then and what they
# cost the host is not counted.
HEAD_START = 500_000
# Written between calls to flush the caches, which hold less.
FLUSHED_BYTES = 256 * 2**20


@cache
def _flushed(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU the device's time alone, measured by events, from cold caches."""
    if device.type == "cuda":
        _flushed(device).zero_()
        torch.cuda._sleep(HEAD_START)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    budget: float,
    min_rounds: int = 5,
    max_rounds: int = 100,
    warm: int = 2,
    on_round: Callable[[float], None] = lambda done: None,
) -> dict[str, Spread]:
    """Time the candidates in turn, A B C A B C ..., so that a drift of the machine affects all of them alike.

    Args:
        candidates: What to call, by name.
        device: Where they run.
        budget: Seconds for all rounds together.
        min_rounds: Rounds even if they exceed the budget.
        max_rounds: Rounds even if the budget allows more.
        warm: Calls of each candidate before the first round.
        on_round: Called after each round with the share of the work that is done.

    Returns:
        Seconds of one call, by name.
    """
    for run in candidates.values():
        for _ in range(warm):
            run()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for number in range(max_rounds):
        spent = time.perf_counter() - begin
        if number >= min_rounds and spent * (number + 1) / number > budget:
            break
        for name, run in candidates.items():
            taken[name].append(seconds(run, device))
        spent = time.perf_counter() - begin
        on_round(min(1.0, max(spent / budget, (number + 1) / max_rounds)))
    return {name: Spread.of(values) for name, values in taken.items()}
