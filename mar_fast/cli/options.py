"""Options that several commands have, and what they stand for: a model, the views of a video, names of classes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

import mar_fast

from .. import MAR, MARConfig, machine
from ..checkpoint.report import class_names
from ..config import FIELDS
from ..data import read_annotations, read_labels, read_views
from ..data.annotations import Annotations
from ..data.video import Sampling, Short
from ..kernels import checks
from ..kernels.device import has_fp8
from ..scaled_linear import scaled_layers
from .common import Device, Dtype

Format = Literal["auto", "list", "kinetics", "ssv2", "ucf101", "hmdb51", "paths"]
Precision = Literal["fp32", "bf16", "fp16"]
Quantize = Literal["fp8", "fp8-emulated"]

Videos = Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="Video files.")]
Clip = Annotated[Path | None, typer.Argument(help="A video file; a short real clip if none is given.")]
Source = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A file, a Hugging Face folder or a hub id.")]
Checkpoint = Annotated[str, typer.Option(help="A file, a folder or a hub id, in any layout.")]
OptionalCheckpoint = Annotated[str | None, typer.Option(help="A file, a folder or a hub id, in any layout.")]

ListFormat = Annotated[Format, typer.Option("--format", help="Of the list; auto finds out.")]
ListLabels = Annotated[Path | None, typer.Option("--labels", help="Names of the classes, for lists that name them.")]
Split = Annotated[int, typer.Option(min=1, help="Of HMDB51.")]
Anew = Annotated[bool, typer.Option("--force", help="Start anew, over results that exist.")]
AllowBroken = Annotated[bool, typer.Option("--allow-broken", help="Exit code 0 although videos could not be read.")]
Workers = Annotated[int, typer.Option(min=1, help="Videos that are read at a time.")]

SamplingOption = Annotated[Sampling, typer.Option(help="stride: every n-th frame; uniform: over the whole video.")]
Stride = Annotated[int, typer.Option(min=1, help="Step between the frames of a clip, in frames of the file.")]
ShortOption = Annotated[Short, typer.Option(help="A video with too few frames: an error, or repeat its last frame.")]
Labels = Annotated[Path | None, typer.Option(help="Class names: one a line, or JSON. Default: the checkpoint's own.")]
Keep = Annotated[float | None, typer.Option(help="Share of visible patches. Default: as the checkpoint says.")]
Batch = Annotated[int, typer.Option(min=1, help="Views in a forward pass, at most.")]
PrecisionOption = Annotated[Precision, typer.Option("--dtype", help="Of weights and activations.")]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option("--quantize", help="fp8: large products in 8 bits; fp8-emulated: the same numbers anywhere, slowly."),
]
DtypeOption = Annotated[Dtype, typer.Option(help="auto: bf16 if its matrix products are clearly faster.")]
DeviceOption = Annotated[Device, typer.Option(help="auto: the GPU, if there is one.")]
Seconds = Annotated[float, typer.Option(help="Time for the timed rounds; at least 5 are done.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of everything random.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

Given = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="A field of MARConfig, for example num_heads=3, image_size=192,320, classifier=none; repeatable.",
    ),
]
Position = Annotated[str | None, typer.Option(help="Position table for another size: formula or interpolate.")]
ModelKey = Annotated[str | None, typer.Option(help="Which of a file's sets of weights, for example model_ema.")]
AllowMissing = Annotated[list[str] | None, typer.Option(help="Names that may be missing; a pattern, repeatable.")]
AllowUnknown = Annotated[list[str] | None, typer.Option(help="Names that may be left over; a pattern, repeatable.")]


def only_with(option: str, given: object, **others: object) -> None:
    """Check that ``others``, options by parameter name, are given beside ``option`` only.

    Raises:
        ValueError: one of them is given without it.
    """
    for name, value in others.items():
        if value and not given:
            raise checks.bad(f"--{name.replace('_', '-')}", f"it without {option}", "both or neither")


def read_list(path: Path, root: Path | None, form: Format, labels: Path | None, split: int = 1) -> Annotations:
    """The videos of a list, whose classes may be named in a file of ``labels``."""
    names = None if labels is None else read_labels(labels)
    return read_annotations(path, root=root, labels=names, format=form, split=split)


def load(source: str, given: list[str] | None, **options: Any) -> MAR:
    """from_pretrained with the fields of ``--set``; options that are None or empty are left out."""
    overrides = dict(_field(item) for item in given or ())
    options = {name: value for name, value in options.items() if value}
    try:
        model: MAR = mar_fast.from_pretrained(source, **options, **overrides)
    except TypeError as error:  # a field of a wrong type is bad input too
        raise ValueError(str(error)) from error
    return model


def _field(item: str) -> tuple[str, Any]:
    name, equals, text = item.partition("=")
    if not equals or name not in FIELDS:
        raise checks.bad("--set", repr(item), f"FIELD=VALUE with one of the fields {', '.join(FIELDS)}")
    for form in (text, f"[{text}]"):
        try:
            value = json.loads(form)
        except ValueError:
            continue
        return name, tuple(value) if isinstance(value, list) else value
    return name, None if text.lower() == "none" else text


def load_masked(source: str, keep: float | None, given: list[str] | None = None) -> MAR:
    """`load` for a share of visible patches; ``keep`` None is the checkpoint's.

    Raises:
        ValueError: a share that the model's cells do not allow.
    """
    if keep is None:
        return load(source, given)
    if not 0 < keep <= 1:
        raise checks.bad("--keep", keep, "a share above 0, up to 1")
    try:
        return load(source, [*(given or ()), f"mask_ratio={1 - keep}"])
    except ValueError as error:
        if str(error).startswith("mask_ratio:"):
            raise ValueError(f"--keep: got {keep}, a share of visible patches that is not allowed. {error}") from error
        raise


def load_classifier(
    checkpoint: str, keep: float | None, dtype: str, device: str, quantize: Quantize | None = None
) -> MAR:
    """A classifier, ready to run; ``keep`` is the share of visible patches, None for the checkpoint's.

    Raises:
        ValueError: not a classifier, a share that its cells do not allow, or a device that does not do ``quantize``.
    """
    model = load_masked(checkpoint, keep)
    if model.classifier is None or not model.config.num_classes:
        raise checks.bad("--checkpoint", f"{checkpoint!r}, without a classifier", "one that was trained to classify")
    return placed(model, dtype, machine.device(device), quantize)


def placed(model: MAR, dtype: str, device: torch.device, quantize: Quantize | None) -> MAR:
    """The model on a device, in a dtype and in eval mode, quantised if that is asked for.

    Raises:
        ValueError: it is to be in fp8, and dtype or device do not go with that.
    """
    model = model.to(device)
    if quantize is None and any(scaled_layers(model)):
        quantize = "fp8"
    if quantize is not None:
        if quantize == "fp8" and dtype == "fp32":
            raise checks.bad("--dtype", "fp32 with --quantize fp8", "bf16 or fp16, in which the rest of the model runs")
        if quantize == "fp8" and not has_fp8(next(model.parameters())):
            accepted = "a GPU with fp8 products (sm_89, sm_90 or later), or fp8-emulated, which is slow"
            raise checks.bad("--quantize", f"fp8 on {device}", accepted)
        model = mar_fast.quantize(model, "fp8", emulate=quantize == "fp8-emulated")
    return model.to(machine.DTYPES[dtype]).eval()


def read_class_names(model: MAR, labels: Path | None) -> tuple[str, ...] | None:
    """`class_names`, those in the file ``labels`` if one is given."""
    return class_names(model, None if labels is None else read_labels(labels))


def class_name(name: str | None, number: int) -> str:
    """The name of a class, or its number if it has none."""
    return f"class {number}" if name is None else name


def view_reader(
    config: MARConfig, views: str, sampling: Sampling, stride: int, short: Short
) -> Callable[[Path], Tensor]:
    """A function from a file to its views (V, C, T, H, W), of the size that a model takes.

    Raises:
        ValueError: ``views`` is not clips x crops, such as "5x3".
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", views)
    if found is None:
        raise checks.bad("--views", repr(views), "clips x crops, for example 5x3 or 1x1")
    clips, crops = map(int, found.groups())
    how: dict[str, Any] = dict(clips=clips, crops=crops, sampling=sampling, stride=stride, short=short)
    return lambda path: read_views(path, config.num_frames, size=config.image_size, **how)
