"""mar-fast convert: a checkpoint in another layout."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import torch
import typer

from .. import from_pretrained, save_checkpoint
from ..checkpoint.write import LayoutName, check_target
from .common import CHECK_FAILED, errors, results
from .loading import AllowMissing, AllowUnknown, Given, ModelKey, Position, load

Target = StrEnum("Target", ["mar", "videomae", "hf", "mar_fast"])


def convert(
    source: Annotated[str, typer.Argument(help="A file, a Hugging Face folder or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write; for hf a folder.")],
    to: Annotated[Target, typer.Option(help="The layout to write.")],
    given: Given = None,
    position: Position = None,
    model_key: ModelKey = None,
    allow_missing: AllowMissing = None,
    allow_unknown: AllowUnknown = None,
    force: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
) -> None:
    """Write a checkpoint in another layout, as safetensors, and read it back.

    What the layout cannot express is refused: leave a part out with --set classifier=none or --set decoder_depth=0.
    """
    check_target(out, to, force)
    model = load(
        source, given,
        position=position, model_key=model_key, allow_missing=allow_missing, allow_unknown=allow_unknown,
    )  # fmt: skip
    save_checkpoint(model, out, layout=cast(LayoutName, to.value), force=force)
    results.print(str(model.load_report), highlight=False, markup=False, soft_wrap=True)
    back = from_pretrained(out).state_dict()
    wrong = [name for name, value in model.state_dict().items() if not torch.equal(value, back[name])]
    if wrong:
        errors.print(f"error: read back with other values: {', '.join(wrong[:5])}", style="red", highlight=False)
        raise typer.Exit(CHECK_FAILED)
    results.print(f"Written: {out} ({to}), {len(back)} parameters, the same bits when read back", highlight=False)
