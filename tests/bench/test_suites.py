"""The benchmark suites on tiny models: every provider does its work, what is wrong gets no speed."""

import gc
import math
import sys
import weakref
from dataclasses import replace

import clips
import pytest
import torch
from helpers import relative

import mar_fast
from mar_fast import inference, machine
from mar_fast.bench import __main__ as module
from mar_fast.bench import harness, peers, records, workloads
from mar_fast.bench.case import Case, Prepared, Provider, RunOptions
from mar_fast.bench.records import Record
from mar_fast.bench.suites import SUITES, extraction, flops, kernels, pipeline, scaling, waterfall
from mar_fast.bench.suites.common import least_work, model_config
from mar_fast.bench.suites.models import by_every_peer
from mar_fast.cost import Cost, Part

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
    monkeypatch.setattr("mar_fast.bench.case.environment", lambda device: ENVIRONMENT)


ENVIRONMENT = dict(device="a CPU", torch="2", triton="3", commit="abc", date="2026", threads=2, clocks="")


def options(dtype=torch.float32, **more):
    return RunOptions(CPU, dtype, **{**dict(sizes=("small",), batches=(1, 2), quick=True, seconds=1e-3), **more})


def names(case):
    return [provider.name for provider in case.providers]


def measured(case, dtype=torch.float32):
    """The records of a case, as {provider: {metric: record}}."""
    found = {}
    for record in harness.measure(case, options(dtype), RATES):
        found.setdefault(record.provider, {})[record.metric] = record
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("mode", "keep", "in_bfloat16"), [("inference", 1.0, 3e-2), ("inference", 0.25, 3e-2), ("training step", 0.5, 5e-2)]
)
def test_every_way_gives_the_logits_or_the_loss_and_gradients(mode, keep, in_bfloat16, dtype):
    pytest.importorskip("transformers")
    case = by_every_peer(options(dtype), "small", 2, keep, compiled=False, training=mode == "training step")
    found = measured(case, dtype)
    floor = found.pop("roofline")["floor"]
    assert list(found) == ["reference, autocast", "PyTorch SDPA", "mar_fast", "Hugging Face VideoMAE, dense"]
    for own in found.values():
        assert own["time"].p50 > 0 and own["error"].p50 < (1e-5 if dtype == torch.float32 else in_bfloat16)
        clips = own["throughput"]
        assert clips.p50 == pytest.approx(2 / own["time"].p50) and clips.p20 <= clips.p80
        assert own["time"].baseline == "PyTorch SDPA" and own["time"].x == keep and own["time"].mode == mode
    assert floor.p50 == pytest.approx(case_floor(case))


@pytest.mark.compiles
@pytest.mark.parametrize("training", [False, True])
def test_compiled(training):
    case = by_every_peer(options(), "small", 1, 0.5, compiled=True, training=training)
    chosen = tuple(one for one in case.providers if one.name.endswith((", compiled", ", frozen")))
    frozen = [] if training else ["PyTorch SDPA, frozen"]
    assert [one.name for one in chosen] == ["PyTorch SDPA, compiled", *frozen, "mar_fast, compiled"]
    found = measured(replace(case, providers=chosen))
    for one in chosen:
        own = found[one.name]
        assert own["error"].p50 < 1e-5 and own["compile time"].p50 > 0 and own["time"], own


def test_classifiers_in_cuda_graphs(monkeypatch):
    """Providers on a GPU; here a function that calls the model stands in for the graph."""
    monkeypatch.setattr(inference, "captured", lambda run, device: run)
    monkeypatch.setattr(inference, "_GRAPH_DEVICES", ("cpu",))
    gpu = replace(options(), device=torch.device("cuda"))
    for compiled in (False, True):
        found = names(by_every_peer(gpu, "small", 1, 0.5, compiled))
        assert [name for name in found if "graph" in name] == ["PyTorch SDPA, CUDA graph", "mar_fast, CUDA graph"]
    work = workloads.Workload(model_config("small", 0.5), 2, CPU, torch.float32)
    for way in (peers.plain_frozen, peers.ours_compiled):
        prepared = way(work, backend="graph")
        assert relative(prepared.outputs()[0], workloads.expected(work)[0]) < 1e-5 and prepared.compile_seconds > 0
        assert prepared.run().shape == (2, work.config.num_classes)


