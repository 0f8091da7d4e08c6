"""flops: multiply-adds and parameters by arithmetic, against the paper and what the original code was counted to do."""

from collections.abc import Iterator

import mar_fast
from mar_fast import cost

from ..case import Case, Setting
from ..runner import Finding, Outcome
from .common import CLASSES, LETTERS

# MAR, arXiv 2207.11660: multiply-adds in G ("GFLOPs" there) by keep ratio, and parameters in M.
PAPER = {"base": ({1.0: 180, 0.5: 86, 0.25: 41}, 94), "large": ({1.0: 597, 0.5: 276, 0.25: 131}, 311)}
# The original code under PyTorch's flop counter.
COUNTED = {"base": {0.5: 86.27, 0.25: 40.91}, "large": {0.5: 276.04, 0.25: 131.39}}


def cases(setting: Setting) -> Iterator[Case]:
    """None: nothing is run."""
    return iter(())


def conclude(setting: Setting, outcomes: list[Outcome]) -> list[Finding]:
    """The table, for the two sizes of the paper and those asked for."""
    return [row for size in dict.fromkeys((*PAPER, *setting.sizes)) for row in _size(size)]


def _size(size: str) -> Iterator[Finding]:
    case = f"ViT-{LETTERS[size]}"
    for keep in (1.0, 0.5, 0.25):
        name = f"videomae_vit_{size}" if keep == 1 else f"mar_vit_{size}"
        config = mar_fast.named_config(name, num_classes=CLASSES, mask_ratio=1 - keep)
        for provider, method in (("mar_fast", "visible"), ("original, by formula", "original")):
            count = cost.count(config, method=method)  # type: ignore[arg-type]
            yield Finding(case, provider, "multiply-adds", "1", count.multiply_adds, keep)
            yield Finding(case, provider, "parameters", "1", count.parameters, keep)
        if size in PAPER:
            yield Finding(case, "paper", "multiply-adds", "1", PAPER[size][0][keep] * 1e9, keep)
        if keep in COUNTED.get(size, {}):
            yield Finding(case, "original, counted", "multiply-adds", "1", COUNTED[size][keep] * 1e9, keep)
            yield Finding(case, "paper", "parameters", "1", PAPER[size][1] * 1e6, keep)


def table(findings: list[Finding]) -> str:
    """Multiply-adds in G by keep ratio, parameters in M: a line for each model and source."""
    lines = [f"{'multiply-adds of a clip, G':34} {'dense':>9} {'50 %':>9} {'75 %':>9} {'parameters, M':>15}"]
    for case, provider in dict.fromkeys((found.case, found.provider) for found in findings):
        of = {
            (found.metric, found.x): found.value
            for found in findings
            if (found.case, found.provider) == (case, provider)
        }
        cells = [
            f"{of[key] / 1e9:9.2f}" if (key := ("multiply-adds", keep)) in of else f"{'':9}"
            for keep in (1.0, 0.5, 0.25)
        ]
        parameters = f"{of['parameters', 0.5] / 1e6:15.2f}" if ("parameters", 0.5) in of else ""
        lines.append(f"{case + ': ' + provider:34} {' '.join(cells)} {parameters}".rstrip())
    return "\n".join(lines)
