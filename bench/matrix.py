"""``python -m mar_fast.bench matrix``: every kernel compiled for each architecture, and what the code looks like.

No GPU is needed. Exit code 1 if anything does not compile, or has a fault on sm_80, sm_90 or sm_100.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mar_fast.kernels.jit.compile_check import STRICT, TARGETS, TRITON, Code, Report, check_all, code, recorded
from mar_fast.kernels.jit.launch import LaunchConfig

from .kernel_calls import Call, calls


@dataclass(frozen=True)
class Entry:
    """What is to be compiled once: the configuration that is in it, and the calls that launch it."""

    code: Code
    config: LaunchConfig
    calls: list[Call]


def named(found: Iterable[Any], names: Sequence[str], names_of: Callable[[Any], set[str]]) -> list[Any]:
    """What has one of the names, of kernels or ops; everything where no name is given.

    Raises:
        ValueError: nothing has that name.
    """
    found, known = list(found), set[str]()
    known.update(*map(names_of, found))
    for name in names:
        if name not in known:
            raise ValueError(f"--kernel: got {name!r}, expected an op or a kernel of {', '.join(sorted(known))}")
    return [one for one in found if not names or names_of(one) & set(names)]


def plan(
    targets: Sequence[str] = TARGETS,
    kernels: Sequence[str] = (),
    chosen: Callable[[Call, str], bool] = lambda call, target: True,
) -> list[Entry]:
    """Everything that is to be compiled for some targets, of some kernels or ops, for the ``chosen`` calls."""
    found: dict[str, Entry] = {}
    for call in calls("meta"):
        for target in (target for target in targets if chosen(call, target)):
            for launch, tensors in recorded(call.everything, target):
                told = code(launch, tensors, target)
                entry = found.setdefault(repr(told), Entry(told, launch.choice.config, []))
                if call not in entry.calls:
                    entry.calls.append(call)
    return named(found.values(), kernels, lambda entry: {entry.code.kernel, *(call.op for call in entry.calls)})


def described(config: LaunchConfig) -> str:
    """ "16 x 256, 4 warps, 1 stages"."""
    value: dict[str, Any] = config.options()
    tile = " x ".join(str(value.pop(name)) for name in ("block_m", "block_n", "block_k") if name in value)
    first = [tile, f"{value.pop('num_warps')} warps", f"{value.pop('num_stages')} stages"]
    return ", ".join([*first, *(f"{name} {said}" for name, said in value.items())])


def line(entry: Entry, report: Report) -> str:
    """One line of the table."""
    local, more = report.stack_bytes + report.spilled_bytes, len(entry.calls) - 1
    return (
        f"{report.kernel:38} {report.target:7} {described(entry.config):42} {report.registers:9} {local:5} "
        f"{report.shared_bytes:6} {report.tensor_core:11} {report.widest_load:4} {report.seconds:4.1f}  "
        f"{entry.calls[0]}{f' and {more} more' if more else ''}"
    )


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench matrix", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="an architecture; may be given again")
    parser.add_argument("--kernel", action="append", default=[], help="an op or a kernel; may be given again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile; 0: this one")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each, and no table")
    options = parser.parse_args(arguments)
    if options.jobs < 0:
        parser.error(f"--jobs: got {options.jobs}, expected a number of processes, or 0")
    try:
        entries = plan(options.target or TARGETS, options.kernel)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    lines, faults, failed = [], [], 0
    for place, report in check_all([entry.code for entry in entries], options.jobs):
        entry, found = entries[place], report.faults()
        if options.json:
            more = dict(faults=found, failed=report.failed, calls=[*map(str, entry.calls)], triton=TRITON)
            print(json.dumps(asdict(report) | asdict(entry.config) | more), flush=True)
        lines.append(line(entry, report))
        faults += [f"{report.kernel}, {entry.calls[0]}, {report.target}: {fault}" for fault in found]
        failed += report.failed
    if not options.json:
        print(f"{'kernel':38} {'target':7} {'configuration':42} registers local shared tensor core load    s  call")
        print(*sorted(lines), *faults, sep="\n")
        print(
            f"{len(lines)} compiled with Triton {TRITON}, {failed} failed. Local and shared memory and the "
            f"widest load in bytes. On {', '.join(STRICT)} no fault is allowed, elsewhere everything must compile."
        )
    return int(failed > 0)
