"""From what a checkpoint says and what the caller asks for to one `MARConfig`, with the origin of every field."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..config import MARConfig
from ..kernels import checks
from .facts import FIELDS, Facts, table_tokens
from .layouts import Layout
from .read import Checkpoint

Position = Literal["formula", "interpolate"]
POSITIONS = ("formula", "interpolate")

# Fields that the checkpoint fixes: by shapes and, for heads, by its configuration.
_FIXED = ("embed_dim", "channels", "patch_size", "depth", "mlp_ratio", "num_heads")
_PARTS = {
    "classifier": ("num_classes", "bridge_embed_dim", "bridge_depth", "bridge_num_heads", "bridge_mlp_ratio"),
    "decoder": ("decoder_embed_dim", "decoder_num_heads", "decoder_mlp_ratio"),
}
_BESIDES = {
    "classifier": ("classifier_norm_eps", "bridge_eps", "mask_ratio"),
    "decoder": ("decoder_eps", "decoder_norm_eps"),
}


@dataclass(frozen=True)
class Choice:
    """The model to build.

    Attributes:
        config: Its configuration.
        origins: Field -> where its value came from, for those that were not left at the default.
        fresh: Part -> why it is made anew and not read from the checkpoint.
        dropped: Part -> why it is not read although the checkpoint has it.
        remarks: On position tables.
    """

    config: MARConfig
    origins: dict[str, str]
    fresh: dict[str, str]
    dropped: dict[str, str]
    remarks: tuple[str, ...]


def choose(
    checkpoint: Checkpoint,
    layout: Layout,
    facts: Facts,
    position: Position | None,
    new_head: bool,
    overrides: Mapping[str, Any],
) -> Choice:
    """Decide on every field.

    Args:
        checkpoint: The tensors and where they are from.
        layout: Theirs.
        facts: What they say.
        position: As in `from_pretrained`.
        new_head: The caller allows a last layer of another size.
        overrides: Fields of `MARConfig` given by the caller.

    Raises:
        ValueError, TypeError: overrides that contradict the checkpoint, or something that cannot be known without.
    """
    for name in overrides:
        if name not in FIELDS:
            raise checks.bad_type(name, "an unknown argument", "one of " + ", ".join(sorted(FIELDS)))
    if position not in (None, *POSITIONS):
        raise checks.bad("position", repr(position), "'formula', 'interpolate' or None")
    fresh, dropped = _parts(checkpoint, layout, facts, overrides)
    values: dict[str, Any] = {name: value for name, (value, _) in facts.items()}
    origins = {name: origin for name, (_, origin) in facts.items()}
    fixed = {name: facts.value(name) for name in _FIXED}
    for part, names in _PARTS.items():
        if part in fresh | dropped:
            # What the checkpoint says of a part that is not read from it is of no use.
            for name in (*names, *_BESIDES[part]):
                values.pop(name, None), origins.pop(name, None)
        elif part == "classifier":
            fixed |= {name: facts.value(name) for name in names}
        elif facts.value("decoder_depth"):
            fixed |= {name: facts.value(name) for name in ("decoder_depth", *names)}

    for name, value in overrides.items():
        if name in fixed and fixed[name] is not None and not _agree(value, fixed[name]):
            may_differ = (name == "num_classes" and new_head) or name in facts.guessed
            if not may_differ:
                more = "; allow_mismatched='classifier.head.*' makes a new head" if name == "num_classes" else ""
                raise checks.bad(name, value, f"{fixed[name]} ({origins[name]}){more}")
        values[name], origins[name] = value, "given"
    values.setdefault("mask_ratio", 0.5 if values["classifier"] == "bridging" else 0.0)
    origins.setdefault("mask_ratio", "default: 0.5 with a bridging classifier, else 0, the dense model")
    _need_heads(checkpoint, values, fresh)
    values["position_grid"], remarks = _position(checkpoint, facts, position, overrides, values)
    if values["position_grid"] is None:
        origins.pop("position_grid", None)
    else:
        origins.setdefault("position_grid", "the checkpoint's grid")
    config = MARConfig(**values)
    shown = {name: origin for name, origin in origins.items() if name in values and name in _relevant(config)}
    return Choice(config, shown, fresh, dropped, remarks)


def _agree(given: object, known: object) -> bool:
    if isinstance(given, list):
        given = tuple(given)
    if isinstance(given, float) and isinstance(known, float):
        return abs(given - known) < 1e-6
    return given == known


def _parts(
    checkpoint: Checkpoint, layout: Layout, facts: Facts, overrides: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Which parts are made anew, and which are left out, by the caller's wish."""
    fresh: dict[str, str] = {}
    dropped: dict[str, str] = {}
    names = checkpoint.tensors
    kind = facts.value("classifier")
    wanted = overrides.get("classifier", kind)
    if wanted is None and kind is None and "num_classes" in overrides and "classifier" not in overrides:
        wanted = "bridging"
        facts["classifier"] = (wanted, "num_classes is given: a new one, as MAR fine-tunes")
    if wanted != kind:
        if kind is not None:
            dropped["classifier"] = f"classifier={wanted!r} was asked for"
        if wanted is not None:
            if "num_classes" not in overrides:
                accepted = f"num_classes=, since the file has no {wanted} classifier and a new one is made"
                raise checks.bad("num_classes", "none", accepted)
            fresh["classifier"] = f"new: the file has no {wanted} classifier"
    elif wanted == "linear" and _reads_token_0(layout, checkpoint, facts):
        got = "a classifier that reads token 0 after the last norm (no mean pooling), which no MARConfig expresses"
        accepted = "one that averages over tokens (fc_norm); classifier=None reads the encoder alone"
        raise checks.bad(checkpoint.where, got, accepted)
    if facts.value("decoder_depth") and overrides.get("decoder_depth") == 0:
        dropped["decoder"] = "decoder_depth=0 was asked for"
    elif not facts.value("decoder_depth") and overrides.get("decoder_depth"):
        fresh["decoder"] = "new: the file has no pixel decoder"
    if overrides.get("final_norm") is False and layout.has("final_norm", names):
        dropped["final_norm"] = "final_norm=False was asked for"
    elif overrides.get("final_norm") and not facts.value("final_norm"):
        fresh["final_norm"] = "new: the file has no last norm"
    return fresh, dropped


