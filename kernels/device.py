"""What this machine can run: which backend an op takes."""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("triton", "eager", "flash_attn", "xformers")
HALF = (torch.float16, torch.bfloat16)
# Packages that have attention and nothing else of ours: the module to import, the extra of mar-fast that installs it,
# and the dtypes that it takes, on CUDA tensors.
ATTENTION_PACKAGES = {
    "flash_attn": ("flash_attn", "flash-attn", HALF),
    "xformers": ("xformers.ops", "xformers", (torch.float32, *HALF)),
}

# Triton reads this when it is first imported, so it cannot change later in a process.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

_forced: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context every op runs on the named backend: "triton" or "eager". One switch for the process.

    Without it an op runs its Triton kernels for a CUDA tensor (or for any tensor when TRITON_INTERPRET=1) and plain
    PyTorch for anything else; float64 always runs in plain PyTorch. Where "triton" is asked for and cannot
    run, the op raises RuntimeError. "flash_attn" and "xformers" are for ``attention`` and ``attention_varlen``, by the
    package of that name (see `mar_fast.kernels.backends`); the other ops run as if nothing was named.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the package that it needs is not installed, or cannot be imported.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(BACKENDS)}")
    if name == "triton" and not HAS_TRITON:
        raise RuntimeError("name: got 'triton', but the package triton is not installed; expected 'eager'")
    if name in ATTENTION_PACKAGES:
        _import_attention(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _import_attention(name: str) -> None:
    module, extra, _ = ATTENTION_PACKAGES[name]
    try:
        importlib.import_module(module)
    except Exception as error:  # a build for another PyTorch may raise anything
        raise RuntimeError(
            f"name: got {name!r}, but importing {module} fails ({type(error).__name__}: {error}); "
            f"expected another backend, or: pip install 'mar-fast[{extra}]'"
        ) from error


def attention_backend(
    operand: Tensor, op: str = "attention", beyond: str = "", dtype: torch.dtype | None = None
) -> str:
    """What runs ``op`` ("attention" or "attention_varlen"): "triton", "eager", "flash_attn" or "xformers".

    Args:
        operand: The packed qkv.
        op: The op's name.
        beyond: What of this call no Triton kernel takes, if so; see `takes_triton`.
        dtype: The dtype to work in, autocast's where that is on; None means the operand's.

    Raises:
        RuntimeError: a backend is forced that cannot run this tensor; the message names what it takes.
    """
    if _forced not in ATTENTION_PACKAGES:
        return "triton" if takes_triton(op, operand, beyond) else "eager"
    _, _, dtypes = ATTENTION_PACKAGES[_forced]
    dtype = dtype or operand.dtype
    if not operand.is_cuda or dtype not in dtypes:
        accepted = " or ".join(str(name).removeprefix("torch.") for name in dtypes)
        got = f"{str(dtype).removeprefix('torch.')} on {operand.device}"
        raise RuntimeError(f"backend {_forced!r} runs {op} on CUDA tensors of {accepted}, got {got}")
    return _forced


def takes_triton(op: str, operand: Tensor, beyond: str = "") -> bool:
    """Whether ``op`` on ``operand`` runs on the Triton path; ``beyond`` says what of this call no kernel takes, if so.

    Raises:
        RuntimeError: ``use_backend("triton")`` is in force and this call cannot run there.
    """
    on_device = (operand.is_cuda or INTERPRETING) and operand.dtype != torch.float64
    if _forced == "triton":
        if beyond:
            raise RuntimeError(f"backend 'triton' runs {op} {beyond}")
        if not on_device:
            got = f"{operand.dtype} on {operand.device}"
            raise RuntimeError(f"backend 'triton' runs {op} on CUDA tensors of at most 32 bits a value, got {got}")
        return True
    return _forced != "eager" and HAS_TRITON and on_device and not beyond
