"""What masking saves: a dense ViT against MAR at 50 % and 75 %, on one clip, checked before it is timed, and drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import MAR, MARConfig, cost, machine, masking, named_config
from ..kernels import checks
from .measured import Measured, OnStep, check, part, time_all
from .plot import frames, new_figure, save, show_frames, time_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The dense row is the plain classifier that one would otherwise use; the masked rows have MAR's bridging classifier.
CASES = {"dense": ("videomae", 0.0), "50 %": ("mar", 0.5), "75 %": ("mar", 0.75)}
COST, TIME = "#4c78a8", "#e45756"


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One case; multiply-adds are of the whole batch, ``rate_fraction`` is the share of the matrix-product rate."""

    case: str
    mask_ratio: float
    visible_tokens: int
    multiply_adds: int
    rate_fraction: float | None = None


@dataclass(frozen=True)
class Savings:
    """All rows and what they were measured on. Speeds are missing if any row is wrong."""

    model: str
    batch: int
    dtype: str
    dtype_reason: str
    matmul_rates: dict[str, float]
    environment: dict[str, str | int]
    rows: tuple[Row, ...]

    @property
    def correct(self) -> bool:
        """Whether every row agrees with the reference."""
        return all(row.correct for row in self.rows)


def model_config(size: str, case: str) -> MARConfig:
    """The configuration of a case for "base", "large", ...; inference only, so without a pixel decoder."""
    family, ratio = CASES[case]
    return named_config(f"{family}_vit_{size}", mask_ratio=ratio, decoder_depth=0)


def measure(
    size: str,
    clip: Tensor,
    *,
    batch: int = 1,
    device: torch.device,
    dtype: str = "auto",
    budget: float = 30.0,
    on_step: OnStep = lambda what, share: None,
) -> Savings:
    """Check and time the cases.

    Args:
        size: "small", "base", "large", "huge" or "giant".
        clip: (C, T, H, W) uint8; every clip of the batch is this one.
        batch: Clips a call.
        device: Where to run.
        dtype: "fp32", "bf16", "fp16", or "auto": bf16 where that is clearly faster here, else fp32.
        budget: Seconds for the timed rounds.
        on_step: Told what is going on and which share of the whole is done.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    checks.whole("batch", batch)
    checks.positive("seconds", budget)
    on_step("measuring this machine's matrix-product rate", 0.0)
    rates = machine.matmul_rates(device, ("fp32", "bf16") if dtype == "auto" else (dtype,))
    dtype, reason = machine.choose_dtype(device, rates) if dtype == "auto" else (dtype, "asked for")
    video = clip.to(device).expand(batch, *clip.shape)

    rows, calls = [], {}
    for number, case in enumerate(CASES):
        config = model_config(size, case)
        torch.manual_seed(0)
        model = MAR(config).eval().to(device)
        say = part(on_step, 0.05 + 0.35 * number / len(CASES), 0.35 / len(CASES))
        (checked,) = check(model, video[:1], [[None]], dtype, say)
        work = cost.count(config, batch=batch).multiply_adds
        sizes: dict[str, Any] = dict(mask_ratio=config.mask_ratio, visible_tokens=config.num_visible)
        rows.append(Row(case=case, multiply_adds=work, **sizes, **vars(checked)))
        calls[case] = partial(model, video)
    result = Savings(size, batch, dtype, reason, rates, machine.environment(device), tuple(rows))
    if not result.correct:
        return result
    timed = []
    for row in time_all(rows, calls, batch, device, budget, part(on_step, 0.4, 0.6)):
        assert row.latency is not None
        timed.append(replace(row, rate_fraction=2 * row.multiply_adds / row.latency.p50 / rates[dtype]))
    return replace(result, rows=tuple(timed))


def draw(result: Savings, clip: Tensor, path: Path) -> None:
    """A PNG: multiply-adds and latency against the keep ratio, above the frames of the clip (C, T, H, W) uint8."""
    figure = new_figure(figsize=(11, 8.6))
    env = result.environment
    figure.suptitle(
        f"MAR on ViT-{result.model[0].upper()}, {result.dtype}, batch {result.batch}: what masking saves\n"
        f"{env['device']}, torch {env['torch']}",
        fontsize=11,
    )
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 1.25)), dtype=object)
    left, right = upper.subplots(1, 2)
    keep = [1 - row.mask_ratio for row in result.rows]
    work = [row.multiply_adds / 1e9 / result.batch for row in result.rows]
    left.plot(keep, work, "o-", color=COST, label="multiply-adds")
    left.set(title="Cost", ylabel="multiply-adds of a clip, 10$^9$")
    _finish(left, keep, work, [f"{value:.1f} G" for value in work])

    spreads = [row.latency for row in result.rows if row.latency is not None]
    factor, unit = time_scale(spread.p80 for spread in spreads)
    low, middle, high = factor * np.array([(spread.p20, spread.p50, spread.p80) for spread in spreads]).T
    errors = (middle - low, high - middle)
    right.errorbar(keep, middle, yerr=errors, fmt="o-", capsize=4, color=TIME, label="median, p20 to p80")
    right.set(title="Latency, and speed-up over dense", ylabel=f"latency of a batch of {result.batch}, {unit}")
    labels = [f"{value:.3g} {unit}, {row.speedup:.2f}x" for value, row in zip(middle, result.rows, strict=True)]
    _finish(right, keep, middle, labels)

    rows, config = {}, model_config(result.model, "dense")
    for case in CASES:
        config = model_config(result.model, case)
        mask = masking.cell_running(1, config.grid, config.mask_ratio, cell=config.cell, phase=0)  # the model's own
        rows[f"{case}\n{config.num_visible} tokens"] = frames(clip, config, mask.bool_masked()[0])
    show_frames(lower, rows, {number: number * config.patch_size[0] for number in range(config.grid[0])})
    save(figure, path)


def _finish(axis: "Axes", keep: Sequence[float], values: Sequence[float], labels: Sequence[str]) -> None:
    """Labels at the points, the line of proportional cost, scales and legend."""
    axis.plot([0, keep[0]], [0, values[0]], ":", color="grey", label="proportional to visible tokens")
    for x, y, label in zip(keep, values, labels, strict=True):
        # Below and right of a point, where no line runs; left of the last one, which is at the edge.
        offset, side = ((9, -11), "left") if x < 1 else ((-10, 9), "right")
        axis.annotate(label, (x, y), xytext=offset, textcoords="offset points", ha=side, fontsize=9)
    axis.set(xlabel="keep ratio (share of visible tokens)", xlim=(0, 1.08))
    axis.set_ylim(0, 1.12 * axis.get_ylim()[1])
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left")
