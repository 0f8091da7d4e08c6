"""Argument checks shared by the ops: each message names the argument, what was got and what is expected."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDICES = (torch.int32, torch.int64)

_CPU = torch.device("cpu")
_check_values_on_device = False
_check_values_on_cpu = True


def bad(argument: str, got: object, accepted: str) -> ValueError:
    """The error for an argument with a wrong value or shape."""
    return ValueError(f"{argument}: got {got}, expected {accepted}")


def bad_type(argument: str, got: object, accepted: str) -> TypeError:
    """The error for an argument of a wrong type or dtype."""
    return TypeError(f"{argument}: got {got}, expected {accepted}")


def names(dtypes: Sequence[torch.dtype]) -> str:
    """``(torch.int32, torch.int64)`` as ``int32 or int64``."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tensor(argument: str, value: object, ndim: int | None, dtypes: Sequence[torch.dtype], shape: str) -> None:
    """Check that ``value`` is a tensor of ``ndim`` dimensions (None: any) and one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise bad_type(argument, type(value).__name__, f"a tensor of shape {shape}")
    if ndim is not None and value.ndim != ndim:
        raise bad(argument, f"shape {tuple(value.shape)}", f"shape {shape}")
    if value.dtype not in dtypes:
        raise bad_type(argument, value.dtype, names(dtypes))


def size(argument: str, value: Tensor, expected: Sequence[int], shape: str) -> None:
    """Check the shape of ``value``; ``shape`` says in symbols what is expected."""
    if tuple(value.shape) != tuple(expected):
        raise bad(argument, f"shape {tuple(value.shape)}", f"{tuple(expected)}, that is {shape}")


def same_device(reference: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Check that all tensors are on ``device``, the one of the argument called ``reference``."""
    for argument, value in tensors.items():
        if value is not None and value.device != device:
            raise bad(argument, f"a tensor on {value.device}", f"one on {device}, where {reference} is")


def positive(argument: str, value: object) -> None:
    """Check that ``value`` is a number above zero."""
    if not isinstance(value, int | float) or not value > 0:
        raise bad(argument, repr(value), "a number above 0")


def whole(argument: str, value: object, least: int = 1) -> None:
    """Check that ``value`` is a whole number, ``least`` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise bad(argument, repr(value), f"a whole number, {least} or more")


class NoGradient(torch.autograd.Function):
    """``apply(message, value, *operands)``: the identity on ``value``; a gradient asked of it raises ``message``.

    It is asked for if ``value`` or one of the ``operands``, which ``value`` depends on, requires a gradient.
    """

    @staticmethod
    def forward(ctx: Any, message: str, value: Tensor, *operands: Tensor) -> Tensor:
        """The identity."""
        ctx.message = message
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Raise the error."""
        raise RuntimeError(ctx.message)


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Within this context values of indices are checked on a GPU too, which waits for the device at every op.

    On a CPU they are always checked. The switch applies to the whole process.
    """
    global _check_values_on_device
    before, _check_values_on_device = _check_values_on_device, enabled
    try:
        yield
    finally:
        _check_values_on_device = before


@contextmanager
def unread() -> Iterator[None]:
    """Within this context indices are not checked on a CPU either, to measure there what a call costs on a GPU."""
    global _check_values_on_cpu
    before, _check_values_on_cpu = _check_values_on_cpu, False
    try:
        yield
    finally:
        _check_values_on_cpu = before


def may_read(value: Tensor) -> bool:
    """Whether the values of this tensor may be read: never while compiling, on a GPU only in `debug_checks`."""
    if torch.compiler.is_compiling():
        return False
    device = value.device
    wanted = _check_values_on_cpu if device == _CPU else _check_values_on_device
    return wanted and device.type != "meta" and value.numel() != 0 and not is_fake(value)


def index_range(argument: str, index: Tensor, length: int) -> None:
    """Check that 0 <= index < length, if values may be read."""
    if may_read(index):
        low, high = (int(value) for value in torch.aminmax(index))
        if low < 0 or high >= length:
            raise bad(argument, f"values from {low} to {high}", f"values from 0 to {length - 1}")


def strictly_ascending(argument: str, index: Tensor) -> None:
    """Check that each row is strictly ascending, if values may be read."""
    if may_read(index) and not bool((index[:, 1:] > index[:, :-1]).all()):
        raise bad(argument, "rows that are not strictly ascending", "sorted, unique indices in every row")


def unique_rows(argument: str, index: Tensor) -> None:
    """Check that no row has an index twice, if values may be read."""
    if may_read(index):
        ascending = index.sort(1).values
        if not bool((ascending[:, 1:] > ascending[:, :-1]).all()):
            raise bad(argument, "rows with repeated indices", "unique indices in every row")
