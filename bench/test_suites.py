"""The suites under pytest-benchmark: ``pytest bench --benchmark-only -k encoder``.

The cases and providers are those of ``mar-fast bench``. pytest-benchmark runs one after the other, so a drift of the
machine falls on some of them only: for a comparison take ``mar-fast bench``, which runs them in turn.
"""

import gc
import itertools
from typing import Any

import pytest
import torch

from mar_fast import machine
from mar_fast.bench import harness
from mar_fast.bench.case import RunOptions
from mar_fast.bench.records import OURS, OWN_SUITES
from mar_fast.bench.suites import SUITES


@pytest.fixture(autouse=True)
def _nothing_left() -> Any:
    yield
    gc.collect()


def test_provider(benchmark: Any, measured: tuple[str, int, str], options: RunOptions) -> None:
    """Right by float64, then timed; error, memory and time to compile go with the figures."""
    suite, number, name = measured
    case = next(itertools.islice(SUITES[suite].cases(options), number, None))
    provider = next(one for one in case.providers if one.name == name)
    torch.compiler.reset()
    try:
        prepared = provider.prepare()
    except Exception as failure:
        if suite in OWN_SUITES or name.startswith(OURS):
            raise
        pytest.skip(f"unavailable: {harness.reason(failure)}")
    if provider.checked:
        error = harness.difference(prepared.outputs(), (provider.expected or case.expected)())
        assert error <= case.tolerance
        benchmark.extra_info["error"] = error
    benchmark.group = f"{case.suite}: {case.name}, x = {case.x:g}, {case.mode}"
    benchmark.extra_info |= {"provider": name, "dtype": case.dtype_name, "compile seconds": prepared.compile_seconds}
    benchmark.pedantic(prepared.run, rounds=5, warmup_rounds=2)
    benchmark.extra_info["peak memory"] = machine.peak_memory(prepared.run, options.device)
