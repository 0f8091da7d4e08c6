"""The command mar-fast: one short file for each subcommand."""

import sys
from typing import Annotated

import typer

import mar_fast

from .bench import SUITE_LIST, bench
from .classify import classify
from .common import BAD_INPUT, INTERRUPTED, USER_ERRORS, errors, show_error, show_warnings
from .convert import convert
from .cost import cost
from .demo import demo
from .evaluate import evaluate
from .export import export
from .extract import extract
from .inspect import inspect
from .tradeoff import tradeoff
from .train import train
from .verify import verify
from .visualize import visualize

# What commands of earlier versions are called now.
MOVED = {
    "savings": "mar-fast demo",
    "masks": "mar-fast visualize",
    "reconstruct": "mar-fast visualize --checkpoint",
    "curve": "mar-fast tradeoff",
    "report": "mar-fast bench --report",
    "inspect": "mar-fast checkpoint inspect",
    "convert": "mar-fast checkpoint convert",
    "verify": "mar-fast checkpoint verify",
    "kernels": "python -m mar_fast.bench matrix",
    "tune": "python -m mar_fast.bench tune",
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Masked video transformers on visible tokens only.\n\n"
    "Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted.",
)
app.command()(demo)
app.command(epilog=f"Suites:\n\n{SUITE_LIST}")(bench)
app.command("eval")(evaluate)
for command in (classify, train, extract, export, tradeoff, visualize, cost):
    app.command()(command)
checkpoint = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Look into checkpoint files, convert and compare them."
)
for tool in (inspect, convert, verify):
    checkpoint.command()(tool)
app.add_typer(checkpoint, name="checkpoint")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mar-fast {mar_fast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: what a user can mend is one line on stderr, not a traceback."""
    show_warnings()
    try:
        if sys.argv[1:] and sys.argv[1] in MOVED:
            raise ValueError(f"command: got {sys.argv[1]!r}, which is now: {MOVED[sys.argv[1]]}")
        app()
    except USER_ERRORS as error:
        show_error(error)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(INTERRUPTED)
