"""The tuner without a GPU: candidates, filters, the choice of a winner, and the user's table, on a stand-in machine."""

import importlib.util
import json
import random
from dataclasses import fields, replace

import pytest
import torch

from mar_fast.kernels import device, launch_config
from mar_fast.kernels.launch_config import LaunchConfig, Row, assumed_architecture

if importlib.util.find_spec("triton") is None or device.INTERPRETING:
    pytest.skip("needs a Triton that compiles", allow_module_level=True)

from mar_fast.kernels.jit import gpu, matrix, tune

KERNEL = "bias_gelu.forward"
ARCHITECTURE = "sm_90"


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The user's tables are in an empty folder."""
    monkeypatch.setenv("MAR_FAST_CONFIGS", str(tmp_path))
    launch_config.forget_tables()
    yield tmp_path
    launch_config.forget_tables()


def unit(dtype="bfloat16"):
    (found,) = [unit for unit in tune.units(ARCHITECTURE, [KERNEL]) if unit.dtype == dtype]
    return found


def in_force(dtype=torch.bfloat16):
    with assumed_architecture(ARCHITECTURE):
        return launch_config.launch_config(KERNEL, torch.empty(0, dtype=dtype, device="meta"))


class StandIn:
    """A machine that says what a test tells it to. ``speed`` gives seconds by configuration, 1 ms by default."""

    architecture, description = ARCHITECTURE, "stand-in, torch 0, Triton 0"

    def __init__(self, **planted):
        self.speed, self.report, self.result = ({}, {}, {})
        self.__dict__.update(planted)
        self.compiled, self.ran, self.timed = [], [], []
        self.noise = random.Random(0)

    def compile(self, found):
        self.compiled += [run.config for run in found]
        for place in reversed(range(len(found))):  # in any order
            run = found[place]
            clean = matrix.report(run.kernel, run.target, run.config, loads={16: 1}, tensor_core=4, matrix=True)
            yield place, replace(clean, **self.report.get(run.config, {}))

    def outcome(self, run):
        self.ran.append(run.config)
        result = self.result.get(run.config, 1.0)
        if isinstance(result, Exception):
            raise result
        return [torch.full((4, 8), 1.0).scatter(1, torch.zeros(4, 1, dtype=torch.long), result)]

    def seconds(self, run, turn):
        self.timed.append(run.config)
        return self.speed.get(run.config, 1e-3) * self.noise.uniform(0.97, 1.03)


def tuned(machine, **options):
    return tune.tune_unit(unit(), machine, **options)


BASE = LaunchConfig(64, 128, 32, num_warps=4, num_stages=3)


# Candidates.


def test_neighbourhood():
    found = tune.candidates(BASE)
    assert found[0] == BASE and len(set(found)) == len(found)
    assert {config.block_m for config in found} == {32, 64, 128}
    assert {config.block_n for config in found} == {64, 128, 256}
    assert {config.block_k for config in found} == {16, 32, 64}
    assert {config.num_stages for config in found} == {1, 2, 3, 4, 5}
    assert {config.num_warps for config in found} == {2, 4, 8, 16}
    for config in found:
        assert 4 <= config.block_m * config.block_n / (32 * config.num_warps) <= 256
    assert LaunchConfig(128, 256, 64, num_warps=8, num_stages=4) in found
    assert LaunchConfig(128, 256, 64, num_warps=2, num_stages=4) not in found  # 512 values a thread


def test_quick_neighbourhood_changes_one_thing():
    found = tune.candidates(BASE, quick=True)
    names = [option.name for option in fields(BASE) if option.name != "origin"]
    changes = [sum(getattr(config, name) != getattr(BASE, name) for name in names) for config in found]
    assert changes[0] == 0 and set(changes[1:]) == {1} and 10 <= len(found) <= 16


def test_neighbourhood_without_a_loop():
    """One stage and no summed dimension: stages mean nothing; rows of unknown length take any number of warps."""
    found = tune.candidates(LaunchConfig(1, num_warps=4))
    assert {config.num_stages for config in found} == {1} and {config.block_m for config in found} == {1, 2}
    assert {config.num_warps for config in found} == {2, 4, 8, 16} and {config.block_n for config in found} == {0}


def test_tiles_of_matrix_products_stay_in_bounds():
    found = tune.candidates(LaunchConfig(16, 256, 16, num_warps=4, num_stages=2))
    assert min(min(c.block_m, c.block_n, c.block_k) for c in found) == 16 and max(c.block_n for c in found) == 256


