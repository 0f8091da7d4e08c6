"""The suite of transformers' models before and after `mar_fast.accelerate`, on tiny ones."""

from dataclasses import replace

import pytest
import torch
from test_suites import measured, names, options, tiny  # noqa: F401 (tiny is a fixture for every test)

from mar_fast.bench import harness, transformers_peers
from mar_fast.bench.suites import SUITES, dropin

pytest.importorskip("transformers")


def cases(dtype=torch.float32, with_compiled=False):
    for make in (dropin.inference_case, dropin.step_case):
        for keep in (1.0, 0.5):
            yield make(options(dtype), "small", 2, keep, with_compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_and_after_are_one_function(dtype):
    """Ours is held against transformers' own code in float64, under the same mask."""
    for case in cases(dtype):
        by_hand = ["transformers, masked by hand"] if case.mode == "inference" and case.x < 1 else []
        assert names(case) == ["transformers", *by_hand, "mar_fast"]
        found = measured(case, dtype)
        assert found.pop("roofline")["floor"].p50 > 0
        for name in names(case):
            own = found[name]
            assert own["time"].baseline == "transformers" and own["time"].ours == (name == "mar_fast")
            assert own["error"].p50 < (1e-5 if dtype == torch.float32 else 5e-2), (case, own)


@pytest.mark.compiles
@pytest.mark.parametrize("number", [1, 3])  # those with a mask: the others compile no less of it
def test_compiled(number):
    case = list(cases(with_compiled=True))[number]
    chosen = tuple(one for one in case.providers if one.name.endswith(", compiled"))
    by = "transformers, masked by hand" if case.mode == "inference" else "transformers"
    assert [one.name for one in chosen] == [f"{by}, compiled", "mar_fast, compiled"]
    found = measured(replace(case, providers=chosen))
    for one in chosen:
        assert found[one.name]["error"].p50 < 1e-5 and found[one.name]["compile time"].p50 > 0


def test_an_accelerated_model_that_is_wrong_gets_no_speed(monkeypatch):
    right = transformers_peers.accelerated

    def wrong(model, **options):
        with torch.no_grad():
            model.classifier.bias.add_(1.0)
        return right(model, **options)

    monkeypatch.setattr(transformers_peers, "accelerated", wrong)
    found = measured(dropin.inference_case(options(), "small", 2, 0.5, False))
    assert "withheld" in found["mar_fast"] and "time" not in found["mar_fast"]
    assert found["transformers"]["time"] and found["transformers, masked by hand"]["time"]


def test_cases():
    """Dense and at 50 %, inference and training; short of time inference alone, and nothing that compiles."""
    found = [(case.mode, case.x, len(case.providers)) for case in dropin.cases(options(batches=(2,), quick=False))]
    assert found == [("inference", 1.0, 4), ("inference", 0.5, 5), ("training step", 1.0, 4), ("training step", 0.5, 4)]
    quick = [(case.mode, case.x, len(case.providers)) for case in dropin.cases(options(batches=(2,)))]
    assert quick == [("inference", 1.0, 2), ("inference", 0.5, 3)]


def test_without_transformers(monkeypatch):
    """Named, it is an error; among all suites it is left out."""
    monkeypatch.setitem(harness.SUITES, "dropin", replace(SUITES["dropin"], needs="a_package_that_is_not_there"))
    with pytest.raises(ModuleNotFoundError, match="suite dropin: a_package_that_is_not_there is not installed"):
        harness.chosen_suites(["encoder", "dropin"])
    assert harness.chosen_suites(["all"]) == [name for name in SUITES if name != "dropin"]
