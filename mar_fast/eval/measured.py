"""What the demo and the trade-off share: check a model against the reference, then time it and measure its memory."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from .. import MAR, TokenMask, machine, reference
from ..checkpoint.compare import relative
from ..timing import Spread, interleaved

# The fast model and the reference sum in different orders; beyond this in float32 it is another function.
FP32_TOLERANCE = 1e-4
# In low precision: twice the reference's own rounding error in that dtype, plus this.
LOW_PRECISION_FLOOR = 1e-3

Mask = TokenMask | None
OnStep = Callable[[str, float], None]


def part(on_step: OnStep, begin: float, size: float) -> OnStep:
    """``on_step`` for a task that is the share ``size`` of the whole and starts at ``begin``."""
    return lambda what, share: on_step(what, begin + size * share)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way to run a model. The speeds are None if this or another way differs from the reference.

    Attributes:
        difference_fp32: Of the logits from the reference model's, relative, in float32.
        difference: Of the logits in the measured dtype from the reference model's in float32.
        reference_difference: The reference model's own in the measured dtype.
        correct: Whether both differences are within rounding.
        latency: Seconds of a call.
        clips_per_second: By the median.
        peak_memory: Bytes of a call beyond what is held before it.
        speedup: Over the first of the ways, of medians.
    """

    difference_fp32: float
    difference: float
    reference_difference: float
    correct: bool
    latency: Spread | None = None
    clips_per_second: float | None = None
    peak_memory: int | None = None
    speedup: float | None = None


def check(
    model: MAR, clip: Tensor, ways: Sequence[Sequence[Mask]], dtype: str, on_step: OnStep = lambda what, share: None
) -> list[Measured]:
    """Compare a model with the reference, on the same weights and masks, and move it to ``dtype``.

    The model is in float32 and in eval mode, the clip (1, C, T, H, W). ``ways`` has the masks of each way to run the
    model, one for each of its passes; None is the model's own.
    """
    plain = reference.MAR(model.config).eval().to(clip.device)
    plain.load_state_dict(model.state_dict())

    def logits(run: torch.nn.Module, name: str) -> list[Tensor]:
        found = []
        for number, masks in enumerate(ways):
            on_step(f"comparing with the reference, {name}", number / len(ways))
            if run is plain:  # it takes no ragged masks; that of a single clip can be given as an equal one
                masks = [None if mask is None else TokenMask.from_bool_masked(mask.bool_masked()) for mask in masks]
            found.append(torch.cat([run(clip, mask, reconstruct=False).logits for mask in masks]))
        return found

    # cuDNN would run the reference's convolution in TF32.
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        expected, fast = logits(plain, "fp32"), logits(model, "fp32")
        low_plain, low_fast = expected, fast
        if dtype != "fp32":
            low = machine.DTYPES[dtype]
            low_plain, low_fast = logits(plain.to(low), dtype), logits(model.to(low), dtype)
    found = []
    for want, *outputs in zip(expected, fast, low_fast, low_plain, strict=True):
        fp32, ours, theirs = (relative(output, want) for output in outputs)
        tolerance = FP32_TOLERANCE if dtype == "fp32" else 2 * theirs + LOW_PRECISION_FLOOR
        correct = fp32 <= FP32_TOLERANCE and ours <= tolerance
        found.append(Measured(difference_fp32=fp32, difference=ours, reference_difference=theirs, correct=correct))
    return found


M = TypeVar("M", bound=Measured)


@torch.inference_mode()
def time_all(
    ways: Sequence[M],
    calls: Mapping[str, Callable[[], object]],
    clips: int,
    device: torch.device,
    budget: float,
    on_step: OnStep,
) -> list[M]:
    """Time the calls, of ``clips`` clips each, in turn for ``budget`` seconds, and measure their memory.

    Returns ``ways``, what is known of each so far, with latency, clips per second, memory, and speed-up over the first.
    """
    gc.collect()
    on_step("timing, in turn", 0.0)
    latency = interleaved(calls, device, budget=budget, on_round=lambda share: on_step("timing, in turn", 0.9 * share))
    on_step("measuring peak memory", 0.9)
    memory = [machine.peak_memory(call, device) for call in calls.values()]
    first = next(iter(latency.values())).p50
    return [
        replace(way, latency=spread, clips_per_second=clips / spread.p50, peak_memory=peak, speedup=first / spread.p50)
        for way, spread, peak in zip(ways, latency.values(), memory, strict=True)
    ]
