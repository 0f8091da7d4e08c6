"""Two runs set side by side: what is planted is found, what is noise is not, and devices do not mix."""

import io
import math
from dataclasses import replace

import bench_records
import numpy as np
import pytest
from bench_records import Maker

from mar_fast.bench import compare, records
from mar_fast.bench.compare import Verdict

CASES = [f"case {number}" for number in range(30)]


def run(seed, ours=1.0, everyone=1.0, *, peer=True, rates=1.0, **options):
    """Thirty cases of mar_fast and a peer, and the machine's rates."""
    make = Maker(seed, **{**dict(spread=0.05, drift=0.02), **options})
    where = dict(mode="inference", x=0.5)
    found = [replace(row, p50=row.p50 * rates) for row in bench_records.machine(make)]
    for number, case in enumerate(CASES):
        seconds = 0.001 * (number + 1) ** 2 * everyone
        found.append(make.timed("encoder", case, "mar_fast", ours * seconds, **where))
        if peer:
            found.append(make.timed("encoder", case, "PyTorch SDPA", 1.3 * seconds, **where))
    return found


def verdicts(before, after, provider="mar_fast", **options):
    changes = compare.compare(before, after, **options)
    return [change.verdict for change in changes if change.record.provider == provider]


def shared(before, after):
    """The share of our rows that is called worse."""
    found = verdicts(before, after)
    assert len(found) == len(CASES)
    return found.count(Verdict.WORSE) / len(found)


@pytest.mark.parametrize("peer", [True, False])
@pytest.mark.parametrize(
    ("spread", "rounds", "detected"), [(0.01, 5, 0.98), (0.05, 10, 0.9), (0.05, 20, 0.97), (0.1, 40, 0.95)]
)
def test_a_slowdown_of_20_percent_is_flagged_and_noise_is_not(spread, rounds, detected, peer):
    """Runs that differ by 2 % besides their rounds; a false alarm anywhere in a comparison once in twenty times."""
    options = dict(spread=spread, rounds=rounds, peer=peer)
    found, alarms, seeds = [], 0, 50
    for seed in range(seeds):
        before = run(2 * seed, **options)
        found.append(shared(before, run(2 * seed + 1, ours=1.2, **options)))
        changes = compare.compare(before, run(2 * seed + 1, **options))
        alarms += any(change.verdict is not Verdict.STEADY for change in changes)
    assert np.mean(found) >= detected
    assert alarms <= 0.12 * seeds


@pytest.mark.parametrize("slower", [0.98, 1.02])
def test_two_percent_is_never_flagged(slower):
    before = run(0, spread=0.002, drift=0)
    assert set(verdicts(before, run(1, ours=slower, spread=0.002, drift=0))) == {Verdict.STEADY}


def test_a_gain_is_a_gain_and_less_throughput_a_loss():
    assert set(verdicts(run(0), run(1, ours=0.7))) == {Verdict.BETTER}
    make = Maker(0, spread=0.02)
    before, slow, fast = (
        [make.timed("pipeline", "clip", "model", rate, metric="throughput", unit="clips/s")] for rate in (10, 7, 14)
    )
    assert verdicts(before, slow, "model") == [Verdict.WORSE] and verdicts(before, fast, "model") == [Verdict.BETTER]
    assert compare.compare(before, slow)[0].regression and not compare.compare(before, fast)[0].regression


def test_a_slower_machine_is_no_regression_but_a_slower_everything_is():
    before = run(0)
    drifted = compare.compare(before, run(1, everyone=1.4, rates=1 / 1.4))
    assert {change.verdict for change in drifted if change.record.metric == "time"} == {Verdict.MACHINE}
    assert not any(change.regression for change in drifted)
    assert shared(before, run(1, everyone=1.4)) == 1.0  # by the rates the machine is as fast as it was
    assert shared(before, run(1, ours=1.4, everyone=1.4, rates=1 / 1.4)) == 1.0
    faster = compare.compare(before, run(1, everyone=0.7, rates=1 / 0.7))
    assert {change.verdict for change in faster if change.record.metric == "time"} == {Verdict.MACHINE}