def test_steps_of_the_waterfall_are_one_function():
    assert [case.mode for case in waterfall.cases(options())] == ["inference"]
    cases = list(waterfall.cases(options(quick=False)))
    assert [(case.mode, names(case)[-1]) for case in cases] == [
        ("inference", "compiled"),
        ("training step", "compiled"),
    ]
    for case in cases:
        found = measured(replace(case, providers=case.providers[:-1]))  # the last one compiles
        for number, name in enumerate(names(case)[:-1]):
            time = found[name]["time"]
            assert time.x == number and time.baseline == "dense, eager" and found[name]["error"].p50 < 1e-5
            assert time.workload == found["roofline"]["floor"].workload


def test_a_wrong_kernel_gets_no_speed(monkeypatch):
    """Ours alone is wrong, by 1 % in the scale of attention: its row is withheld, its peers keep theirs."""
    attention = sys.modules["mar_fast.kernels.attention"]
    right = attention.eager_attention
    monkeypatch.setattr(attention, "eager_attention", lambda qkv, scale: right(qkv, 1.01 * scale))
    case = by_every_peer(options(), "small", 1, 0.5, compiled=False)
    found = harness.measure(case, options(), RATES)
    ours = {record.metric: record for record in found if record.provider == "mar_fast"}
    assert set(ours) == {"error", "withheld"} and ours["withheld"].note.startswith("wrong: differs from float64 by")
    assert harness.failures(found) == 1 and "withheld: wrong: differs" in harness.text(found)
    assert any((record.provider, record.metric) == ("PyTorch SDPA", "time") for record in found)


def test_kernels_suite():
    cases = list(kernels.cases(options()))
    assert {case.name.split(":")[0] for case in cases} == {
        "gather_patch_embed",
        "attention",
        "add_layer_norm",
        "bias_gelu",
        "linear_gelu",
        "mlp",
        "scatter_tokens",
        "masked_patch_loss",
    }
    assert [case.mode for case in cases] == ["forward", "backward"] * 8
    attention = next(case for case in cases if case.name.startswith("attention"))
    kept = tuple(one for one in attention.providers if one.name != "flex_attention")  # it compiles
    found = measured(replace(attention, providers=kept))
    # In float32 our attention is PyTorch's own on a CPU: it is not measured against itself.
    assert {name for name, own in found.items() if "time" in own} == {"mar_fast", "scores written out"}
    for package in ("xformers", "flash_attn"):
        assert package in found[package]["unavailable"].note
    assert attention.baseline == "scores written out" and case_floor(attention) == pytest.approx(
        4 * 784**2 * 6 * 64 / RATES["fp32"]
    )


def test_no_op_is_measured_against_itself_on_a_cpu(monkeypatch):
    """Ours is plain PyTorch there; on a GPU that is the baseline. Attention in blocks is another function."""
    plain = ("SDPA", "PyTorch", "reshape + index + linear")
    for case in kernels.cases(options()):
        assert not set(names(case)) & {*plain, "cuBLAS on gathered patches"} and case.baseline in names(case)
    for op_case in kernels.every_op_case(options()):
        case = kernels.kernel_case(op_case, "forward", on_gpu=True)
        assert case.baseline in plain and names(case) == ["mar_fast", *op_case.peers]
    monkeypatch.setattr(kernels.cpu_attention, "PREFERRED", True)
    found = [case for case in kernels.cases(options(torch.bfloat16)) if case.name.startswith("attention")]
    assert [case.baseline for case in found] == ["SDPA", "scores written out"]


def case_floor(case):
    return case.floor.floor_seconds(RATES[case.dtype_name], RATES["copy"])


def test_scaling_fits_a_power():
    assert scaling.exponent([(x, 3 * x**1.7) for x in (1, 2, 5)]) == pytest.approx(1.7)
    times = []
    for case in scaling.cases(options(quick=False)):
        tokens = scaling.configuration("small", case.name, case.x)[0].num_visible * max(case.clips, 1)
        where = dict(suite="scaling", case=case.name, provider="mar_fast", metric="time", x=case.x)
        times.append(Record.of(ENVIRONMENT, tokens**1.5, **where))
    found = {record.case: record.p50 for record in scaling.conclude(options(), times)}
    assert found == pytest.approx(
        {"keep ratio": 1.5, "tokens": 1.5, "batch": 1.5, "frames": 1.5, "resolution": 3.0}, abs=1e-9
    )


