"""What is measured: a case is one workload, its providers are the ways to do it, one of them the baseline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mar_fast.cost import Cost
from mar_fast.machine import environment, short_name


@dataclass(frozen=True)
class RunOptions:
    """What all cases of a run have in common.

    Attributes:
        device: Where to run.
        dtype: Of weights, or of autocast in training.
        sizes: Encoders to take: "small", "base", "large", ...
        batches: Batch sizes.
        quick: Few and small cases, a few rounds.
        seconds: For the timed rounds of a case.
        clip: A video file, for the pipeline; None is a short real clip that a package ships.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: tuple[str, ...]
    batches: tuple[int, ...]
    quick: bool = False
    seconds: float = 12.0
    clip: Path | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @cached_property
    def environment(self) -> Mapping[str, str | int]:
        """What `machine.environment` says of the device, once for all records of a run."""
        return environment(self.device)


@dataclass(frozen=True)
class Prepared:
    """A provider made ready to run.

    Attributes:
        run: One call, as it is timed and as its memory is measured.
        outputs: What is compared with the expected outputs.
        compile_seconds: Of a compiled one.
    """

    run: Callable[[], object]
    outputs: Callable[[], list[Tensor]]
    compile_seconds: float | None = None


@dataclass(frozen=True)
class Provider:
    """One way to do the workload. ``prepare`` raises where it cannot run on this machine: it is unavailable then.

    Attributes:
        name: "mar_fast", or "mar_fast, compiled", ...; others are peers.
        prepare: Makes it ready.
        expected: Its own expected outputs, where it computes another function than the case's.
        checked: Whether outputs are compared; not where it does only a part of the work.
        x: Its own position on the x axis, where it differs from the case's.
    """

    name: str
    prepare: Callable[[], Prepared]
    expected: Callable[[], list[Tensor]] | None = None
    checked: bool = True
    x: float | None = None


@dataclass(frozen=True)
class Case:
    """One workload at one size.

    Attributes:
        suite: "encoder", ...
        name: What it is, without ``x``.
        mode: "inference", "training step", "forward", "backward".
        x: Keep ratio, tokens, ...: the position on a plot's x axis.
        dtype: That the products work in.
        clips: Clips of one call, for the throughput; 0 where that has no meaning.
        providers: In the order of the table.
        expected: The right outputs, in float64.
        tolerance: Largest difference that passes, a norm relative to that of the expected outputs.
        baseline: The provider that speed-ups are over. Others may differ from float64 by twice as much as it does.
        floor: The least work, if it is known: at the machine's own rates no provider can be faster (roofline).
        share: Of a run's seconds for timed rounds: less where calls are short or cases are many.
    """

    suite: str
    name: str
    mode: str
    x: float
    dtype: torch.dtype
    clips: int
    providers: tuple[Provider, ...]
    expected: Callable[[], list[Tensor]]
    tolerance: float
    baseline: str
    floor: Cost | None = None
    share: float = 1.0

    @property
    def dtype_name(self) -> str:
        """ "bf16", "fp32", ..."""
        return short_name(self.dtype)
