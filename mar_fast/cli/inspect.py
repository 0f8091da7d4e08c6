"""mar-fast inspect: what is in a checkpoint, and how it would be read."""

from typing import Annotated

import typer
from rich.table import Table

from .common import print_json, results
from .loading import AllowMissing, AllowUnknown, Given, ModelKey, Position, load


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A file, a Hugging Face folder or a hub id.")],
    given: Given = None,
    position: Position = None,
    model_key: ModelKey = None,
    allow_missing: AllowMissing = None,
    allow_unknown: AllowUnknown = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Show a checkpoint's layout and sizes, what is read, what is not and why."""
    model = load(
        checkpoint, given,
        position=position, model_key=model_key, allow_missing=allow_missing, allow_unknown=allow_unknown,
    )  # fmt: skip
    report = model.load_report
    assert report is not None
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        part = part if part in ("encoder", "classifier") else "decoder"
        parts[part] = parts.get(part, 0) + parameter.numel()
    if as_json:
        print_json({**report.as_dict(), "parameters_of": parts})
        return
    config = model.config
    table = Table(title=report.layout, title_justify="left")
    for name in ("part", "width", "blocks", "heads", "parameters, M"):
        table.add_column(name, justify="left" if name == "part" else "right")
    sizes = {
        "encoder": (config.embed_dim, config.depth, config.num_heads),
        "classifier": (config.bridge_embed_dim, config.bridge_depth, config.bridge_num_heads),
        "decoder": (config.decoder_embed_dim, config.decoder_depth, config.decoder_num_heads),
    }
    if config.classifier == "linear":
        sizes["classifier"] = (config.embed_dim, 0, 0)
    for part, count in parts.items():
        label = f"{config.classifier} classifier, {config.num_classes} classes" if part == "classifier" else part
        shown = (str(size) if size else "" for size in sizes[part])
        table.add_row(label, *shown, f"{count / 1e6:.2f}")
    results.print(table)
    results.print(str(report), highlight=False, markup=False, soft_wrap=True)
