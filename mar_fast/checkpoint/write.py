"""save_checkpoint: a model as a safetensors file or folder, in any layout that can express it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ..config import MARConfig
from ..files import may_write, write_whole, write_whole_folder
from ..kernels import checks
from ..model import MAR
from ..scaled_linear import scaled_layers
from . import huggingface, processors, videomae2
from .layouts import EPS, FINE_TUNED, MAR_LAYOUT, OURS, PRETRAINING, VIDEOMAE2, Layout, hugging_face, matters
from .read import METADATA_KEY

LayoutName = Literal["mar_fast", "mar", "videomae", "videomae2", "hf"]
LAYOUTS = get_args(LayoutName)
FOLDERS = ("videomae2", "hf")
"""Layouts that are a folder for other programs, with their config.json."""
FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


def save_checkpoint(
    model: MAR,
    path: str | Path,
    *,
    layout: LayoutName = "mar_fast",
    force: bool = False,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write a model's weights as safetensors, whole or not at all.

    The configuration goes into the file's metadata, or into config.json, where other programs pass over it:
    `from_pretrained` gives the same model back, heads, eps and mask ratio included. Equal models give equal bytes.

    Args:
        model: The model; its parameters keep their dtype.
        path: A file that ends with .safetensors; for "hf" and "videomae2" a folder, which gets config.json,
            model.safetensors and preprocessor_config.json, and which ``from_pretrained`` of transformers reads. Query
            and value biases are called q_bias and v_bias there, as in the files of the hub.
        layout: "mar_fast" (our own names, for every model, quantised ones too), "mar" (a bridging classifier; without
            the constants mean, std and pos_embed, which MAR makes itself), "videomae" (fine-tuned for a linear
            classifier, else pre-training), "videomae2" (a linear classifier, as VideoMAE v2's folders on the hub have
            it) or "hf" (the transformers class that computes the same).
        force: Replace what is there; a folder only if it holds nothing else.
        labels: For a folder with a classifier: the names of its classes, for config.json. A model that was read from
            such a folder has them in ``load_report.labels``.

    Returns:
        The path.

    Raises:
        ValueError: the layout cannot express the model; the message says what stands in the way.
        FileExistsError: the path is there, and ``force`` is not set.
        OSError: it cannot be written.
        TypeError: not a `mar_fast.MAR`.
    """
    from safetensors import SafetensorError

    if not isinstance(model, MAR):
        raise checks.bad_type("model", type(model).__name__, "a mar_fast.MAR")
    if labels is not None:
        if layout not in FOLDERS:
            raise checks.bad("labels", f"some, for layout {layout!r}", "None: only a folder has them")
        check_labels(labels, model.config)
    path = check_target(path, layout, force)
    names = layout_for(model.config, layout)
    try:
        if layout in FOLDERS:
            write_whole_folder(path, lambda folder: write_files(model, folder, layout, labels))
        else:
            write_whole(path, lambda file: _write_tensors(model, names, file, layout))
    except SafetensorError as error:  # a disk that is full
        raise OSError(f"{path}: cannot be written ({error})") from error
    return path


