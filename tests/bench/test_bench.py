"""The measuring tools: known costs come out right, results reach the disk whole."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mar_fast import files, kernels, machine
from mar_fast.bench import gpu, harness, records
from mar_fast.bench.case import RunOptions
from mar_fast.bench.op_cases import PART, OpCase
from mar_fast.bench.suites import SUITES
from mar_fast.bench.suites.kernels import kernel_case
from mar_fast.timing import Spread, interleaved

CPU = torch.device("cpu")


def test_known_durations_come_out_right():
    spreads = interleaved(
        {"short": lambda: time.sleep(0.005), "long": lambda: time.sleep(0.02)}, CPU, budget=0.3, min_rounds=5
    )
    assert spreads["short"].p20 >= 0.005 and spreads["long"].p20 >= 0.02
    assert 2 < spreads["long"].p50 / spreads["short"].p50 < 4.5
    assert 5 <= spreads["short"].n == spreads["long"].n <= 13


def test_candidates_take_turns_after_a_warm_up():
    calls = []
    shares = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    spreads = interleaved(runs, CPU, budget=1e-9, min_rounds=3, on_round=shares.append)
    assert calls == ["a", "a", "b", "b", "c", "c", *"abc" * 3]
    assert spreads["a"].n == 3 and shares == [1.0] * 3
    calls.clear()
    interleaved(runs, CPU, budget=60, min_rounds=1, max_rounds=4)
    assert len(calls) == 6 + 12


def test_spread_is_of_percentiles():
    values = list(np.random.default_rng(0).permutation(np.arange(101.0)))
    assert Spread.of(values) == Spread(20.0, 50.0, 80.0, 101)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)


def test_peak_memory_sees_what_comes_and_goes():
    def run():
        block = torch.ones(64, 1024, 1024)  # 256 MiB, gone at the end
        return float(block[0, 0, 0])

    peak = machine.peak_memory(run, CPU)
    if peak is None:
        pytest.skip("this system does not tell")
    assert 250 * 2**20 < peak < 300 * 2**20  # the kernel counts resident pages in batches
    assert machine.peak_memory(lambda: None, CPU) < 8 * 2**20  # the block before does not count


def test_matmul_rate_and_dtype_choice():
    rates = machine.matmul_rates(CPU, ("fp32",), budget=0.1)
    assert rates["fp32"] > 1e9
    assert machine.choose_dtype(CPU, {"fp32": 1e9, "bf16": 4e9})[0] == "bf16"
    assert machine.choose_dtype(CPU, {"fp32": 1e9, "bf16": 0.2e9})[0] == "fp32"
    assert "4.0x as fast" in machine.choose_dtype(CPU, {"fp32": 1e9, "bf16": 4e9})[1]


def test_environment_identifies_the_run():
    env = machine.environment(CPU)
    assert env["torch"] == torch.__version__ and env["threads"] == torch.get_num_threads()
    assert env["commit"] and "cores" in env["device"] and env["date"].startswith("20")


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_only_what_runs_and_is_right_gets_a_time(mode):
    def silent(x, bias):
        raise NotImplementedError

    def small(x, bias):
        if len(x) > 2:
            raise MemoryError("too many clips\nand more")
        return kernels.bias_gelu(x, bias)

    peers = {"silent": silent, "small": small, "wrong": lambda x, bias: 1.1 * x, PART: lambda x, bias: x}
    op_case = OpCase(
        op="bias_gelu",
        label="a case",
        tokens=5,
        dtype=torch.float32,
        operands=lambda: dict(x=torch.randn(3, 5, 8), bias=torch.randn(8)),
        ours=kernels.bias_gelu,
        peers=peers,
        differentiated=("x",),
        flops=1.0,
        bytes=2.0,
        backward=(0.0, 1.5),
    )
    options = RunOptions(CPU, torch.float32, ("small",), (1,), seconds=1e-9)
    case = kernel_case(op_case, mode, on_gpu=True)
    measured = harness.measure(case, options, {"fp32": 1e9, "copy": 1e9})
    found = {(record.provider, record.metric): record for record in measured}
    timed = {"mar_fast", PART} if mode == "forward" else {"mar_fast"}
    for metric in ("time", "peak memory"):
        assert {name for name, what in found if what == metric} == timed
    assert found["silent", "unavailable"].note == "NotImplementedError: no message"
    assert found["small", "unavailable"].note == "MemoryError: too many clips"
    assert found["wrong", "withheld"].note.startswith("wrong: differs from float64 by ")
    assert found["roofline", "floor"].p50 == pytest.approx(2e-9 if mode == "forward" else 3e-9)
    assert not harness.failures(measured) and all(record.baseline == "silent" for record in measured)


def test_half_written_files_are_never_seen(tmp_path):
    target = tmp_path / "deep" / "a.json"

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    files.write_whole(target, lambda temporary: temporary.write_text("whole"))
    with pytest.raises(RuntimeError):
        files.write_whole(target, fail)
    assert target.read_text() == "whole" and list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o044  # readable as any other file, not only by its owner


def test_may_write(tmp_path):
    (tmp_path / "a").write_text("")
    files.may_write([tmp_path / "new" / "b"], force=False)
    files.may_write([tmp_path / "a"], force=True)
    for path, error in (
        (tmp_path / "a", FileExistsError),
        (tmp_path, FileExistsError),
        (tmp_path / "a/b", NotADirectoryError),
    ):
        with pytest.raises(error):
            files.may_write([path], force=False)


def test_what_make_gpu_measures_and_its_table():
    """Each case of the short run keeps ours, its baseline and what a target is named for; the table says the ratios."""
    options = RunOptions(torch.device("cuda"), torch.bfloat16, ("base",), (32, 8, 1))
    every = [case for name in gpu.SUITES for case in SUITES[name].cases(options)]
    chosen = [case for case in map(gpu.short, every) if case is not None]
    assert len(chosen) == 43 and {case.suite for case in chosen} == set(gpu.SUITES)
    for case in chosen:
        names = {provider.name for provider in case.providers}
        assert {"mar_fast", case.baseline} <= names, case.name
    results = Path(__file__).parents[2] / "bench/results/gpu"
    lines = gpu.table(records.load([results / f"{name}.jsonl" for name in gpu.SUITES])).splitlines()
    line = next(one for one in lines if one.startswith("encoder: ViT-B, batch 32, inference, 0.5 "))
    assert line.split()[6:] == ["12.7", "ms", "14.8", "ms", "1.16x", "1.28x", "PyTorch", "SDPA"]
    line = next(one for one in lines if "batch 1, inference, 0.5, CUDA graph" in one)
    assert line.endswith("PyTorch SDPA, CUDA graph") and "1.08x" in line
    line = next(one for one in lines if one.startswith("kernels: bias_gelu: 32 clips, 784 tokens, width 3072, forward"))
    assert "1.04x" in line and "88 %" in line and "61%" in line
