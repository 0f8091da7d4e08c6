"""Two runs set side by side: what is planted is found, what is noise is not, and devices do not mix."""

import math
from dataclasses import replace

import bench_records
import numpy as np
import pytest
from bench_records import Maker, row

from mar_fast.bench import records
from mar_fast.bench.compare import compare, ratio
from mar_fast.timing import Spread

CASES = [f"case {number}" for number in range(30)]


def drawn(seed, ours=1.0, everyone=1.0, **options):
    """Thirty cases of mar_fast and a peer, the run-to-run scatter in the first of them."""
    options = dict(spread=0.02, rounds=20, drift=0.0075) | options
    still = Maker(seed + 10**6, **options | dict(drift=0.0))
    make, found = Maker(seed, **options), []
    for number, case in enumerate(CASES):
        seconds = 0.001 * (number + 1) ** 2 * everyone
        where = dict(case=case, mode="inference", x=0.5, baseline="PyTorch SDPA")
        found.append(make.time(ours * seconds, **where))
        found.append(still.time(1.3 * seconds, provider="PyTorch SDPA", **where))
    return found


def verdicts(before, after, **options):
    return [change.verdict for change in compare(before, after, **options).changes]


@pytest.mark.parametrize(("spread", "rounds"), [(0.01, 5), (0.015, 10), (0.02, 20), (0.02, 100)])
def test_noise_raises_no_alarm_and_10_percent_are_found(spread, rounds):
    """As the docstring promises: fewer than 5 % of comparisons of 30 cases, more than 95 % of slower ones."""
    options, alarms, found, seeds = dict(spread=spread, rounds=rounds), 0, [], 120
    for seed in range(seeds):
        before = drawn(2 * seed, **options)
        alarms += compare(before, drawn(2 * seed + 1, **options)).regressed
        found += verdicts(before, drawn(2 * seed + 1, ours=1.1, **options))
    assert alarms < 0.05 * seeds
    assert len(found) == 30 * seeds and found.count("worse") > 0.95 * len(found)


def test_a_change_needs_both_5_percent_and_ranges_apart():
    still = dict(spread=0.002, drift=0.0)
    for factor, expected in ((1.045, ""), (1.06, "worse"), (0.96, ""), (0.94, "better")):
        assert set(verdicts(drawn(0, **still), drawn(1, ours=factor, **still))) == {expected}, factor
    assert "worse" not in verdicts(drawn(0, spread=0.2), drawn(1, ours=1.1, spread=0.2))  # ranges meet


def test_a_drift_of_the_machine_is_none_of_ours():
    before = drawn(0)
    assert set(verdicts(before, drawn(1, everyone=1.4))) == {""}
    assert set(verdicts(before, drawn(1, ours=1.4, everyone=1 / 1.4))) == {"worse"}  # as fast as before, and yet


def test_the_range_of_a_ratio_against_repetition():
    """p20 and p80 of drawn ratios, and those that are put together from the percentiles of two times."""
    random = np.random.default_rng(0)
    ours, baseline = np.exp(random.normal(0, 0.03, 10**5)), 2 * np.exp(random.normal(0, 0.04, 10**5))
    found = ratio(*(row("time", Spread.of(list(times)), "s") for times in (ours, baseline)))
    want = Spread.of(list(baseline / ours))
    assert [found.p20, found.p50, found.p80] == pytest.approx([want.p20, want.p50, want.p80], rel=2e-3)


def test_few_rounds_are_wider_and_one_tells_nothing():
    times = [row("time", Spread(0.9, 1.0, 1.1, n), "s") for n in (100, 10, 5, 1)]
    wide = [math.log(found.p80 / found.p20) for found in (ratio(time, time) for time in times[:3])]
    assert wide[1] / wide[0] == pytest.approx(1.2, rel=3e-3) and wide[2] / wide[0] == pytest.approx(1.8, rel=3e-3)
    assert ratio(times[3], times[3]) == Spread(0.0, 1.0, math.inf, 1)


def test_what_is_lost_and_what_is_not_compared():
    before = drawn(0)
    wrong = row("withheld", Spread(0, 0, 0, 0), note="differs", case="case 3", mode="inference", x=0.5)
    gone = replace(wrong, case="case 4", metric="unavailable", note="no memory")
    found = compare(before, [*before[:6], *before[7:8], *before[9:], wrong, gone])
    assert found.lost == [wrong, gone] and found.regressed and found.unjudged == 2 and len(found.changes) == 28
    assert not compare([*before, wrong], [*before, wrong]).lost  # as before
    peer = replace(wrong, provider="flash_attn")
    assert not compare(before, [*before, peer]).regressed
    alone = [record for record in before if record.provider == "mar_fast"]
    assert compare(alone, alone).unjudged == 30 and not compare(alone, alone).changes


def test_steps_of_a_waterfall_are_held_against_the_first():
    found = compare(bench_records.waterfall(Maker(0)), bench_records.waterfall(Maker(1)))
    assert [change.record.provider for change in found.changes] == list(bench_records.STEPS)[1:]
    assert found.changes[-1].before.p50 == pytest.approx(1 / 0.12, rel=0.05) and not found.unjudged


def test_devices_do_not_mix_unless_allowed():
    before, after = drawn(0), [replace(record, device="another") for record in drawn(1, ours=1.3)]
    with pytest.raises(ValueError, match="after: got measurements on another, expected them on AMD EPYC"):
        compare(before, after)
    assert verdicts(before, after, allow_other_device=True) == ["worse"] * len(CASES)
    said = f"device differs: {bench_records.DEVICE} before, another after"
    assert compare(before, after, allow_other_device=True).notices == [said]


def test_a_record_twice_is_an_error():
    before = drawn(0)
    with pytest.raises(ValueError, match=r"after: got two records of encoder, case 1, inference, x 0.5, bf16, PyTorch"):
        compare(before, [*before, before[3]])


def test_print():
    before, after = drawn(0), [replace(record, torch="2.99") for record in drawn(1, ours=1.3)]
    text = str(compare(before, after[:-2]))
    assert text.startswith("CAUTION: torch differs: 2.13.0 before, 2.99 after; a change below may be due to that\nours")
    change = compare(before, after).changes[7]
    line = next(line for line in text.splitlines() if "case 7," in line)
    cells = f"encoder, case 7, inference, x 0.5, bf16, mar_fast PyTorch SDPA {change.before.p50:.2f}x"
    assert " ".join(line.split()).startswith(cells) and line.endswith("worse") and f"{change.share:+.1%}" in line
    assert "29 ratios compared: 29 worse, 0 better.\n1 times of ours are in one run only" in text


@pytest.fixture
def command(run, tmp_path):
    """mar-fast bench --compare of two runs by way of files."""

    def call(before, after, *options):
        for name, found in (("a.jsonl", before), ("b.jsonl", after)):
            records.write(tmp_path / name, found)
        return run("bench", "--compare", "a.jsonl", "b.jsonl", *options)

    return call


def test_exit_codes(command):
    before, slow = drawn(0), drawn(1, ours=1.3)
    code, out, _ = command(before, slow, "--fail-on-regression")
    assert code == 1 and "30 worse, 0 better" in out
    assert command(before, slow)[0] == 0 and command(before, drawn(3), "--fail-on-regression")[0] == 0
    code, out, err = command(before, [replace(one, device="another") for one in slow])
    assert code == 2 and out == "" and "expected them on AMD EPYC" in err
