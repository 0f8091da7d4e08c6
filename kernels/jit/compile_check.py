"""Compiling kernels for a GPU that need not be there, and what the machine code looks like.

An op called on tensors without memory says what it would launch (`recorded`); that is compiled for the target with
Triton's own compiler and assembler, so what is looked at here is what would run there.
"""

import importlib
import math
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..device import INTERPRETING, assumed_architecture
from .launch import Launch, recording

# Bytes of shared memory that one program may have (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_LIMIT = {"sm_80": 166912, "sm_87": 166912, "gfx942": 65536}
SHARED_LIMIT |= dict.fromkeys(("sm_90", "sm_100", "sm_103", "sm_110"), 232448)
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
STRICT = ("sm_80", "sm_90", "sm_100")
TRITON = triton.__version__
# Kernels whose loads need not be wide: it reads a weight, once for many calls, in another order.
COLD = ("fold_weight",)

_TENSOR_CORE = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma")
# A product of float32: its precision, rows, summed values and columns.
_FLOAT32_DOT = re.compile(
    r"(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) (?:[^\n]*inputPrecision = (\w+))?"
    r"[^\n]* : (?:tensor|!ttg\.memdesc)<(\d+)x(\d+)xf32[^\n]*?<\d+x(\d+)xf32"
)
# So laid out float32 was wrong on an H200 (Triton 3.6) by the size of one TF32 product; all three are there.
_WRONG_LAYOUT = "wgmma.mma_async.sync.aligned.m64n8k8."
# LDG.E.128, LDGSTS.E.BYPASS.LTC128B.128, LDG.E.U8.CONSTANT, LDG.E.ENL2.256; LTC128B is about the cache.
_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.E((?:\.[A-Z0-9]+)*)")
_LOAD_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_BULK_LOAD = re.compile(r"cp\.async\.bulk(?:\.tensor\.\dd)?\.shared")  # TMA: wider than any load of a thread
_AMD_LOAD = re.compile(r"(?:global|buffer)_load_(dwordx4|dwordx3|dwordx2|dword|ushort|short|ubyte|sbyte)")
_AMD_LOAD_BYTES = dict(dwordx4=16, dwordx3=12, dwordx2=8, dword=4, ushort=2, short=2, ubyte=1, sbyte=1)
_POINTER = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Code:
    """What the compiler is told of a launch: two with the same ``repr`` compile to the same code."""

    kernel: str
    target: str
    function: tuple[str, str]  # module and name
    signature: dict[str, Any]
    constants: dict[str, Any]
    hints: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What became of one launch on one target.

    ``dots`` are the matrix products of the source, ``single`` those of float32 by one of TF32; ``products`` is how many
    of TF32 the compiler made of one of float32, where it is multiplied so. ``loads``: how many, by bytes a thread.
    """

    kernel: str
    target: str
    registers: int = 0
    spilled_bytes: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    tensor_core: int = 0
    dots: int = 0
    single: int = 0
    products: float = 0.0
    wrong_layout: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    @property
    def widest_load(self) -> int:
        """Bytes that the widest global load takes for one thread; 0 where there is none."""
        return max(self.loads, default=0)

    def faults(self) -> list[str]:
        """What is wrong with it: nothing for a kernel that may be run."""
        if self.error:
            return [self.error]
        limit, wide = SHARED_LIMIT.get(self.target, 101376), self.target not in STRICT or self.kernel in COLD
        found = {
            f"{self.spilled_bytes} bytes spilled, {self.stack_bytes} bytes of stack": self.spilled_bytes
            or self.stack_bytes,
            f"{self.shared_bytes} bytes of shared memory, {limit} is the limit": self.shared_bytes > limit,
            "no tensor core instruction": self.dots and not self.tensor_core,
            f"{self.single} float32 products by one of TF32, three are needed": self.single,
            f"float32 products by {self.products:.2f} of TF32, three are needed": self.products not in (0, 3),
            f"{self.wrong_layout} m64n8k8 wgmma, which are wrong for float32": self.wrong_layout,
            f"widest global load {self.widest_load} bytes": not wide and self.widest_load < 16,
        }
        return [text for text, is_so in found.items() if is_so]

    @property
    def failed(self) -> bool:
        """Whether a gate stops here: it does not compile, or has a fault on a target where none is allowed."""
        return bool(self.error or (self.target in STRICT and self.faults()))


def recorded(run: Callable[[], object], target: str) -> list[tuple[Launch, tuple[Tensor | None, ...]]]:
    """What ``run``, calls of ops on tensors on the meta device, would launch on ``target``.

    Raises:
        RuntimeError: kernels are interpreted in this process, and cannot be compiled.
    """
    if INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, and cannot be compiled")
    with assumed_architecture(target), recording() as launches:
        run()
    return launches


def code(launch: Launch, tensors: Sequence[Tensor | None], target: str) -> Code:
    """What the compiler is told: types, constants, and which addresses and numbers are multiples of 16."""
    function, config = launch.kernel.fn, launch.choice.config
    values = dict(zip(launch.kernel.arg_names, (*tensors, *launch.numbers), strict=False)) | launch.constants
    signature = {
        name: "constexpr" if name in launch.constants else _kind(values[name]) for name in launch.kernel.arg_names
    }
    return Code(
        launch.choice.kernel, target, (function.__module__, function.__qualname__), signature,
        {name: values[name] for name, kind in signature.items() if kind == "constexpr"},
        {
            (place,): [["tt.divisibility", 16]]
            for place, (name, kind) in enumerate(signature.items())
            if kind != "constexpr" and _divisible(values[name])
        },
        {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True},
    )  # fmt: skip


def _kind(value: Any) -> Any:
    """The type of an argument as Triton would specialise it: 1 and None become constants."""
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    if isinstance(value, Tensor):
        return "*" + _POINTER[value.dtype]
    if isinstance(value, bool | float):
        return "u1" if isinstance(value, bool) else "fp32"
    if value is None or value == 1:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _divisible(value: Any) -> bool:
    """Whether an address, or a number, is a multiple of 16; memory is allocated on such addresses."""
    if isinstance(value, Tensor):
        value = value.storage_offset() * value.element_size()
    return type(value) is int and value % 16 == 0


def check(code: Code) -> Report:
    """Compile, and read the result."""
    start, found = time.perf_counter(), dict[str, Any]()
    nvidia = code.target.startswith("sm_")
    target = GPUTarget("cuda", int(code.target[3:]), 32) if nvidia else GPUTarget("hip", code.target, 64)
    kernel = getattr(importlib.import_module(code.function[0]), code.function[1])
    try:
        compiled = triton.compile(ASTSource(kernel, code.signature, code.constants, code.hints), target, code.options)
        found = _products(compiled) | (_read_nvidia if nvidia else _read_amd)(compiled)
    except Exception as failure:  # whatever the compiler raises is the finding
        found["error"] = f"does not compile: {type(failure).__name__}: {str(failure).strip()[-300:]}"
    return Report(code.kernel, code.target, seconds=time.perf_counter() - start, **found)


def check_all(codes: Sequence[Code], jobs: int) -> Iterator[tuple[int, Report]]:
    """Check them in ``jobs`` processes (0: in this one): (place, report) as they are done.

    The compiler is C++ and may end its process; then they are done one at a time, so that the culprit is known.
    """
    if not jobs:
        yield from enumerate(map(check, codes))
        return
    pending = dict(enumerate(codes))
    while pending:
        with ProcessPoolExecutor(min(jobs, len(pending)), mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(check, code): place for place, code in pending.items()}
            try:
                for future in as_completed(futures):
                    with suppress(BrokenProcessPool):
                        report = future.result()
                        del pending[futures[future]]
                        yield futures[future], report
            finally:
                pool.shutdown(cancel_futures=True)
        if pending and jobs == 1:  # done in order, so it was the first of these
            lost = pending.pop(place := min(pending))
            yield place, Report(lost.kernel, lost.target, error="does not compile: the compiler ended its process")
        jobs = 1


def _products(compiled: Any) -> dict[str, Any]:
    """Matrix products of the source, and of float32 what the compiler made of them, just before instructions.

    By multiply-adds, as it may cut a product into several.
    """
    source, made = (_FLOAT32_DOT.findall(compiled.asm[stage]) for stage in ("ttir", "ttgir"))
    multiplied = [sum(math.prod(map(int, sizes)) for _, *sizes in found) for found in (source, made)]
    precisions = [precision for precision, *_ in source]
    return dict(
        dots=compiled.asm["ttir"].count("tt.dot "), single=precisions.count("tf32"),
        products=multiplied[1] / multiplied[0] if "tf32x3" in precisions else 0.0,
        shared_bytes=compiled.metadata.shared,
    )  # fmt: skip


def _read_nvidia(compiled: Any) -> dict[str, Any]:
    """Registers, memory and instructions; the machine code by the cuobjdump that Triton ships."""
    ptx, tool = compiled.asm["ptx"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    # Spilled values live in local memory: LOCAL, or on the stack, by version of the assembler.
    found: dict[str, Any] = dict(
        registers=_number(r"REG:(\d+)", usage), spilled_bytes=_number(r"LOCAL:(\d+)", usage),
        stack_bytes=_number(r"STACK:(\d+)", usage), tensor_core=len(_TENSOR_CORE.findall(ptx)),
        wrong_layout=ptx.count(_WRONG_LAYOUT),
    )  # fmt: skip
    return found | dict(
        loads=dict(Counter([*map(load_bytes, _LOAD.findall(sass)), *[16] * len(_BULK_LOAD.findall(ptx))]))
    )


def _read_amd(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]
    return dict(
        registers=_number(r"\.vgpr_count:\s+(\d+)", code),
        spilled_bytes=4 * _number(r"\.vgpr_spill_count:\s+(\d+)", code),
        stack_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", code),
        tensor_core=len(_TENSOR_CORE.findall(code)),
        loads=dict(Counter(_AMD_LOAD_BYTES[name] for name in _AMD_LOAD.findall(code))),
    )


def load_bytes(options: str) -> int:
    """Bytes of a load by what is said after its name: ".128.CONSTANT"."""
    return next((_LOAD_BYTES[option] for option in options.split(".") if option in _LOAD_BYTES), 4)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0
