"""What the commands share: exit codes, consoles, progress, numbers as text."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..files import write_whole

CHECK_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
USER_ERRORS = (ValueError, OSError, ModuleNotFoundError)
SHOWN_ERRORS = 5

# Results go to stdout, everything else to stderr, so that --json can be piped.
results, errors = Console(), Console(stderr=True)
if not results.is_terminal:
    results.width = max(results.width, 180)  # in a file or a pipe, wide tables get the width they need

Size = StrEnum("Size", ["small", "base", "large", "huge", "giant"])
Dtype = StrEnum("Dtype", ["auto", "fp32", "bf16", "fp16"])
Device = StrEnum("Device", ["auto", "cpu", "cuda"])

WRONG_MODEL = "the fast model differs from the reference beyond rounding; no speed is given"


def show(text: str, style: str | None = None) -> None:
    """Print text on stdout as it is: no markup, no highlighting, no line breaks."""
    results.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def tell(text: str, style: str | None = None) -> None:
    """Print text on stderr as it is."""
    errors.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def show_error(text: object) -> None:
    """Print an error on stderr."""
    tell(f"error: {text}", style="red")


def show_broken(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Print why the first videos could not be read, and the file that says it of all."""
    for row in rows[:SHOWN_ERRORS]:
        show_error(f"{row['video']}: {row['error']}")
    if len(rows) > SHOWN_ERRORS:
        tell(f"and {len(rows) - SHOWN_ERRORS} more, all in {file}")


class _ToErrors(logging.Handler):
    """Shows the library's warnings on stderr, as errors are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(f"{record.levelname.lower()}: {record.getMessage()}", style="yellow")


_to_errors = _ToErrors(logging.WARNING)


def show_warnings() -> None:
    """Show the library's warnings on stderr, in every command."""
    logging.getLogger("mar_fast").addHandler(_to_errors)


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr; yields ``step(what, share of the whole that is done)``."""
    words = TextColumn("{task.description}", markup=False)  # a file name may have brackets
    columns = (words, BarColumn(), "{task.percentage:>3.0f} %", TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def print_json(content: Any) -> None:
    """Plain JSON on stdout."""
    typer.echo(json.dumps(content, indent=2))


def write_json(content: Any, path: Path) -> None:
    """A JSON file, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def ms(seconds: float) -> str:
    """Seconds as milliseconds, without a unit."""
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.2f}"


def megabytes(size: int | None) -> str:
    """Bytes as megabytes, without a unit."""
    return "not measured" if size is None else f"{size / 1e6:.0f}"
