"""The suite of transformers' models before and after `mar_fast.accelerate`, on tiny ones."""

from dataclasses import replace

import pytest
import torch
from test_suites import CPU, ENVIRONMENT, RATES, tiny  # noqa: F401 (a fixture for every test)

from mar_fast.bench import records, runner, session, transformers_peers
from mar_fast.bench.case import Setting
from mar_fast.bench.suites import SUITES, dropin

pytest.importorskip("transformers")


def setting(dtype=torch.float32, **options):
    return Setting(CPU, dtype, ("small",), (2,), budget=1e-3, **options)


def cases(dtype=torch.float32, with_compiled=False):
    one = setting(dtype)
    yield dropin.inference_case(one, "small", 2, 1.0, with_compiled)
    yield dropin.inference_case(one, "small", 2, 0.5, with_compiled)
    yield dropin.step_case(one, "small", 2, 1.0, with_compiled)
    yield dropin.step_case(one, "small", 2, 0.5, with_compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_and_after_are_one_function(dtype):
    """Ours is held against transformers' own code in float64, under the same mask."""
    for case in cases(dtype):
        outcome = runner.measure(case, setting(dtype), RATES)
        names = ["transformers", "mar_fast"]
        if case.mode == "inference" and case.x < 1:
            names.insert(1, "transformers, masked by hand")
        assert [result.provider for result in outcome.results] == names and not outcome.wrong
        for result in outcome.results:
            assert not result.absent and not result.withheld and result.time, result
            assert result.error < (1e-5 if dtype == torch.float32 else 5e-2), (case, result)
        assert outcome.floor > 0


@pytest.mark.compiles
@pytest.mark.parametrize("number", [1, 3])  # those with a mask: the others compile no less of it
def test_compiled(number):
    case = list(cases(with_compiled=True))[number]
    chosen = tuple(one for one in case.candidates if one.provider.endswith(", compiled"))
    by = "transformers, masked by hand" if case.mode == "inference" else "transformers"
    assert [one.provider for one in chosen] == [f"{by}, compiled", "mar_fast, compiled"]
    for result in runner.measure(replace(case, candidates=chosen, yardstick=""), setting(), RATES).results:
        assert result.error < 1e-5 and result.compile_seconds > 0 and result.time, result


def test_an_accelerated_model_that_is_wrong_gets_no_speed(monkeypatch):
    right = transformers_peers.accelerated

    def wrong(model, **options):
        with torch.no_grad():
            model.classifier.bias.add_(1.0)
        return right(model, **options)

    monkeypatch.setattr(transformers_peers, "accelerated", wrong)
    case = dropin.inference_case(setting(), "small", 2, 0.5, False)
    outcome = runner.measure(case, setting(), RATES)
    assert outcome.wrong and outcome.of("mar_fast").withheld and outcome.of("mar_fast").time is None
    assert outcome.of("transformers").time and outcome.of("transformers, masked by hand").time


def test_cases():
    """Dense and at 50 %, inference and training; short of time inference alone, and nothing that compiles."""
    found = [(case.mode, case.x, len(case.candidates)) for case in dropin.cases(setting())]
    assert found == [
        ("inference", 1.0, 4), ("inference", 0.5, 5), ("training step", 1.0, 4), ("training step", 0.5, 4),
    ]  # fmt: skip
    quick = [(case.mode, case.x, len(case.candidates)) for case in dropin.cases(setting(quick=True))]
    assert quick == [("inference", 1.0, 2), ("inference", 0.5, 3)]


def test_without_transformers(monkeypatch):
    """Named, it is an error; among all suites it is left out."""
    monkeypatch.setitem(session.SUITES, "dropin", replace(SUITES["dropin"], needs="a_package_that_is_not_there"))
    with pytest.raises(ModuleNotFoundError, match="suite dropin: a_package_that_is_not_there is not installed"):
        session.chosen_suites(["encoder", "dropin"])
    assert session.chosen_suites(["all"]) == [name for name in SUITES if name != "dropin"]


def test_rows_are_ours_or_theirs():
    case = next(cases())
    found = list(runner.rows(runner.measure(case, setting(), RATES), ENVIRONMENT))
    ours = {row.provider for row in found if records.is_ours(row.suite, row.provider)}
    assert ours == {"mar_fast"} and {row.provider for row in found} == {"mar_fast", "transformers", "roofline"}
