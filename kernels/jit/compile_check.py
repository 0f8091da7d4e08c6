"""Compile kernels for a GPU without having one, and look at the machine code.

An op that is called with meta tensors records what it would launch (`recorded`). That is compiled for the target by
Triton's own compiler and assembler: what is checked here is what would run there.
"""

import math
import multiprocessing
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import triton
from torch import Tensor
from triton._utils import canonicalize_dtype
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..device import INTERPRETING, assumed_architecture
from .launch import TUNED, Launch, LaunchConfig, Recorded, recording

# Bytes of shared memory that one program may have (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_LIMIT = dict(sm_80=166912, sm_87=166912, sm_90=232448, sm_100=232448, sm_103=232448, sm_110=232448, gfx942=65536)
TARGETS = (*TUNED, "sm_120", "gfx942")
STRICT = TUNED
TRITON = triton.__version__
# Kernels whose loads need not be wide: fold_weight reads a weight in another order, once for many calls.
COLD = ("fold_weight",)

# Patterns for PTX, machine code and its resource usage. Numbers that they find are added up, other finds counted.
FIGURES = {
    "registers": r"(?:REG:|\.vgpr_count:\s+)(\d+)",
    # Spilled values are in local memory: LOCAL or STACK, depending on the assembler's version.
    "local": r"(?:LOCAL:|STACK:|\.private_segment_fixed_size:\s+)(\d+)",
    "tensor core": r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma",
    # LDG.E.128, LDGSTS.E.BYPASS.LTC128B.128 (LTC128B is about the cache), LDG.E.ENL2.256; TMA; AMD's.
    "wide loads": r"\b(?:LDG|LDGSTS)\.E\S*\.(?:128|256)\b|cp\.async\.bulk(?:\.tensor\.\dd)?\.shared"
    r"|(?:global|buffer)_load_dwordx4",
    "TMA": r"\bUTMA(?:LDG|STG)\b",
}
# In this layout float32 was wrong on an H200 (Triton 3.6), by as much as with one TF32 product, though there are three.
WRONG_LAYOUT = "wgmma.mma_async.sync.aligned.m64n8k8."
# A product of float32 in Triton's own stages: its precision, rows, summed values and columns.
FLOAT32_PRODUCT = re.compile(
    r"(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) (?:[^\n]*inputPrecision = (\w+))?"
    r"[^\n]* : (?:tensor|!ttg\.memdesc)<(\d+)x(\d+)xf32[^\n]*?<\d+x(\d+)xf32"
)