def test_a_loss_hidden_by_a_faster_machine_shows_against_the_peer():
    before, after = run(0, spread=0.02, drift=0), run(1, ours=1.4, everyone=1 / 1.4, spread=0.02, drift=0)
    assert set(verdicts(before, after)) == {Verdict.WORSE}
    change = next(c for c in compare.compare(before, after) if c.record.provider == "mar_fast")
    assert change.ratio == pytest.approx(1.0, abs=0.05) and change.peer == "PyTorch SDPA"
    assert change.peer_ratio == pytest.approx(1.4, rel=0.05)
    other_torch = [replace(row, torch="9.9") for row in after]  # then the peer's own code is another
    assert set(verdicts(before, other_torch)) == {Verdict.STEADY}


def test_a_slower_peer_is_no_regression_of_ours():
    before = run(0)
    after = [
        replace(row, p20=1.5 * row.p20, p50=1.5 * row.p50, p80=1.5 * row.p80) if "SDPA" in row.provider else row
        for row in before
    ]
    changes = compare.compare(before, after)
    assert set(verdicts(before, after, "PyTorch SDPA")) == {Verdict.WORSE}
    assert not any(change.regression for change in changes)


@pytest.mark.parametrize("rounds", [5, 10, 30, 100])
@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_error_of_a_median_against_repetition(rounds, shape):
    """The formula, on average, against how far medians of the same distribution really scatter."""
    random = np.random.default_rng(rounds)
    draws = random.normal(0, 0.05, (4000, rounds)) if shape == "normal" else random.exponential(0.05, (4000, rounds))
    values = np.exp(draws)
    scatter = np.log(np.median(values, axis=1)).std()
    make = Maker()
    formula = np.mean([
        compare.median_error(make.row("s", "c", "p", "time", m, spread=(low, high), n=rounds))
        for low, m, high in np.percentile(values, (20, 50, 80), axis=1).T
    ])  # fmt: skip
    assert 0.9 < formula / scatter < 1.6


def test_what_one_round_can_tell():
    make = Maker()
    single, wide = make.row("s", "c", "mar_fast", "time", 1.0), make.row("s", "c", "mar_fast", "time", 3.0)
    changes = compare.compare([single], [wide])
    assert [change.verdict for change in changes] == [Verdict.UNKNOWN] and changes[0].ratio == 3.0


def test_many_rows_are_looked_at_more_strictly():
    assert compare.critical(1) == compare.critical(10) == 3.0
    assert compare.critical(1000) == pytest.approx(4.056, abs=0.001)  # 1 - 0.05 / 2000 of a normal distribution


@pytest.mark.parametrize(
    ("metric", "before", "after", "verdict"),
    [
        ("peak memory", 1e9, 1.2e9, Verdict.WORSE),
        ("peak memory", 1e9, 0.8e9, Verdict.BETTER),
        ("peak memory", 1e9, 1.05e9, Verdict.STEADY),
        ("peak memory", 1e6, 5e6, Verdict.STEADY),  # some pages
        ("peak memory", 0, 2e7, Verdict.WORSE),
        ("error", 1e-3, 1.9e-3, Verdict.STEADY),
        ("error", 1e-3, 2.1e-3, Verdict.WORSE),
        ("error", 1e-3, 4e-4, Verdict.BETTER),
        ("error", 1e-9, 9e-8, Verdict.STEADY),
        ("error", 0, 1e-3, Verdict.WORSE),
        ("error", 1e-3, math.nan, Verdict.WORSE),
        ("error", math.nan, 1e-3, Verdict.BETTER),
        ("error", math.nan, math.nan, Verdict.STEADY),
    ],
)
def test_memory_and_error(metric, before, after, verdict):
    make = Maker()
    rows = [[make.row("encoder", "c", "mar_fast", metric, value, "B")] for value in (before, after)]
    assert [change.verdict for change in compare.compare(*rows)] == [verdict]