def test_scaling_cases_run():
    assert {case.name for case in scaling.cases(options())} == {"keep ratio"}
    cases = {case.name: case for case in scaling.cases(options(quick=False)) if case.x in (0.25, 8, 160)}
    assert set(cases) == {"keep ratio", "frames", "resolution"}
    for case in cases.values():
        found = measured(case)
        for name in ("reference, autocast", "mar_fast"):
            assert found[name]["error"].p50 < 1e-5 and found[name]["time"].x == case.x


@pytest.mark.real_clip
def test_pipeline(monkeypatch):
    (case,) = pipeline.cases(options())
    found = measured(case)
    assert case.name.endswith("bikes.mp4")
    assert found[pipeline.BOTH]["time"].p50 > found[pipeline.DECODE]["time"].p20
    assert "error" not in found[pipeline.DECODE] and found[pipeline.BOTH]["error"].p50 < 1e-5
    times = [found[name]["time"] for name in names(case)]
    for slower, verdict in ((pipeline.DECODE, "data-bound"), (pipeline.MODEL, "compute-bound")):
        slow = [replace(time, p50=3 if time.provider == slower else 1) for time in times]
        (share,) = pipeline.conclude(options(), slow)
        assert share.note.startswith(verdict) and share.metric == "share"


def test_extraction(monkeypatch, tmp_path):
    """All of it is right, and reading all windows at least three times as fast as reading each anew."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(extraction, "WINDOWS", 2)
    film = clips.textured(tmp_path / "a.mkv", 120, (64, 80), codec="ffv1")
    reading, features, dtypes = (measured(case) for case in extraction.cases(options(clip=film)))
    assert [name for name, own in dtypes.items() if own["time"].p50 > 0] == [
        f"mar_fast, {name}" for name in machine.DTYPES
    ]
    assert all(own["error"].p50 < (1e-5 if "fp32" in name else 3e-2) for name, own in dtypes.items())
    assert 3 * reading[extraction.OURS]["time"].p50 < reading[extraction.LOOP]["time"].p50
    assert reading[extraction.OURS]["error"].p50 == 0
    assert list(features) == [extraction.LOOP, extraction.OURS, extraction.COPIED]
    assert all(own["error"].p50 < 1e-5 and own["time"].p50 > 0 for own in features.values())


def test_flops_are_the_papers(monkeypatch):
    monkeypatch.setattr(mar_fast, "named_config", named_config)
    found = flops.conclude(options(), [])
    of = {(one.case, one.provider, one.metric, one.x): one.p50 for one in found}
    for case in ("ViT-B", "ViT-L"):
        for keep in (1.0, 0.5, 0.25):
            formula = of[case, "original, by formula", "multiply-adds", keep]
            assert round(formula / 1e9) == of[case, "paper", "multiply-adds", keep] / 1e9
            if keep < 1:
                assert round(formula / 1e9, 2) == of[case, "original, counted", "multiply-adds", keep] / 1e9
    text = harness.figures(found)
    assert (
        "ViT-B, mar_fast: multiply-adds 180.34 G at 1, 85.34 G at 0.5" in text and "93.02 M" in text and "ViT-S" in text
    )


# ---------------------------------------------------------------------------------------------------------------------
# The harness, on providers that do next to nothing


def toy(name="toy", baseline="", **providers):
    expected = torch.ones(3)
    made = [
        Provider(provider, (lambda value=value: Prepared(lambda: None, lambda: [value])))
        for provider, value in providers.items()
    ]
    floor = Cost((Part("toy", 0, 50 * 10**9, 10**9),))
    return Case("toys", name, "", 1.0, torch.float32, 0, tuple(made), lambda: [expected], 0.1, baseline, floor)


def test_the_baseline_sets_what_others_may_differ_by():
    """Twice as far off as it is, and a thousandth more; what computes another function has the case's tolerance."""
    ones = torch.ones(3)
    values = dict(good=ones * 1.019, bad=ones * 1.023, worst=ones * 1.2, base=ones * 1.01, nan=ones * math.nan)
    own = Provider("own", lambda: Prepared(lambda: None, lambda: [ones * 2.1]), expected=lambda: [ones * 2])
    for baseline, wrong in (("base", {"bad", "worst", "nan"}), ("", {"worst", "nan"}), ("own", {"worst", "nan"})):
        case = toy(baseline=baseline, **values)
        found = measured(replace(case, providers=(*case.providers, own)))
        assert {name for name, metrics in found.items() if "withheld" in metrics} == wrong
        assert all("time" not in found[name] and "peak memory" not in found[name] for name in wrong)


