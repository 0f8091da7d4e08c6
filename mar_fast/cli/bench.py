"""mar-fast bench: the suites, and what changed between two runs of them."""

from pathlib import Path
from typing import Annotated

import typer

from .. import files, machine
from ..bench import compare as comparison
from ..bench import session
from ..bench.suites import SUITES
from .common import CHECK_FAILED, INTERRUPTED, Device, Dtype, Size, errors, progress, results

SUITE_LIST = "\n\n".join(f"{name}: {suite.about}" for name, suite in SUITES.items())


def bench(
    suites: Annotated[list[str] | None, typer.Argument(metavar="[SUITE]...", help="Names from below, or all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few and small cases, a few rounds.")] = False,
    size: Annotated[
        list[Size] | None, typer.Option(help="Of the ViT; repeatable. Usual: base, on a GPU large too.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Clips a call; repeatable.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: bf16 where its matrix products are clearly faster.")] = Dtype.auto,
    device: Annotated[Device, typer.Option(help="auto: the GPU, where there is one.")] = Device.auto,
    seconds: Annotated[float | None, typer.Option(help="For the timed rounds of a case.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of a CPU; usually as many as PyTorch chooses.")] = None,
    clip: Annotated[Path | None, typer.Option(help="A video file for the pipeline; else a short real clip.")] = None,
    out: Annotated[Path, typer.Option(help="The measurements, as JSON lines.")] = Path("bench.jsonl"),
    force: Annotated[bool, typer.Option("--force", help="Replace that file.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Run nothing: what changed from file A to file B.")
    ] = None,
    allow_other_device: Annotated[bool, typer.Option(help="With --compare: also runs of different devices.")] = False,
    fail_on_regression: Annotated[
        bool, typer.Option(help="With --compare: exit code 1 if something got worse.")
    ] = False,
) -> None:
    """Measure: every way to do a job in turn, each checked against float64 before it is timed.

    The file of measurements is complete after every case; Ctrl-C keeps what was measured. For a quick look at what
    masking saves, see savings.
    """
    if compare is not None:
        if suites:
            raise ValueError(f"--compare: got it together with {' '.join(suites)}, expected no suite beside it")
        code = comparison.run(
            *compare,
            fail_on_regression=fail_on_regression,
            allow_other_device=allow_other_device,
            console=results,
        )
        raise typer.Exit(code)
    if fail_on_regression:
        raise ValueError("--fail-on-regression: got it without --compare, expected both")
    names = session.chosen_suites(suites or [])
    files.may_write([out], force)
    done = session.Session()
    try:
        with machine.threads(threads), progress() as step:
            step("measuring this machine's ceilings", 0.0)
            setting, reason, rates = session.setting_for(
                device=device, dtype=dtype, sizes=[str(one) for one in size or ()], batches=batch or (), quick=quick,
                seconds=seconds, clip=clip,
            )  # fmt: skip
            results.print(f"dtype: {reason}", highlight=False)
            session.run(names, setting, rates, out=out, say=_say, on_step=step, into=done)
    except KeyboardInterrupt:
        if not done.rows:
            raise
        errors.print(f"interrupted: {out} has the {len(done.rows)} measurements made so far")
        raise typer.Exit(INTERRUPTED) from None
    results.print(f"Written: {out}, {len(done.rows)} measurements; mar-fast report {out} draws them", highlight=False)
    if done.wrong:
        errors.print(
            f"error: in {done.wrong} cases a result of ours is wrong or did not run; it has no speed", style="red"
        )
        raise typer.Exit(CHECK_FAILED)


def _say(text: str) -> None:
    results.print(text, highlight=False, markup=False, soft_wrap=True)
