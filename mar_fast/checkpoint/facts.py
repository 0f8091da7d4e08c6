"""What a checkpoint says about its model: fields of `MARConfig` from shapes, configuration files and conventions."""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import MARConfig, known_decoder_heads, known_heads
from ..kernels import checks
from ..layers import sinusoid_table
from . import huggingface
from .layouts import Layout
from .read import Checkpoint

FIELDS = tuple(item.name for item in fields(MARConfig))
BRIDGE_HEADS = {512: 4}
"""The bridging classifier of the paper: 512 wide, heads of 128."""


class Facts(dict[str, tuple[Any, str]]):
    """Field of `MARConfig` -> (value, where it came from)."""

    def __init__(self) -> None:
        super().__init__()
        self.grid_known = False
        """Whether the checkpoint says how large its clips were."""
        self.guessed: set[str] = set()
        """Fields that go by a named model and not by the checkpoint: the caller may know better."""

    def state(self, origin: str, **values: Any) -> None:
        """Note values of one origin; what was noted before is kept."""
        for name, value in values.items():
            self.setdefault(name, (value, origin))

    def value(self, name: str, otherwise: Any = None) -> Any:
        """The value of a field."""
        return self[name][0] if name in self else otherwise


def gather(checkpoint: Checkpoint, layout: Layout, overrides: Mapping[str, Any]) -> Facts:
    """All that is known about the model of a checkpoint; a part that ``overrides`` leave out is not looked at.

    Raises:
        ValueError: something that sizes are read from is missing or contradicts a configuration file.
    """
    facts = Facts()
    if "mar_fast" in checkpoint.configs and layout.key != "hf":
        facts.state("the file's own configuration", **_own_config(checkpoint))
        facts.grid_known = True
        return facts
    _from_shapes(facts, checkpoint, layout, overrides)
    if layout.key == "hf":
        huggingface.state(facts, checkpoint, layout)
        if "mar_fast" in checkpoint.configs:
            # What config.json itself says goes first: transformers reads that, and it may have been edited.
            facts.state("mar_fast in config.json", **_own_config(checkpoint))
    else:
        eps = ("encoder_eps", "final_norm_eps", "classifier_norm_eps", "bridge_eps", "decoder_eps", "decoder_norm_eps")
        facts.state(f"{layout.title}: all of its norms", **dict.fromkeys(eps, 1e-6))
    _from_args(facts, checkpoint.configs.get("args", {}))
    if layout.key == "mar":
        _from_mar_entries(facts, checkpoint)
    _heads(facts)
    if "num_frames" not in facts or "image_size" not in facts:
        facts.grid_known = False
    facts.state("assumed: the file does not say", num_frames=16, image_size=(224, 224))
    return facts


