"""How kernels are launched: the choice of tiles, and launches that look nothing up a second time.

An op makes one `Launch` for each kind of call, and calls it with the tensors of each call. With meta tensors nothing
runs; the compile check records such launches.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled
from torch.nn import Parameter
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import checks, device, plan
from ..device import architecture


def _no_stream(index: int) -> int:
    return 0


def _no_device() -> int:
    return -1


# Both are missing where PyTorch was built without CUDA.
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _no_stream)
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", _no_device)

# Outputs are allocated by torch.empty_like where possible: it takes a third of torch.empty's time.
DENSE = torch.contiguous_format

# Versions of Triton whose compiled kernels `Launch` can run directly.
DIRECT = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) < (3, 10) and not torch.version.hip


# Choices.

# Architectures with choices of their own; any other one gets what compiles anywhere.
TUNED = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and launch options of one kernel; the ``config`` beside each kernel says which of them it reads.

    ``block_m`` is along rows (tokens, queries), ``block_n`` along columns (channels, keys), ``block_k`` along the
    summed dimension of a matrix product. The tile that a program owns is kept in registers if ``resident``, else loaded
    at each step. With ``tma`` operands are loaded by the Tensor Memory Accelerator, where `takes_tma` allows it. With
    ``fused`` a pass that may be one kernel or several is one. With ``cudnn`` attention's forward pass is cuDNN's, in 16
    bits and where operands allow TMA.
    """

    block_m: int
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 1
    resident: bool = True
    tma: bool = False
    fused: bool = False
    cudnn: bool = False

    def __str__(self) -> str:
        tile = " x ".join(str(size) for size in (self.block_m, self.block_n, self.block_k) if size)
        rest = ", not resident" * (not self.resident) + ", TMA" * self.tma
        rest += ", fused" * self.fused + ", cuDNN" * self.cudnn
        return f"{tile}, {self.num_warps} warps, {self.num_stages} stages{rest}"


@dataclass(frozen=True)
class Choice:
    """The configuration of a kernel for a call, and the dtype and shape that it was chosen for."""

    kernel: str
    config: LaunchConfig
    dtype: str
    shape: Mapping[str, int] = field(hash=False)

    def __str__(self) -> str:
        return ", ".join([self.kernel, self.dtype, *(f"{name} {value}" for name, value in self.shape.items())])


@dataclass(frozen=True)
class Override:
    """A row of the user's file: a configuration, its source, and the dtypes (all if none) and shapes that it is for."""

    config: LaunchConfig
    origin: str
    dtypes: Sequence[str] = ()
    where: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tile = self.config
        for size in (tile.block_m, tile.block_n, tile.block_k, tile.num_warps):
            if not isinstance(size, int) or size < 0 or size & (size - 1):
                raise ValueError(f"{size!r}: blocks and warps are powers of two")
        if not all(isinstance(getattr(torch, name, None), torch.dtype) for name in self.dtypes):
            raise ValueError(f"{self.dtypes!r} are no dtypes")
        for low, high in self.where.values():
            range(low, high)  # two integers

    def fits(self, dtype: str, shape: Mapping[str, int]) -> bool:
        """Whether the row is for such a call: never if it has a range for a feature that the call does not have."""
        inside = (name in shape and low <= shape[name] <= high for name, (low, high) in self.where.items())
        return (not self.dtypes or dtype in self.dtypes) and all(inside)


def overrides_path() -> Path:
    """The user's own choices: $MAR_FAST_CONFIGS, else mar_fast/overrides.json in the user's configuration folder."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(os.environ.get("MAR_FAST_CONFIGS") or folder / "mar_fast" / "overrides.json")


def read_overrides(path: Path) -> dict[tuple[str, str], list[Override]]:
    """The rows by architecture and kernel, none without a file; ValueError names the file and the row that is wrong."""
    found, at = dict[tuple[str, str], list[Override]](), str(path)
    try:
        for target, kernels in json.loads(path.read_text() if path.is_file() else "{}").items():
            for kernel, rows in kernels.items():
                for number, row in enumerate(rows):
                    at = f"{path}, {target}, {kernel}, row {number}"
                    override = Override(**(row | {"config": LaunchConfig(**row["config"])}))
                    found.setdefault((target, kernel), []).append(override)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        expected = "{architecture: {kernel: [{dtypes, where, config, origin}]}}"
        raise ValueError(f"{at}: got {error!r}, expected launch choices, {expected}") from error
    return found


_overrides = cache(lambda: read_overrides(overrides_path()))


def forget_choices() -> None:
    """Read the user's choices again at the next call, for a process that has just written them."""
    _overrides.cache_clear()
    plan.forget()


