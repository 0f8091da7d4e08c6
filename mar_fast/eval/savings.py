"""What masking saves: a dense ViT against MAR at 50 % and 75 %, on one clip, checked before it is timed."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import MAR, MARConfig, cost, machine, named_config, reference
from ..kernels import checks
from ..timing import Spread, interleaved

# The dense row is the plain classifier that one would otherwise use; the masked rows carry MAR's bridging classifier.
CASES = {"dense": ("videomae", 0.0), "50 %": ("mar", 0.5), "75 %": ("mar", 0.75)}

# The fast model and the reference sum in different orders; beyond this in float32 it is another function.
FP32_BOUND = 1e-4
# In low precision: twice the reference's own rounding error in that dtype, plus this.
LOW_PRECISION_FLOOR = 1e-3


@dataclass(frozen=True)
class Row:
    """One case. Times are seconds for a batch, memory is bytes, differences are norms relative to the reference."""

    case: str
    mask_ratio: float
    visible_tokens: int
    multiply_adds: int
    difference_fp32: float
    difference: float
    reference_difference: float
    correct: bool
    latency: Spread | None = None
    clips_per_second: float | None = None
    peak_memory: int | None = None
    speedup: float | None = None
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
    on_step: Callable[[str, float], None] = lambda what, share: None,
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
    if not isinstance(batch, int) or batch < 1:
        raise checks.bad("batch", batch, "a whole number, 1 or more")
    checks.positive("seconds", budget)
    on_step("measuring this machine's matrix-product rate", 0.0)
    wanted = ("fp32", "bf16") if dtype == "auto" else (dtype,)
    rates = machine.matmul_rates(device, wanted)
    reason = "asked for"
    if dtype == "auto":
        dtype, reason = machine.choose_dtype(device, rates)
    video = clip.to(device).expand(batch, *clip.shape)

    rows, models = [], {}
    for number, case in enumerate(CASES):
        on_step(f"{case}: comparing with the reference", 0.05 + 0.35 * number / len(CASES))
        row, models[case] = check(model_config(size, case), case, video, dtype)
        rows.append(row)
        gc.collect()
    result = Savings(size, batch, dtype, reason, rates, machine.environment(device), tuple(rows))
    if not result.correct:
        return result

    runs = {case: _inference(model, video) for case, model in models.items()}
    on_step("timing, cases in turn", 0.4)
    latency = interleaved(
        runs, device, budget=budget, on_round=lambda share: on_step("timing, cases in turn", 0.4 + 0.55 * share)
    )
    on_step("measuring peak memory", 0.95)
    memory = {case: machine.peak_memory(run, device) for case, run in runs.items()}
    dense = latency["dense"].p50
    timed = tuple(
        Row(
            **{
                **vars(row),
                "latency": latency[row.case],
                "clips_per_second": batch / latency[row.case].p50,
                "peak_memory": memory[row.case],
                "speedup": dense / latency[row.case].p50,
                "rate_fraction": 2 * row.multiply_adds / latency[row.case].p50 / rates[dtype],
            }
        )
        for row in rows
    )
    on_step("done", 1.0)
    return Savings(size, batch, dtype, reason, rates, result.environment, timed)


def check(config: MARConfig, case: str, video: Tensor, dtype: str) -> tuple[Row, torch.nn.Module]:
    """Compare the fast model with the reference on the same weights; returns the row and the model to be timed."""
    torch.manual_seed(0)
    plain = reference.MAR(config).eval().to(video.device)
    fast = MAR(config).eval().to(video.device)
    fast.load_state_dict(plain.state_dict())
    # cuDNN would run the reference's convolution in TF32.
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        one = video[:1]
        truth = plain(one).logits
        difference_fp32 = relative(fast(one).logits, truth)
        low = machine.DTYPES[dtype]
        reference_difference = relative(plain.to(low)(one).logits, truth) if dtype != "fp32" else 0.0
        fast.to(low)
        difference = relative(fast(one).logits, truth) if dtype != "fp32" else difference_fp32
    bound = 2 * reference_difference + LOW_PRECISION_FLOOR
    row = Row(
        case=case,
        mask_ratio=config.mask_ratio,
        visible_tokens=config.num_visible,
        multiply_adds=cost.count(config, batch=video.shape[0]).multiply_adds,
        difference_fp32=difference_fp32,
        difference=difference,
        reference_difference=reference_difference,
        correct=difference_fp32 <= FP32_BOUND and (dtype == "fp32" or difference <= bound),
    )
    return row, fast


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of ``want``, in float64; NaN counts as infinitely far."""
    ratio = float((got.double() - want.double()).norm() / want.double().norm())
    return ratio if ratio == ratio else float("inf")


def _inference(model: torch.nn.Module, video: Tensor) -> Callable[[], Any]:
    @torch.inference_mode()
    def run() -> Any:
        return model(video)

    return run
