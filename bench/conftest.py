"""Options of ``pytest bench``: where and how much."""

import pytest

from mar_fast.bench import session
from mar_fast.bench.case import Setting


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--full`` for the cases of a full run, ``--bench-device``, ``--bench-dtype``."""
    group = parser.getgroup("mar_fast")
    group.addoption("--full", action="store_true", help="all cases of mar-fast bench and not only the quick ones")
    group.addoption("--bench-device", default="auto", choices=("auto", "cpu", "cuda"))
    group.addoption("--bench-dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))


def setting_of(config: pytest.Config) -> Setting:
    """The setting of this run; ceilings are measured for it once."""
    if not hasattr(config, "mar_fast_setting"):
        options = config.option
        config.mar_fast_setting = session.setting_for(  # type: ignore[attr-defined]
            device=options.bench_device, dtype=options.bench_dtype, quick=not options.full
        )
    return config.mar_fast_setting[0]  # type: ignore[attr-defined]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each suite, case and candidate: ``-k encoder``, ``-k "kernels and SDPA"``."""
    if "measured" not in metafunc.fixturenames:
        return
    from mar_fast.bench import session
    from mar_fast.bench.suites import SUITES

    setting, found, names = setting_of(metafunc.config), [], []
    for name in session.chosen_suites(["all"]):
        for number, case in enumerate(SUITES[name].cases(setting)):
            for candidate in case.candidates:
                found.append((name, number, candidate.provider))
                names.append(f"{name}, {case.name}, x = {case.x:g}, {case.mode}, {candidate.provider}")
    metafunc.parametrize("measured", found, ids=names)


@pytest.fixture
def setting(request: pytest.FixtureRequest) -> Setting:
    """The setting of this run."""
    return setting_of(request.config)
