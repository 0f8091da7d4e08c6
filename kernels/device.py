"""Which backend runs a call of an op: what the machine has, and what `use_backend` asks for."""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

from .checks import names

BACKENDS = ("triton", "eager", "flash_attn", "xformers")
HALF = (torch.float16, torch.bfloat16)
# Packages for attention alone: the module to import, the extra of mar-fast that installs it, and the dtypes that it
# takes, on CUDA tensors.
ATTENTION_PACKAGES = {
    "flash_attn": ("flash_attn", "flash-attn", HALF),
    "xformers": ("xformers.ops", "xformers", (torch.float32, *HALF)),
}

# Triton reads this once, when it is imported.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# dtypes that Triton's interpreter computes wrongly, so that no interpreted kernel takes them.
REFUSED = (torch.bfloat16,) if INTERPRETING else ()
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Devices that have autocast. Evaluated here because torch.compile of PyTorch 2.11 cannot trace the call.
AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind))

_forced: str | None = None
_assumed: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context every op runs on the named backend, "triton" or "eager", in all threads of the process.

    Outside of it an op runs its Triton kernels for CUDA tensors (for any tensor with TRITON_INTERPRET=1, which refuses
    bfloat16) and plain PyTorch for all others; float64 always runs in plain PyTorch. If "triton" cannot run a call, the
    op raises RuntimeError. "flash_attn" and "xformers" apply to ``attention`` and ``attention_varlen`` only, which then
    run by the package of that name (see `mar_fast.kernels.backends`).

    Raises:
        ValueError: there is no such backend.
        RuntimeError: its package is not installed or cannot be imported.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(BACKENDS)}")
    if name == "triton" and not HAS_TRITON:
        raise RuntimeError("name: got 'triton', but the package triton is not installed; expected 'eager'")
    if name in ATTENTION_PACKAGES:
        module, extra, _ = ATTENTION_PACKAGES[name]
        try:
            importlib.import_module(module)
        except Exception as error:  # a build for another PyTorch may raise anything
            raise RuntimeError(
                f"name: got {name!r}, but importing {module} fails ({type(error).__name__}: {error}); "
                f"expected another backend, or: pip install 'mar-fast[{extra}]'"
            ) from error
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def assumed_architecture(name: str) -> Iterator[None]:
    """Within this context meta tensors count as on architecture ``name`` and take the Triton path, to be recorded."""
    global _assumed
    before, _assumed = _assumed, name
    try:
        yield
    finally:
        _assumed = before


@cache
def _device_architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)  # which torch.compile can trace, unlike get_device_capability
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def architecture(operand: Tensor) -> str:
    """The architecture that ``operand`` is on: "sm_90", "gfx942", or "interpreter" for a CPU tensor."""
    if operand.is_cuda:
        return _device_architecture(operand.get_device())
    return _assumed or "interpreter" if operand.is_meta else "interpreter"


def has_fp8(operand: Tensor) -> bool:
    """Whether ``operand`` is on a GPU with products of e4m3: sm_89 (Ada), sm_90 (Hopper) and later."""
    arch = architecture(operand)
    return arch.startswith("sm_") and int(arch[3:]) >= 89


def limit_of_e4m3(operand: Tensor) -> str:
    """``limit`` in `takes_triton` for a kernel that writes e4m3: "" on a device with e4m3 or in the interpreter."""
    return "" if has_fp8(operand) or (INTERPRETING and not operand.is_cuda) else "on sm_89, sm_90 and later"


def working_dtype(operand: Tensor, default: torch.dtype) -> torch.dtype:
    """The dtype of matrix products on this device: autocast's if it is on, else ``default``."""
    kind = "cuda" if operand.is_meta and _assumed else operand.device.type
    if kind in AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return default


def without_autocast(operand: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the operand's device."""
    kind = operand.device.type
    return torch.autocast(kind, enabled=False) if kind in AUTOCAST else nullcontext()


def attention_backend(
    operand: Tensor, op: str = "attention", limit: str = "", dtype: torch.dtype | None = None, unverified: bool = False
) -> str:
    """The backend, one of `BACKENDS`, of a call of attention or attention_varlen that works in ``dtype``.

    Arguments are those of `takes_triton`; ``dtype`` None means the operand's.

    Raises:
        RuntimeError: the backend that `use_backend` names cannot run this tensor; the message says what it takes.
    """
    if _forced not in ATTENTION_PACKAGES:
        return "triton" if takes_triton(op, operand, limit, unverified) else "eager"
    _, _, dtypes = ATTENTION_PACKAGES[_forced]
    dtype = dtype or operand.dtype
    if not operand.is_cuda or dtype not in dtypes:
        got = f"{names((dtype,))} on {operand.device}"
        raise RuntimeError(f"backend {_forced!r} runs {op} on CUDA tensors of {names(dtypes)}, got {got}")
    return _forced


def takes_triton(op: str, operand: Tensor, limit: str = "", unverified: bool = False) -> bool:
    """Whether a call of ``op`` runs on the Triton path.

    Args:
        op: The op's name.
        operand: The tensor whose device and dtype decide.
        limit: The limit of the kernels that this call exceeds, in words; "" if it exceeds none.
        unverified: Whether the kernels were not verified for this call, which then takes them only within
            ``use_backend("triton")``.

    Raises:
        RuntimeError: within ``use_backend("triton")``, if the kernels cannot run this call.
    """
    on_device = operand.is_cuda or INTERPRETING or (operand.is_meta and _assumed is not None)
    can_run = on_device and operand.dtype != torch.float64
    if _forced == "triton":
        if limit:
            raise RuntimeError(f"backend 'triton' runs {op} {limit}")
        if not can_run:
            got = f"{operand.dtype} on {operand.device}"
            raise RuntimeError(f"backend 'triton' runs {op} on CUDA tensors of at most 32 bits a value, got {got}")
        return True
    return _forced != "eager" and HAS_TRITON and can_run and not limit and not unverified
