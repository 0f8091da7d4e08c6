"""What this machine can run: which backend an op takes."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("triton", "eager")
OPS_WITH_KERNELS = frozenset({"bias_gelu"})

# Triton reads this when it is first imported, so it cannot change later in a process.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

_forced: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context every op runs on the named backend: "triton" or "eager". One switch for the process.

    Without it an op with a Triton kernel takes that for a CUDA tensor (or for any tensor when TRITON_INTERPRET=1)
    and plain PyTorch for anything else; float64 always runs in plain PyTorch. Where "triton" is asked for and cannot
    run, the op raises RuntimeError.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(BACKENDS)}")
    if name == "triton" and not HAS_TRITON:
        raise RuntimeError("name: got 'triton', but the package triton is not installed; expected 'eager'")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def takes_triton(op: str, operand: Tensor) -> bool:
    """Whether ``op`` on ``operand`` runs on the Triton path.

    Raises:
        RuntimeError: ``use_backend("triton")`` is in force and this op or this tensor cannot run there.
    """
    on_device = (operand.is_cuda or INTERPRETING) and operand.dtype != torch.float64
    if _forced == "triton":
        if op not in OPS_WITH_KERNELS:
            raise RuntimeError(f"backend 'triton' has no kernel for {op}; it has {', '.join(sorted(OPS_WITH_KERNELS))}")
        if not on_device:
            got = f"{operand.dtype} on {operand.device}"
            raise RuntimeError(f"backend 'triton' runs {op} on CUDA tensors of at most 32 bits a value, got {got}")
        return True
    return _forced != "eager" and HAS_TRITON and on_device and op in OPS_WITH_KERNELS


def eager_only(op: str, operand: Tensor) -> None:
    """For an op that has no kernel yet: raise RuntimeError where ``use_backend("triton")`` asks for one."""
    takes_triton(op, operand)
