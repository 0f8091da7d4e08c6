"""The command mar-fast: one short file for each subcommand."""

import sys
from typing import Annotated

import typer

import mar_fast

from .bench import SUITE_LIST, bench
from .classify import classify
from .common import BAD_INPUT, INTERRUPTED, USER_ERRORS, errors, show_warnings
from .convert import convert
from .cost import cost
from .evaluate import evaluate
from .inspect import inspect
from .masks import masks
from .reconstruct import reconstruct
from .savings import savings
from .tradeoff import tradeoff
from .verify import verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Masked video transformers on visible tokens only.\n\n"
    "Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted.",
)
app.command(epilog=f"Suites:\n\n{SUITE_LIST}")(bench)
app.command()(savings)
app.command()(masks)
app.command()(reconstruct)
app.command()(cost)
app.command()(classify)
app.command("eval")(evaluate)
app.command()(tradeoff)
app.command()(inspect)
app.command()(convert)
app.command()(verify)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mar-fast {mar_fast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: what a user can mend is one line on stderr, not a traceback."""
    show_warnings()
    try:
        if sys.argv[1:2] in (["kernels"], ["tune"]):
            moved = {"kernels": "matrix", "tune": "tune"}[sys.argv[1]]
            raise ValueError(f"command: got {sys.argv[1]!r}, which is now: python -m mar_fast.bench {moved}")
        app()
    except USER_ERRORS as error:
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(INTERRUPTED)
