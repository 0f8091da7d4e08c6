"""What the subcommands share: exit codes, consoles, progress, options."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from .. import MARConfig
from ..data import read_clip
from ..files import may_write

CHECK_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
USER_ERRORS = (ValueError, OSError, ModuleNotFoundError)

# Results go to stdout, everything else to stderr, so that --json can be piped.
results = Console()
errors = Console(stderr=True)
# For tables of many columns: in a file or a pipe they have the room that they need.
wide_results = results if results.is_terminal else Console(width=max(results.width, 180))

Size = StrEnum("Size", ["small", "base", "large", "huge", "giant"])
Dtype = StrEnum("Dtype", ["auto", "fp32", "bf16", "fp16"])
Device = StrEnum("Device", ["auto", "cpu", "cuda"])


class _ToErrors(logging.Handler):
    """Warnings of the library as lines on stderr, like errors."""

    def emit(self, record: logging.LogRecord) -> None:
        said = f"{record.levelname.lower()}: {record.getMessage()}"
        errors.print(said, style="yellow", highlight=False, markup=False, soft_wrap=True)


_to_errors = _ToErrors(logging.WARNING)


def show_warnings() -> None:
    """Have what the library warns of on stderr, in every command."""
    logging.getLogger("mar_fast").addHandler(_to_errors)


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr; yields ``step(what, share of the whole that is done)``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def check_png(out: Path, force: bool) -> None:
    """Check, before any work, that a picture may be written there.

    Raises:
        ValueError: not the name of a PNG.
        FileExistsError, NotADirectoryError: something stands in the way.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out: got {str(out)!r}, expected a file name that ends with .png")
    may_write([out], force)


def print_json(content: Any) -> None:
    """Plain JSON on stdout."""
    typer.echo(json.dumps(content, indent=2))


def clip_for(path: Path, config: MARConfig, stride: int) -> Tensor:
    """One clip (C, T, H, W) of the size that a model takes, from the middle of a file."""
    return read_clip(path, config.num_frames, size=config.image_size, stride=stride)


def ms(seconds: float) -> str:
    """Seconds as milliseconds, without a unit."""
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.2f}"
