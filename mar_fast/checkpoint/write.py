"""save_checkpoint: a model as a safetensors file or folder, in any layout that can express it."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..files import may_write, write_whole, write_whole_folder
from ..kernels import checks
from ..model import MAR
from ..scaled_linear import scaled_layers
from . import config_json, processors
from .layouts import EPS, FINE_TUNED, MAR_LAYOUT, OURS, PRETRAINING, VIDEOMAE2, Layout, hugging_face, matters
from .read import METADATA_KEY
from .report import class_names

LayoutName = Literal["mar_fast", "mar", "videomae", "videomae2", "hf"]
LAYOUTS = get_args(LayoutName)
FOLDERS = ("videomae2", "hf")
"""Layouts that are a folder for other programs, with their config.json."""
_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
CARD = "README.md"


def save_checkpoint(
    model: MAR,
    path: str | Path,
    *,
    layout: LayoutName = "mar_fast",
    force: bool = False,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write a model's weights as safetensors, whole or not at all; returns the path.

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
        force: Replace what is there; a folder only if it holds nothing else, and its model card stays.
        labels: For a folder with a classifier: the names of its classes, for config.json; None for those that the
            model's checkpoint had.

    Raises:
        ValueError: the layout cannot express the model; the message says what stands in the way.
        FileExistsError: the path is there, and ``force`` is not set.
        OSError: it cannot be written.
        TypeError: not a `mar_fast.MAR`.
    """
    if labels is not None and layout not in FOLDERS:
        raise checks.bad("labels", f"some, for layout {layout!r}", "None: only a folder has them")
    folder = layout in FOLDERS
    return write(model, check_target(path, folder, force), layout, labels, folder)


def write(
    model: MAR, path: Path, layout: LayoutName, labels: Sequence[str] | None, folder: bool, card: str | None = None
) -> Path:
    """Write a file, or a folder (in any layout; with this model card, if it has none); returns its path."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    names, config, labels = layout_for(model, layout), model.config, class_names(model, labels)

    def write_tensors(file: Path) -> None:
        # One entry: safetensors writes several in a random order, and the same model shall give the same bytes.
        ours = {METADATA_KEY: json.dumps(asdict(config))}
        save_file(named_tensors(model, names), file, metadata={"format": "pt"} if layout in FOLDERS else ours)

    def write_files(new: Path) -> None:
        content: dict[str, Any] = {"library_name": "mar_fast"}
        if layout in FOLDERS:
            make = config_json.for_transformers if layout == "hf" else config_json.for_videomae2
            content = make(config, str(next(model.parameters()).dtype).removeprefix("torch."))
        if labels:
            content |= config_json.id2label(labels)
        for name, its in {
            "config.json": {**content, "mar_fast": asdict(config)},
            "preprocessor_config.json": processors.preprocessor_json(config),
        }.items():
            (new / name).write_text(json.dumps(its, indent=2) + "\n", encoding="utf-8")
        write_tensors(new / "model.safetensors")
        if (path / CARD).is_file():
            shutil.copy(path / CARD, new)
        elif card is not None:
            (new / CARD).write_text(card, encoding="utf-8")

    try:
        if folder:
            write_whole_folder(path, write_files)
        else:
            write_whole(path, write_tensors)
    except SafetensorError as error:  # a disk that is full
        raise OSError(f"{path}: cannot be written ({error})") from error
    return path


def check_target(path: str | Path, folder: bool, force: bool) -> Path:
    """Check, before any work, that a model's file or folder may be written, or replaced with ``force``.

    Raises:
        ValueError: the file's name does not end with .safetensors, or the folder has none.
        FileExistsError, NotADirectoryError: something stands in the way: a folder holds nothing but a model.
    """
    path = Path(path).expanduser()
    if not folder and path.suffix != ".safetensors":
        raise checks.bad("path", repr(str(path)), "a file name that ends with .safetensors")
    if folder and path.is_file():
        raise FileExistsError(f"{path}: got a file, expected a folder or a new name")
    if folder and path.name in ("", ".."):
        raise checks.bad("path", repr(str(path)), "the name of a folder, which is replaced as a whole")
    may_write([path / name for name in _FILES] if folder else [path], force)
    if path.is_dir() and (others := sorted({item.name for item in path.iterdir()} - {*_FILES, CARD})):
        raise FileExistsError(f"{path}: holds {', '.join(others[:3])}, expected a new folder, or one of a model only")
    return path


def layout_for(model: MAR, layout: LayoutName) -> Layout:
    """The names under which a model is written.

    Raises:
        ValueError: the layout cannot express it, or is unknown.
        TypeError: it is no `mar_fast.MAR`.
    """
    if not isinstance(model, MAR):
        raise checks.bad_type("model", type(model).__name__, "a mar_fast.MAR")
    if layout not in LAYOUTS:
        raise checks.bad("layout", repr(layout), "one of " + ", ".join(map(repr, LAYOUTS)))
    config = model.config
    if layout == "mar_fast":
        return OURS
    hf, v2, linear = layout == "hf", layout == "videomae2", config.classifier == "linear"
    decoder = config.decoder_depth > 0

    def need(field: str, met: bool, accepted: str) -> None:
        if not met:
            raise checks.bad(f"{field}, for layout {layout!r}", repr(getattr(config, field)), accepted)

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
        if hf and field in config_json.FIXED_EPS_FIELDS:
            eps, why = config_json.FIXED_EPS, "which transformers fixes"
        elif hf or v2:
            eps, why = config.encoder_eps, "as encoder_eps: config.json has one layer_norm_eps"
        need(field, getattr(config, field) == eps, f"{eps}, {why} (load with {field}={eps} to change it)")
    if hf:
        return hugging_face(config_json.kind_for(config))
    return {"mar": MAR_LAYOUT, "videomae2": VIDEOMAE2, "videomae": FINE_TUNED if linear else PRETRAINING}[layout]


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