def write_files(model: MAR, folder: Path, layout: LayoutName, labels: Sequence[str] | None) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json into a folder, in any layout."""
    config, dtype = model.config, str(next(model.parameters()).dtype).removeprefix("torch.")
    if layout == "hf":
        content = huggingface.config_json(config, dtype, labels)
    elif layout == "videomae2":
        content = videomae2.config_json(config, dtype, labels)
    else:
        content = huggingface.with_labels({"library_name": "mar_fast"}, labels)
    _write_json(folder / "config.json", {**content, "mar_fast": asdict(config)})
    _write_json(folder / "preprocessor_config.json", processors.preprocessor_json(config))
    _write_tensors(model, layout_for(config, layout), folder / "model.safetensors", layout)


def _write_tensors(model: MAR, names: Layout, file: Path, layout: LayoutName) -> None:
    from safetensors.torch import save_file

    # One entry: safetensors writes several in a random order, and the same model shall give the same bytes.
    metadata = {"format": "pt"} if layout in FOLDERS else {METADATA_KEY: json.dumps(asdict(model.config))}
    save_file(named_tensors(model, names), file, metadata=metadata)


def check_labels(labels: Sequence[str], config: MARConfig) -> None:
    """Check that there is a name for each class."""
    if not config.classifier:
        raise checks.bad("labels", "some, for a model without a classifier", "None")
    if isinstance(labels, str) or len(labels) != config.num_classes:
        raise checks.bad("labels", f"{len(labels)} names", f"{config.num_classes}, one for each class")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_target(path: str | Path, layout: str, force: bool) -> Path:
    """Check, before any work, that a checkpoint of this layout may be written there.

    Raises:
        ValueError: an unknown layout, or a name that does not fit it.
        FileExistsError, NotADirectoryError: something stands in the way.
    """
    if layout not in LAYOUTS:
        raise checks.bad("layout", repr(layout), "one of " + ", ".join(map(repr, LAYOUTS)))
    path = Path(path).expanduser()
    if layout not in FOLDERS:
        if path.suffix != ".safetensors":
            raise checks.bad("path", repr(str(path)), "a file name that ends with .safetensors")
        may_write([path], force)
    else:
        check_folder(path, FILES, force)
    return path


def check_folder(path: Path, names: Sequence[str], force: bool, beside: Sequence[str] = ()) -> None:
    """Check that a folder of these files may be written, or replaced with ``force``; only ``beside`` may be there too.

    Raises:
        FileExistsError, NotADirectoryError: something stands in the way.
    """
    if path.is_file():
        raise FileExistsError(f"{path}: got a file, expected a folder or a new name")
    may_write([path / name for name in names], force)
    if path.is_dir() and (others := sorted({item.name for item in path.iterdir()} - {*names, *beside})):
        raise FileExistsError(f"{path}: holds {', '.join(others[:3])}, expected a new folder, or one of a model only")


def layout_for(config: MARConfig, layout: LayoutName) -> Layout:
    """The names under which a model of this configuration is written.

    Raises:
        ValueError: the layout cannot express it.
    """
    if layout == "mar_fast":
        return OURS
    hf, v2, linear = layout == "hf", layout == "videomae2", config.classifier == "linear"
    decoder = config.decoder_depth > 0
    title = {
        "mar": "MAR's layout",
        "videomae": "VideoMAE's layout",
        "videomae2": "VideoMAE v2's layout on the hub",
        "hf": "Hugging Face's layout",
    }[layout]

    def need(field: str, met: bool, accepted: str) -> None:
        if not met:
            raise checks.bad(f"{field}, for {title}", repr(getattr(config, field)), accepted)

    if layout == "mar":
        need("classifier", config.classifier == "bridging", "'bridging', which every MAR has")
        need("final_norm", config.final_norm, "True: its encoder ends with a norm")
    else:
        bridging = "it has no bridging classifier (load with classifier=None)"
        need("classifier", config.classifier != "bridging", f"'linear' or None: {bridging}")
        need("classifier", linear or not v2, "'linear': with num_classes=0 it gives pooled features")
        need("num_classes", not (hf and linear) or config.num_classes > 0, "1 or more: transformers' class has a head")
        lone = "its classifier has no pixel decoder (load with decoder_depth=0)"
        need("decoder_depth", not (linear and decoder), f"0: {lone}")
        need("final_norm", not (linear and config.final_norm), "False: its mean-pooling classifier has no norm before")
        need("final_norm", hf or linear or config.final_norm, "True: its pre-training encoder ends with a norm")
    maker = "transformers makes" if hf else "its models make"
    own_grid = f"None: {maker} the table for the clip's own grid"
    need("position_grid", config.position_grid in (None, config.grid), own_grid)
    square = config.patch_size[1] == config.patch_size[2]
    need("patch_size", not (hf and decoder) or square, "a square one: transformers' pixel decoder takes no other")
    for field in EPS:
        if not matters(config, field):
            continue
        eps, why = 1e-6, "the eps of all its norms"
        if hf and field in huggingface.FIXED_EPS_FIELDS:
            eps, why = huggingface.FIXED_EPS, "which transformers fixes"
        elif hf or v2:
            eps, why = config.encoder_eps, "as encoder_eps: config.json has one layer_norm_eps"
        need(field, getattr(config, field) == eps, f"{eps}, {why} (load with {field}={eps} to change it)")
    if hf:
        return hugging_face(huggingface.kind_for(config))
    if v2:
        return VIDEOMAE2
    return MAR_LAYOUT if layout == "mar" else FINE_TUNED if linear else PRETRAINING


def named_tensors(model: MAR, layout: Layout) -> dict[str, Tensor]:
    """Parameters and weights in fp8 by the names of a layout, on the CPU, each with memory of its own.

    Raises:
        ValueError: the layout has no weights in fp8.
    """
    tensors: dict[str, Tensor] = {}
    scaled = {f"{name}.{key}": value for name, layer in scaled_layers(model) for key, value in layer.named_buffers()}
    if scaled and layout is not OURS:
        got = f"layers in fp8, which the layout {layout.title} does not have"
        raise checks.bad("model", got, "layout 'mar_fast', or the model before it was quantised")
    for ours, value in (*model.named_parameters(), *scaled.items()):
        names = layout.theirs(ours)
        for name, piece in zip(names, value.detach().chunk(len(names)), strict=True):
            tensors[name] = piece.to("cpu").clone(memory_format=torch.contiguous_format)
    return tensors
