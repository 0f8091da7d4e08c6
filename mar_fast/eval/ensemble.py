"""Ensembles of masks: views of one clip that together see every tubelet equally often, and their average.

A share k / n of the tokens, in lowest terms, needs n masks, and each token is then visible in k of them. At 1/2, 1/4,
1/8 the masks are a partition: every token is seen exactly once.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import masking
from ..kernels import checks
from ..masking import TokenMask
from ..model import MAR

Kind = Literal["running", "random", "tube", "frame"]
"""The masks that have complements; what a content mask drops is not a content mask."""

MOST_VIEWS = 64


def fraction(ratio: float) -> Fraction:
    """The share k / n that a mask of ``ratio`` keeps: n views see every token, each of them k times.

    Raises:
        ValueError: not a number in [0, 1), or no share of at most `MOST_VIEWS` parts.
    """
    if not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise checks.bad("ratio", repr(ratio), "a number in [0, 1)")
    kept = Fraction(1 - ratio).limit_denominator(MOST_VIEWS)
    if not kept or abs(float(kept) - (1 - ratio)) > 1e-6:
        raise checks.bad("ratio", ratio, f"one that keeps k/n of the tokens, with n up to {MOST_VIEWS}")
    return kept


def complementary(
    kind: Kind,
    batch: int,
    grid: tuple[int, int, int],
    ratio: float,
    *,
    cell: tuple[int, int, int] = (1, 2, 2),
    generator: torch.Generator | None = None,
    device: masking.Device = None,
) -> list[TokenMask]:
    """The masks of an ensemble: each drops ``ratio``, and together they see every token of a clip equally often.

    Args:
        kind: "running" takes phases of cell running masking, evenly spaced: 0 and 2 at 50 %, 0 to 3 at 75 % of the
            default cell. "random", "tube" and "frame" deal out tokens, positions in space or frames at random.
        batch: Number of clips; each has a deal of its own.
        grid: (T', H', W') tubelets.
        ratio: Share of masked tokens, in [0, 1).
        cell: Of the running mask.
        generator: Source of the random draws; None is torch's default.
        device: Where the masks go; None is the generator's device, or the CPU.

    Returns:
        n masks where the share kept is k/n in lowest terms; each token of each clip is visible in k of them.

    Raises:
        ValueError: an argument does not fit, or tokens, positions or frames cannot be dealt out in n equal parts.
    """
    if kind not in get_args(Kind):
        raise checks.bad("kind", repr(kind), "one of " + ", ".join(get_args(Kind)))
    kept = fraction(ratio)
    target = torch.device(device or (generator.device if generator is not None else "cpu"))
    if kind == "running":
        slots = math.prod(cell)
        phases = range(0, slots, max(1, slots // kept.denominator))
        return [masking.cell_running(batch, grid, ratio, cell=cell, phase=phase, device=target) for phase in phases]
    order = masking.shuffled(kind, batch, grid, generator, target)
    units, parts = math.prod(order.shape[1:]), kept.denominator
    if units % parts:
        word = {"random": "tokens", "tube": "positions", "frame": "frames of tubelets"}[kind]
        raise checks.bad("ratio", ratio, f"one whose {parts} views share the {units} {word} of grid {grid} equally")
    part = order.to(target) % parts  # every part has as many units as any other
    masks = [((part - view) % parts >= kept.numerator).expand(batch, *grid) for view in range(parts)]
    visible = math.prod(grid) // parts * kept.numerator
    return [TokenMask.from_bool_masked(masked, num_visible=visible) for masked in masks]


def log_probabilities(model: MAR, video: Tensor, masks: Sequence[TokenMask | None]) -> Tensor:
    """Logarithm of the softmax scores, averaged over the masks: one forward pass for each.

    Args:
        model: A model with a classifier.
        video: (B, C, T, H, W), as the model takes it.
        masks: At least one; None is the model's own.

    Returns:
        (B, classes) float64; gradients flow.

    Raises:
        ValueError, TypeError: an argument does not fit the model.
    """
    if model.classifier is None or not model.config.num_classes:
        raise checks.bad("model", "one without a classifier", "a model that was trained to classify")
    if not masks:
        raise checks.bad("masks", "none", "at least one")
    scores = []
    for mask in masks:
        logits = model(video, mask, reconstruct=False).logits
        assert logits is not None
        scores.append(logits.double().log_softmax(-1))
    # The average is taken in logarithms, so that scores too small for a float are not lost.
    return torch.stack(scores).logsumexp(0) - math.log(len(masks))