def _own_config(checkpoint: Checkpoint) -> dict[str, Any]:
    values = checkpoint.configs["mar_fast"]
    where = f"{checkpoint.where}, configuration of mar_fast in it"
    if not isinstance(values, dict):
        raise checks.bad(where, type(values).__name__, "an object of MARConfig's fields")
    if unknown := sorted(set(values) - set(FIELDS)):
        accepted = "fields of MARConfig; it may be of a newer mar_fast"
        raise checks.bad(where, f"unknown fields {', '.join(unknown)}", accepted)
    try:
        return asdict(MARConfig(**values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _from_shapes(facts: Facts, checkpoint: Checkpoint, layout: Layout, overrides: Mapping[str, Any]) -> None:
    names = checkpoint.tensors

    def shape(ours: str, ndim: int) -> tuple[int, ...]:
        theirs = layout.theirs(ours)[0]
        if theirs not in names:
            hint = f"{theirs}, from which sizes are read, or the argument that leaves this part out"
            raise checks.bad(checkpoint.where, f"no {theirs} ({layout.title} layout)", hint)
        size = tuple(names[theirs].shape)
        if len(size) != ndim or 0 in size:
            raise checks.bad(f"{checkpoint.where}, {theirs}", f"shape {size}", f"{ndim} dimensions, none of them 0")
        return size

    def blocks(stem: str, prefix: str, width: int) -> dict[str, Any]:
        depth = layout.depth(stem, names)
        if not depth:
            raise checks.bad(checkpoint.where, f"no blocks of the {stem} ({layout.title} layout)", "one or more")
        # Another block's where the first one lacks it: a missing entry is named by the check of all names.
        first = next((i for i in range(depth) if _fc1(layout, stem, i) in names), 0)
        hidden = shape(f"{stem}.blocks.{first}.mlp.fc1.weight", 2)[0]
        return {f"{prefix}depth": depth, f"{prefix}mlp_ratio": hidden / width}

    width, channels, *patch = shape("encoder.patch_embed.proj.weight", 5)
    origin = "shape of " + layout.theirs("encoder.patch_embed.proj.weight")[0]
    facts.state(origin, embed_dim=width, channels=channels, patch_size=tuple(patch))
    facts.state("blocks in the file", **blocks("encoder", "", width))
    kind = layout.classifier
    if layout.key == "mar_fast":
        kind = "bridging" if re.search(r"^classifier\.(proj|blocks)\.", "\n".join(names), re.MULTILINE) else "linear"
    facts.state("entries in the file", classifier=kind if kind and _has_classifier(layout, names) else None)
    if layout.always_final_norm or facts.value("classifier") == "bridging":
        facts.state(f"{layout.title}: always there", final_norm=True)
    facts.state("entries in the file", final_norm=layout.has("final_norm", names))
    keeps_classifier = overrides.get("classifier", kind) == kind and layout.has("classifier", names)
    head = layout.theirs("classifier.head.weight")[0]
    if keeps_classifier and head in names:
        facts.state(f"shape of {head}", num_classes=shape("classifier.head.weight", 2)[0])
    if keeps_classifier and kind == "bridging":
        bridge = shape("classifier.proj.weight", 2)[0]
        facts.state(f"shape of {layout.theirs('classifier.proj.weight')[0]}", bridge_embed_dim=bridge)
        facts.state("blocks in the file", **blocks("classifier", "bridge_", bridge))
    if layout.has("decoder", names) and overrides.get("decoder_depth") == 0:
        facts.state("entries in the file", decoder_depth=layout.depth("decoder", names))
    elif layout.has("decoder", names):
        decoder = shape("encoder_to_decoder.weight", 2)[0]
        facts.state("shape of encoder_to_decoder.weight", decoder_embed_dim=decoder)
        facts.state("blocks in the file", **blocks("decoder", "decoder_", decoder))
    else:
        facts.state("entries in the file", decoder_depth=0)


def _fc1(layout: Layout, stem: str, block: int) -> str:
    return layout.theirs(f"{stem}.blocks.{block}.mlp.fc1.weight")[0]


def _has_classifier(layout: Layout, names: Mapping[str, Tensor]) -> bool:
    """Whether this layout has one: one that has lost it altogether must not pass for one that never had it."""
    if layout.has("classifier", names):
        return True
    # A VideoMAE encoder alone ends with its norm; where that is lacking too, the classifier has been lost.
    return layout.key != "mar_fast" and not (layout.key == "videomae" and layout.has("final_norm", names))


def _from_args(facts: Facts, args: dict[str, Any]) -> None:
    """VideoMAE's files keep the arguments of the training run."""
    frames, size = args.get("num_frames"), args.get("input_size")
    t, h, w = facts.value("patch_size")
    if isinstance(frames, int) and frames > 0 and frames % t == 0:
        facts.state("args in the file", num_frames=frames)
    if isinstance(size, int) and size > 0 and size % h == size % w == 0:
        facts.state("args in the file", image_size=(size, size))
    facts.grid_known = facts.grid_known or {"num_frames", "image_size"} <= facts.keys()


def _from_mar_entries(facts: Facts, checkpoint: Checkpoint) -> None:
    """MAR keeps its mean and std, as constants, with the weights."""
    for name in ("mean", "std"):
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            continue
        values = tensor.flatten()
        if values.numel() != facts.value("channels") or not values.is_floating_point():
            got = f"{values.dtype} of shape {tuple(tensor.shape)}"
            raise checks.bad(f"{checkpoint.where}, {name}", got, f"{facts.value('channels')} floating-point values")
        # The shortest decimal of a float32: 0.485, and not 0.48500001430511475.
        decimals = tuple(float(str(np.float32(value))) for value in values.tolist())
        if not all(0 <= value <= 1 for value in decimals):
            raise checks.bad(f"{checkpoint.where}, {name}", decimals, "values in [0, 1], as of pixels in [0, 1]")
        facts.state(f"{name} in the file", **{name: decimals})


def _heads(facts: Facts) -> None:
    width, depth, decoder_embed_dim = facts.value("embed_dim"), facts.value("depth"), facts.value("decoder_embed_dim")
    known = {
        "num_heads": (known_heads(width, depth), f"the known model that is {width} wide and {depth} deep"),
        "decoder_num_heads": (
            known_decoder_heads(decoder_embed_dim),
            f"the known decoder that is {decoder_embed_dim} wide",
        ),
        "bridge_num_heads": (BRIDGE_HEADS.get(facts.value("bridge_embed_dim")), "the bridging classifier of the paper"),
    }
    for name, (heads, origin) in known.items():
        if heads and name not in facts:
            facts.state(origin, **{name: heads})
            facts.guessed.add(name)


TABLES = ("pos_embed", "encoder.pos_embed", "decoder.pos_embed")
"""Position tables are not learned in any layout, but MAR and some trainers save them."""


def table_tokens(checkpoint: Checkpoint) -> int | None:
    """Tokens of the position tables in the file; None where there are none."""
    found = {checkpoint.tensors[name].shape[-2] for name in TABLES if _is_table(checkpoint.tensors.get(name))}
    return found.pop() if len(found) == 1 else None


def table_fault(tensor: Tensor) -> str | None:
    """Why a position table in a file is not the one of the formula; None where it is."""
    if not _is_table(tensor):
        return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    table = sinusoid_table(*tensor.shape[-2:])
    # Half-precision files have rounded it.
    bound = max(1e-5, torch.finfo(tensor.dtype).eps)
    difference = float((tensor.reshape(table.shape).float() - table).abs().max())
    return None if difference <= bound else f"values up to {difference:.1e} from the sinusoid, as if it were learned"


def _is_table(tensor: Tensor | None) -> bool:
    if tensor is None or tensor.ndim not in (2, 3) or not tensor.is_floating_point():
        return False
    return 0 < tensor.numel() == tensor.shape[-1] * tensor.shape[-2]
