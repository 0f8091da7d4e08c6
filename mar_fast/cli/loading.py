"""What the commands on checkpoints share: the options of from_pretrained."""

import json
from dataclasses import fields
from typing import Annotated, Any

import typer

from .. import MAR, MARConfig, from_pretrained

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


def load(source: str, given: list[str] | None, **options: Any) -> MAR:
    """from_pretrained with the fields of ``--set``."""
    overrides = dict(_field(item) for item in given or ())
    options = {name: value for name, value in options.items() if value}
    try:
        return from_pretrained(source, **options, **overrides)
    except TypeError as error:  # a field of a wrong type is bad input too
        raise ValueError(str(error)) from error


def _field(item: str) -> tuple[str, Any]:
    name, equals, text = item.partition("=")
    known = [field.name for field in fields(MARConfig)]
    if not equals or name not in known:
        raise ValueError(f"--set: got {item!r}, expected FIELD=VALUE with one of the fields {', '.join(known)}")
    for form in (text, f"[{text}]"):
        try:
            value = json.loads(form)
        except ValueError:
            continue
        return name, tuple(value) if isinstance(value, list) else value
    return name, None if text.lower() == "none" else text
