"""Speeds that are promised, asserted on the machine at hand: ``pytest bench -k targets``. An idle machine is needed."""

from dataclasses import replace

import pytest

from mar_fast.bench import peers, runner
from mar_fast.bench.case import Setting
from mar_fast.bench.suites import encoder

# Speed-up over the reference under autocast: ViT-B, 50 % masked, batch 1, medians of one interleaved run.
WANTED = {"mar_fast": 1.3, "mar_fast, compiled": 1.7}
# Where the reference is so near the machine's own rate of matrix products that nothing could be that much faster, this
# share of the floor's speed is asked for instead.
OF_THE_FLOOR = {"mar_fast": 0.75, "mar_fast, compiled": 0.8}


def test_targets_on_a_cpu(setting: Setting) -> None:
    """Our encoder against the original's way of running it, both in the setting's low precision."""
    if setting.on_gpu:
        pytest.skip("a CPU's targets")
    case = encoder.inference_case(setting, "base", 1, 0.5, compiled=True)
    case = replace(case, candidates=tuple(one for one in case.candidates if one.provider in {peers.YARDSTICK, *WANTED}))
    outcome = runner.measure(case, replace(setting, budget=20.0, quick=False), runner.ceilings(setting.device))
    print(runner.text(outcome))
    times = {result.provider: result.time.p50 for result in outcome.results if result.time is not None}
    assert outcome.floor is not None
    for name, wanted in WANTED.items():
        speedup, possible = times[peers.YARDSTICK] / times[name], times[peers.YARDSTICK] / outcome.floor
        assert speedup >= min(wanted, OF_THE_FLOOR[name] * possible), (name, speedup, possible)
