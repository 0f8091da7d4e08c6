"""The tuner without a GPU: candidates, filters, the choice of a winner, and the user's file, on a stand-in machine."""

import json
import random
import re
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from mar_fast.kernels import device

pytest.importorskip("triton")
if device.INTERPRETING:
    pytest.skip("needs a Triton that compiles", allow_module_level=True)

from mar_fast import timing
from mar_fast.bench import __main__, matrix, tune
from mar_fast.kernels.jit import launch
from mar_fast.kernels.jit.compile_check import Report
from mar_fast.kernels.jit.launch import LaunchConfig, forget_choices, read_overrides
from mar_fast.timing import Spread

KERNEL, TARGET, COMMAND = "bias_gelu_forward", "sm_90", ["tune", "--kernel", "bias_gelu_forward"]
NOW, FASTER = LaunchConfig(16, 256), LaunchConfig(32, 256)


@pytest.fixture(autouse=True)
def path(monkeypatch, tmp_path):
    """The user has no choices of their own yet."""
    monkeypatch.setenv("MAR_FAST_CONFIGS", str(tmp_path / "mine" / "overrides.json"))
    forget_choices()
    yield tmp_path / "mine" / "overrides.json"
    forget_choices()


@pytest.fixture
def machine(monkeypatch):
    """Its compiler, clock and kernels do what a test says, by configuration; the harness and all else is real."""
    made = SimpleNamespace(speed={}, result={}, faults={}, compiled=set(), ran=set(), timed=[])
    noise = random.Random(0)

    def check_all(codes, jobs):
        for told in codes:
            made.compiled.add(told.config)
            faults = made.faults.get(told.config, [])
            yield Report(told, faults, {} if "does not compile" in faults else {"registers": 32})

    def op(x):
        (config,) = launch._forced.values()
        made.ran.add(config)
        if isinstance(result := made.result.get(config, 1.0), BaseException):
            raise result
        made.running = config
        return result if isinstance(result, torch.Tensor) else x * torch.tensor(result, dtype=x.dtype)

    def captured(run):
        run()
        return lambda config=made.running: setattr(made, "running", config)

    def seconds(run, where):
        run()
        made.timed.append(made.running)
        return made.speed.get(made.running, 1e-3) * noise.uniform(0.97, 1.03)

    few, planted = {}, {}  # to record all calls takes long
    for call, case in matrix.calls("meta").items():
        if case.op in ("bias_gelu", "mlp"):
            x = torch.tensor([1.0, -2.0, 1.0]).to(case.dtype)
            few[call], planted[call] = case, replace(case, operands=partial(dict, x=x), ours=op)
    for module in (matrix, tune):
        monkeypatch.setattr(module, "calls", lambda where: few if where == "meta" else planted)
    monkeypatch.setattr(tune, "check_all", check_all)
    monkeypatch.setattr(tune.suite, "captured", captured)
    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(tune, "gpu", lambda: (torch.device("cpu"), TARGET))
    return made


def unit(kernel=KERNEL, where="bfloat16", run=None):
    choices = tune.launched(lambda launch, *_: launch.choice, [TARGET], [kernel])
    (found,) = [tune.Unit(*one, TARGET, run) for one in choices.items() if where in str(one[0])]
    return found


# Candidates.

NEIGHBOURS = [
    (LaunchConfig(64, 128, 32, 4, 3), dict(block_m=[32, 64, 128], block_k=[16, 32, 64], num_stages=[1, 2, 3, 4, 5])),
    # Neither stages without a loop nor blocks that are not there; rows of unknown length take any number of warps.
    (LaunchConfig(1), dict(block_m=[1, 2], block_n=[0], block_k=[0], num_stages=[1], num_warps=[2, 4, 8, 16])),
    # Tiles of matrix products stay in bounds.
    (LaunchConfig(16, 256, 16, 4, 2), dict(block_m=[16, 32], block_n=[128, 256], block_k=[16, 32])),
]


@pytest.mark.parametrize(("config", "values"), NEIGHBOURS)
def test_neighbours(config, values):
    found = tune.neighbours(config)
    assert config not in found and len(set(found)) == len(found)
    for name, expected in values.items():
        assert sorted({getattr(one, name) for one in [config, *found]}) == expected, name
    for one in found:  # one thing changes, warps along with a block; neither idle threads nor 512 values for one
        assert len(asdict(one).items() - asdict(config).items() - {("num_warps", one.num_warps)}) <= 1
        assert not one.block_n or 4 <= one.block_m * one.block_n / (32 * one.num_warps) <= 256