def test_units():
    """Cases that take one row in one dtype are one unit; each knows where its launches are."""
    found = tune.units(ARCHITECTURE)
    assert {one.kernel for one in found} <= set(matrix.kernel_names()) and KERNEL in {one.kernel for one in found}
    assert len({(one.kernel, one.row, one.dtype) for one in found}) == len(found)
    for one in found:
        assert one.runs and all(matrix.launch_at(run).name == one.kernel for run in one.runs)
        assert one.dtype in ("float32", "float16", "bfloat16")


def test_options_that_a_kernel_does_not_read():
    """They make no further candidate; and a table keeps every option that is not at its default."""
    config = in_force()
    others = [replace(config, block_k=64), replace(config, num_warps=8)]
    assert tune.distinct(unit(), [config, *others]) == [config, others[1]]
    for option in fields(config):
        if isinstance(option.default, bool):
            switched = replace(config, **{option.name: not option.default})
            assert tune.distinct(unit(), [config, switched]) == [config]
            assert tune.entry(replace(unit().row, config=switched))["config"][option.name] is not option.default


def test_candidate_is_what_gets_compiled():
    run = replace(unit().runs[0], config=LaunchConfig(32, 64, num_warps=2))
    launch = matrix.launch_at(run)
    assert launch.config == run.config and launch.constexprs == dict(BLOCK_M=32, BLOCK_N=64)


# What becomes of a planted candidate.


def near(config):
    """A neighbour: twice as many rows."""
    return replace(config, block_m=config.block_m * 2)


def test_faster_one_wins():
    machine = StandIn(speed={near(in_force()): 0.7e-3})
    result = tuned(machine)
    assert result.winner == near(in_force()) and result.gain == pytest.approx(1 / 0.7, rel=0.05)
    assert result.before[0] == pytest.approx(1e-3, rel=0.03) and result.after[0] == pytest.approx(0.7e-3, rel=0.03)
    assert machine.timed.count(in_force()) == machine.timed.count(near(in_force())) >= tune.FINAL_ROUNDS


def test_slower_ones_change_nothing():
    others = tune.candidates(in_force())[1:]
    result = tuned(StandIn(speed={config: 1.3e-3 for config in others}))
    assert result.winner is None and result.gain == 1.0 and 5 < result.timed <= len(others) + 1


def test_gain_within_the_spread_is_none():
    assert tuned(StandIn(speed={near(in_force()): 0.99e-3})).winner is None


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (dict(stack_bytes=8), "8 bytes of stack"),
        (dict(spilled_bytes=4), "4 bytes spilled"),
        (dict(shared_bytes=300_000), "300000 bytes of shared memory"),
        (dict(error="does not compile: why"), "does not compile"),
        (dict(tensor_core=0), "no tensor core instruction"),
        (dict(tensor_core=0, matrix=False), "no tensor core instruction"),
    ],
)
def test_bad_code_is_never_run(fault, words):
    bad = near(in_force())
    machine = StandIn(speed={bad: 0.1e-3}, report={bad: fault})
    result = tuned(machine)
    assert result.winner is None and words in result.dropped[bad]
    assert bad in machine.compiled and bad not in machine.ran and bad not in machine.timed


def test_the_compiler_itself_drops_candidates():
    """Not a stand-in's word: far too large a tile for its warps spills, and a tiny one makes narrow loads."""
    machine = StandIn()
    machine.compile = lambda found: matrix.each(matrix.compile_found, found, jobs=0)
    base, huge, tiny = in_force(), LaunchConfig(64, 512, num_warps=4), LaunchConfig(4, 32, num_warps=1)
    dropped = tune.compiled_clean(unit(), [base, near(base), huge, tiny], machine)
    assert set(dropped) == {huge, tiny}
    assert "bytes of stack" in dropped[huge] and "widest global load" in dropped[tiny]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (1.01, "differs by more than rounding"),
        (float("nan"), "not finite"),
        (RuntimeError("out of resources"), "does not run: RuntimeError: out of resources"),
    ],
)
def test_wrong_results_are_never_timed(result, words):
    bad = near(in_force())
    machine = StandIn(speed={bad: 0.1e-3}, result={bad: result})
    found = tuned(machine)
    assert found.winner is None and words in found.dropped[bad]
    assert bad in machine.ran and bad not in machine.timed


@pytest.mark.parametrize("planted", [dict(result={in_force: float("nan")}), dict(report={in_force: dict(error="no")})])
def test_row_in_force_that_does_not_work(planted):
    machine = StandIn(**{name: {key(): value for key, value in of.items()} for name, of in planted.items()})
    result = tuned(machine)
    assert result.winner is None and "configuration in force" in result.problem and not machine.timed


# The choice among times.


def around(median, width=0.02):
    return [median * (1 + width * step / 10) for step in range(-10, 11)]


A, B, C = (LaunchConfig(size) for size in (16, 32, 64))


