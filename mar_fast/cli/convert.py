"""mar-fast checkpoint convert: a checkpoint in another layout."""

from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import typer
from torch import Tensor

import mar_fast

from .. import from_pretrained, save_checkpoint
from ..checkpoint.write import FOLDERS, LayoutName, check_target
from ..kernels import checks
from . import common, options


def convert(
    source: options.Source,
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write; for hf and videomae2 a folder.")],
    to: Annotated[LayoutName | None, typer.Option(help="The layout to write. Default with --biases-from: hf.")] = None,
    quantize: Annotated[
        Literal["fp8"] | None, typer.Option(help="Large weights in 8 bits, for inference; to mar_fast only.")
    ] = None,
    biases_from: Annotated[
        str | None, typer.Option(help="A checkpoint that has the biases of query and value which the source lost.")
    ] = None,
    given: options.Given = None,
    position: options.Position = None,
    model_key: options.ModelKey = None,
    allow_missing: options.AllowMissing = None,
    allow_unknown: options.AllowUnknown = None,
    force: options.Force = False,
) -> None:
    """Write a checkpoint in another layout, as safetensors, and read it back.

    What the layout cannot express is refused: leave a part out with --set classifier=none or --set decoder_depth=0.

    transformers 5.5 to 5.17 loses the biases of query and value, and saves zeros in their place: --biases-from puts
    back those of the original file, and says whether the other weights have been trained since.
    """
    if to is None and biases_from is None:
        raise checks.bad("--to", "none", f"one of {', '.join(get_args(LayoutName))}, or --biases-from")
    to = to or "hf"
    check_target(out, to in FOLDERS, force)
    allowed = dict(allow_missing=allow_missing, allow_unknown=allow_unknown)
    model = options.load(source, given, position=position, model_key=model_key, biases_from=biases_from, **allowed)
    if quantize is not None:
        model = mar_fast.quantize(model, quantize, emulate=True)  # nothing is computed here
    assert model.load_report is not None
    save_checkpoint(model, out, layout=to, force=force)
    common.show(str(model.load_report))
    back = from_pretrained(out).state_dict()
    wrong = [name for name, value in model.state_dict().items() if not _same_bits(value, back[name])]
    if wrong:
        common.show_error(f"read back with other values: {', '.join(wrong[:5])}")
        raise typer.Exit(common.CHECK_FAILED)
    if model.load_report.labels and to not in FOLDERS:
        common.show("note: not carried over: the names of classes (id2label in config.json)")
    common.show(f"Written: {out} ({to}), {len(back)} parameters, the same bits when read back")


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))
