"""mar-fast report: record files as one page with tables and pictures."""

from pathlib import Path
from typing import Annotated

import typer

from .common import progress, results


def report(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Record files, or folders of *.jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md and its pictures.")] = Path("mar-fast-report"),
    baseline: Annotated[
        str | None, typer.Option(help="The provider that speed-ups are over; default: a plain PyTorch one.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace files that are there.")] = False,
) -> None:
    """Write a Markdown page of what was measured: tables for each suite, and pictures as PNG.

    Roofline, time and memory against keep ratio, peers, waterfall and scaling, as far as the files hold them.
    """
    from ..bench import report as page
    from ..bench import rows

    found = rows.load(files)
    with progress() as step:
        written = page.write(found, out, force=force, baseline=baseline, on_step=step)
    results.print(
        f"{len(found)} rows, {len(written) - 1} pictures\nWritten: {written[0]}", highlight=False, soft_wrap=True
    )
