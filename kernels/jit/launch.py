"""How every kernel is launched; or, on tensors without memory, what would be launched, for the compile matrix."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..launch_config import LaunchConfig, architecture


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded: the kernel's arguments in order, without constexprs, and these by name."""

    name: str
    kernel: Any
    arguments: tuple[Any, ...]
    constexprs: dict[str, Any]
    config: LaunchConfig


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within this context nothing runs: launches are appended to the list that this yields."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    name: str, kernel: Any, grid: Sequence[int], arguments: tuple[Any, ...], config: LaunchConfig, **constexprs: Any
) -> None:
    """Run ``kernel`` over ``grid`` on the device of its first argument. ``name`` is its key in the tables."""
    if _recorded is not None:
        _recorded.append(Launch(name, kernel, arguments, constexprs, config))
        return
    # The default of fused multiply-adds changes with Triton 3.10.
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
    operand: Tensor = arguments[0]
    if operand.is_cuda and operand.get_device() != torch.cuda.current_device():
        with torch.cuda.device(operand.device):
            kernel[tuple(grid)](*arguments, **constexprs, **options)
    else:
        kernel[tuple(grid)](*arguments, **constexprs, **options)


def as_rows(tensor: Tensor) -> Tensor:
    """(..., D) as (rows, D) with unit stride in the last dimension; copies only what has another layout."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def precision(operand: Tensor) -> str:
    """How the tensor cores multiply float32 without losing its precision: by parts on NVIDIA's, as it is on AMD's."""
    return "ieee" if architecture(operand).startswith("gfx") else "tf32x3"


def block(extent: int, least: int = 1) -> int:
    """The power of two that holds ``extent``, at least ``least``."""
    return max(least, triton.next_power_of_2(extent))
