"""The tuner without a GPU: candidates, filters, the choice of a winner, and the user's file, on a stand-in machine."""

import importlib.util
import json
import random
from dataclasses import fields, replace

import pytest
import torch

from mar_fast.kernels import device

if importlib.util.find_spec("triton") is None or device.INTERPRETING:
    pytest.skip("needs a Triton that compiles", allow_module_level=True)

from mar_fast.bench import __main__, kernel_calls, tune
from mar_fast.kernels.jit import compile_check
from mar_fast.kernels.jit.launch import LaunchConfig, forget_choices, read_overrides
from mar_fast.timing import Spread

KERNEL, ARCHITECTURE = "bias_gelu_forward", "sm_90"


@pytest.fixture(autouse=True)
def path(monkeypatch, tmp_path):
    """The user has no choices of their own yet."""
    monkeypatch.setenv("MAR_FAST_CONFIGS", str(tmp_path / "mine" / "overrides.json"))
    forget_choices()
    yield tmp_path / "mine" / "overrides.json"
    forget_choices()


def unit(dtype="bfloat16"):
    (found,) = [unit for unit in tune.units(ARCHITECTURE, [KERNEL]) if unit.choice.dtype == dtype]
    return found


def in_force():
    return unit().choice.config


def near(config):
    """A neighbour: twice as many rows."""
    return replace(config, block_m=config.block_m * 2)


class StandIn:
    """A machine that says what a test tells it to. ``speed`` gives seconds by configuration, 1 ms by default."""

    architecture, device = ARCHITECTURE, torch.device("cpu")

    def __init__(self, **planted):
        self.speed, self.report, self.result = ({}, {}, {})
        self.__dict__.update(planted)
        self.compiled, self.ran, self.timed = [], [], []
        self.noise = random.Random(0)

    def compile(self, codes):
        for place in reversed(range(len(codes))):  # in any order
            told = codes[place]
            config = LaunchConfig(*list(told.constants.values())[-2:], num_warps=told.options["num_warps"])
            self.compiled.append(config)
            clean = compile_check.Report(KERNEL, ARCHITECTURE, loads={16: 1}, tensor_core=4, dots=1)
            yield place, replace(clean, **self.report.get(config, {}))

    def outcome(self, call, kernel, config):
        self.ran.append(config)
        result = self.result.get(config, 1.0)
        if isinstance(result, BaseException):
            raise result
        return [torch.full((4, 8), 1.0).scatter(1, torch.zeros(4, 1, dtype=torch.long), result)]

    def seconds(self, call, backward, kernel, config):
        assert kernel == KERNEL and not backward
        self.timed.append(config)
        return self.speed.get(config, 1e-3) * self.noise.uniform(0.97, 1.03)


def run(machine, path, **options):
    return list(tune.tune(machine, path, "by a test", [KERNEL], **options))


# Candidates.

BASE = LaunchConfig(64, 128, 32, num_warps=4, num_stages=3)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (BASE, dict(block_m={32, 64, 128}, block_n={64, 128, 256}, block_k={16, 32, 64}, num_stages={1, 2, 3, 4, 5})),
        # Neither stages without a loop nor blocks that are not there; rows of unknown length take any number of warps.
        (LaunchConfig(1), dict(block_m={1, 2}, block_n={0}, block_k={0}, num_stages={1}, num_warps={2, 4, 8, 16})),
        # Tiles of matrix products stay in bounds.
        (LaunchConfig(16, 256, 16, 4, 2), dict(block_m={16, 32}, block_n={128, 256}, block_k={16, 32})),
    ],
)
def test_neighbourhood(config, values):
    found = tune.candidates(config)
    assert found[0] == config and len(set(found)) == len(found)
    for name, expected in values.items():
        assert {getattr(one, name) for one in found} == expected, name
    for one in found:  # neither idle threads nor 512 values for one
        assert not one.block_n or 4 <= one.block_m * one.block_n / (32 * one.num_warps) <= 256


def test_quick_neighbourhood_changes_one_thing():
    found = tune.candidates(BASE, quick=True)
    names = [option.name for option in fields(BASE) if option.name != "origin"]
    changes = [sum(getattr(config, name) != getattr(BASE, name) for name in names) for config in found]
    assert changes[0] == 0 and set(changes[1:]) == {1} and 10 <= len(found) <= 16


def test_units():
    """One for each kernel, dtype and shape, with every call that makes the choice, in its forward or backward pass."""
    found = {str(one): one for one in tune.units(ARCHITECTURE)}
    for one in found.values():
        if one.choice.kernel.endswith(("_forward", "_backward")):
            assert {backward for _, backward in one.runs} == {one.choice.kernel.endswith("_backward")}
    labels = [
        kernel_calls.calls("meta")[call].label
        for call, _ in found["add_layer_norm_backward, bfloat16, width 1024"].runs
    ]
    assert [label.split("width ")[1] for label in labels] == ["1024", "1024, layer scale and drop path"]