_forced: Mapping[str, LaunchConfig] = {}


@contextmanager
def forced(configs: Mapping[str, LaunchConfig]) -> Iterator[None]:
    """Within this context these kernels take these configurations, and no choice is made for them."""
    global _forced
    before, _forced = _forced, {**_forced, **configs}
    plan.forget()
    try:
        yield
    finally:
        _forced = before
        plan.forget()


def choose(
    kernel: str, config: Callable[..., LaunchConfig], operand: Tensor, dtype: torch.dtype | None = None, **shape: int
) -> Choice:
    """The configuration of a kernel for a call: the user's, or by ``config(architecture, dtype, **shape)``.

    ``operand`` is a tensor on the device; ``dtype`` is that of the products, by default the operand's.
    """
    dtype, target = dtype or operand.dtype, architecture(operand)
    name = str(dtype).removeprefix("torch.")
    fitting = (row.config for row in _overrides().get((target, kernel), ()) if row.fits(name, shape))
    return Choice(kernel, _forced.get(kernel) or next(fitting, None) or config(target, dtype, **shape), name, shape)


# Launches.

Recorded = tuple["Launch", tuple[Tensor | None, ...]]
_recorded: list[Recorded] | None = None


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Within this context nothing runs: launches are appended to the list that it yields, with their tensors."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


_stubbed = False


@contextmanager
def stubbed() -> Iterator[None]:
    """Within this context CPU tensors take the Triton path but no kernel runs, which leaves the cost on the host.

    Values of indices are not checked, as on a GPU.
    """
    global _stubbed, current_device, current_stream
    plan.forget()
    before = _stubbed, device.INTERPRETING, current_device, current_stream
    _stubbed, device.INTERPRETING = True, True
    current_device, current_stream = _no_device, _no_stream  # the real ones look for a driver
    try:
        with checks.unread():
            yield
    finally:
        _stubbed, device.INTERPRETING, current_device, current_stream = before
        plan.forget()


