"""Speeds that are promised, asserted on the machine at hand: ``pytest bench -k targets``. An idle machine is needed."""

from dataclasses import replace

import pytest

from mar_fast.bench import harness, peers
from mar_fast.bench.case import RunOptions
from mar_fast.bench.suites.models import by_every_peer

# Speed-up over the reference under autocast: ViT-B, 50 % masked, batch 1, medians of one interleaved run.
WANTED = {"mar_fast": 1.3, "mar_fast, compiled": 1.7}
# Where the reference is so near the machine's own rate of matrix products that nothing could be that much faster, this
# share of the floor's speed is asked for instead.
OF_THE_FLOOR = {"mar_fast": 0.75, "mar_fast, compiled": 0.8}


def test_targets_on_a_cpu(options: RunOptions) -> None:
    """Our encoder against the original's way of running it, both in the run's low precision."""
    if options.on_gpu:
        pytest.skip("a CPU's targets")
    case = by_every_peer(options, "base", 1, 0.5, compiled=True)
    chosen = tuple(one for one in case.providers if one.name in {peers.REFERENCE, *WANTED})
    case = replace(case, providers=chosen, baseline=peers.REFERENCE)
    longer = replace(options, seconds=20.0, quick=False)
    found = harness.measure(case, longer, harness.ceilings(options.device))
    print(harness.text(found))
    times = {record.provider: record.p50 for record in found if record.metric in ("time", "floor")}
    for name, wanted in WANTED.items():
        speedup, possible = times[peers.REFERENCE] / times[name], times[peers.REFERENCE] / times["roofline"]
        assert speedup >= min(wanted, OF_THE_FLOOR[name] * possible), (name, speedup, possible)
