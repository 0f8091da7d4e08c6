"""What this machine can run: which backend an op takes, and its launch configuration."""

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

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


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and launch options of one kernel, and where the choice came from."""

    block_m: int
    block_n: int
    num_warps: int
    origin: str = field(compare=False)


@cache
def launch_config(op: str, architecture: str) -> LaunchConfig:
    """The launch configuration of ``op`` on ``architecture`` ("sm_90"), else the row for any architecture."""
    for name in (architecture, "default"):
        path = Path(__file__).parent / "configs" / f"{name}.json"
        if path.exists() and (row := json.loads(path.read_text()).get(op)):
            return LaunchConfig(**row)
    raise KeyError(f"no launch configuration for {op} on {architecture}")


@cache
def _cuda_architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architecture(operand: Tensor) -> str:
    """The architecture that ``operand`` lives on: "sm_90", or "interpreter" for a CPU tensor."""
    return _cuda_architecture(operand.get_device()) if operand.is_cuda else "interpreter"