def test_compiler_and_launchers_drop_candidates(monkeypatch):
    """Not a stand-in's word: too large a tile for its warps spills, a tiny one makes narrow loads, one is refused, and
    options that the kernel does not read make no further candidate."""
    bad = [LaunchConfig(64, 512), LaunchConfig(4, 32, num_warps=1), LaunchConfig(0, 32)]
    same = [replace(NOW, block_k=64), replace(NOW, resident=False)]
    monkeypatch.setattr(tune.os, "cpu_count", lambda: 0)  # no other processes
    assert unit().compiled_clean([NOW, *same, FASTER, *bad]) == [NOW, FASTER]


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_every_call_that_makes_a_choice_is_timed_in_the_pass_that_does(monkeypatch, mode):
    kernel = f"add_layer_norm_{mode}"
    seen, labels = [], ("", ", bias of x, layer scale and drop path")
    monkeypatch.setattr(tune, "workload", lambda *passed: passed)

    def run(case):
        seen.append(case)
        return [SimpleNamespace(metric="time", provider=str(config)) for config in case[-1]]

    one = unit(kernel, "bfloat16, width 1024", run)
    assert len(one.race([one.choice.config, NOW])[NOW]) == 2
    calls = [f"add_layer_norm, 32 clips, 784 tokens, width 1024{more}, bfloat16" for more in labels]
    assert seen == [(call, mode, kernel, [one.choice.config, NOW]) for call in calls]


# What becomes of planted candidates.


SPILLS, LOST = ["8 bytes of spills and stack"], "False: the configuration in force does not "
WRONG = (1.2, float("nan"), RuntimeError("refused"), [1.0, 1.0, 1.2], torch.ones(2, 3), torch.ones(3).double())
NOTHING_WINS = [
    (FASTER, 0.99e-3, 1.0, [], "compiled ran timed"),  # a gain within the spread
    (FASTER, 0.1e-3, 1.0, SPILLS, "compiled"),
    *((FASTER, 0.1e-3, result, [], "compiled ran") for result in WRONG),
    *((NOW, 1e-3, result, [], "compiled ran") for result in (float("nan"), float("inf"))),
    (NOW, 1e-3, 1.0, ["does not compile"], "compiled"),
]


@pytest.mark.parametrize(("config", "speed", "result", "faults", "stages"), NOTHING_WINS)
def test_configuration_that_does_not_win(machine, path, capsys, config, speed, result, faults, stages):
    """It goes as far as it may, and nothing is written; if it is the one in force nothing is even timed."""
    machine.speed, machine.result, machine.faults = {config: speed}, {config: result}, {config: faults}
    assert __main__.main(COMMAND) == 0 and not path.exists()
    assert capsys.readouterr().out.count(LOST if config == NOW else ": stays, ") == 3
    assert [name for name in ("compiled", "ran", "timed") if config in getattr(machine, name)] == stages.split()
    assert config != NOW or NOW not in machine.timed


EIGHT_BITS = [torch.tensor([1.0, -2.0, third]).to(torch.float8_e4m3fn) for third in (1.0, 1.125)]  # neighbours


@pytest.mark.parametrize(
    ("now", "faster", "dtypes"),
    [*((1.0, [1, 1, 1 + off], found) for off, found in ((1e-4, 3), (5e-3, 2), (5e-2, 1), (0.2, 0))),
     *((EIGHT_BITS[0], other, found) for other, found in zip(EIGHT_BITS, (3, 0), strict=True))],
)  # fmt: skip
def test_agreement(machine, path, now, faster, dtypes):
    """An error counts by the value and by the largest one, 2; what rounding explains in a dtype is one in others."""
    machine.speed, machine.result = {FASTER: 0.5e-3}, {NOW: now, FASTER: faster}
    assert __main__.main(COMMAND) == 0
    assert len(read_overrides(path).get((TARGET, KERNEL), ())) == dtypes


def test_a_backward_pass_keeps_its_launches(machine, monkeypatch):
    """Each provider runs with its own configuration, though none is forced any more."""
    ran, (call, *_) = [], matrix.calls("meta")

    class Planned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            ctx.config = getattr(ctx, "config", None) or launch._forced[KERNEL]
            ran.append(ctx.config)
            return grad

    planned = replace(tune.calls("cuda")[call], ours=lambda x: Planned.apply(x), differentiated=("x",))
    monkeypatch.setattr(tune, "calls", lambda where: {call: planned})
    made = [one.prepare() for one in tune.workload(call, "backward", KERNEL, [NOW, FASTER]).providers]
    del ran[:]
    for one in (*made, *made):
        one.run()
    assert ran == [NOW, FASTER] * 2


A, B, C = (LaunchConfig(size) for size in (16, 32, 64))


def around(median, width=0.02):
    return Spread.of([median * (1 + width * step / 10) for step in range(-10, 11)])


TIMES = [
    ({A: [around(10)], B: [around(9)], C: [around(8)]}, C),
    ({A: [around(10)], B: [around(11)]}, A),
    ({A: [around(10, 0.5)], B: [around(9)]}, A),  # the one in force is that fast at times
    ({A: [around(10)], B: [around(9, 0.5)]}, A),
    # Over several calls: faster in one, no slower in the others.
    ({A: [around(10), around(1)], B: [around(8), around(1.001)]}, B),
    ({A: [around(10), around(1)], B: [around(5), around(1.2)]}, A),
    ({A: [around(10), around(1)], B: [around(8), around(1)], C: [around(9), around(0.5)]}, C),
]


