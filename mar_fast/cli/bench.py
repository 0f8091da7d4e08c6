"""mar-fast bench: the suites, their report, and what changed between two runs of them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import files, machine
from ..bench import harness, records
from ..bench import report as page
from ..bench.compare import compare as compared
from ..bench.suites import SUITES
from . import options
from .common import CHECK_FAILED, INTERRUPTED, Device, Dtype, Size, errors, progress, show

SUITE_LIST = "\n\n".join(f"{name}: {suite.about}" for name, suite in SUITES.items())


def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SUITE]...", help="Names from below, or all. With --report: record files, or folders."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few and small cases, a few rounds.")] = False,
    size: Annotated[list[Size] | None, typer.Option(help="ViT; repeatable. Usual: base, on a GPU large too.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Clips a call; repeatable.")] = None,
    dtype: options.DtypeOption = Dtype.auto,
    device: options.DeviceOption = Device.auto,
    seconds: Annotated[float | None, typer.Option(help="For the timed rounds of a case.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of a CPU; usually as many as PyTorch chooses.")] = None,
    clip: Annotated[Path | None, typer.Option(help="A video file for the pipeline; else a short real clip.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The records, as JSON lines (bench.jsonl); the report's folder (bench-report).")
    ] = None,
    force: options.Force = False,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing: tables and pictures of the records given in place of suites.")
    ] = False,
    baseline: Annotated[
        str | None, typer.Option(help="With --report: the provider that speed-ups are over; usually each case's own.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Run nothing: what changed from records A to B.")
    ] = None,
    allow_other_device: Annotated[bool, typer.Option(help="With --compare: also runs of different devices.")] = False,
    fail_on_regression: Annotated[bool, typer.Option(help="With --compare: exit code 1 if one got worse.")] = False,
) -> None:
    """Measure: every way to do a workload in turn, each checked against float64 before it is timed.

    The file of records is complete after every case; Ctrl-C keeps what was measured. For a quick look at what masking
    saves, see demo.
    """
    given = " ".join(suites or ())
    if compare is not None and (given or report):
        raise ValueError(f"--compare: got it together with {given or '--report'}, expected no suite beside it")
    with_compare = dict(fail_on_regression=fail_on_regression, allow_other_device=allow_other_device)
    options.only_with("--compare", compare, **with_compare)
    options.only_with("--report", report, baseline=baseline)
    if compare is not None:
        found = compared(*(records.load([path]) for path in compare), allow_other_device=allow_other_device)
        show(str(found))
        raise typer.Exit(CHECK_FAILED if fail_on_regression and found.regressed else 0)
    if report:
        _report([Path(name) for name in suites or ()], out or Path("bench-report"), force, baseline)
        return
    names = harness.chosen_suites(suites or [])
    out = out or Path("bench.jsonl")
    files.may_write([out], force)
    done: list[records.Record] = []
    try:
        with machine.threads(threads), progress() as step:
            step("measuring this machine's ceilings", 0.0)
            how: dict[str, Any] = dict(device=device, dtype=dtype, quick=quick, seconds=seconds, clip=clip)
            chosen, reason, rates = harness.options_for(sizes=size or (), batches=batch or (), **how)
            show(f"dtype: {reason}")
            harness.run(names, chosen, rates, out=out, say=show, on_step=step, into=done)
    except KeyboardInterrupt:
        if not done:
            raise
        errors.print(f"interrupted: {out} has the {len(done)} records made so far")
        raise typer.Exit(INTERRUPTED) from None
    show(f"Written: {out}, {len(done)} records; mar-fast bench --report {out} makes tables and pictures of them")
    wrong = harness.failures(done)
    if wrong:
        errors.print(f"error: in {wrong} cases a result of ours is wrong or did not run; it has no speed", style="red")
        raise typer.Exit(CHECK_FAILED)


def _report(paths: list[Path], out: Path, force: bool, baseline: str | None) -> None:
    if not paths:
        raise ValueError(f"--report: got no records, expected files or folders of *{records.SUFFIX}")
    found = records.load(paths)
    with progress() as step:
        written = page.write(found, out, force=force, baseline=baseline, on_step=step)
    show(f"{len(found)} records, {len(written) - 1} pictures\nWritten: {written[0]}")
