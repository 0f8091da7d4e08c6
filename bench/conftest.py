"""Options of ``pytest bench``: where and how much."""

import functools

import pytest

from mar_fast.bench import harness
from mar_fast.bench.case import RunOptions
from mar_fast.bench.suites import SUITES


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--full`` for the cases of a full run, ``--bench-device``, ``--bench-dtype``."""
    group = parser.getgroup("mar_fast")
    group.addoption("--full", action="store_true", help="all cases of mar-fast bench and not only the quick ones")
    group.addoption("--bench-device", default="auto", choices=("auto", "cpu", "cuda"))
    group.addoption("--bench-dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))


@functools.cache
def options_of(config: pytest.Config) -> RunOptions:
    """The options of this run; ceilings are measured for it once."""
    given = config.option
    return harness.options_for(device=given.bench_device, dtype=given.bench_dtype, quick=not given.full)[0]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each suite, case and provider: ``-k encoder``, ``-k "kernels and SDPA"``."""
    if "measured" not in metafunc.fixturenames:
        return
    found = [
        pytest.param((suite, number, one.name), id=f"{suite}, {case.name}, x = {case.x:g}, {case.mode}, {one.name}")
        for suite in harness.chosen_suites(["all"])
        for number, case in enumerate(SUITES[suite].cases(options_of(metafunc.config)))
        for one in case.providers
    ]
    metafunc.parametrize("measured", found)


@pytest.fixture
def options(request: pytest.FixtureRequest) -> RunOptions:
    """The options of this run."""
    return options_of(request.config)
