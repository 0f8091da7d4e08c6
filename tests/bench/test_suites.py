"""The benchmark suites on tiny models: every candidate does its job, what is wrong gets no speed."""

import gc
import math
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import relative

import mar_fast
from mar_fast import inference, machine
from mar_fast.bench import __main__ as module
from mar_fast.bench import jobs, peers, records, runner, session
from mar_fast.bench.case import Candidate, Case, Floor, Prepared, Setting
from mar_fast.bench.runner import Outcome, Result
from mar_fast.bench.suites import SUITES, encoder, flops, kernels, pipeline, scaling, training, waterfall
from mar_fast.timing import Spread

CPU = torch.device("cpu")
RATES = {"fp32": 1e11, "bf16": 2e11, "copy": 1e10}
named_config = mar_fast.named_config


@pytest.fixture(autouse=True)
def tiny(monkeypatch, request):
    """Encoders of one layer, 48 wide, on small clips: the suites as they are, in a moment."""
    # The compiler takes several times as long for the loops that small clips make, and beside decoding a model that
    # works on small ones takes no time.
    side = 224 if any(name in request.function.__name__ for name in ("compiled", "pipeline")) else 64

    def small(name, **overrides):
        sizes = dict(embed_dim=48, depth=1, num_heads=3, bridge_embed_dim=32, bridge_depth=1, bridge_num_heads=2)
        sizes |= dict(
            image_size=(side, side),
            decoder_embed_dim=32,
            decoder_num_heads=2,
            decoder_depth=0 if name.startswith("videomae") else 1,
        )
        return named_config(name, **{**sizes, **overrides})

    monkeypatch.setattr(mar_fast, "named_config", small, raising=False)


def setting(dtype=torch.float32, **options):
    return Setting(CPU, dtype, **{**dict(sizes=("small",), batches=(1, 2), quick=True, budget=1e-3), **options})


def providers(case):
    return [candidate.provider for candidate in case.candidates]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_every_classifier_gives_the_logits(dtype, keep):
    pytest.importorskip("transformers")
    case = encoder.inference_case(setting(dtype), "small", 2, keep, compiled=False)
    outcome = runner.measure(case, setting(dtype), RATES)
    assert [result.provider for result in outcome.results] == [
        "reference, autocast", "PyTorch SDPA", "mar_fast", "Hugging Face VideoMAE, dense",
    ]  # fmt: skip
    for result in outcome.results:
        assert not result.absent and not result.withheld and result.time.p50 > 0, result
        assert result.error < (1e-5 if dtype == torch.float32 else 3e-2)
    assert outcome.floor == pytest.approx(case.floor.at(RATES[case.dtype_name], RATES["copy"])) and not outcome.wrong
    clips = [row for row in runner.rows(outcome, ENVIRONMENT) if row.metric == "throughput"]
    assert clips[0].p50 == pytest.approx(2 / outcome.results[0].time.p50) and clips[0].p20 <= clips[0].p80


@pytest.mark.compiles
def test_compiled_classifiers():
    case = encoder.inference_case(setting(), "small", 1, 0.5, compiled=True)
    compiled = [one for one in case.candidates if "compiled" in one.provider or "frozen" in one.provider]
    assert [one.provider for one in compiled] == [
        "PyTorch SDPA, compiled", "PyTorch SDPA, frozen", "mar_fast, compiled",
    ]  # fmt: skip
    outcome = runner.measure(replace(case, candidates=tuple(compiled), yardstick=""), setting(), RATES)
    for result in outcome.results:
        assert result.error < 1e-5 and result.compile_seconds > 0 and result.time, result


