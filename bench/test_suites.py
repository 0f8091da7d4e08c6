"""The suites under pytest-benchmark: ``pytest bench --benchmark-only -k encoder``.

The cases and candidates are those of ``mar-fast bench``. pytest-benchmark runs one after the other, so a drift of the
machine falls on some of them only: for a comparison take ``mar-fast bench``, which runs them in turn.
"""

import gc
import itertools
import math
from typing import Any

import pytest
import torch

from mar_fast import machine
from mar_fast.bench import runner
from mar_fast.bench.case import Setting
from mar_fast.bench.records import is_ours
from mar_fast.bench.suites import SUITES, flops


@pytest.fixture(autouse=True)
def _nothing_left() -> Any:
    yield
    gc.collect()


def test_candidate(benchmark: Any, measured: tuple[str, int, str], setting: Setting) -> None:
    """Right by float64, then timed; error, memory and time to compile go with the figures."""
    suite, number, provider = measured
    case = next(itertools.islice(SUITES[suite].cases(setting), number, None))
    candidate = next(one for one in case.candidates if one.provider == provider)
    torch.compiler.reset()
    try:
        prepared = candidate.prepare()
    except Exception as error:
        if is_ours(suite, provider):
            raise
        pytest.skip(f"absent: {runner.reason(error)}")
    if candidate.checked:
        truth = (candidate.truth or case.truth)()
        difference = max(runner.relative(got, want) for got, want in zip(prepared.outputs(), truth, strict=True))
        assert difference <= case.bound
        benchmark.extra_info["error"] = difference
    benchmark.group = f"{case.suite}: {case.name}, x = {case.x:g}, {case.mode}"
    benchmark.extra_info["provider"] = candidate.provider
    benchmark.extra_info["dtype"] = case.dtype_name
    benchmark.extra_info["compile seconds"] = prepared.compile_seconds
    benchmark.pedantic(prepared.run, rounds=5, warmup_rounds=2)
    benchmark.extra_info["peak memory"] = machine.peak_memory(prepared.run, setting.device)


def test_flops(benchmark: Any, setting: Setting) -> None:
    """The suite that runs nothing: how long the arithmetic takes, and that its numbers are the paper's."""
    found = benchmark(SUITES["flops"].conclude, setting, [])
    for row in found:
        if row.metric == "multiply-adds" and row.provider == "original, by formula":
            size = next((size for size in flops.PAPER if row.case == f"ViT-{flops.LETTERS[size]}"), None)
            if size is not None:
                assert math.isclose(round(row.value / 1e9), flops.PAPER[size][0][row.x])
