"""Options of ``pytest bench``: where and how much."""

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


def options_of(config: pytest.Config) -> RunOptions:
    """The options of this run; ceilings are measured for it once."""
    if not hasattr(config, "mar_fast_options"):
        given = config.option
        config.mar_fast_options = harness.options_for(  # type: ignore[attr-defined]
            device=given.bench_device, dtype=given.bench_dtype, quick=not given.full
        )[0]
    return config.mar_fast_options  # type: ignore[attr-defined]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each suite, case and provider: ``-k encoder``, ``-k "kernels and SDPA"``."""
    if "measured" not in metafunc.fixturenames:
        return
    found, names = [], []
    for name in harness.chosen_suites(["all"]):
        for number, case in enumerate(SUITES[name].cases(options_of(metafunc.config))):
            for provider in case.providers:
                found.append((name, number, provider.name))
                names.append(f"{name}, {case.name}, x = {case.x:g}, {case.mode}, {provider.name}")
    metafunc.parametrize("measured", found, ids=names)


@pytest.fixture
def options(request: pytest.FixtureRequest) -> RunOptions:
    """The options of this run."""
    return options_of(request.config)
