"""mar-fast convert: a checkpoint in another layout."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import torch
import typer

from .. import from_pretrained, save_checkpoint
from ..checkpoint.write import LayoutName, check_target
from ..kernels import checks
from .common import CHECK_FAILED, errors, results
from .loading import AllowMissing, AllowUnknown, Given, ModelKey, Position, load

Target = StrEnum("Target", ["mar", "videomae", "hf", "mar_fast"])


def convert(
    source: Annotated[str, typer.Argument(help="A file, a Hugging Face folder or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write; for hf a folder.")],
    to: Annotated[
        Target | None, typer.Option(help="The layout to write; without it hf, where --biases-from is given.")
    ] = None,
    biases_from: Annotated[
        str | None,
        typer.Option(help="A checkpoint that still has the biases of query and value which the source has lost."),
    ] = None,
    given: Given = None,
    position: Position = None,
    model_key: ModelKey = None,
    allow_missing: AllowMissing = None,
    allow_unknown: AllowUnknown = None,
    force: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
) -> None:
    """Write a checkpoint in another layout, as safetensors, and read it back.

    What the layout cannot express is refused: leave a part out with --set classifier=none or --set decoder_depth=0.

    Files that transformers 5.5 to 5.17 saved have zeros where the file that it had read has biases of query and value:
    --biases-from puts those of that file back, and says whether the other weights have been trained since.
    """
    if to is None:
        if biases_from is None:
            raise checks.bad("--to", "none", "one of " + ", ".join(Target) + " (hf where --biases-from is given)")
        to = Target.hf
    check_target(out, to, force)
    model = load(
        source, given,
        position=position, model_key=model_key, allow_missing=allow_missing, allow_unknown=allow_unknown,
        biases_from=biases_from,
    )  # fmt: skip
    assert model.load_report is not None
    labels = model.load_report.labels
    takes_labels = to == Target.hf and model.config.classifier is not None
    save_checkpoint(model, out, layout=cast(LayoutName, to.value), force=force, labels=labels if takes_labels else None)
    results.print(str(model.load_report), highlight=False, markup=False, soft_wrap=True)
    back = from_pretrained(out).state_dict()
    wrong = [name for name, value in model.state_dict().items() if not torch.equal(value, back[name])]
    if wrong:
        errors.print(f"error: read back with other values: {', '.join(wrong[:5])}", style="red", highlight=False)
        raise typer.Exit(CHECK_FAILED)
    if labels and not takes_labels:
        results.print("note: not carried over: the names of classes (id2label in config.json)", highlight=False)
    said = f"Written: {out} ({to}), {len(back)} parameters, the same bits when read back"
    results.print(said, highlight=False, markup=False, soft_wrap=True)