def _reads_token_0(layout: Layout, checkpoint: Checkpoint, facts: Facts) -> bool:
    if layout.key not in ("hf", "videomae") or "mar_fast" in checkpoint.configs:
        return False
    has_norm = facts.value("final_norm") or layout.has("final_norm", checkpoint.tensors)
    return bool(has_norm) and not any(name.startswith("fc_norm.") for name in checkpoint.tensors)


def _need_heads(checkpoint: Checkpoint, values: dict[str, Any], fresh: dict[str, str]) -> None:
    for name, width, depth, part in (
        ("num_heads", "embed_dim", "depth", "encoder"),
        ("decoder_num_heads", "decoder_embed_dim", "decoder_depth", "decoder"),
        ("bridge_num_heads", "bridge_embed_dim", "bridge_depth", "classifier"),
    ):
        there = part != "classifier" or values["classifier"] == "bridging"
        if there and values.get(depth) and part not in fresh and name not in values:
            got = f"none for {checkpoint.where}: it does not say, and no known model is {values[width]} wide"
            deep = f" and {values[depth]} deep" if part == "encoder" else ""
            raise checks.bad(name, got + deep, f"{name}=, the number of attention heads of the {part}")


def _position(
    checkpoint: Checkpoint,
    facts: Facts,
    position: Position | None,
    overrides: Mapping[str, Any],
    values: Mapping[str, Any],
) -> tuple[Any, tuple[str, ...]]:
    """The grid that position tables are made for, None for the model's own, and what there is to say about it."""
    patch = values["patch_size"]
    frames, size = facts.value("num_frames"), tuple(facts.value("image_size"))
    same = values["num_frames"] == frames and _agree(values["image_size"], size)
    new = _grid(values["num_frames"], values["image_size"], patch)
    base = facts.value("position_grid") or _grid(frames, size, patch)
    base = tuple(base) if base else None
    tokens = table_tokens(checkpoint)
    known = facts.grid_known or (tokens is not None and base is not None and tokens == math.prod(base))
    if overrides.get("position_grid") is not None:
        if position is not None:
            raise checks.bad("position", repr(position), "None where position_grid is given")
        return overrides["position_grid"], ("position table: interpolated from the position_grid given",)
    if tokens is not None and base is not None and tokens != math.prod(base):
        if known or (not same and tokens != (new and math.prod(new))):
            got = f"a position table of {tokens} tokens"
            raise checks.bad(checkpoint.where, got, f"{math.prod(base)}, for {frames} frames of {size[0]} x {size[1]}")
        if same:
            got = f"none for {checkpoint.where}, whose position table has {tokens} tokens"
            raise checks.bad("num_frames and image_size", got, "the size of clip that it was trained on")
        base, known = new, True  # the file confirms the size that the caller gives
    if same:
        return facts.value("position_grid"), ()
    if new is None or new == base:
        return None, ()
    if position is None and not known:
        accepted = (
            f"'formula' if the checkpoint was trained on clips of this size, or 'interpolate' from {frames} frames of "
            f"{size[0]} x {size[1]}, the usual ones: the file does not say"
        )
        raise checks.bad("position", f"none, with clips of another size than {frames} x {size}", accepted)
    if position == "formula":
        its = f"; the checkpoint's grid is {base}" if known else ""
        return None, (f"position table: by the formula for the grid {new}{its}",)
    if base is None:
        got = f"none, and clips of {frames} frames of {size[0]} x {size[1]} do not fit the patch {patch}"
        raise checks.bad("position_grid", got, "the grid that the checkpoint was trained with")
    how = "as asked for" if position else "the default where the size of clips differs; position='formula' is the other"
    if not known:
        how += "; the checkpoint's size is assumed, since the file does not say"
    return base, (f"position table: interpolated from the checkpoint's grid {base} to {new}: {how}",)


def _grid(frames: Any, size: Any, patch: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """Tubelets, or None where the sizes do not fit, which `MARConfig` will say."""
    if not isinstance(frames, int) or not isinstance(size, tuple | list) or len(size) != 2:
        return None
    extents = (frames, *size)
    if not all(isinstance(extent, int) and extent > 0 for extent in extents):
        return None
    if any(extent % step for extent, step in zip(extents, patch, strict=True)):
        return None
    t, h, w = (extent // step for extent, step in zip(extents, patch, strict=True))
    return t, h, w


def _relevant(config: MARConfig) -> set[str]:
    """Fields that mean something for this model."""
    names = {item.name for item in fields(MARConfig)}
    if config.classifier != "bridging":
        names -= {name for name in names if name.startswith("bridge_")}
    if config.classifier is None:
        names -= {"num_classes", "classifier_norm_eps", "head_dropout"}
    if not config.decoder_depth:
        names -= {name for name in names if name.startswith("decoder_") and name != "decoder_depth"}
        names -= {"norm_pix_loss"}
    if not config.final_norm:
        names -= {"final_norm_eps"}
    return names
