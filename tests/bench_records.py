"""Made-up records of every suite, for tests of what reads them: no measurement, and never to be kept as one."""

import numpy as np

from mar_fast.bench.records import Record
from mar_fast.timing import Spread

DEVICE = "AMD EPYC 9R14, 2 cores, AVX512"
ORIGIN = dict(device=DEVICE, torch="2.13.0", triton="3.9.0", commit="0123456789ab", date="2026-01-02T03:04:05+00:00")
PEERS = {
    "PyTorch SDPA": 1.0,
    "mar_fast": 0.8,
    "mar_fast, compiled": 0.62,
    "reference, autocast": 1.3,
    "PyTorch SDPA, compiled": 0.8,
    "PyTorch SDPA, max-autotune": 0.78,
    "Hugging Face VideoMAE, dense": 1.4,
    "Hugging Face VideoMAE, index after embedding": 1.25,
    "xformers, memory-efficient attention": 0.97,
    "flash_attn, variable length": 0.9,
}
STEPS = {
    "dense, eager": 1.0,
    "masked": 0.52,
    "a step that makes things much worse than they were before": 0.7,
    "SDPA": 0.36,
    "fused norms and GELU": 0.165,
    "compiled": 0.12,
}
KERNELS = {
    "attention": ("12 heads of 64", {"SDPA": 1, "mar_fast": 1, "SDPA flash": 1.1, "flex_attention": 1.6}),
    "bias_gelu": ("width 3072", {"PyTorch": 1.0, "mar_fast": 0.5, "PyTorch, compiled": 0.55}),
}


def row(metric, value, unit="1", *, suite="encoder", case="c", provider="mar_fast", dtype="bf16", **more):
    """One record; ``value`` is a figure or a spread."""
    names = dict(suite=suite, case=case, provider=provider, metric=metric, unit=unit, dtype=dtype, **more)
    return Record.of({**ORIGIN, **{key: names.pop(key) for key in ORIGIN if key in names}}, value, **names)


class Maker:
    """Times drawn from a seed: ``spread`` is one sigma of the rounds of a case, ``drift`` that of its median by run."""

    def __init__(self, seed=0, *, spread=0.02, rounds=20, drift=0.0):
        self.random, self.spread, self.rounds, self.drift = np.random.default_rng(seed), spread, rounds, drift

    def time(self, median, **where):
        median = median * np.exp(self.random.normal(0, self.drift))
        rounds = median * np.exp(self.random.normal(0, self.spread, self.rounds))
        return row("time", Spread.of(list(rounds)), "s", **where)


def machine():
    where = dict(suite="machine", provider="machine")
    return [
        row("rate", 11e9, "B/s", case="copy", **where | dict(dtype="")),
        row("rate", 740e9, "FLOP/s", case="matrix product", **where),
    ]


def models(make, suite="encoder", mode="inference", batches=(1, 8)):
    found = []
    for batch in batches:
        scale = batch * (1 if suite == "encoder" else 3.2)
        for x, share in ((1.0, 1.0), (0.5, 0.47), (0.25, 0.22)):
            where = dict(suite=suite, case=f"ViT-B, batch {batch}", mode=mode, x=x, baseline="PyTorch SDPA")
            work = 180e9 * share * scale
            for metric, value, unit in (
                ("floor", 2 * work / 740e9, "s"),
                ("multiply-adds", work, "1"),
                ("bytes moved", 172e6 + 90e6 * share * scale, "B"),
            ):
                found.append(row(metric, value, unit, provider="roofline", **where))
            for provider, factor in PEERS.items():
                seconds, own = 0.9 * factor * share * scale, where | dict(provider=provider)
                found += [
                    make.time(seconds, **own),
                    row("throughput", batch / seconds, "clips/s", **own),
                    row("peak memory", 8e7 * share * scale * factor, "B", **own),
                    row("error", 5e-3 * factor, **own),
                ]
            lost = where | dict(provider="flash-attn | fused")
            found.append(row("unavailable", Spread(0, 0, 0, 0), note="needs a GPU", **lost))
    return found


def kernels(make, tokens=(392, 784, 1568)):
    found = []
    for op, (label, peers) in KERNELS.items():
        for x in tokens:
            for mode, factor in (("forward", 1.0), ("backward", 2.3)):
                case = f"{op}: 1 clips, {x} tokens, {label}"
                where = dict(suite="kernels", case=case, mode=mode, x=x, baseline=next(iter(peers)))
                found.append(row("floor", 9e-7 * x * factor, "s", provider="roofline", **where))
                for provider, share in peers.items():
                    found.append(make.time(3e-6 * x * factor * share, provider=provider, **where))
    return found


def waterfall(make, mode="inference", case="ViT-B, batch 1, 50 % masked"):
    found = []
    for number, (step, share) in enumerate(STEPS.items()):
        where = dict(suite="waterfall", case=case, provider=step, mode=mode, x=number, baseline="dense, eager")
        found += [make.time(1.9 * share, **where), row("peak memory", 3e8, "B", **where), row("error", 3e-7, **where)]
    return found


def others(make):
    """Figures that are no times: exponents, counts, a share with its note."""
    flops = dict(suite="flops", case="ViT-B", metric="multiply-adds", dtype="")
    return [
        *(row(value=count, x=x, **flops) for x, count in ((1.0, 180.34e9), (0.5, 85.34e9))),
        row("exponent", 1.15, suite="scaling", case="tokens", mode="inference"),
        make.time(0.2, suite="scaling", case="tokens", mode="inference", x=784),
        row("share", 0.3, suite="pipeline", case="bikes.mp4", mode="inference", x=0.5, note="compute-bound | so"),
    ]


def everything(make):
    return [
        *machine(),
        *models(make),
        *models(make, "training", "training step", (8,)),
        *kernels(make),
        *waterfall(make),
        *waterfall(make, "training step"),
        *others(make),
    ]
