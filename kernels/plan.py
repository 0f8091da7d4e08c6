"""Plans: what an op works out once for a kind of call, so that later calls only look it up.

Checks, backend, launch choice, grid and compiled kernel depend on nothing but shapes, strides, dtypes, devices,
alignment, options and modes. These make the key of a call; under it an op keeps its plan, a function of the tensors.
"""

import itertools
import os
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch import is_autocast_enabled as autocast
from torch import is_grad_enabled as grad_enabled
from torch import is_inference_mode_enabled as inference_mode
from torch._C import _are_functorch_transforms_active as transforms
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C._functorch import is_functorch_wrapped_tensor as wrapped
from torch.nn import Parameter

from . import device

Run = Callable[..., Any]
Key = tuple[Any, ...]

# Plans of one op: shapes that change with every call must not fill the memory. Beyond it all are dropped and made anew.
LIMIT = 512

# Hashing a tuple in every call takes long, so keys hold a number for it, looked up by the tuple's identity. The tuples
# are kept alive, so that no other one gets the same identity.
_tuples: dict[int, tuple[tuple[Any, ...], int]] = {}
_numbers: dict[Key, int] = {}
_count = itertools.count()


def _numbered(value: tuple[Any, ...]) -> Any:
    """A number shared by tuples that are equal and have parts of the same types, unlike (2, 3.0) == (2, 3)."""
    if not all(type(part) in (int, float, bool, str) for part in value):
        return type(value), value, *map(type, value)
    if len(_tuples) >= LIMIT:
        _tuples.clear()
        _numbers.clear()  # numbers are not reused, so these calls are planned anew
    number = _numbers.setdefault((type(value), value, *map(type, value)), next(_count))
    _tuples[id(value)] = value, number
    return number


def dual() -> bool:
    """Whether tensors may have tangents, for forward-mode differentiation."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is active, which no kernel supports."""
    return transforms() or forward_ad._current_level >= 0


def watched(*values: Any) -> bool:
    """Whether a call is traced or intercepted: by a compiler, a dispatch mode or a tensor subclass."""
    if torch.compiler.is_compiling() or dispatch_modes():
        return True
    tensors = [value for value in values if isinstance(value, Tensor)]
    return any(type(value) not in (Tensor, Parameter) or wrapped(value) for value in tensors)


class Plans:
    """The plans of one op, by key."""

    every: ClassVar["weakref.WeakSet[Plans]"] = weakref.WeakSet()

    def __init__(self) -> None:
        self._kept: dict[Key, Run] = {}
        Plans.every.add(self)

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, *values: Any) -> tuple[Key | None, Run | None]:
        """The key of a call and its plan, if there is one. Without a key no plan may be kept for this call."""
        if torch.compiler.is_compiling() or dispatch_modes() or transforms() or forward_ad._current_level >= 0:
            return None, None
        # Every call runs this: flat code, as few function calls as possible.
        parts: list[Any] = [grad_enabled(), inference_mode(), device._forced, device._assumed]
        on: torch.device | None = None
        for value in values:
            kind = type(value)
            if kind is Tensor or kind is Parameter:
                if on is None:
                    on = value.device
                    parts.append(on)
                try:
                    address = value.data_ptr()  # 0 on a meta device, whose get_device() is a CPU's
                except RuntimeError:  # a tensor that escaped from a transform of torch.func
                    return None, None
                parts += (
                    value.shape,
                    value.is_contiguous() or value.stride(),
                    value.dtype,
                    value.get_device(),
                    address and address & 15 | 16,
                    value.requires_grad,
                )
            elif value is None:
                parts.append(None)
            elif isinstance(value, Tensor):
                return None, None
            elif isinstance(value, tuple):
                known = _tuples.get(id(value))
                parts.append(known[1] if known is not None and known[0] is value else _numbered(value))
            else:
                parts += kind, value  # 1 == 1.0 == True
        if on is None or (device_type := on.type) not in device.AUTOCAST:
            return None, None
        if autocast(device_type):
            parts.append(torch.get_autocast_dtype(device_type))
        key = tuple(parts)
        try:
            return key, self._kept.get(key)
        except TypeError:  # a list among the options
            return None, None

    def keep(self, key: Key | None, run: Run) -> Run:
        """Keep a plan under the key that `find` gave; returns it."""
        if key is not None:
            if len(self._kept) >= LIMIT:
                self._kept.clear()
            self._kept[key] = run
        return run


def forget() -> None:
    """Forget all plans, since launch choices changed or a forked process has no device."""
    for plans in Plans.every:
        plans._kept.clear()


os.register_at_fork(after_in_child=forget)
