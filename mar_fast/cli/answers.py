"""What classify, eval and tradeoff share: options, the model from a checkpoint, the views of a video."""

import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from .. import MAR, MARConfig, machine
from ..data import read_views
from ..data.annotations import read_labels
from ..kernels import checks

Precision = StrEnum("Precision", ["fp32", "bf16", "fp16"])
SamplingName = StrEnum("SamplingName", ["stride", "uniform"])
ShortName = StrEnum("ShortName", ["error", "repeat"])

Videos = Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="Video files.")]
Labels = Annotated[Path | None, typer.Option(help="Names of the classes: one a line, or JSON; else the checkpoint's.")]
Sampling = Annotated[SamplingName, typer.Option(help="stride: every n-th frame; uniform: over the whole video.")]
Stride = Annotated[int, typer.Option(min=1, help="Frames of the file from one frame of a clip to the next.")]
Short = Annotated[
    ShortName, typer.Option(help="What a video with too few frames is: an error, or its last frame is repeated.")
]


def load(checkpoint: str, keep: float | None, dtype: str, device: str) -> MAR:
    """A classifier, ready to run; ``keep`` is the share of visible patches, None what the checkpoint says.

    Raises:
        ValueError: not a classifier, or a share that its cells do not allow.
    """
    from .. import from_pretrained

    if keep is not None and not 0 < keep <= 1:
        raise checks.bad("--keep", keep, "a share above 0, up to 1")
    overrides: dict[str, Any] = {} if keep is None else {"mask_ratio": 1 - keep}
    try:
        model: MAR = from_pretrained(checkpoint, **overrides)
    except ValueError as error:
        if keep is not None and str(error).startswith("mask_ratio:"):
            raise ValueError(
                f"--keep: got {keep}, which as the share of masked patches is not allowed. {error}"
            ) from error
        raise
    if model.classifier is None:
        raise checks.bad("--checkpoint", f"{checkpoint!r}, without a classifier", "one that was trained to classify")
    return model.to(machine.device(device), machine.DTYPES[dtype]).eval()


def parse_views(text: str) -> tuple[int, int]:
    """ "5x3" as 5 clips and 3 crops."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise checks.bad("--views", repr(text), "clips x crops, for example 5x3 or 1x1")
    return int(found[1]), int(found[2])


def label_names(labels: Path | None) -> list[str] | None:
    """The names of the classes in a file; None where there is no file."""
    return None if labels is None else read_labels(labels)


def names_for(model: MAR, given: list[str] | None) -> list[str] | None:
    """The names of a model's classes: those ``given``, else those that its checkpoint has.

    Raises:
        ValueError: more or fewer are given than there are classes.
    """
    classes = model.config.num_classes
    if given is None:
        own = model.load_report.labels if model.load_report is not None else None
        return None if own is None else list(own)
    if len(given) != classes:
        raise checks.bad("--labels", f"{len(given)} names", f"{classes}, as the checkpoint has classes")
    return given


def class_name(names: list[str] | None, number: int) -> str:
    """The name of a class, or its number in words where names are not known."""
    return f"class {number}" if names is None else names[number]


def reader(
    config: MARConfig, views: tuple[int, int], sampling: SamplingName, stride: int, short: ShortName
) -> Callable[[Path], Tensor]:
    """From a path to the views of a video, of the size that a model takes."""
    clips, crops = views
    options: dict[str, Any] = dict(sampling=sampling.value, stride=stride, short=short.value)
    return lambda path: read_views(path, config.num_frames, clips=clips, crops=crops, size=config.image_size, **options)
