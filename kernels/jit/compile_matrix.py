"""Compiling kernels for a GPU that need not be there, and what the machine code looks like.

A launcher run on tensors without memory says what it would launch (jit/launch.py); that is compiled for the target with
Triton's own compiler and assembler, so what is looked at here is what would run there.
"""

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..launch_config import assumed_architecture
from .launch import Launch, recording

# Bytes of shared memory that one program may have (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
STRICT = ("sm_80", "sm_90", "sm_100")
TARGETS = tuple(SHARED_LIMIT)

_TENSOR_CORE = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma")
_GLOBAL_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.E(\.[A-Z0-9.]*)?")
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
        if self.shared_bytes > SHARED_LIMIT[self.target]:
            faults.append(f"{self.shared_bytes} bytes of shared memory, {SHARED_LIMIT[self.target]} is the limit")
        if self.matrix and not self.tensor_core:
            faults.append("no tensor core instruction")
        if self.target in STRICT and self.widest_load < 16:
            faults.append(f"widest global load {self.widest_load} bytes")
        return faults

    def as_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self) | {"widest_load": self.widest_load, "faults": self.faults()})


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


def compile_launch(launch: Launch, target: str, case: str = "") -> Report:
    """Compile one launch for ``target`` and read the result."""
    config = launch.config
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
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            hints[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    said = ", ".join(f"{key} {value}" for key, value in asdict(config).items() if key != "origin" and value)
    start, error, compiled = time.perf_counter(), "", None
    try:
        source = ASTSource(launch.kernel, signature, constants, hints)
        compiled = triton.compile(source, target=gpu_target(target), options=options)
    except Exception as failure:  # whatever the compiler raises is the finding
        error = f"does not compile: {type(failure).__name__}: {str(failure).strip()[-300:]}"
    seconds = time.perf_counter() - start
    read = dict(registers=0, spilled_bytes=0, stack_bytes=0, shared_bytes=0, tensor_core=0, matrix=False, loads={})
    if compiled is not None:
        read |= _read(compiled, target)
    return Report(launch.name, case, target, said, config.origin, **read, seconds=seconds, error=error)  # type: ignore[arg-type]


def _kind(value: Any) -> str:
    """The type of an argument as Triton would specialise it: 1 and None become constants."""
    if value is None or (isinstance(value, int) and value == 1 and not isinstance(value, bool)):
        return "constexpr"
    if isinstance(value, Tensor):
        return "*" + _POINTER[value.dtype]
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
        if "cp.async.bulk" in code:
            found["loads"][16] = found["loads"].get(16, 0) + code.count("cp.async.bulk")
    found["tensor_core"] = len(_TENSOR_CORE.findall(code))
    return found


def _load_bytes(options: str) -> int:
    for mark, size in ((".128", 16), (".64", 8), (".U8", 1), (".S8", 1), (".U16", 2), (".S16", 2)):
        if mark in options:
            return size
    return 4


def _count(sizes: Iterable[int]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for size in sizes:
        counts[size] = counts.get(size, 0) + 1
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