def test_options_that_a_kernel_does_not_read():
    """They make no further candidate; and the launch that is compiled is the candidate's."""
    config = in_force()
    others = [replace(config, block_k=64), replace(config, num_warps=8), replace(config, resident=not config.resident)]
    one, machine = unit(), StandIn()
    assert tune.compiled_clean(one, [config, *others], machine) == [config, others[1]] and not one.dropped
    assert set(machine.compiled) == {config, others[1]}


# What becomes of a planted candidate.


def test_faster_one_wins():
    machine = StandIn(speed={near(in_force()): 0.7e-3})
    result = tune.tune_unit(unit(), machine)
    assert result.winner == near(in_force())
    assert result.before[0] == pytest.approx(1e-3, rel=0.03) and result.after[0] == pytest.approx(0.7e-3, rel=0.03)
    assert machine.timed.count(in_force()) == machine.timed.count(near(in_force())) >= tune.FINAL_ROUNDS


def test_gain_within_the_spread_is_none():
    others = tune.candidates(in_force())[1:]
    result = tune.tune_unit(unit(), StandIn(speed={config: 1.3e-3 for config in others} | {near(in_force()): 0.99e-3}))
    assert result.winner is None and 5 < result.timed <= len(others) + 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (dict(stack_bytes=8), "8 bytes of stack"),
        (dict(spilled_bytes=4), "4 bytes spilled"),
        (dict(shared_bytes=300_000), "300000 bytes of shared memory"),
        (dict(error="does not compile: why"), "does not compile"),
        (dict(tensor_core=0), "no tensor core instruction"),
        (dict(products=2.0), "float32 products by 2.00 of TF32"),
        (dict(wrong_layout=1), "m64n8k8"),
    ],
)
def test_bad_code_is_never_run(fault, words):
    bad = near(in_force())
    machine = StandIn(speed={bad: 0.1e-3}, report={bad: fault})
    result = tune.tune_unit(unit(), machine)
    assert result.winner is None and words in result.dropped[bad]
    assert bad in machine.compiled and bad not in machine.ran and bad not in machine.timed


def test_the_compiler_and_launchers_drop_candidates():
    """Not a stand-in's word: too large a tile for its warps spills, a tiny one makes narrow loads, one is refused."""
    machine = StandIn()
    machine.compile = lambda codes: compile_check.check_all(codes, jobs=0)
    one, good = unit(), [in_force(), near(in_force())]
    huge, tiny, refused = LaunchConfig(64, 512), LaunchConfig(4, 32, num_warps=1), LaunchConfig(0, 32)
    assert tune.compiled_clean(one, [*good, huge, tiny, refused], machine) == good
    dropped = one.dropped
    assert "bytes of stack" in dropped[huge] and "widest global load" in dropped[tiny]
    assert dropped[refused].startswith("the launcher fails: ZeroDivisionError")


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (1.01, "not close"),
        (float("nan"), "not close"),
        (RuntimeError("out of resources"), "does not run: RuntimeError: out of resources"),
    ],
)
def test_wrong_results_are_never_timed(result, words):
    bad = near(in_force())
    machine = StandIn(speed={bad: 0.1e-3}, result={bad: result})
    found = tune.tune_unit(unit(), machine)
    assert found.winner is None and words in found.dropped[bad]
    assert bad in machine.ran and bad not in machine.timed


@pytest.mark.parametrize(
    ("what", "planted"), [("result", float("nan")), ("result", float("inf")), ("report", dict(error="no"))]
)
def test_choice_in_force_that_does_not_work(what, planted):
    machine = StandIn(**{what: {in_force(): planted}})
    result = tune.tune_unit(unit(), machine)
    assert result.winner is None and "configuration in force" in result.problem and not machine.timed


def test_agreement():
    want = [torch.tensor([1.0, -100.0, 0.0]).bfloat16()]
    assert tune.disagreement(want, want) == tune.disagreement([want[0] * 1.01], want) == ""
    off, single = want[0] + torch.tensor([0.0, 0.0, 8.0]).bfloat16(), [torch.ones(3)]
    for got, expected in (([off], want), ([want[0].float()], want), ([want[0][:2]], want), ([], want)):
        assert tune.disagreement(got, expected)
    assert tune.disagreement([torch.full((3,), 1.001)], single) and not tune.disagreement([single[0] + 1e-5], single)


# The choice among times.

A, B, C = (LaunchConfig(size) for size in (16, 32, 64))