def test_what_is_not_judged_and_what_only_one_run_has():
    make = Maker()
    rate = make.row("machine", "copy", "machine", "rate", 1e9, "B/s")
    old, new = (make.row("encoder", "c", name, "time", 1.0) for name in ("mar_fast, old", "mar_fast, new"))
    wrong = make.row("encoder", "c", "mar_fast", "withheld", 0, "1", n=0, note="differs")
    absent = make.row("encoder", "c", "flash_attn", "absent", 0, "1", n=0, note="no GPU")
    changes = compare.compare([rate, old], [replace(rate, p50=1.0), new, wrong, absent])
    assert [(change.record, change.verdict) for change in changes] == [
        (old, Verdict.ONLY_BEFORE), (new, Verdict.ONLY_AFTER), (wrong, Verdict.WORSE), (absent, Verdict.ONLY_AFTER)
    ]  # fmt: skip
    assert [change.regression for change in changes] == [False, False, True, False]


def test_devices_do_not_mix_unless_allowed():
    before, after = run(0), [replace(row, device="another") for row in run(1, ours=1.3)]
    with pytest.raises(ValueError, match="after: got measurements on another, expected them on AMD EPYC"):
        compare.compare(before, after)
    assert shared(before, [replace(row, device=bench_records.DEVICE) for row in after]) == 1.0
    assert verdicts(before, after, allow_other_device=True) == [Verdict.WORSE] * len(CASES)
    assert compare.notices(before, after) == [f"device differs: {bench_records.DEVICE} before, another after"]


def test_a_row_twice_is_an_error():
    before = run(0)
    with pytest.raises(ValueError, match=r"after: got two rows for encoder, case 0, mar_fast, inference, time, x 0\.5"):
        compare.compare(before, [*before, before[3]])


@pytest.fixture
def printed(tmp_path):
    """Compare two lists of rows by way of files; returns the exit code and what was printed."""

    def call(before, after, **options):
        from rich.console import Console

        for name, found in (("a.jsonl", before), ("b.jsonl", after)):
            records.write(tmp_path / name, found)
        console = Console(file=io.StringIO(), width=220)
        options = {"fail_on_regression": True, **options}
        code = compare.run(tmp_path / "a.jsonl", tmp_path / "b.jsonl", console=console, **options)
        return code, " ".join(console.file.getvalue().split())

    return call


def test_exit_code_and_print(printed):
    before, slow = run(0), run(1, ours=1.3)
    code, text = printed(before, slow)
    assert code == 1 and "60 rows compared: 30 worse, 0 better, 30 within the noise." in text
    assert "encoder, case 7, inference, x 0.5, bfloat16, mar_fast" in text and "CAUTION" not in text
    change = next(c for c in compare.compare(before, slow) if c.record.case == "case 7")
    assert f"+{100 * (change.ratio - 1):.0f} %" in text and "over PyTorch SDPA" in text
    assert printed(before, slow, fail_on_regression=False)[0] == 0
    assert printed(before, run(3))[0] == 0
    code, text = printed(before, [replace(row, torch="2.99") for row in slow[:-1]])
    assert "CAUTION: torch differs: 2.13.0 before, 2.99 after" in text
    assert "only before: encoder, case 29, PyTorch SDPA, inference, 1 rows (time)" in text


def test_print_says_what_it_could_not_see(printed):
    make = Maker(0, spread=0.4, rounds=5)
    noisy = [make.timed("encoder", case, "mar_fast", 1.0) for case in CASES]
    single = make.row("encoder", "once", "mar_fast", "time", 1.0)
    wrong = make.row("encoder", "[bold]c", "mar_fast", "withheld", 0, "1", n=0, note="differs by [3e-1]")
    code, text = printed([*noisy, single], [*noisy, single, wrong])
    assert code == 1 and "30 are too noisy for one of 20%" in text and "1 rows of one round only" in text
    assert "worse: encoder, [bold]c, x 0, bfloat16, mar_fast is withheld now: differs by [3e-1]" in text
    assert "0 rows are in both runs" in printed([single], [wrong])[1]
