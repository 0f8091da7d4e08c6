"""Calls of real size for every kernel: what the compile matrix compiles and the tuner times."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import bias_gelu as gelu

Device = torch.device | str
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """One shape of one op in one dtype. ``calls(device)`` makes its operands there and gives its passes by name."""

    op: str
    label: str
    dtype: torch.dtype
    calls: Callable[[Device], Calls]


FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def bias_gelu_cases() -> Iterator[Case]:
    """The MLP's hidden activation."""
    for dtype in FLOATS:

        def calls(device: Device, dtype: torch.dtype = dtype) -> Calls:
            x = torch.empty(32 * 784, 3072, dtype=dtype, device=device).normal_()
            bias = torch.empty(3072, dtype=dtype, device=device).normal_()
            return {"forward": lambda: gelu.forward(x, bias), "backward": lambda: gelu.backward(x, x, bias)}

        yield Case("bias_gelu", "ViT-B, 32 clips, 50 %", dtype, calls)


def cases() -> list[Case]:
    """All of them."""
    return [*bias_gelu_cases()]
