"""What the tuner measures on: the current GPU. Operands are those of the cases, at real size."""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from ..launch_config import architecture, forced
from . import cases, matrix
from .compile_matrix import Report
from .matrix import Found

# Cycles that the device waits before a timed run, so that the host has queued all its launches by then: about 1 ms.
HEAD_START = 2_000_000
MOST_SETS = 8


class Gpu:
    """The current GPU, for `tune.tune`.

    Raises:
        RuntimeError: torch finds none.
    """

    def __init__(self, jobs: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU here")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.architecture = architecture(torch.empty(0, device=self.device))
        name = torch.cuda.get_device_name(self.device)
        self.description = f"{name}, torch {torch.__version__}, Triton {triton.__version__}"
        self.jobs = jobs or os.cpu_count() or 1
        self._place: int | None = None
        self._sets: list[cases.Calls] = []

    def compile(self, found: Sequence[Found]) -> Iterator[tuple[int, Report]]:
        """The compiler's reports, from several processes."""
        return matrix.each(matrix.compile_found, found, self.jobs)

    def outcome(self, run: Found) -> list[Tensor]:
        """Results of one run; what it leaves unwritten is NaN, which a block that was freed before might hide."""
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
        try:
            results = self._run(run, 0)
            torch.cuda.synchronize(self.device)
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        every = results if isinstance(results, tuple | list) else [results]
        return [result for result in every if isinstance(result, Tensor)]

    def seconds(self, run: Found, turn: int) -> float:
        """The device's time for one run, on operands that are not in its cache."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START)
        start.record()
        self._run(run, turn)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def _run(self, run: Found, turn: int) -> Any:
        if self._place != run.case:
            self._fill(run.case)
        calls = self._sets[turn % len(self._sets)]
        with forced({run.kernel: run.config}) if run.config else nullcontext():
            return calls[run.call]()

    def _fill(self, place: int) -> None:
        """As many sets of a case's operands as push each other out of the cache, and at least two."""
        self._place, self._sets = None, []
        torch.cuda.empty_cache()
        make = functools.partial(cases.cases()[place].calls, self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._sets = [make()]
        size = max(torch.cuda.memory_allocated(self.device) - before, 1)
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._sets += [make() for _ in range(min(max(2, 2 * cache // size + 1), MOST_SETS) - 1)]
        self._place = place
