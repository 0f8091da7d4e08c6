"""What the subcommands share: exit codes, consoles, progress, options."""

import json
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
from ..video import read_clip

CHECK_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
USER_ERRORS = (ValueError, OSError, ModuleNotFoundError)

# Results go to stdout, everything else to stderr, so that --json can be piped.
results = Console()
errors = Console(stderr=True)

Size = StrEnum("Size", ["small", "base", "large", "huge", "giant"])


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


def print_json(content: Any) -> None:
    """Plain JSON on stdout."""
    typer.echo(json.dumps(content, indent=2))


def clip_for(path: Path, config: MARConfig, stride: int) -> Tensor:
    """One clip (C, T, H, W) of the size that a model takes, from the middle of a file."""
    return read_clip(path, config.num_frames, size=config.image_size, stride=stride)
