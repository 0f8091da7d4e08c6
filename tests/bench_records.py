"""Made-up rows of every suite, for tests of what reads them: no measurement, and never to be kept as one."""

import numpy as np

from mar_fast.bench.records import Record

DEVICE = "AMD EPYC 9R14, 2 cores, AVX512"
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
    "dense, eager": 1.0, "masked": 0.52, "visible-only embedding": 0.47, "SDPA": 0.36, "bf16 weights": 0.16,
    "fused norms and GELU": 0.165, "fused loss": 0.15, "compiled": 0.12,
}  # fmt: skip


class Maker:
    """Rows with a spread, drawn from a seed; ``slow`` multiplies every time, ``drift`` those of this run at random."""

    def __init__(self, seed=0, *, spread=0.06, rounds=20, slow=1.0, drift=0.0, **common):
        self.random = np.random.default_rng(seed)
        self.spread, self.rounds, self.slow, self.drift = spread, rounds, slow, drift
        self.common = {
            **dict(
                device=DEVICE, dtype="bfloat16", torch="2.13.0", triton="3.9.0", commit="0123456789ab",
                date="2026-01-02T03:04:05+00:00",
            ),
            **common,
        }  # fmt: skip

    def row(self, suite, case, provider, metric, value, unit="s", *, mode="", x=0.0, spread=None, n=1, **more):
        low, high = spread or (value, value)
        fields = dict(
            suite=suite, case=case, provider=provider, mode=mode, metric=metric, unit=unit, x=x, p20=low, p50=value,
            p80=high, n=n,
        )  # fmt: skip
        return Record(**{**self.common, **fields, **more})

    def timed(self, suite, case, provider, median, *, metric="time", unit="s", **more):
        """Rounds as a shared machine gives them: a normal core, and now and then a slow one."""
        median = median * self.slow * np.exp(self.random.normal(0, self.drift)) if metric == "time" else median
        core = self.random.normal(0, self.spread / 1.683, self.rounds)
        late = self.random.exponential(self.spread, self.rounds) * (self.random.random(self.rounds) < 0.15)
        low, middle, high = (float(v) for v in np.percentile(median * np.exp(core + late), (20, 50, 80)))
        return self.row(suite, case, provider, metric, middle, unit, spread=(low, high), n=self.rounds, **more)


def machine(make):
    return [
        make.row("machine", "copy", "machine", "rate", 11e9, "B/s", dtype="uint8"),
        make.row("machine", "matrix product", "machine", "rate", 740e9, "FLOP/s"),
        make.row("machine", "matrix product", "machine", "rate", 190e9, "FLOP/s", dtype="float32"),
    ]


def models(make, suite="encoder", mode="inference", batches=(1, 8)):
    found = []
    for batch in batches:
        case, scale = f"ViT-B, batch {batch}", batch * (1 if suite == "encoder" else 3.2)
        for x, share in ((1.0, 1.0), (0.5, 0.47), (0.25, 0.22)):
            where = dict(mode=mode, x=x)
            work = 180e9 * share * scale
            found += [
                make.row(suite, case, "roofline", "floor", 2 * work / 740e9, **where),
                make.row(suite, case, "roofline", "multiply-adds", work, "1", **where),
                make.row(suite, case, "roofline", "bytes moved", 172e6 + 90e6 * share * scale, "B", **where),
            ]
            for provider, factor in PEERS.items():
                if "dense" in provider and x < 1:
                    continue
                seconds = 0.9 * factor * share * scale
                found.append(make.timed(suite, case, provider, seconds, **where))
                found.append(
                    make.timed(suite, case, provider, batch / seconds, metric="throughput", unit="clips/s", **where)
                )
                found.append(make.row(suite, case, provider, "peak memory", 8e7 * share * scale * factor, "B", **where))
                found.append(make.row(suite, case, provider, "error", 5e-3 * factor, "1", **where))
            found.append(
                make.row(suite, case, "flash-attn | fused", "absent", 0, "1", n=0, note="needs a GPU", **where)
            )
        found.append(
            make.row(suite, case, "slow but wrong", "withheld", 0, "1", n=0, mode=mode, x=1.0, note="differs by 3e-1")
        )
    return found


def kernels(make):
    found = []
    shapes = {
        "attention": ("12 heads of 64", {"mar_fast": 1, "SDPA": 1, "SDPA flash": 1.1, "flex_attention": 1.6}),
        "bias_gelu": ("width 3072", {"mar_fast": 0.5, "PyTorch": 1.0, "PyTorch, compiled": 0.55}),
        "gather_patch_embed": (
            "width 768, uint8 clip",
            {"mar_fast": 0.5, "reshape + index + linear": 1, "the same, compiled": 0.9, "Conv3d of all, then index": 2},
        ),
    }
    for op, (label, peers) in shapes.items():
        for tokens in (392, 784, 1568):
            for mode, factor in (("forward", 1.0), ("backward", 2.3)):
                case = f"{op}: 1 clips, {tokens} tokens, {label}"
                seconds = 3e-6 * tokens * factor
                found.append(make.row("kernels", case, "roofline", "floor", 0.3 * seconds, mode=mode, x=tokens))
                for provider, share in peers.items():
                    found.append(make.timed("kernels", case, provider, share * seconds, mode=mode, x=tokens))
    return found


