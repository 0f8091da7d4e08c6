"""The machine: its device, its matrix-product and copy rates, peak memory, and what identifies a measurement."""

import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from .kernels import checks
from .timing import interleaved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def short_name(dtype: torch.dtype) -> str:
    """ "bf16" for torch.bfloat16, and so on."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def device(name: str = "auto") -> torch.device:
    """The device to run on: "cpu", "cuda", or "auto" for the GPU if there is one.

    Raises:
        ValueError: "cuda" on a machine without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch finds no GPU here; expected 'cpu' or 'auto'")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def matmul_rates(device: torch.device, dtypes: tuple[str, ...], budget: float = 4.0) -> dict[str, float]:
    """Measured FLOP/s of a large square matrix product, by dtype: random operands, median, interleaved."""
    side = 8192 if device.type == "cuda" else 2048
    runs: dict[str, Callable[[], object]] = {}
    for name in dtypes:
        left, right = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        runs[name] = partial(torch.matmul, left, right)
    spreads = interleaved(runs, device, budget=budget, min_rounds=5, max_rounds=30)
    return {name: 2 * side**3 / spread.p50 for name, spread in spreads.items()}


def copy_rate(device: torch.device, budget: float = 2.0) -> float:
    """Measured bytes per second of a large copy, read and written ones together."""
    size = (1024 if device.type == "cuda" else 256) * 2**20
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spread = interleaved({"copy": lambda: target.copy_(source)}, device, budget=budget, min_rounds=5, max_rounds=30)
    return 2 * size / spread["copy"].p50


def choose_dtype(device: torch.device, rates: dict[str, float]) -> tuple[str, str]:
    """The dtype to run in, bf16 if its matrix products are clearly faster, and the reason in words."""
    gain = rates["bf16"] / rates["fp32"]
    reason = f"bf16 matrix products run {gain:.1f}x as fast as fp32 ones on this {device.type.upper()}"
    return ("bf16" if gain > 1.5 else "fp32"), reason


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that ``run`` needs on top of what is in use: allocator peak on a GPU, growth of resident memory on a CPU.

    None if the system cannot tell (not Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # Return freed memory first, or run would reuse it unseen; then reset the high-water mark.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        run()
        return max(_status_bytes("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found[1]) * 1024


def environment(device: torch.device) -> dict[str, str | int]:
    """What a reader needs to know to repeat a measurement."""
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "clocks": _clocks(device),
        "mar_fast": importlib.metadata.version("mar-fast"),
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within this context PyTorch uses ``count`` threads; None changes nothing.

    Raises:
        ValueError: count is not a whole number of 1 or more.
    """
    if count is not None and (not isinstance(count, int) or count < 1):
        raise checks.bad("threads", repr(count), "a whole number, 1 or more")
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        name = next(models, f":{name}").split(":", 1)[1].strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"


def _clocks(device: torch.device) -> str:
    """Clocks and power limit of a GPU by its driver's tool; empty without that tool."""
    if device.type != "cuda":
        return ""
    wanted = "clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    options = f"--query-gpu={wanted}", "--format=csv,noheader", f"--id={device.index or 0}"
    answer = _answer("nvidia-smi", *options)
    return f"{wanted}: {answer}" if answer else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of this checkout, with "-dirty" if it was changed; empty outside a checkout."""
    here = Path(__file__).resolve()
    git = "git", "-C", str(here.parent)
    tracked = _answer(*git, "ls-files", "--error-unmatch", str(here))
    return _answer(*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") if tracked else ""


def _answer(*command: str) -> str:
    """What a command prints; nothing if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
