"""Compiling kernels for a GPU that need not be there, and what the machine code looks like.

A launcher run on tensors without memory says what it would launch (jit/launch.py); that is compiled for the target with
Triton's own compiler and assembler, so what is looked at here is what would run there. jit/matrix.py does it for every
case.
"""

import json
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..launch_config import LaunchConfig, assumed_architecture
from .launch import Launch, recording

# Bytes of shared memory that one program may have (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_LIMIT = {
    "sm_80": 166912, "sm_86": 101376, "sm_87": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448,
    "sm_103": 232448, "sm_110": 232448, "sm_120": 101376, "sm_121": 101376, "gfx942": 65536,
}  # fmt: skip
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
STRICT = ("sm_80", "sm_90", "sm_100")
TRITON = triton.__version__

_TENSOR_CORE = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma")
# LDG.E.128, LDGSTS.E.BYPASS.LTC128B.128, LDG.E.U8.CONSTANT, LDG.E.ENL2.256; LTC128B is about the cache.
_GLOBAL_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.E((?:\.[A-Z0-9]+)*)")
_LOAD_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_BULK_LOAD = re.compile(r"cp\.async\.bulk(?:\.tensor\.\dd)?\.shared")
_POINTER = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What became of one launch on one target. ``loads`` counts global loads by their bytes a thread."""

    kernel: str
    case: str
    target: str
    config: str
    origin: str
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int
    tensor_core: int
    matrix: bool
    loads: dict[int, int]
    seconds: float
    error: str = ""
    dtype: str = ""

    @property
    def widest_load(self) -> int:
        """Bytes that the widest global load takes for one thread; 0 where there is none."""
        return max(self.loads, default=0)

    def faults(self) -> list[str]:
        """What is wrong with it: nothing for a kernel that may be run."""
        if self.error:
            return [self.error]
        faults = []
        if self.spilled_bytes or self.stack_bytes:
            faults.append(f"{self.spilled_bytes} bytes spilled, {self.stack_bytes} bytes of stack")
        limit = SHARED_LIMIT.get(self.target, 65536)
        if self.shared_bytes > limit:
            faults.append(f"{self.shared_bytes} bytes of shared memory, {limit} is the limit")
        if self.matrix and not self.tensor_core:
            faults.append("no tensor core instruction")
        if self.target in STRICT and self.widest_load < 16:
            faults.append(f"widest global load {self.widest_load} bytes")
        return faults

    @property
    def failed(self) -> bool:
        """Whether a gate stops here: it does not compile, or has a fault on a target where none is allowed."""
        return bool(self.error or (self.target in STRICT and self.faults()))

    def as_json(self) -> str:
        """One line of JSON."""
        more = {"widest_load": self.widest_load, "faults": self.faults(), "failed": self.failed}
        return json.dumps(asdict(self) | more | {"triton": TRITON})


def gpu_target(name: str) -> GPUTarget:
    """ "sm_90" or "gfx942" as Triton names it."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def launches(run: Callable[[], object], target: str) -> list[Launch]:
    """What ``run``, a call of launchers on tensors on the meta device, would launch on ``target``."""
    with assumed_architecture(target), recording() as recorded:
        run()
    return recorded


def compile_launch(launch: Launch, target: str, case: str = "", dtype: str = "") -> Report:
    """Compile one launch for ``target`` and read the result. ``case`` and ``dtype`` are for the report."""
    config = launch.config
    start, error, compiled = time.perf_counter(), "", None
    try:
        compiled = triton.compile(ASTSource(launch.kernel, *specialised(launch)), gpu_target(target), _options(config))
    except Exception as failure:  # whatever the compiler raises is the finding
        error = f"does not compile: {type(failure).__name__}: {str(failure).strip()[-300:]}"
    seconds = time.perf_counter() - start
    read = _read(compiled, target) if compiled is not None else {}
    return report(launch.name, target, config, case=case, dtype=dtype, seconds=seconds, error=error, **read)


def report(kernel: str, target: str, config: LaunchConfig | None, **known: Any) -> Report:
    """A report with nothing in it but what is known."""
    said = ""
    if config is not None:
        said = ", ".join(f"{name} {value}" for name, value in config.options().items())
    nothing: dict[str, Any] = dict(
        case="", config=said, origin=config.origin if config else "", registers=0, spilled_bytes=0, stack_bytes=0,
        shared_bytes=0, tensor_core=0, matrix=False, loads={}, seconds=0.0,
    )  # fmt: skip
    return Report(kernel=kernel, target=target, **(nothing | known))


def launch_key(launch: Launch, target: str) -> str:
    """Two launches with the same key compile to the same code."""
    code = (launch.kernel.fn.__module__, launch.kernel.fn.__qualname__)
    return repr((launch.name, code, specialised(launch), _options(launch.config), target))


def _options(config: LaunchConfig) -> dict[str, Any]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """The types of the arguments, the constants among them, and what is known of the others, as Triton does it."""
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int], list[list[Any]]] = {}
    values = dict(zip(names, launch.arguments, strict=False)) | launch.constexprs
    for place, name in enumerate(names):
        value = values[name]
        kind = "constexpr" if name in launch.constexprs else _kind(value)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif _divisible(value):
            hints[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, hints


def _divisible(value: Any) -> bool:
    """Whether an address, or a number, is a multiple of 16; memory is allocated on such addresses."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0


def _kind(value: Any) -> str:
    """The type of an argument as Triton would specialise it: 1 and None become constants."""
    if value is None or (isinstance(value, int) and value == 1 and not isinstance(value, bool)):
        return "constexpr"
    if isinstance(value, Tensor):
        return "*" + _POINTER[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _read(compiled: Any, target: str) -> dict[str, Any]:
    """Registers, memory and instructions of a compiled kernel."""
    found: dict[str, Any] = {"shared_bytes": compiled.metadata.shared, "matrix": "tt.dot" in compiled.asm["ttir"]}
    if target.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        wide = re.findall(r"(?:global|buffer)_load_(dwordx4|dwordx3|dwordx2|dword|ushort|short|ubyte|sbyte)", code)
        size = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "sbyte": 1}
        found |= dict(
            registers=_number(r"\.vgpr_count:\s+(\d+)", code),
            spilled_bytes=4 * _number(r"\.vgpr_spill_count:\s+(\d+)", code),
            stack_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", code),
            loads=_count(size[name] for name in wide),
        )
    else:
        code = compiled.asm["ptx"]
        usage, sass = _disassemble(compiled.asm["cubin"])
        found |= dict(
            registers=_number(r"REG:(\d+)", usage),
            # Spilled values live in local memory: LOCAL, or on the stack, by version of the assembler.
            spilled_bytes=_number(r"LOCAL:(\d+)", usage),
            stack_bytes=_number(r"STACK:(\d+)", usage),
            loads=_count(_load_bytes(options) for options in _GLOBAL_LOAD.findall(sass)),
        )
        # Bulk copies (TMA) are wider than any load of a thread.
        if bulk := len(_BULK_LOAD.findall(code)):
            found["loads"] = _count([16] * bulk, found["loads"])
    found["tensor_core"] = len(_TENSOR_CORE.findall(code))
    return found


def _load_bytes(options: str) -> int:
    return next((_LOAD_BYTES[option] for option in options.split(".") if option in _LOAD_BYTES), 4)


def _count(sizes: Iterable[int], before: dict[int, int] | None = None) -> dict[int, int]:
    counts = Counter(before or {})
    counts.update(sizes)
    return dict(sorted(counts.items(), reverse=True))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, by the cuobjdump that Triton ships."""
    tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )  # type: ignore[return-value]
