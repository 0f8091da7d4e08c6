"""content: a mask that keeps the tubelets that change most, each clip as many as its motion asks for."""

import math

import torch
from torch import Tensor

from .kernels import checks
from .token_mask import TokenMask, check_grid


def content(
    video: Tensor,
    grid: tuple[int, int, int],
    *,
    budget: float | None = None,
    threshold: float | None = None,
) -> TokenMask:
    """Keep the tubelets that change most: up to a share of the whole batch, or from a threshold on.

    The change of a tubelet is the mean absolute difference of its frames to the frame before each, over its pixels and
    channels; for the first frame of a tubelet that is the last one of the tubelet before. The clip's first frame has
    none before it and counts as the second does. A relative of Run-Length Tokenization (arXiv 2411.05222), which drops
    a tubelet that hardly differs from the one before it.

    Of equal tubelets those with the lower index are kept, of equal indices those of earlier clips. Changes of uint8
    clips are summed in whole numbers, so they give the same mask on every device.

    Args:
        video: (B, C, T, H, W), any strides, on any device.
        grid: (T', H', W') tubelets, dividing the clip.
        budget: Share of the tokens of the whole batch that are kept, in (0, 1]: ceil(budget * B * L) of them, so that
            clips with more motion keep more; at least one of every clip.
        threshold: Keep each tubelet that changes by this or more, 0 or above: in shares of the full range for uint8
            (0.02 is 5 grey levels), in the clip's own units for floating point. A clip without any keeps the one that
            changes most. Either budget or threshold is given.

    Returns:
        A mask on the clip's device, which is waited for: the lengths have to be known.

    Raises:
        ValueError, TypeError: an argument does not fit, or a floating-point clip is not finite.
    """
    check_grid(grid, (3,))
    if (budget is None) == (threshold is None):
        raise checks.bad("budget and threshold", f"budget={budget}, threshold={threshold}", "one of them")
    if budget is not None and (not isinstance(budget, int | float) or not 0 < budget <= 1):
        raise checks.bad("budget", repr(budget), "a number in (0, 1]")
    if threshold is not None and (not isinstance(threshold, int | float) or not 0 <= threshold < math.inf):
        raise checks.bad("threshold", repr(threshold), "a number, 0 or above")
    change, unit = _change(video, grid)
    batch, tokens = change.shape
    best = change == change.max(1, keepdim=True).values
    best &= best.cumsum(1) == 1
    if budget is not None:
        visible = _most(change, best, max(math.ceil(budget * batch * tokens - 1e-6), batch))
    else:
        assert threshold is not None
        visible = (change.double() >= threshold * unit) | best
    return TokenMask.ragged((~visible).view(batch, *grid), grid)


def _change(video: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, float]:
    """(B, L), how much each tubelet changes: int64 for uint8 clips, else floating point; and how much of it is 1.0."""
    checks.tensor("video", video, 5, (torch.uint8, *checks.FLOATS), "(B, C, T, H, W)")
    channels, *extents = video.shape[1:]
    if channels == 0 or any(extent == 0 or extent % side for extent, side in zip(extents, grid, strict=True)):
        accepted = f"(B, C, T, H, W) with channels, whose T, H and W the grid {grid} divides"
        raise checks.bad("video", f"shape {tuple(video.shape)}", accepted)
    patch = tuple(extent // side for extent, side in zip(extents, grid, strict=True))
    whole = video.dtype == torch.uint8
    clip = video if whole else video.to(torch.promote_types(video.dtype, torch.float32))
    before, after = clip[:, :, :-1], clip[:, :, 1:]
    # Of unsigned bytes the difference of the larger and the smaller; no wider copy of the clip is made.
    steps = torch.maximum(before, after) - torch.minimum(before, after)
    # A lone frame changes by nothing, unless its values are not finite.
    steps = steps if extents[0] > 1 else clip - clip
    steps = steps.sum(1, dtype=torch.int64 if whole else None)  # (B, T - 1, H, W), or (B, 1, H, W)
    steps = torch.cat((steps[:, :1], steps), 1)[:, -extents[0] :]
    t, h, w = patch
    split = steps.view(len(video), grid[0], t, grid[1], h, grid[2], w)
    change = split.sum((2, 4, 6)).flatten(1)
    values = channels * t * h * w
    if whole:
        return change, 255.0 * values
    if not bool(change.isfinite().all()):
        raise checks.bad("video", "values that are not finite", "finite ones")
    return change / values, 1.0


def _most(change: Tensor, best: Tensor, count: int) -> Tensor:
    """(B, L) bool: the best of each clip, and of all others those that change most, ``count`` together."""
    batch, tokens = change.shape
    # Token by token through all clips, so that equal tubelets are taken from every clip alike.
    change, best = change.t().flatten(), best.t().flatten()
    order = change.argsort(descending=True, stable=True)
    order = order[(~best[order]).to(torch.uint8).argsort(stable=True)]
    visible = torch.zeros_like(best).scatter(0, order[:count], True)
    return visible.view(tokens, batch).t()