def waterfall(make, mode="inference"):
    found, case = [], "ViT-B, batch 1, 50 % masked"
    for number, (step, share) in enumerate(STEPS.items()):
        where = dict(mode=mode, x=number)
        found += [
            make.timed("waterfall", case, step, 1.9 * share, **where),
            make.row("waterfall", case, step, "peak memory", 3e8 * (0.4 + 0.6 * share), "B", **where),
            make.row("waterfall", case, step, "error", 3e-7 if number < 4 else 5e-3, "1", **where),
        ]
    return found


def scaling(make):
    found = []
    axes = {
        "tokens": ((98, 196, 392, 784, 1568), 1.15), "batch": ((1, 2, 4, 8, 16), 0.97),
        "frames": ((4, 8, 16, 32), 1.21), "resolution": ((112, 160, 224, 320), 2.3),
        "keep ratio": ((0.25, 0.5, 0.75, 1.0), 1.1),
    }  # fmt: skip
    for case, (values, exponent) in axes.items():
        for provider, factor in (("mar_fast", 0.8), ("PyTorch SDPA", 1.0)):
            for x in values:
                seconds = 0.2 * factor * (x / values[0]) ** exponent
                found.append(make.timed("scaling", case, provider, seconds, mode="inference", x=x))
            found.append(make.row("scaling", case, provider, "exponent", exponent, "1", mode="inference"))
    return found


def pipeline(make):
    found = []
    for x, model in ((1.0, 0.8), (0.5, 0.36), (0.25, 0.16)):
        for provider, seconds in {"decode": 0.21, "model": model, "end to end": max(0.21, model) + 0.02}.items():
            note = ("compute-bound" if model > 0.21 else "data-bound") if provider == "end to end" else ""
            where = dict(mode="inference", x=x, note=note)
            found.append(make.timed("pipeline", "ViT-B, bikes.mp4", provider, seconds, **where))
            found.append(
                make.timed(
                    "pipeline", "ViT-B, bikes.mp4", provider, 1 / seconds, metric="throughput", unit="clips/s", **where
                )
            )
    return found


def flops(make):
    found = []
    for provider, share in {
        "mar_fast": 1.0,
        "original, by formula": 1.01,
        "paper": 1.0,
        "PyTorch's counter": 1.0,
    }.items():
        for x, count in ((1.0, 180.34e9), (0.5, 85.34e9), (0.25, 39.52e9)):
            found.append(make.row("flops", "ViT-B", provider, "multiply-adds", share * count, "1", x=x, dtype=""))
        found.append(make.row("flops", "ViT-B", provider, "parameters", 93.02e6, "1", x=1.0, dtype=""))
    return found


def awkward(make):
    """What pictures get wrong easily: one provider, one ratio, a bad step with a long name, little memory or range."""
    found = machine(make)
    for op, factors in {
        "add_layer_norm": {"mar_fast": 1.1, "PyTorch": 2.7}, "gather_patch_embed": {"mar_fast": 1.3, "Conv3d": 5}
    }.items():  # fmt: skip
        for tokens in (98, 392, 1568):
            case, where = f"{op}: 32 clips, {tokens} tokens", dict(mode="forward", x=tokens)
            moved = 32 * tokens * 6144
            count = moved / 2 if op == "add_layer_norm" else 32 * tokens * 1536 * 768
            found.append(make.row("kernels", case, "roofline", "multiply-adds", count, "1", **where))
            found.append(make.row("kernels", case, "roofline", "bytes moved", moved, "B", **where))
            for provider, factor in factors.items():
                seconds = factor * max(2 * count / 740e9, moved / 11e9)
                found.append(make.timed("kernels", case, provider, seconds, **where))
    steps = {"dense, eager": 1.0, "a step that makes things much worse than they were before": 1.4, "compiled": 0.4}
    for number, (step, seconds) in enumerate(steps.items()):
        found.append(
            make.timed("waterfall", "ViT-L, batch 32, 75 % masked", step, seconds, mode="training step", x=number)
        )
    found.append(make.timed("encoder", "ViT-B, batch 1", "mar_fast", 0.003, mode="inference", x=0.5))
    return found + [
        make.timed("scaling", "batch", "mar_fast", 0.1 + 0.001 * x, mode="inference", x=x) for x in (1, 2, 3)
    ]


def everything(make):
    return [
        *machine(make), *flops(make), *models(make), *models(make, "training", "training step", (8,)), *kernels(make),
        *waterfall(make), *waterfall(make, "training step"), *scaling(make), *pipeline(make),
    ]  # fmt: skip
