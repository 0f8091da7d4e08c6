"""``python -m mar_fast.bench matrix``: every kernel compiled for each architecture, and what the code looks like.

No GPU is needed. Exit code 1 if anything does not compile, or has a fault on sm_80, sm_90 or sm_100.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import triton

from mar_fast.kernels.jit.compile_check import STRICT, TARGETS, Code, Report, check_all, code, recorded
from mar_fast.kernels.jit.launch import LaunchConfig

from .kernel_calls import Call, calls


@dataclass(frozen=True)
class Entry:
    """What is to be compiled once: the configuration that is in it, and the calls that launch it."""

    code: Code
    config: LaunchConfig
    calls: list[Call]

    def names(self) -> set[str]:
        """Its kernel, and the ops that launch it."""
        return {self.code.kernel, *(call.op for call in self.calls)}


def check_names(names: Sequence[str], known: Iterable[str]) -> None:
    """ValueError for a name that is neither an op nor a kernel."""
    for name in names:
        if name not in set(known):
            raise ValueError(f"--kernel: got {name!r}, expected an op or a kernel of {', '.join(sorted(set(known)))}")


def plan(
    targets: Sequence[str] = TARGETS,
    kernels: Sequence[str] = (),
    chosen: Callable[[Call, str], bool] = lambda call, target: True,
) -> list[Entry]:
    """Everything that is to be compiled for some targets, of some kernels or ops, for the ``chosen`` calls.

    Raises:
        ValueError: there is no such kernel.
    """
    found: dict[str, Entry] = {}
    for call in calls("meta"):
        for target in (target for target in targets if chosen(call, target)):
            for launch, tensors in recorded(call.everything, target):
                told = code(launch, tensors, target)
                entry = found.setdefault(repr(told), Entry(told, launch.choice.config, []))
                if call not in entry.calls:
                    entry.calls.append(call)
    check_names(kernels, {name for entry in found.values() for name in entry.names()})
    return [entry for entry in found.values() if not kernels or entry.names() & set(kernels)]


def described(config: LaunchConfig) -> str:
    """ "16 x 256, 4 warps, 1 stages"."""
    value: dict[str, Any] = config.options()
    tile = " x ".join(str(value.pop(name)) for name in ("block_m", "block_n", "block_k") if name in value)
    first = [tile, f"{value.pop('num_warps')} warps", f"{value.pop('num_stages')} stages"]
    return ", ".join([*first, *(f"{name} {said}" for name, said in value.items())])


def print_table(*rows: Sequence[Any]) -> None:
    """Columns as wide as they need to be."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


COLUMNS = ("kernel", "target", "configuration", "registers", "local", "shared", "tensor core", "load", "s", "call")


def row(entry: Entry, report: Report) -> tuple[Any, ...]:
    """One line of the table."""
    call = f"{entry.calls[0]}{f' and {len(entry.calls) - 1} more' if entry.calls[1:] else ''}"
    numbers = (report.registers, report.stack_bytes + report.spilled_bytes, report.shared_bytes, report.tensor_core)
    rest = (report.widest_load, round(report.seconds, 1), call)
    return (report.kernel, report.target, described(entry.config), *numbers, *rest)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench matrix", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="an architecture; may be given again")
    parser.add_argument("--kernel", action="append", default=[], help="an op or a kernel; may be given again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile; 0: this one")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each, and no table")
    options = parser.parse_args(arguments)
    try:
        entries = plan(options.target or TARGETS, options.kernel)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    rows, faults, failed = [], [], 0
    for place, report in check_all([entry.code for entry in entries], options.jobs):
        entry = entries[place]
        if options.json:
            more = {
                "config": entry.config.options(),
                "origin": entry.config.origin,
                "calls": list(map(str, entry.calls)),
            }
            verdict = {"faults": report.faults(), "failed": report.failed, "triton": triton.__version__}
            print(json.dumps(asdict(report) | more | verdict), flush=True)
        rows.append(row(entry, report))
        faults += [f"{report.kernel}, {entry.calls[0]}, {report.target}: {fault}" for fault in report.faults()]
        failed += report.failed
    if not options.json:
        print_table(COLUMNS, *sorted(rows))
        print(*faults, sep="\n")
        print(
            f"{len(rows)} compiled with Triton {triton.__version__}, {failed} failed. Local and shared memory and the "
            f"widest load in bytes. On {', '.join(STRICT)} no fault is allowed, elsewhere everything must compile."
        )
    return int(failed > 0)