def test_choice():
    assert tune.choose({A: [around(10)], B: [around(9)], C: [around(8)]}, A) == C
    assert tune.choose({A: [around(10)], B: [around(11)]}, A) is None
    assert tune.choose({A: [around(10, 0.5)], B: [around(9)]}, A) is None  # the one in force is that fast at times
    assert tune.choose({A: [around(10)], B: [around(9, 0.5)]}, A) is None


def test_choice_over_several_cases():
    """Faster in one case, no slower in the others."""
    assert tune.choose({A: [around(10), around(1)], B: [around(8), around(1.001)]}, A) == B
    assert tune.choose({A: [around(10), around(1)], B: [around(5), around(1.2)]}, A) is None
    assert tune.choose({A: [around(10), around(1)], B: [around(8), around(1)], C: [around(9), around(0.5)]}, A) == C


def test_agreement():
    want = [torch.tensor([1.0, -100.0, 0.0]).bfloat16(), torch.tensor([3, 4])]
    assert tune.disagreement(want, want) == ""
    assert tune.disagreement([want[0] * 1.01, want[1]], want) == ""
    assert "rounding" in tune.disagreement([want[0] + torch.tensor([0.0, 0.0, 8.0]).bfloat16(), want[1]], want)
    assert "rounding" in tune.disagreement([torch.full((3,), 1.001)], [torch.ones(3)])
    assert "result 1 differs" in tune.disagreement([want[0], want[1] + 1], want)
    assert "of another kind" in tune.disagreement([want[0].float(), want[1]], want)
    assert "1 results, not 2" in tune.disagreement(want[:1], want)


# The table.


def run_tune(machine, path, **options):
    options = dict(project="mar_fast 9 abc", date="2026-01-02", kernels=[KERNEL]) | options
    return list(tune.tune(machine, path, **options))


def test_table_is_written_read_and_goes_first(folder):
    path, winner = folder / f"{ARCHITECTURE}.json", near(in_force())
    before = in_force()
    results = run_tune(StandIn(speed={winner: 0.5e-3}), path)
    assert [result.winner for result in results] == [winner] * 3  # dtypes
    table = launch_config.read_table(path)[KERNEL]
    assert {row.dtypes for row in table} == {("bfloat16",), ("float16",), ("float32",)}
    assert in_force() == winner != before  # without a new process
    said = in_force().origin
    assert said.startswith("measured on stand-in, torch 0, Triton 0, mar_fast 9 abc, 2026-01-02: ")
    medians = [float(word) for word, unit in zip(said.split(), said.split()[1:], strict=False) if unit == "us"]
    assert medians == [pytest.approx(500, rel=0.05), pytest.approx(1000, rel=0.05)]
    assert "us against" in said and "(ViT-B, 32 clips, 50 % forward)" in said
    assert [file.name for file in folder.iterdir()] == [path.name]  # no temporary file left
    assert launch_config.rows("bias_gelu.backward", ARCHITECTURE)[0].table.parent == launch_config.TABLES


def test_nothing_faster_writes_nothing(folder):
    run_tune(StandIn(speed={config: 2e-3 for config in tune.candidates(in_force())[1:]}), folder / "sm_90.json")
    assert list(folder.iterdir()) == []


def test_what_is_there_stays(folder):
    """Rows of other kernels, and rows for other shapes of this one; a second run replaces what the first wrote."""
    path = folder / f"{ARCHITECTURE}.json"
    other = {"config": {"block_m": 8, "block_n": 64, "num_warps": 4, "num_stages": 1}, "origin": "mine"}
    path.write_text(json.dumps({"add_layer_norm.forward": [other], KERNEL: [other | {"dtypes": ["float64"]}]}))
    launch_config.forget_tables()
    first = near(in_force())
    run_tune(StandIn(speed={first: 0.5e-3}), path)
    second = near(first)
    run_tune(StandIn(speed={second: 0.3e-3}), path)
    content = json.loads(path.read_text())
    assert content["add_layer_norm.forward"] == [other]
    dtypes = [row.get("dtypes") for row in content[KERNEL]]
    assert sorted(map(str, dtypes)) == sorted(map(str, [["float64"], ["bfloat16"], ["float16"], ["float32"]]))
    assert in_force() == second


def test_interrupt_keeps_what_was_measured(folder):
    path, winner = folder / f"{ARCHITECTURE}.json", near(in_force())
    machine = StandIn(speed={winner: 0.5e-3})
    running = tune.tune(machine, path, project="", date="", kernels=[KERNEL])
    first = next(running)
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt)
    (row,) = launch_config.read_table(path)[KERNEL]
    assert row.config == winner and row.dtypes == (first.unit.dtype,)


