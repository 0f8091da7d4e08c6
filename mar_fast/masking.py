"""Masks: cell running masking, and those that users compare it with.

But for `content`, nothing waits for the device or makes a shape depend on data: the number of visible tokens follows
from the ratio.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .config import check_cell, masked_slots
from .kernels import checks
from .token_mask import TokenMask, check_grid

__all__ = ["TokenMask", "cell_running", "content", "frame", "random", "tube"]

Grid = tuple[int, int, int]
Device = torch.device | str | None

# The axes of the grid over which a mask is drawn; along the others it repeats.
_AXES = {"random": (0, 1, 2), "tube": (1, 2), "frame": (0,)}


def cell_running(
    batch: int,
    grid: Grid,
    ratio: float,
    *,
    cell: tuple[int, int, int] = (1, 2, 2),
    direction: int = 1,
    phase: int | Tensor | None = None,
    temporal_shuffle: bool = False,
    spatial_repeat: bool = True,
    generator: torch.Generator | None = None,
    device: Device = None,
) -> TokenMask:
    """Cell running masking (MAR, arXiv 2207.11660, section 3.2): every position is seen in turn.

    A cell of S slots masks a run of d = ratio * S slots, which moves by one slot with every step in time:
    ``masked(t, s) = ((s - direction * t - phase) mod S) < d``. Slots are numbered (t, y, x) within the cell; for a
    cell longer than one in time, t counts cells.

    The test form of the paper is ``phase=0``. Its training form is ``phase=None, temporal_shuffle=True``.

    Args:
        batch: Number of clips, 0 or more.
        grid: (T', H', W') tubelets.
        ratio: Share of masked tokens, a whole number of slots: 0, 1/4, 1/2 or 3/4 for the default cell.
        cell: (t, y, x) tubelets, dividing the grid.
        direction: 1 as in MAR, -1 as in VideoMAE v2's decoder mask (arXiv 2303.16727).
        phase: A number, or integers of shape (B,) or (B, cells in space); None draws them.
        temporal_shuffle: Permute the masks of a clip along time, drawn for each clip.
        spatial_repeat: Whether a drawn phase is one for the clip (the paper's recipe) or one for each cell in space.
        generator: Source of all random draws, on any device; None is torch's default, and the only choice within
            torch.compile.
        device: Where the mask goes; None is the generator's device, or the CPU.

    Returns:
        A mask with L * (1 - ratio) visible tokens in every clip.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    _check_batch_and_grid(batch, grid)
    if not isinstance(cell, tuple) or len(cell) != 3 or not all(isinstance(side, int) and side > 0 for side in cell):
        raise checks.bad("cell", repr(cell), "three whole numbers (t, y, x) above 0")
    check_cell(cell, grid)
    if direction not in (1, -1):
        raise checks.bad("direction", repr(direction), "1 or -1")
    _check_ratio(ratio)
    slots, masked_count = math.prod(cell), masked_slots("ratio", ratio, cell)
    steps, rows, columns = (extent // side for extent, side in zip(grid, cell, strict=True))
    cells = rows * columns  # in space
    device = _device(device, generator)

    if phase is None:
        shape = (batch, 1 if spatial_repeat else cells)
        phase = _to(torch.randint(slots, shape, **_source(generator, device)), device)
    elif isinstance(phase, Tensor):
        counts = phase.dtype != torch.bool and not phase.is_floating_point() and not phase.is_complex()
        if not counts or tuple(phase.shape) not in ((batch,), (batch, cells)):
            got = f"{phase.dtype} of shape {tuple(phase.shape)}"
            raise checks.bad("phase", got, f"a number or integers of shape ({batch},) or ({batch}, {cells})")
        phase = _to((phase[:, None] if phase.ndim == 1 else phase) % slots, device)
    elif isinstance(phase, int) and not isinstance(phase, bool):
        phase = torch.full((batch, 1), phase % slots, device=device)
    else:
        raise checks.bad_type("phase", repr(phase), "a whole number, a tensor of integers or None")

    step = torch.arange(steps, device=device).expand(batch, steps)
    if temporal_shuffle:
        step = _to(torch.rand(batch, steps, **_source(generator, device)), device).argsort(1)
    slot = torch.arange(slots, device=device)
    # (B, steps, cells or 1, slots)
    run = (slot - direction * step[:, :, None, None] - phase[:, None, :, None]) % slots
    masked = (run < masked_count).expand(batch, steps, cells, slots)
    masked = masked.reshape(batch, steps, rows, columns, *cell).permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, *grid)
    return TokenMask.from_bool_masked(masked, num_visible=math.prod(grid) // slots * (slots - masked_count))


def random(
    batch: int, grid: Grid, ratio: float, *, generator: torch.Generator | None = None, device: Device = None
) -> TokenMask:
    """Tokens masked independently of each other, floor(ratio * L) of them in every clip (MAE, arXiv 2111.06377).

    Arguments and errors as in `cell_running`; any ratio in [0, 1).
    """
    return _drawn("random", batch, grid, ratio, generator, device)


def tube(
    batch: int, grid: Grid, ratio: float, *, generator: torch.Generator | None = None, device: Device = None
) -> TokenMask:
    """One random mask in space, the same at all times (VideoMAE, arXiv 2203.12602, section 3.3).

    floor(ratio * H' * W') positions are masked. Arguments and errors as in `cell_running`; any ratio in [0, 1).
    """
    return _drawn("tube", batch, grid, ratio, generator, device)


def frame(
    batch: int, grid: Grid, ratio: float, *, generator: torch.Generator | None = None, device: Device = None
) -> TokenMask:
    """Whole tubelet-frames masked at random, floor(ratio * T') of them (VideoMAE, arXiv 2203.12602, section 3.3).

    Arguments and errors as in `cell_running`; any ratio in [0, 1).
    """
    return _drawn("frame", batch, grid, ratio, generator, device)


def _drawn(
    kind: str, batch: int, grid: Grid, ratio: float, generator: torch.Generator | None, device: Device
) -> TokenMask:
    order = shuffled(kind, batch, grid, generator, device)
    _check_ratio(ratio)
    units = math.prod(order.shape[1:])
    count = min(math.floor(ratio * units + 1e-6), units - 1)  # 0.29 * 100 is a little below 29
    masked = _to(order < count, _device(device, generator)).expand(batch, *grid)
    return TokenMask.from_bool_masked(masked, num_visible=math.prod(grid) // units * (units - count))


def shuffled(kind: str, batch: int, grid: Grid, generator: torch.Generator | None, device: Device) -> Tensor:
    """The numbers of what a mask draws in random order, all orders equally likely: (B, T' or 1, H' or 1, W' or 1).

    Args:
        kind: "random" draws tokens, "tube" positions in space, "frame" frames of tubelets.
        batch, grid, generator, device: As in `cell_running`, but the result is on the generator's device, if given.

    Raises:
        ValueError: batch or grid does not fit.
    """
    _check_batch_and_grid(batch, grid)
    shape = [side if axis in _AXES[kind] else 1 for axis, side in enumerate(grid)]
    noise = torch.rand(batch, math.prod(shape), **_source(generator, _device(device, generator)))
    return noise.argsort(1).view(batch, *shape)


def content(
    video: Tensor,
    grid: Grid,
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


def _change(video: Tensor, grid: Grid) -> tuple[Tensor, float]:
    """(B, L), how much each tubelet changes: int64 for uint8 clips, else floating point; and how much of it is 1.0."""
    checks.tensor("video", video, 5, (torch.uint8, *checks.FLOATS), "(B, C, T, H, W)")
    channels, *extents = video.shape[1:]
    if channels == 0 or any(extent == 0 or extent % side for extent, side in zip(extents, grid, strict=True)):
        accepted = f"(B, C, T, H, W) with channels, whose T, H and W the grid {grid} divides"
        raise checks.bad("video", f"shape {tuple(video.shape)}", accepted)
    t, h, w = (extent // side for extent, side in zip(extents, grid, strict=True))
    whole = video.dtype == torch.uint8
    clip = video if whole else video.to(torch.promote_types(video.dtype, torch.float32))
    before, after = clip[:, :, :-1], clip[:, :, 1:]
    # Of unsigned bytes the difference of the larger and the smaller; no wider copy of the clip is made.
    steps = torch.maximum(before, after) - torch.minimum(before, after)
    # A lone frame changes by nothing, unless its values are not finite.
    steps = steps if extents[0] > 1 else clip - clip
    steps = steps.sum(1, dtype=torch.int64 if whole else None)  # (B, T - 1, H, W), or (B, 1, H, W)
    steps = torch.cat((steps[:, :1], steps), 1)[:, -extents[0] :]
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


def _check_batch_and_grid(batch: int, grid: Grid) -> None:
    if not isinstance(batch, int | torch.SymInt) or batch < 0:
        raise checks.bad("batch", repr(batch), "a whole number, 0 or more")
    check_grid(grid, (3,))


def _check_ratio(ratio: float) -> None:
    if not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise checks.bad("ratio", repr(ratio), "a number in [0, 1)")


def _device(device: Device, generator: torch.Generator | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return generator.device if generator is not None else torch.device("cpu")


def _source(generator: torch.Generator | None, device: torch.device) -> dict[str, Any]:
    """Random numbers are drawn where the generator lives, so that a seed gives one mask on every device.

    Without a generator the keyword must be left out: torch.compile cannot pass None on once the batch is a symbol.
    """
    return {"device": device} if generator is None else {"device": generator.device, "generator": generator}


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    # To a GPU without waiting; to the CPU a copy that is not waited for could be read too early.
    return tensor.to(device, non_blocking=device.type != "cpu")
