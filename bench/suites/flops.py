"""flops: multiply-adds and parameters by formula, beside the paper's and those counted in the original code."""

from collections.abc import Iterator
from functools import partial

import mar_fast
from mar_fast import cost

from ..case import Case, RunOptions
from ..records import OURS, Record
from .common import CLASSES, LETTERS

# MAR, arXiv 2207.11660: multiply-adds in G ("GFLOPs" there) by keep ratio, and parameters in M.
PAPER = {"base": ({1.0: 180, 0.5: 86, 0.25: 41}, 94), "large": ({1.0: 597, 0.5: 276, 0.25: 131}, 311)}
# The original code under PyTorch's flop counter.
COUNTED = {"base": {0.5: 86.27, 0.25: 40.91}, "large": {0.5: 276.04, 0.25: 131.39}}


def cases(options: RunOptions) -> Iterator[Case]:
    """None: nothing is run."""
    return iter(())


def conclude(options: RunOptions, found: list[Record]) -> list[Record]:
    """Multiply-adds and parameters, for the two sizes of the paper and those asked for."""
    make = partial(Record.of, options.environment, suite="flops")
    return [
        make(value, case=f"ViT-{LETTERS[size]}", provider=provider, metric=metric, x=x)
        for size in dict.fromkeys((*PAPER, *options.sizes))
        for provider, metric, x, value in _figures(size)
    ]


def _figures(size: str) -> Iterator[tuple[str, str, float, float]]:
    """Provider, metric, keep ratio and value."""
    for keep in (1.0, 0.5, 0.25):
        name = f"videomae_vit_{size}" if keep == 1 else f"mar_vit_{size}"
        config = mar_fast.named_config(name, num_classes=CLASSES, mask_ratio=1 - keep)
        methods: tuple[tuple[str, cost.Method], ...] = ((OURS, "visible"), ("original, by formula", "original"))
        for provider, method in methods:
            count = cost.count(config, method=method)
            yield provider, "multiply-adds", keep, count.multiply_adds
            yield provider, "parameters", keep, count.parameters
        if size in PAPER:
            yield "paper", "multiply-adds", keep, PAPER[size][0][keep] * 1e9
        if keep in COUNTED.get(size, {}):
            yield "original, counted", "multiply-adds", keep, COUNTED[size][keep] * 1e9
            yield "paper", "parameters", keep, PAPER[size][1] * 1e6