@dataclass(frozen=True)
class Code:
    """What the compiler is told of a launch: two that are equal compile to the same code."""

    kernel: str
    target: str
    source: tuple[str, dict[str, Any], dict[str, Any], dict[Any, Any]]  # module:name, and what else `ASTSource` takes
    options: dict[str, Any]
    config: LaunchConfig = field(compare=False, repr=False)

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True)
class Report:
    """The result for a `Code`: faults, and figures for a table, empty if it did not compile."""

    code: Code
    faults: list[str]
    figures: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether the gate fails: it does not compile, or has a fault on a target where none is allowed."""
        return not self.figures or (self.code.target in STRICT and bool(self.faults))


def recorded(run: Callable[[], object], target: str) -> list[Recorded]:
    """What ``run``, calls of ops on tensors on the meta device, would launch on ``target``."""
    if INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, and cannot be compiled")
    with assumed_architecture(target), recording() as launches:
        run()
    return launches


def code(launch: Launch, tensors: Sequence[Tensor | None], target: str) -> Code:
    """What the compiler is told: types, constants, and which addresses and numbers are multiples of 16."""
    function, config, names = launch.kernel.fn, launch.choice.config, launch.kernel.arg_names
    values = dict(zip(names, (*tensors, *launch.numbers), strict=False)) | launch.constants
    signature = {name: "constexpr" if name in launch.constants else _kind(values[name]) for name in names}
    for i, block in launch.blocks.items():
        signature[names[i]] = f"tensordesc<{signature[names[i]][1:]}{list(block.block)}>"
    constants = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
    plain = [i for i, name in enumerate(names) if name not in constants and i not in launch.blocks]
    hints = {(i,): [["tt.divisibility", 16]] for i in plain if _divisible(values[names[i]])}
    source = (f"{function.__module__}:{function.__qualname__}", signature, constants, hints)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return Code(launch.choice.kernel, target, source, options, config)


def _kind(value: Any) -> Any:
    """The type of an argument as Triton would specialise it: 1 and None become constants."""
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    if isinstance(value, Tensor):
        return f"*{canonicalize_dtype(value.dtype)}"
    if isinstance(value, bool | float):
        return "u1" if isinstance(value, bool) else "fp32"
    return "constexpr" if value is None or value == 1 else "i32" if -(2**31) <= value < 2**31 else "i64"


def _divisible(value: Any) -> bool:
    """Whether an address, or a number, is a multiple of 16; memory is allocated on such addresses."""
    if isinstance(value, Tensor):
        value = value.storage_offset() * value.element_size()
    return type(value) is int and value % 16 == 0


def check(code: Code) -> Report:
    """Compile it, and look for faults in the result."""
    nvidia = code.target.startswith("sm_")
    target = GPUTarget("cuda", int(code.target[3:]), 32) if nvidia else GPUTarget("hip", code.target, 64)
    name, signature, *others = code.source
    try:
        source = ASTSource(pkgutil.resolve_name(name), signature, *others)
        compiled = triton.compile(source, target, code.options)
        text = _disassembled(compiled.asm) if nvidia else compiled.asm["amdgcn"]
    except Exception as failure:  # whatever the compiler raises is the finding
        return Report(code, [f"does not compile: {type(failure).__name__}: {str(failure).strip()[-300:]}"])
    shared, limit = compiled.metadata.shared, SHARED_LIMIT.get(code.target, 101376)
    figures = {name: count(pattern, text) for name, pattern in FIGURES.items()} | {"shared": shared}
    described = any(str(kind).startswith("tensordesc") for kind in signature.values())
    (precisions, wanted), (_, made) = (_float32_products(compiled.asm[stage]) for stage in ("ttir", "ttgir"))
    single, products = precisions.count("tf32"), made / wanted if "tf32x3" in precisions else 3.0
    wrong, local, wide = text.count(WRONG_LAYOUT), figures["local"], figures["wide loads"]
    faults = {
        f"{local} bytes of spills and stack": local > 0,
        f"{shared} bytes of shared memory, {limit} is the limit": shared > limit,
        "no tensor core instruction": "tt.dot " in compiled.asm["ttir"] and not figures["tensor core"],
        f"{single} float32 products by one of TF32, three are needed": single > 0,
        f"float32 products by {products:.2f} of TF32, three are needed": products != 3 and not single,
        f"{wrong} m64n8k8 wgmma, which are wrong for float32": wrong > 0,
        "no TMA instruction": described and not figures["TMA"],
        "no global load of 16 bytes": not wide and code.target in STRICT and code.kernel not in COLD,
    }
    return Report(code, [text for text, is_so in faults.items() if is_so], figures)


def count(pattern: str, text: str) -> int:
    """The sum of the numbers that a pattern finds, or how often it finds anything else."""
    return sum(int(found) if found.isdigit() else 1 for found in re.findall(pattern, text))


def _float32_products(stage: str) -> tuple[list[str], int]:
    """Precisions of the products of float32 in one of Triton's stages, and their multiply-adds.

    Multiply-adds are compared, not numbers of products, since the compiler may split one product into several.
    """
    found = FLOAT32_PRODUCT.findall(stage)
    return [precision for precision, *_ in found], sum(math.prod(map(int, sizes)) for _, *sizes in found)


def _disassembled(stages: Any) -> str:
    """PTX, machine code and its resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(stages["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "-sass", file.name]
        return str(stages["ptx"] + subprocess.run(tool, capture_output=True, text=True, check=True).stdout)


@cache
def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def check_all(codes: Sequence[Code], jobs: int) -> Iterator[Report]:
    """The report of each, checked in ``jobs`` processes (0: in this one).

    The compiler is C++ and may crash its process; the rest is then done one at a time, so that the culprit is known.
    """
    left = list(codes)
    while left and jobs:
        try:
            for report in _pool(jobs).map(check, tuple(left)):
                del left[0]
                yield report
        except BrokenProcessPool:
            _pool.cache_clear()
            if jobs == 1:
                yield Report(left.pop(0), ["does not compile: the compiler ended its process"])
            jobs = 1
    yield from map(check, left)