class Block(NamedTuple):
    """What a TMA descriptor says of a tensor: its shape and strides, and the block that one load or store moves."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


class Launch:
    """A launch without its tensors: calling it with them, in the kernel's order (None to leave one out), launches it.

    Args:
        kernel: The Triton function; its parameters are tensors, numbers and constants, in this order.
        grid: Programs along each axis.
        numbers: Its integers and floats, in order.
        choice: Its configuration.
        copied: For each tensor whether it is copied first, because the kernel cannot address it; False for the rest.
        blocks: By position, the tensors that the kernel gets as TMA descriptors.
        **constants: Its other constants, by name; BLOCK_M, BLOCK_N and BLOCK_K are the configuration's unless given.
    """

    __slots__ = (
        *("_arguments", "_described", "_grid", "_index", "_run"),
        *("blocks", "choice", "constants", "copied", "grid", "kernel", "numbers"),
    )

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        numbers: Sequence[float],
        choice: Choice,
        copied: Sequence[bool] = (),
        blocks: Mapping[int, Block] | None = None,
        **constants: Any,
    ) -> None:
        self.kernel, self.grid, self.numbers, self.choice = kernel, tuple(grid), tuple(numbers), choice
        self.copied = tuple(copied) if any(copied) else ()
        tile = choice.config
        sizes = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k)
        self.constants = {name: size for name, size in sizes.items() if name in kernel.arg_names} | constants
        self.blocks = dict(blocks or {})
        self._described: list[tuple[int, dict[str, Any]]] = []
        self._grid = (*self.grid, 1, 1)[:3]
        self._run: Any = None
        self._arguments: tuple[Any, ...] = ()
        self._index = -1

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch it on the current stream of the tensors' device."""
        if self.copied:
            tensors = tuple(
                tensor.contiguous() if copy and tensor is not None else tensor
                for tensor, copy in zip(tensors, (*self.copied, *(False,) * len(tensors)), strict=False)
            )
        if self._run is None or _recorded is not None or _hooked() or current_device() != self._index:
            self._look_up(tensors)
            return
        if self._described:
            tensors = self._as_described(tensors)
        # Nothing but the stream is looked up.
        self._run(*self._grid, current_stream(self._index), *self._arguments[0], *tensors, *self._arguments[1])

    def _as_described(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """Put in descriptors, not checked again: shapes, strides and alignment are in the plan's key."""
        given = list(tensors)
        for i, attributes in self._described:
            given[i] = descriptor = object.__new__(TensorDescriptor)
            descriptor.__dict__.update(attributes, base=tensors[i])
        return tuple(given)

    def _look_up(self, tensors: tuple[Tensor | None, ...]) -> None:
        if _recorded is not None:
            _recorded.append((self, tensors))
            return
        operand = tensors[0]
        assert operand is not None
        if operand.is_meta:
            return
        config, kernel = self.choice.config, self.kernel
        options: dict[str, Any] = dict(num_warps=config.num_warps, num_stages=config.num_stages)
        given: list[Any] = list(tensors)
        for i, block in self.blocks.items():
            given[i] = TensorDescriptor(tensors[i], *map(list, block))
        arguments = (*given, *self.numbers)
        if type(operand) not in (Tensor, torch.nn.Parameter) and is_wrap_triton_enabled():
            # Traced: inductor launches the kernel itself, and accepts no other options.
            torch.library.wrap_triton(kernel)[self.grid](*arguments, **self.constants, **options)
            return
        self._described = [(i, {k: v for k, v in vars(given[i]).items() if k != "base"}) for i in self.blocks]
        if _stubbed:
            self._ready(current_device(), lambda *arguments: None, (None,) * 5)
            return
        if device.REFUSED and any(x is not None and x.dtype in device.REFUSED for x in tensors):
            accepted = "float32 or float16 with TRITON_INTERPRET=1, whose bfloat16 is wrong, or use_backend('eager')"
            raise RuntimeError(f"{self.choice.kernel}: got bfloat16, expected {accepted}")
        options["enable_fp_fusion"] = True  # the default changes with Triton 3.10
        if operand.is_cuda and operand.get_device() != current_device():
            with torch.cuda.device(operand.device):
                kernel[self.grid](*arguments, **self.constants, **options)
            return
        compiled = kernel[self.grid](*arguments, **self.constants, **options)
        if DIRECT and operand.is_cuda and compiled is not None:
            # Function and packed metadata; no launch metadata, no hooks.
            handles = (compiled.function, compiled.packed_metadata, None, None, None)
            self._ready(operand.get_device(), compiled.run, handles)

    def _ready(self, index: int, run: Any, handles: tuple[Any, ...]) -> None:
        """Let the next calls on this device go straight to ``run``."""
        names = self.kernel.arg_names
        rest = [self.constants[name] for name in names[len(names) - len(self.constants) :]]
        self._arguments = (handles, (*self.numbers, *rest))
        self._index, self._run = index, run


def _hooked() -> bool:
    """Whether a profiler listens to launches."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


# What launchers share.


def rows(x: Tensor | None) -> tuple[int, bool]:
    """(stride, copied): values from row to row of (..., D), 0 for None; whether x, unevenly spaced, must be copied."""
    if x is None:
        return 0, False
    columns = x.shape[-1]
    if columns != 1 and x.stride(-1) != 1:
        return columns, True
    stride, below = None, 0
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != below:
            return columns, True
        below = step * size
    return columns if stride is None else stride, False


def takes_tma(x: Tensor, stride: int) -> bool:
    """Whether a kernel may get x, rows ``stride`` values apart, as a TMA descriptor (CUDA driver API, tensor maps).

    That needs sm_90 or later, and addresses and strides that are multiples of 16 bytes. inductor cannot make
    descriptors for a kernel that it sees.
    """
    target, size = architecture(x), x.element_size()
    has_tma = target == "interpreter" or (target.startswith("sm_") and int(target[3:]) >= 90)
    if not has_tma or type(x) not in (Tensor, Parameter):
        return False
    address = x.storage_offset() * size if x.is_meta else x.data_ptr()
    return address % 16 == 0 and stride * size % 16 == 0


def multiprocessors(operand: Tensor) -> int:
    """How many the operand's GPU has; without a GPU, how many a B200 (for sm_100) or an H200 has."""
    if operand.is_cuda:
        return int(torch.cuda.get_device_properties(operand.device).multi_processor_count)
    return 148 if architecture(operand) == "sm_100" else 132


def scattered(vector: Tensor | None) -> bool:
    """Whether a vector is not contiguous, so that it must be copied."""
    return vector is not None and not vector.is_contiguous()


def like(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor to give to ``empty_like``: of this shape, with memory for one value. Plans may keep no other tensors."""
    return torch.empty((), dtype=dtype, device=device).expand(shape)


def precision(operand: Tensor) -> str:
    """``input_precision`` of float32 products: three TF32 products on NVIDIA's tensor cores, exact on AMD's."""
    return "ieee" if architecture(operand).startswith("gfx") else "tf32x3"


def block(extent: int) -> int:
    """The power of two that holds ``extent``."""
    return max(1, triton.next_power_of_2(extent))