def test_broken_table_is_an_error_and_stays(folder):
    path = folder / "other.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json: got .*expected a table of launch configurations"):
        run_tune(StandIn(), path)
    assert path.read_text() == "[]"


def test_table_is_written_whole_or_not_at_all(folder):
    path = folder / f"{ARCHITECTURE}.json"
    tune.write_table(path, {KERNEL: [tune.entry(Row(path, KERNEL, (), (), replace(A, origin="mine")))]})
    good = path.read_text()
    with pytest.raises(ValueError, match="is not a power of two"):
        tune.write_table(path, {KERNEL: [{"config": {"block_m": 3}, "origin": ""}]})
    assert path.read_text() == good and [file.name for file in folder.iterdir()] == [path.name]


def row(table, config, dtypes=(), **where):
    ranges = tuple((name, low, high) for name, (low, high) in where.items())
    return Row(table, "k", dtypes, ranges, config)


def test_winner_takes_no_calls_from_earlier_rows(tmp_path):
    """The user's table goes first, so a special row of the package's must go into it before a general winner."""
    ours = tmp_path / "sm_90.json"
    few = row(ours, A, tokens=(0, 64))
    half = row(ours, B, ("float16", "bfloat16"), tokens=(0, 32))
    single = row(ours, B, ("float32",), width=(1, 8))
    rest = row(ours, C)
    table = tune.merged([], [half, single, few, rest], {(rest, "bfloat16"): LaunchConfig(128)})
    assert [entry["config"]["block_m"] for entry in table] == [32, 32, 16, 128]
    assert [entry.get("dtypes") for entry in table] == [["float16", "bfloat16"], ["float32"], None, ["bfloat16"]]
    assert [entry.get("where") for entry in table] == [
        {"tokens": [0, 32]},
        {"width": [1, 8]},
        {"tokens": [0, 64]},
        None,
    ]


def test_every_call_takes_the_row_it_took(tmp_path):
    """Random tables, random winners: only calls of a replaced row, in its dtype, change, and all of them do."""
    draw = random.Random(0)
    dtypes = ["bfloat16", "float16", "float32"]

    def random_rows(table, start):
        found = []
        for number in range(draw.randint(1, 5)):
            some = tuple(draw.sample(dtypes, draw.choice([0, 1, 1, 2])))
            names = draw.sample(["tokens", "width"], draw.choice([0, 1, 1, 2]))
            ranges = {name: sorted(draw.choices(range(10), k=2)) for name in names}
            found.append(row(table, LaunchConfig(2 ** (start + number)), some, **ranges))
        return found

    def taken(rows, dtype, features):
        return next((row for row in rows if row.fits(dtype, features)), None)

    changed = 0
    for _ in range(150):
        mine = random_rows(tmp_path / "mine.json", 0)
        others = [*random_rows(tmp_path / "sm_90.json", 5), row(tmp_path / "default.json", LaunchConfig(2**10))]
        before = [*mine, *others]
        winners = {
            (row, dtype): LaunchConfig(2 ** (11 + number))
            for number, row in enumerate(draw.sample(before, min(3, len(before))))
            for dtype in draw.sample(dtypes, 2)
            if not row.dtypes or dtype in row.dtypes
        }
        path = tmp_path / "table.json"
        tune.write_table(path, {"k": [entry | {"origin": ""} for entry in tune.merged(mine, others, winners)]})
        after = [*launch_config.read_table(path)["k"], *others]
        for dtype in dtypes:
            for tokens in range(10):
                for width in range(10):
                    features = dict(tokens=tokens, width=width)
                    old = taken(before, dtype, features)
                    want = winners.get((old, dtype), old.config)
                    assert taken(after, dtype, features).config == want
                    changed += want != old.config
    assert changed > 1000


def test_winner_of_a_special_row(tmp_path):
    ours = tmp_path / "sm_90.json"
    few, many, rest = row(ours, A, tokens=(0, 64)), row(ours, B, tokens=(65, 999)), row(ours, C)
    (entry,) = tune.merged([], [few, many, rest], {(many, "float16"): LaunchConfig(128)})
    assert entry["where"] == {"tokens": [65, 999]} and entry["dtypes"] == ["float16"]


# The machine.


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch finds no GPU here"):
        gpu.Gpu()


@pytest.mark.gpu
def test_on_a_gpu(folder):
    machine = gpu.Gpu()
    path = folder / f"{machine.architecture}.json"
    results = list(tune.tune(machine, path, project="", date="", kernels=[KERNEL], quick=True))
    assert len(results) == 3 and all(not result.problem and result.before[0] > 0 for result in results)
    assert path.is_file() == any(result.winner for result in results)