def test_floor_is_the_slower_ceiling():
    """At 100 GFLOP/s and 10 GB/s; a step's optimizer moves 28 bytes a parameter after the rest."""
    for moved, seconds in ((10**9, 1.0), (10**11, 10.0)):
        case = replace(toy(mar_fast=torch.ones(3)), floor=Cost((Part("toy", 0, 50 * 10**9, moved),)))
        assert measured(case)["roofline"]["floor"].p50 == seconds
    work = workloads.Workload(model_config("small", 0.5, decoder=True), 2, CPU, torch.float32, training=True)
    step = mar_fast.cost.count(
        work.config, batch=2, reconstruct=True, training=True, bytes_per_value=4, bytes_per_pixel=4
    )
    least = least_work(work).floor_seconds(1e11, 1e10) - step.floor_seconds(1e11, 1e10)
    assert least == pytest.approx(28 * step.parameters / 1e10)


def test_an_interruption_keeps_what_is_done(monkeypatch, tmp_path):
    def interrupting():
        raise KeyboardInterrupt

    second = replace(toy("second"), providers=(Provider("mar_fast", interrupting),))
    suite = replace(SUITES["encoder"], cases=lambda options: iter((toy("first", mar_fast=torch.ones(3)), second)))
    monkeypatch.setitem(harness.SUITES, "encoder", suite)
    path, done = tmp_path / "results.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        harness.run(["encoder"], options(), RATES, out=path, say=lambda text: None, into=done)
    assert records.read(path) == done
    assert {(record.suite, record.case) for record in done} == {
        ("machine", "copy"),
        ("machine", "matrix product"),
        ("toys", "first"),
    }


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

        return replace(toy(str(number)), providers=(Provider("mar_fast", prepare, expected=lambda: [block]),))

    suite = replace(SUITES["encoder"], cases=lambda options: (holding(number) for number in range(3)))
    monkeypatch.setitem(harness.SUITES, "encoder", suite)
    done = harness.run(["encoder"], options(), RATES, say=lambda text: None)
    gc.collect()
    assert seen == [1, 1, 1] and not any(reference() is not None for reference in alive)
    assert {record.case for record in done if record.metric == "time"} == {"0", "1", "2"}


def test_a_wrong_step_of_the_waterfall_is_ours(monkeypatch):
    case = replace(toy(masked=torch.ones(3), compiled=2 * torch.ones(3)), suite="waterfall")
    for suite, wrong in (("waterfall", 1), ("encoder", 0)):
        assert harness.failures(harness.measure(replace(case, suite=suite), options(), RATES)) == wrong


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
    assert "ViT-B, paper: multiply-adds 180.00 G at 1" in capsys.readouterr().out
    assert {record.suite for record in records.read(tmp_path / "new" / "flops.jsonl")} == {"machine", "flops"}


def test_choice_of_suites():
    assert harness.chosen_suites(["all"]) == list(SUITES)
    assert harness.chosen_suites(["kernels", "flops", "kernels"]) == ["kernels", "flops"]


def test_a_few_clips_are_of_the_same_workload():
    work = workloads.Workload(model_config("small", 0.5), 3, CPU, torch.float32)
    few = work.few()
    assert all(torch.equal(value, work.weights[name]) for name, value in few.weights.items())
    assert torch.equal(few.clips, work.clips[:1]) and torch.equal(few.mask.keep_idx, work.mask.keep_idx[:1])
