"""mar-fast checkpoint inspect: what is in a checkpoint, and how it would be read."""

from collections import Counter

from rich.table import Table

from . import common, options


def inspect(
    checkpoint: options.Source,
    given: options.Given = None,
    position: options.Position = None,
    model_key: options.ModelKey = None,
    allow_missing: options.AllowMissing = None,
    allow_unknown: options.AllowUnknown = None,
    as_json: options.Json = False,
) -> None:
    """Show a checkpoint's layout and sizes, what is read, what is not and why."""
    allowed = dict(allow_missing=allow_missing, allow_unknown=allow_unknown)
    model = options.load(checkpoint, given, position=position, model_key=model_key, **allowed)
    report, config = model.load_report, model.config
    assert report is not None
    parts = Counter[str]()
    for name, value in model.state_dict().items():
        part = name.split(".")[0]
        parts[part if part in ("encoder", "classifier") else "decoder"] += value.numel()
    if as_json:
        common.print_json({**report.as_dict(), "parameters_of": parts})
        return
    table = Table("part", title=report.layout, title_justify="left")
    for name in ("embed_dim", "blocks", "heads", "parameters, M"):
        table.add_column(name, justify="right")
    bridging = (config.bridge_embed_dim, config.bridge_depth, config.bridge_num_heads)
    sizes = {
        "encoder": (config.embed_dim, config.depth, config.num_heads),
        "classifier": (config.embed_dim, 0, 0) if config.classifier == "linear" else bridging,
        "decoder": (config.decoder_embed_dim, config.decoder_depth, config.decoder_num_heads),
    }
    for part, count in parts.items():
        label = part
        if part == "classifier":
            label = f"{config.classifier} classifier, {config.num_classes} classes" if config.num_classes else "pooling"
        table.add_row(label, *(str(size or "") for size in sizes[part]), f"{count / 1e6:.2f}")
    common.results.print(table)
    common.show(str(report))