def test_classifiers_in_cuda_graphs(monkeypatch):
    """Candidates on a GPU; here a function that calls the model stands in for the graph."""
    monkeypatch.setattr(inference, "captured", lambda run, device: run)
    monkeypatch.setattr(inference, "_GRAPH_DEVICES", ("cpu",))
    gpu = replace(setting(), device=torch.device("cuda"))
    for compiled in (False, True):
        names = providers(encoder.inference_case(gpu, "small", 1, 0.5, compiled))
        assert [name for name in names if "graph" in name] == ["PyTorch SDPA, CUDA graph", "mar_fast, CUDA graph"]
    job = jobs.Job(encoder.model_config("small", 0.5), 2, CPU, torch.float32)
    for way in (peers.plain_frozen, peers.ours_compiled):
        prepared = way(job, backend="graph")
        assert relative(prepared.outputs()[0], jobs.truth(job)[0]) < 1e-5 and prepared.compile_seconds > 0
        assert prepared.run().shape == (2, job.config.num_classes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_training_step_has_the_loss_and_gradients(dtype):
    pytest.importorskip("transformers")
    case = training.training_case(setting(dtype), "small", 2, 0.5, compiled=False)
    outcome = runner.measure(case, setting(dtype), RATES)
    assert len(outcome.results) == 4
    for result in outcome.results:
        assert not result.absent and not result.withheld and result.time, result
        assert result.error < (1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.compiles
def test_compiled_training():
    case = training.training_case(setting(), "small", 1, 0.5, compiled=True)
    compiled = tuple(one for one in case.candidates if one.provider.endswith(", compiled"))
    assert len(compiled) == 2
    for result in runner.measure(replace(case, candidates=compiled, yardstick=""), setting(), RATES).results:
        assert result.error < 1e-5 and result.compile_seconds > 0, result


def test_steps_of_the_waterfall_are_one_function():
    assert [case.mode for case in waterfall.cases(setting())] == ["inference"]
    cases = list(waterfall.cases(setting(quick=False)))
    assert [(case.mode, providers(case)[-1]) for case in cases] == [
        ("inference", "compiled"),
        ("training step", "compiled"),
    ]
    for case in cases:
        case = replace(case, candidates=case.candidates[:-1])  # the last one compiles
        outcome = runner.measure(case, setting(), RATES)
        assert [candidate.x for candidate in case.candidates] == list(range(len(case.candidates)))
        for result in outcome.results:
            assert not result.absent and result.error < 1e-5 and result.time, result
        xs = {row.provider: row.x for row in runner.rows(outcome, ENVIRONMENT)}
        assert xs["masked"] == 1 and xs[outcome.results[-1].provider] == len(outcome.results) - 1


def test_a_wrong_kernel_gets_no_speed(monkeypatch):
    """Ours alone is wrong, by 1 % in the scale of attention: its row is withheld, its peers keep theirs."""
    attention = sys.modules["mar_fast.kernels.attention"]
    right = attention.eager_attention
    monkeypatch.setattr(attention, "eager_attention", lambda qkv, scale: right(qkv, 1.01 * scale))
    case = encoder.inference_case(setting(), "small", 1, 0.5, compiled=False)
    outcome = runner.measure(case, setting(), RATES)
    ours = outcome.of("mar_fast")
    assert outcome.wrong and ours.withheld.startswith("wrong: differs from float64 by")
    assert ours.time is None and ours.memory is None and outcome.of("PyTorch SDPA").time
    assert "withheld" in {row.metric for row in runner.rows(outcome, ENVIRONMENT) if row.provider == "mar_fast"}
    assert "wrong: differs" in runner.text(outcome)


def test_kernels_suite():
    cases = list(kernels.cases(setting()))
    assert {case.name.split(":")[0] for case in cases} == {
        "gather_patch_embed", "attention", "add_layer_norm", "bias_gelu", "scatter_tokens", "masked_patch_loss",
    }  # fmt: skip
    assert [case.mode for case in cases] == ["forward", "backward"] * 6
    attention = next(case for case in cases if case.name.startswith("attention"))
    kept = tuple(one for one in attention.candidates if one.provider != "flex_attention")  # it compiles
    outcome = runner.measure(replace(attention, candidates=kept), setting(), RATES)
    assert {result.provider for result in outcome.results if result.time} == {"mar_fast", "SDPA", "scores written out"}
    for package in ("xformers", "flash_attn"):
        assert package in outcome.of(package).absent
    assert case_floor(attention) == pytest.approx(4 * 784**2 * 6 * 64 / RATES["fp32"])


def case_floor(case):
    return case.floor.at(RATES[case.dtype_name], RATES["copy"])


def test_scaling_fits_a_power():
    assert scaling.exponent([(x, 3 * x**1.7) for x in (1, 2, 5)]) == pytest.approx(1.7)
    outcomes = []
    for case in scaling.cases(setting(quick=False)):
        tokens = scaling.configuration("small", case.name, case.x)[0].num_visible * max(case.clips, 1)
        outcomes.append(Outcome(case, [Result("mar_fast", time=Spread(0, tokens**1.5, 0, 5))], RATES))
    found = {row.case: row.value for row in scaling.conclude(setting(), outcomes)}
    assert found == pytest.approx(
        {"keep ratio": 1.5, "tokens": 1.5, "batch": 1.5, "frames": 1.5, "resolution": 3.0}, abs=1e-9
    )


def test_scaling_cases_run():
    assert {case.name for case in scaling.cases(setting())} == {"keep ratio"}
    cases = {case.name: case for case in scaling.cases(setting(quick=False)) if case.x in (0.25, 8, 160)}
    assert set(cases) == {"keep ratio", "frames", "resolution"}
    for case in cases.values():
        for result in runner.measure(case, setting(), RATES).results:
            assert result.error < 1e-5 and result.time


@pytest.mark.real_clip
def test_pipeline(monkeypatch):
    (case,) = pipeline.cases(setting())
    outcome = runner.measure(case, setting(), RATES)
    assert case.name.endswith("bikes.mp4") and not any(one.absent or one.withheld for one in outcome.results)
    assert outcome.of(pipeline.BOTH).time.p50 > outcome.of(pipeline.DECODE).time.p20
    assert outcome.of(pipeline.DECODE).error is None and outcome.of(pipeline.BOTH).error < 1e-5
    for slower, verdict in ((pipeline.DECODE, "data-bound"), (pipeline.MODEL, "compute-bound")):
        for result in outcome.results:
            result.time = Spread(1, 3 if result.provider == slower else 1, 3, 5)
        (found,) = pipeline.conclude(setting(), [outcome])
        assert found.note.startswith(verdict)


def test_flops_are_the_papers(monkeypatch):
    monkeypatch.setattr(mar_fast, "named_config", named_config)
    found = flops.conclude(setting(), [])
    of = {(row.case, row.provider, row.metric, row.x): row.value for row in found}
    for case in ("ViT-B", "ViT-L"):
        for keep in (1.0, 0.5, 0.25):
            formula = of[case, "original, by formula", "multiply-adds", keep]
            assert round(formula / 1e9) == of[case, "paper", "multiply-adds", keep] / 1e9
            if keep < 1:
                assert round(formula / 1e9, 2) == of[case, "original, counted", "multiply-adds", keep] / 1e9
    table = flops.table(found)
    assert "85.34" in table and "93.02" in table and "ViT-S: mar_fast" in table


# ---------------------------------------------------------------------------------------------------------------------
# The runner and the session, on candidates that do next to nothing


ENVIRONMENT = dict(device="a CPU", torch="2", triton="3", commit="abc", date="2026", threads=2, clocks="")


def toy(name="toy", **candidates):
    truth = torch.ones(3)
    made = [
        Candidate(provider, (lambda value=value: Prepared(lambda: None, lambda: [value])))
        for provider, value in candidates.items()
    ]
    return Case("toys", name, "", 1.0, torch.float32, 0, tuple(made), lambda: [truth], 0.1, floor=Floor(5e10, 1e9))


def test_the_yardstick_sets_the_bound():
    """Others may be twice as far off as it is, and a thousandth more."""
    ones = torch.ones(3)
    case = toy(good=ones * 1.019, bad=ones * 1.023, worst=ones * 1.2, base=ones * 1.01, nan=ones * math.nan)
    outcome = runner.measure(replace(case, yardstick="base"), setting(), RATES)
    assert {result.provider for result in outcome.results if result.withheld} == {"bad", "worst", "nan"}
    outcome = runner.measure(case, setting(), RATES)
    assert {result.provider for result in outcome.results if result.withheld} == {"worst", "nan"}


def test_floor_is_the_slower_ceiling():
    assert Floor(5e10, 1e9).at(1e11, 1e10) == 1.0 and Floor(5e10, 1e11).at(1e11, 1e10) == 10.0


def test_an_interruption_keeps_what_is_done(monkeypatch, tmp_path):
    def interrupting():
        raise KeyboardInterrupt

    second = replace(toy("second"), candidates=(Candidate("mar_fast", interrupting),))
    suite = replace(SUITES["encoder"], cases=lambda setting: iter((toy("first", mar_fast=torch.ones(3)), second)))
    monkeypatch.setitem(session.SUITES, "encoder", suite)
    path, done = tmp_path / "results.jsonl", session.Session()
    with pytest.raises(KeyboardInterrupt):
        session.run(["encoder"], setting(), RATES, out=path, say=lambda text: None, into=done)
    assert records.read(path) == done.rows
    assert {(row.suite, row.case) for row in done.rows} == {
        ("machine", "copy"), ("machine", "matrix product"), ("toys", "first"),
    }  # fmt: skip


def test_threads_are_left_as_found():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), machine.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    with machine.threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads: got 0, expected a whole number, 1 or more"), machine.threads(0):
        pass


def test_a_case_that_was_measured_holds_nothing(monkeypatch):
    """Neither models nor operands of one case are there when the next one is measured."""
    alive, seen = [], []

    def holding(number):
        block = torch.ones(3)
        alive.append(weakref.ref(block))

        def prepare():
            gc.collect()
            seen.append(sum(reference() is not None for reference in alive))
            return Prepared(lambda: block, lambda: [block])

        return replace(toy(str(number)), candidates=(Candidate("mar_fast", prepare, truth=lambda: [block]),))

    suite = replace(SUITES["encoder"], cases=lambda setting: (holding(number) for number in range(3)))
    monkeypatch.setitem(session.SUITES, "encoder", suite)
    done = session.run(["encoder"], setting(), RATES, say=lambda text: None)
    gc.collect()
    assert seen == [1, 1, 1] and not any(reference() is not None for reference in alive)
    assert {row.case for row in done.rows if row.metric == "time"} == {"0", "1", "2"}


def test_a_wrong_step_of_the_waterfall_is_ours(monkeypatch):
    case = replace(toy(masked=torch.ones(3), compiled=2 * torch.ones(3)), suite="waterfall")
    assert runner.measure(case, setting(), RATES).wrong
    assert not runner.measure(replace(case, suite="encoder"), setting(), RATES).wrong


def test_module_says_what_is_wrong_with_its_arguments(capsys, tmp_path):
    for arguments, message in (
        (["speed"], "suite: got 'speed', expected one or more of flops"),
        (["encoder", "--batch", "0"], "batch: got 0, expected a whole number"),
        (["encoder", "--threads", "0"], "threads: got 0, expected a whole number"),
        (["flops", "--out", str(tmp_path)], "got a folder, expected a file name"),
    ):
        with pytest.raises(SystemExit) as stop:
            module.main(arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert module.main(["flops", "--quick", "--out", str(tmp_path / "new" / "flops.jsonl")]) == 0
    assert "multiply-adds of a clip" in capsys.readouterr().out
    assert {row.suite for row in records.read(tmp_path / "new" / "flops.jsonl")} == {"machine", "flops"}


def test_choice_of_suites():
    assert session.chosen_suites(["all"]) == list(SUITES)
    assert session.chosen_suites(["kernels", "flops", "kernels"]) == ["kernels", "flops"]


def test_a_few_clips_are_of_the_same_job():
    job = jobs.Job(encoder.model_config("small", 0.5), 3, CPU, torch.float32)
    few = job.few()
    assert all(torch.equal(value, job.weights[name]) for name, value in few.weights.items())
    assert torch.equal(few.clips, job.clips[:1]) and torch.equal(few.mask.keep_idx, job.mask.keep_idx[:1])
