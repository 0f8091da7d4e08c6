"""What masking saves: a dense ViT against MAR at 50 % and 75 %, on one clip, checked before it is timed."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import MAR, MARConfig, cost, machine, named_config
from ..kernels import checks
from .measured import Measured, OnStep, check, part, time_all

# The dense row is the plain classifier that one would otherwise use; the masked rows have MAR's bridging classifier.
CASES = {"dense": ("videomae", 0.0), "50 %": ("mar", 0.5), "75 %": ("mar", 0.75)}


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