def around(median, width=0.02):
    return Spread.of([median * (1 + width * step / 10) for step in range(-10, 11)])


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({A: [around(10)], B: [around(9)], C: [around(8)]}, C),
        ({A: [around(10)], B: [around(11)]}, None),
        ({A: [around(10, 0.5)], B: [around(9)]}, None),  # the one in force is that fast at times
        ({A: [around(10)], B: [around(9, 0.5)]}, None),
        # Over several calls: faster in one, no slower in the others.
        ({A: [around(10), around(1)], B: [around(8), around(1.001)]}, B),
        ({A: [around(10), around(1)], B: [around(5), around(1.2)]}, None),
        ({A: [around(10), around(1)], B: [around(8), around(1)], C: [around(9), around(0.5)]}, C),
    ],
)
def test_choice(times, winner):
    assert tune.choose(times, A) == winner


# The file.


def test_winner_is_written_read_and_goes_first(path):
    winner, before = near(in_force()), in_force()
    assert [unit.winner for unit in run(StandIn(speed={winner: 0.5e-3}), path)] == [winner] * 3  # dtypes
    rows = json.loads(path.read_text())[ARCHITECTURE][KERNEL]
    assert sorted(row["dtypes"] for row in rows) == [["bfloat16"], ["float16"], ["float32"]]
    assert all(row["where"] == {"backward": [0, 0]} for row in rows)
    assert in_force() == winner != before  # without a new process
    measured, call = in_force().origin.removeprefix("by a test: ").split(" (")
    medians = [float(part.split()[0]) for part in measured.split(" against ")]
    assert medians == [pytest.approx(500, rel=0.05), pytest.approx(1000, rel=0.05)] and call.startswith("bias_gelu, 32")
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file left


def test_nothing_faster_writes_nothing(path):
    run(StandIn(speed={config: 2e-3 for config in tune.candidates(in_force())[1:]}), path)
    assert not path.exists()


def test_what_is_there_stays(path):
    """Rows of other architectures, kernels and dtypes; a second run replaces what the first wrote."""
    other = {"config": {"block_m": 8, "block_n": 64}, "origin": "mine"}
    mine = {ARCHITECTURE: {"sum_parts": [other], KERNEL: [other | {"dtypes": ["float64"]}]}, "sm_80": {KERNEL: [other]}}
    path.parent.mkdir()
    path.write_text(json.dumps(mine))
    first, second = near(in_force()), near(near(in_force()))
    for winner in (first, second):
        run(StandIn(speed={winner: 0.5e-3}), path)
    content = json.loads(path.read_text())
    assert content["sm_80"] == mine["sm_80"] and content[ARCHITECTURE]["sum_parts"] == [other]
    dtypes = [row["dtypes"] for row in content[ARCHITECTURE][KERNEL]]
    assert sorted(dtypes) == [["bfloat16"], ["float16"], ["float32"], ["float64"]] and in_force() == second


def test_broken_file_is_an_error_and_stays(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json: got .*expected launch choices"):
        run(StandIn(), path)
    assert path.read_text() == "[]"


def test_file_is_written_whole_or_not_at_all(path):
    row = {"dtypes": ["float32"], "where": {}, "config": {"block_m": 4}, "origin": "mine"}
    tune.add_override(path, ARCHITECTURE, KERNEL, row)
    good = path.read_text()
    with pytest.raises(ValueError, match="is not a power of two"):
        tune.add_override(path, ARCHITECTURE, KERNEL, row | {"config": {"block_m": 3}})
    assert path.read_text() == good and [file.name for file in path.parent.iterdir()] == [path.name]


# The command and the machine.


def test_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tune, "Gpu", lambda: StandIn(speed={near(in_force()): 0.5e-3}))
    out = tmp_path / "out.json"
    assert __main__.main(["tune", "--kernel", KERNEL, "--quick", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"3 rows written: {out}" in said and len(read_overrides(out)[ARCHITECTURE][KERNEL]) == 3
    assert "bias_gelu_forward, bfloat16, backward False" in said and "us, 32 x 256, 4 warps, 1 stages" in said
    with pytest.raises(SystemExit):
        tune.main(["--kernel", "nothing"])
    assert "--kernel: got 'nothing', expected an op or a kernel of add_layer_norm, " in capsys.readouterr().err


def test_interrupt_keeps_what_was_measured(monkeypatch, capsys, path):
    """Ctrl-C in the second unit."""
    winner = near(in_force())
    machine = StandIn(speed={winner: 0.5e-3})
    write = tune.add_override

    def written(*arguments):
        write(*arguments)
        machine.result[winner] = KeyboardInterrupt()

    monkeypatch.setattr(tune, "add_override", written)
    monkeypatch.setattr(tune, "Gpu", lambda: machine)
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--kernel", KERNEL])
    (row,) = read_overrides(path)[ARCHITECTURE][KERNEL]
    assert row.config == winner and row.dtypes == ("bfloat16",)
    assert f"1 rows written: {path}" in capsys.readouterr().out


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "torch finds no GPU here" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(path):
    results = list(tune.tune(tune.Gpu(), path, "", [KERNEL], quick=True))
    assert len(results) == 3 and all(not result.problem and result.before[0] > 0 for result in results)
    assert path.is_file() == any(result.winner for result in results)
