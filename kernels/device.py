"""What this machine can run: which backend an op takes."""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

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

# Devices that know autocast. Asked once: torch.compile of PyTorch 2.11 cannot trace the question.
AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind))

_forced: str | None = None
_assumed: str | None = None


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


def forced() -> str | None:
    """The backend that `use_backend` names, if it is in force."""
    return _forced


@contextmanager
def assumed_architecture(name: str) -> Iterator[None]:
    """Within this context tensors without memory live on ``name``, and take the Triton path to be recorded."""
    global _assumed
    before, _assumed = _assumed, name
    try:
        yield
    finally:
        _assumed = before


def recording() -> bool:
    """Whether an architecture is assumed."""
    return _assumed is not None


@cache
def _device_architecture(index: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architecture(operand: Tensor) -> str:
    """The architecture that ``operand`` lives on: "sm_90", "gfx942", or "interpreter" for a CPU tensor."""
    if operand.is_cuda:
        return _device_architecture(operand.get_device())
    return _assumed or "interpreter" if operand.is_meta else "interpreter"


def working_dtype(operand: Tensor, default: torch.dtype) -> torch.dtype:
    """The dtype that matrix products on this device work in: autocast's where it is on, else ``default``."""
    kind = "cuda" if operand.is_meta and recording() else operand.device.type
    if kind in AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return default


def without_autocast(operand: Tensor) -> AbstractContextManager[object]:
    """A context in which products keep the dtype of their operands."""
    kind = operand.device.type
    return torch.autocast(kind, enabled=False) if kind in AUTOCAST else nullcontext()


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
    operand: Tensor, op: str = "attention", beyond: str = "", dtype: torch.dtype | None = None, unproved: bool = False
) -> str:
    """What runs ``op`` ("attention" or "attention_varlen"): "triton", "eager", "flash_attn" or "xformers".

    Args:
        operand: The packed qkv.
        op: The op's name.
        beyond: What of this call no Triton kernel takes, if so; see `takes_triton`.
        dtype: The dtype to work in, autocast's where that is on; None means the operand's.
        unproved: Whether the kernels for this call were never compared with anything on hardware; see `takes_triton`.

    Raises:
        RuntimeError: a backend is forced that cannot run this tensor; the message names what it takes.
    """
    if _forced not in ATTENTION_PACKAGES:
        return "triton" if takes_triton(op, operand, beyond, unproved) else "eager"
    _, _, dtypes = ATTENTION_PACKAGES[_forced]
    dtype = dtype or operand.dtype
    if not operand.is_cuda or dtype not in dtypes:
        accepted = " or ".join(str(name).removeprefix("torch.") for name in dtypes)
        got = f"{str(dtype).removeprefix('torch.')} on {operand.device}"
        raise RuntimeError(f"backend {_forced!r} runs {op} on CUDA tensors of {accepted}, got {got}")
    return _forced


def takes_triton(op: str, operand: Tensor, beyond: str = "", unproved: bool = False) -> bool:
    """Whether ``op`` on ``operand`` runs on the Triton path.

    Args:
        op: The op's name.
        operand: The tensor that decides.
        beyond: What of this call no kernel takes, if so.
        unproved: Whether it takes the path only where ``use_backend("triton")`` asks for it.

    Raises:
        RuntimeError: ``use_backend("triton")`` is in force and this call cannot run there.
    """
    runs = operand.is_cuda or INTERPRETING or (operand.is_meta and recording())
    on_device = runs and operand.dtype != torch.float64
    if _forced == "triton":
        if beyond:
            raise RuntimeError(f"backend 'triton' runs {op} {beyond}")
        if not on_device:
            got = f"{operand.dtype} on {operand.device}"
            raise RuntimeError(f"backend 'triton' runs {op} on CUDA tensors of at most 32 bits a value, got {got}")
        return True
    return _forced != "eager" and HAS_TRITON and on_device and not beyond and not unproved