@pytest.mark.parametrize(("times", "winner"), TIMES)
def test_choice_among_times(times, winner):
    assert tune.fastest(times, A) == winner


# The file and the command.


def test_fastest_is_written_read_and_goes_first(machine, path, capsys):
    """It is two steps away. Rows of other architectures, kernels and dtypes stay; a second run replaces the first's."""
    other = {"config": {"block_m": 8, "block_n": 64}, "origin": "mine"}
    mine = {TARGET: {"sum_parts": [other], KERNEL: [other | {"dtypes": ["float64"]}]}, "sm_80": {KERNEL: [other]}}
    path.parent.mkdir()
    path.write_text(json.dumps(mine))
    best = replace(FASTER, block_m=64)
    for winner, speed in (best, {FASTER: 0.8e-3, best: 0.5e-3}), (replace(best, num_warps=8), {}):
        machine.speed, machine.timed, before = speed or {winner: 0.5e-3}, [], unit().choice.config
        assert __main__.main(COMMAND) == 0
        assert unit().choice.config == winner != before  # without a new process
        assert {before, winner} <= machine.compiled  # it is the candidate's launch that is compiled
        assert machine.timed.count(before) >= machine.timed.count(winner) >= 3 * 5  # rounds of three dtypes
        said = capsys.readouterr().out
        assert f"3 rows written: {path}" in said and f"bfloat16, backward False: {winner}, " in said
    content = json.loads(path.read_text())
    assert content["sm_80"] == mine["sm_80"] and content[TARGET]["sum_parts"] == [other]
    rows = content[TARGET][KERNEL]
    assert sorted(row["dtypes"] for row in rows) == [["bfloat16"], ["float16"], ["float32"], ["float64"]]
    assert all(row["where"] == {"backward": [0, 0]} for row in rows[:3])
    medians = re.match(r"measured: .*: (.*) us against (.*) ms \(bias_gelu, 32 clips", rows[0]["origin"]).groups()
    assert [*map(float, medians)] == [pytest.approx(500, rel=0.05), pytest.approx(1, rel=0.05)]
    good = path.read_text()
    with pytest.raises(ValueError, match="powers of two"):
        tune.add_override(path, TARGET, unit().choice, LaunchConfig(3), "mine")  # whole or not at all
    assert path.read_text() == good and [file.name for file in path.parent.iterdir()] == [path.name]


def table(row):
    """A file whose second row is this one."""
    good = {"dtypes": ["float32"], "where": {"backward": [0, 1]}, "config": {"block_m": 4}, "origin": "mine"}
    return json.dumps({TARGET: {KERNEL: [good, good | row if isinstance(row, dict) else row]}})


BROKEN = [
    *((content, "got .*Error") for content in ("[]", "{", '{"sm_90": []}')),
    (table({"config": {"block_m": 3}}), "row 1: got .*powers of two"),
    (table({"config": {"block_m": 4, "block_j": 4}}), "row 1: got .*block_j"),
    (table({"dtypes": "float32"}), "row 1: got .*are no dtypes"),
    (table({"where": {"backward": 1}}), "row 1: got .*TypeError"),
    (table({"dtype": ["float32"]}), "row 1: got .*unexpected keyword argument 'dtype'"),
    (table(1), "row 1: got .*TypeError"),
    (json.dumps({TARGET: {KERNEL: [{"config": {"block_m": 4}}]}}), "row 0: got .*origin"),
]


@pytest.mark.parametrize(("content", "words"), BROKEN)
def test_broken_file_is_an_error_and_stays(machine, tmp_path, capsys, content, words):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        __main__.main([*COMMAND, "--out", str(path)])
    words = words.replace("row", f"{TARGET}, {KERNEL}, row")
    assert re.search(rf"other\.json.*{words}.*, expected launch choices", capsys.readouterr().err)
    assert path.read_text() == content


def test_interrupt_keeps_what_was_measured(machine, monkeypatch, capsys, path):
    """Ctrl-C in the second unit."""
    machine.speed, write = {FASTER: 0.5e-3}, tune.add_override

    def written(*arguments):
        write(*arguments)
        machine.result[FASTER] = KeyboardInterrupt()

    monkeypatch.setattr(tune, "add_override", written)
    with pytest.raises(KeyboardInterrupt):
        __main__.main(COMMAND)
    (row,) = read_overrides(path)[TARGET, KERNEL]
    assert row.config == FASTER and row.dtypes == ["bfloat16"] and f"1 rows written: {path}" in capsys.readouterr().out


def test_errors_of_the_command(monkeypatch, capsys, machine):
    with pytest.raises(SystemExit):
        tune.main(["--kernel", "nothing"])
    assert "--kernel: got 'nothing', expected an op or a kernel of bias_gelu, " in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "torch finds no GPU here, expected one to measure on" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(path, capsys):
    assert __main__.main(COMMAND) == 0
    said = capsys.readouterr().out
    assert said.count(" us against ") == 3 and path.is_file() == ("\n0 rows written" not in said)
