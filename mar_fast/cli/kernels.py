"""mar-fast kernels: every Triton kernel compiled for each architecture, and what the machine code looks like."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from .common import CHECK_FAILED, errors, need_triton, progress, wide_results

if TYPE_CHECKING:
    from ..kernels.jit.compile_matrix import Report
    from ..kernels.jit.matrix import Plan


def kernels(
    target: Annotated[list[str] | None, typer.Option(help="An architecture, for example sm_90; repeatable.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="An op or one of its kernels; repeatable.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes that compile; 0 is one for each core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table, one line each.")] = False,
) -> None:
    """Compile every kernel, for every case and row of the launch tables. No GPU is needed.

    Exit code 1 if anything does not compile, or has a fault on sm_80, sm_90 or sm_100.
    """
    need_triton()
    from ..kernels.jit import matrix
    from ..kernels.jit.compile_matrix import TARGETS

    if jobs < 0:
        raise ValueError(f"--jobs: got {jobs}, expected a number of processes, or 0")
    made = matrix.plan(list(dict.fromkeys(target or TARGETS)), kernel or ())
    reports: list[Report] = []
    with progress() as step:
        step("compiling", 0.0)
        for number, done in enumerate(_all(made, jobs or os.cpu_count() or 1), 1):
            reports += done
            if as_json:
                for report in done:
                    typer.echo(report.as_json())
            step(f"compiled {done[0].kernel} for {done[0].target}", number / (len(made.found) + 1))
    failed = sum(report.failed for report in reports)
    if not as_json:
        place = {name: number for number, name in enumerate(TARGETS)}
        reports.sort(key=lambda report: (report.kernel, report.case, report.dtype, place[report.target]))
        _print(reports, len(made.found))
    if failed:
        errors.print(f"error: {failed} of {len(reports)} lines failed", style="red", highlight=False)
        raise typer.Exit(CHECK_FAILED)


def _all(made: "Plan", jobs: int) -> "Iterator[list[Report]]":
    from ..kernels.jit import matrix

    if made.faults:
        yield made.faults
    yield from matrix.compiled(made, jobs)


COLUMNS = ("registers", "spilled", "stack", "shared", "tensor core", "widest load", "seconds")


def _print(reports: "list[Report]", compiled: int) -> None:
    from ..kernels.jit.compile_matrix import STRICT, TRITON

    table = Table()
    for name in ("kernel", "case", "target", "configuration"):
        table.add_column(name, overflow="fold")
    for name in COLUMNS:
        table.add_column(name.replace(" ", "\n"), justify="right")
    for report in reports:
        numbers = [report.registers, report.spilled_bytes, report.stack_bytes, report.shared_bytes, report.tensor_core]
        known = [*map(str, numbers), str(report.widest_load), f"{report.seconds:.1f}"]
        cells = [report.kernel, _case(report), report.target, _tile(report.config)]
        table.add_row(*cells, *([""] * len(known) if report.error else known), style="red" if report.faults() else "")
    wide_results.print(table)
    for report in reports:
        for fault in report.faults():
            words = f"{', '.join(part for part in (report.kernel, _case(report), report.target) if part)}: {fault}"
            wide_results.print(Text(words, style="red"), soft_wrap=True)
    wide_results.print(
        f"{len(reports)} lines, {compiled} compiled with Triton {TRITON}. Spilled, stack, shared, widest load: bytes. "
        f"Seconds are those of the compiler, near 0 where Triton had the result. On {', '.join(STRICT)} no fault is "
        "allowed, elsewhere everything must compile.",
        style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip


def _case(report: "Report") -> str:
    return ", ".join(part for part in (report.case, report.dtype) if part)


def _tile(config: str) -> str:
    """ "block_m 16, block_n 256, num_warps 4, num_stages 1" as "16 x 256, 4 warps, 1 stage"."""
    if not config:
        return ""
    value = dict(part.split(" ") for part in config.split(", "))
    blocks = " x ".join(value.pop(name) for name in ("block_m", "block_n", "block_k") if name in value)
    warps, stages = value.pop("num_warps"), value.pop("num_stages")
    more = [f"{name} {said}" for name, said in value.items()]
    return ", ".join([blocks, f"{warps} warps", f"{stages} stage{'' if stages == '1' else 's'}", *more])
