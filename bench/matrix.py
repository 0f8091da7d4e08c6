"""``python -m mar_fast.bench matrix``: every kernel compiled for each architecture, and what the code looks like.

No GPU is needed. Exit code 1 if anything does not compile, or has a fault on sm_80, sm_90 or sm_100.
"""

import argparse
import os
from collections.abc import Sequence

from mar_fast.kernels.jit.compile_check import STRICT, TARGETS, TRITON, check_all, code

from .kernel_calls import launched


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench matrix", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="an architecture; may be given again")
    parser.add_argument("--kernel", action="append", default=[], help="an op or a kernel; may be given again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile; 0: this one")
    options = parser.parse_args(arguments)
    if options.jobs < 0:
        parser.error(f"--jobs: got {options.jobs}, expected a number of processes, or 0")
    try:
        entries = launched(code, options.target or TARGETS, options.kernel)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(f"{'kernel':38} {'target':7} {'configuration':43} figures, call")
    faults, failed = [], 0
    for report in check_all([*entries], options.jobs):
        told, call = report.code, entries[report.code][0]
        figures = ", ".join(f"{what} {value}" for what, value in report.figures.items())
        print(f"{told.kernel:38} {told.target:7} {told.config!s:43} {figures:75} {call}", flush=True)
        faults += [f"{told.kernel}, {call}, {told.target}: {fault}" for fault in report.faults]
        failed += report.failed
    print(*faults, sep="\n")
    print(
        f"{len(entries)} compiled with Triton {TRITON}, {failed} failed. Local and shared memory in bytes. "
        f"On {', '.join(STRICT)} no fault is allowed, elsewhere everything must compile."
    )
    return int(failed > 0)
