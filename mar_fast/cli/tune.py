"""mar-fast tune: faster launch configurations for the GPU at hand."""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.table import Table

from ..bench import machine
from ..kernels.launch_config import user_table_folder
from .common import errors, need_triton, progress, wide_results

if TYPE_CHECKING:
    from ..kernels.jit.tune import Machine, Result


def tune(
    kernel: Annotated[list[str] | None, typer.Option(help="An op or one of its kernels; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Try fewer candidates: one change at a time.")] = False,
    out: Annotated[Path | None, typer.Option(help="The table to write; default: the one that is read first.")] = None,
) -> None:
    """Measure launch configurations on this GPU, case by case, and keep those that are faster beyond the spread.

    They go to a table of your own, which goes before those of the package ($MAR_FAST_CONFIGS, or mar_fast/configs in
    your configuration folder). Each winner is written as soon as it is known: Ctrl-C keeps what has been measured.
    """
    need_triton()
    if out is not None and out.suffix != ".json":
        raise ValueError(f"--out: got {str(out)!r}, expected a file name that ends with .json")
    if not torch.cuda.is_available():
        raise ValueError("device: torch finds no GPU here, expected one to measure on")
    from ..kernels.jit import tune as tuner

    gpu = _gpu()
    path = out if out is not None else user_table_folder() / f"{gpu.architecture}.json"
    environment = machine.environment(torch.device("cuda"))
    project = f"mar_fast {environment['mar_fast']} {environment['commit']}".rstrip()
    results: list[Result] = []
    try:
        with progress() as step:
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            for result in tuner.tune(
                gpu, path, project=project, date=today, kernels=kernel or (), quick=quick, on_step=step
            ):
                results.append(result)
    finally:
        _print(results, path)


def _gpu() -> "Machine":
    from ..kernels.jit.gpu import Gpu

    return Gpu()


def _print(results: "list[Result]", path: Path) -> None:
    table = Table()
    for name in ("kernel", "dtype", "row", "candidates", "before, us", "after, us", "gain", "configuration"):
        table.add_column(name, justify="right" if "us" in name or name in ("gain", "candidates") else "left")
    for result in results:
        row = result.unit.row
        where = ", ".join(f"{name} {low} to {high}" for name, low, high in row.where) or "everything"
        tried = f"{result.timed} of {result.timed + len(result.dropped)}"
        before, after = (" ".join(f"{s * 1e6:.1f}" for s in medians) for medians in (result.before, result.after))
        said = (
            ", ".join(f"{name} {value}" for name, value in result.winner.options().items())
            if result.winner
            else "stays"
        )
        table.add_row(
            result.unit.kernel, result.unit.dtype, where, tried, before, after,
            f"{result.gain:.2f}x" if result.winner else "", result.problem or said,
        )  # fmt: skip
    wide_results.print(table)
    won = sum(result.winner is not None for result in results)
    written = f"{won} rows written: {path}" if won else "nothing is faster beyond the spread; no table written"
    errors.print(f"{len(results)} rows tuned, {written}", highlight=False, soft_wrap=True)
