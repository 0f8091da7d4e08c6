"""What is measured: a case is one job, its candidates are the ways to do it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mar_fast.machine import short_name


@dataclass(frozen=True)
class Setting:
    """What all cases of a run have in common.

    Attributes:
        device: Where to run.
        dtype: Of weights, or of autocast in training.
        sizes: Encoders to take: "small", "base", "large", ...
        batches: Batch sizes.
        quick: Few and small cases, a few rounds.
        budget: Seconds for the timed rounds of a case.
        clip: A video file, for the pipeline; None is a short real clip that a package ships.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: tuple[str, ...]
    batches: tuple[int, ...]
    quick: bool = False
    budget: float = 12.0
    clip: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Prepared:
    """A candidate made ready to run.

    Attributes:
        run: One call, as it is timed and as its memory is measured.
        outputs: What the check compares with the truth.
        compile_seconds: Of a compiled one.
    """

    run: Callable[[], object]
    outputs: Callable[[], list[Tensor]]
    compile_seconds: float | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to do the job. ``prepare`` raises where it cannot be had on this machine: it is absent then.

    Attributes:
        provider: Its name.
        prepare: Makes it ready.
        truth: Its own right outputs, where it computes something else than the case's.
        checked: Whether outputs are compared; not for a bound that does only a part of the job.
        x: Its own place on the x axis, where the case's is not its.
    """

    provider: str
    prepare: Callable[[], Prepared]
    truth: Callable[[], list[Tensor]] | None = None
    checked: bool = True
    x: float | None = None


@dataclass(frozen=True)
class Floor:
    """The least work of a case: no provider can be faster than the machine's ceilings allow (roofline)."""

    multiply_adds: float
    bytes_moved: float
    seconds: Callable[[float, float], float] | None = None
    """Of (peak FLOP/s, bytes/s), where the work comes in parts one after the other; None is one part."""

    def at(self, peak_flops: float, bandwidth: float) -> float:
        """Seconds at these rates."""
        if self.seconds is not None:
            return self.seconds(peak_flops, bandwidth)
        return max(2 * self.multiply_adds / peak_flops, self.bytes_moved / bandwidth)


def _gone() -> Any:
    raise RuntimeError("this case has been measured, and what it held is gone")


@dataclass(frozen=True)
class Case:
    """One job at one size.

    Attributes:
        suite: "encoder", ...
        name: What it is, without ``x``.
        mode: "inference", "training step", "forward", "backward", or "" where it has no meaning.
        x: Keep ratio, tokens, ...: the place on a plot's x axis.
        dtype: That the products work in.
        clips: Clips of one call, for the throughput; 0 where that has no meaning.
        candidates: In the order of the table.
        truth: The right outputs, in float64.
        bound: Largest difference that is let pass, a norm relative to the truth.
        yardstick: A provider; others may differ from the truth by twice as much as that one, and a little more.
        floor: The least work, if it is known.
        baseline: The provider that speed-ups are given over; "" is the first one.
        slack: The little more.
        share: Of the setting's seconds for timed rounds: less where calls are short or cases are many.
    """

    suite: str
    name: str
    mode: str
    x: float
    dtype: torch.dtype
    clips: int
    candidates: tuple[Candidate, ...]
    truth: Callable[[], list[Tensor]]
    bound: float
    yardstick: str = ""
    floor: Floor | None = None
    baseline: str = ""
    slack: float = 1e-3
    share: float = 1.0

    def emptied(self) -> "Case":
        """The same without its candidates' models and operands, which would stay in memory as long as it does."""
        candidates = tuple(replace(one, prepare=_gone, truth=None) for one in self.candidates)
        return replace(self, candidates=candidates, truth=_gone)

    @property
    def dtype_name(self) -> str:
        """ "bf16", "fp32", ..."""
        return short_name(self.dtype)
