"""From what a checkpoint says and what the caller asks for to one `MARConfig`, with the origin of every field."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from ..config import FIELDS, IMAGENET_MEAN, IMAGENET_STD, MARConfig, known_heads
from ..kernels import checks
from .layouts import Checkpoint, matters, part_of
from .report import Said, say
from .sources import PATCH_EMBED, TOKEN_0

Position = Literal["formula", "interpolate"]

_SIZES = ("embed_dim", "depth", "num_heads", "mlp_ratio", "channels", "patch_size", "num_classes")
"""Endings of the fields that a checkpoint fixes: by its shapes, heads by its configuration."""


def plan(
    checkpoint: Checkpoint, position: Position | None, new_head: bool, overrides: Mapping[str, Any]
) -> tuple[MARConfig, dict[str, str]]:
    """The configuration, and where the value of each field came from that was not left at its default.

    The checkpoint gets a remark on its position table, and notes on parts that the caller wants anew or left out.
    ``new_head`` says that a last layer of another size is allowed.

    Raises:
        ValueError, TypeError: overrides that contradict the checkpoint, or something that cannot be known without.
    """
    for name in overrides:
        if name not in FIELDS:
            raise checks.bad_type(name, "an unknown argument", "one of " + ", ".join(sorted(FIELDS)))
    if position not in (None, "formula", "interpolate"):
        raise checks.bad("position", repr(position), "'formula', 'interpolate' or None")
    overrides = {name: value for name, value in overrides.items() if (name, value) != ("position_grid", None)}
    norm, blocks = checkpoint.has("final_norm"), checkpoint.depth("decoder")
    said = say("entries in the file", final_norm=norm, decoder_depth=blocks) | checkpoint.own | checkpoint.said
    fresh, dropped = _parts(checkpoint, said, overrides)
    checkpoint.absent |= fresh
    for ours in list(checkpoint.tensors):
        if reason := dropped.get(part_of(ours) or ""):
            checkpoint.pass_over(ours, reason)
    if checkpoint.said:
        shapes = _sizes(checkpoint)
        for name, (value, origin) in checkpoint.said.items():
            known, shape = shapes.get(name, (value, ""))
            if not _agree(value, known):
                raise checks.bad(f"{checkpoint.where}, {origin}", value, f"{known}, by the {shape}")
        said |= shapes
    unread = fresh.keys() | dropped.keys()
    # What the source says of a part that is not read from it is of no use; dropout is a rate of training.
    said = {name: it for name, it in said.items() if part_of(name) not in unread or name.endswith("dropout")}
    if "classifier" in unread:
        said.pop("mask_ratio", None)
    if "decoder" in unread:
        del said["decoder_depth"]
    grid_said = {"num_frames", "image_size"} <= said.keys()
    usual_values = {"num_frames": 16, "image_size": (224, 224), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    for name, usual in usual_values.items():
        said.setdefault(name, (usual, "assumed: the file does not say"))
    said["position_grid"] = _position(checkpoint, said, grid_said, position, overrides), "the checkpoint's grid"

    for name, value in overrides.items():
        known, origin = said.get(name, (value, ""))
        # Where the file has no head, 0, a new one is made.
        new = name == "num_classes" and (new_head or known == 0)
        if name in said and name.endswith(_SIZES) and not new and not _agree(value, known):
            more = "; allow_mismatched='classifier.head.*' makes a new head" if name == "num_classes" else ""
            raise checks.bad(name, value, f"{known} ({origin}){more}")
        said[name] = value, "given"
    ratio = 0.5 if said["classifier"][0] == "bridging" else 0.0
    said.setdefault("mask_ratio", (ratio, "default: 0.5 with a bridging classifier, else 0, the dense model"))
    values = {name: value for name, (value, _) in said.items()}
    for part, prefix in (("encoder", ""), ("decoder", "decoder_"), ("classifier", "bridge_")):
        field, depth = f"{prefix}num_heads", values.get(f"{prefix}depth")
        if part in unread or not depth or field in values:
            continue
        width = values[f"{prefix}embed_dim"]
        sizes = f"{width} wide and {depth} deep" if part == "encoder" else f"{width} wide"
        values[field] = known_heads(prefix, width, depth)
        said[field] = values[field], f"the known {part} that is {sizes}"
        if not values[field]:
            got = f"none for {checkpoint.where}: it does not say, and no known model is {sizes}"
            raise checks.bad(field, got, f"{field}=, the number of attention heads of the {part}")
    config = MARConfig(**values)
    return config, {name: origin for name, (_, origin) in said.items() if matters(config, name)}


def _agree(given: object, known: object) -> bool:
    if isinstance(given, float) and isinstance(known, float):
        return abs(given - known) < 1e-6
    return (tuple(given) if isinstance(given, list) else given) == known


def _sizes(checkpoint: Checkpoint) -> Said:
    """The fields that shapes and numbers of blocks give, of the parts that are read."""
    tensors, theirs, layout = checkpoint.tensors, checkpoint.layout.theirs, checkpoint.layout.title

    def shape(ours: str, ndim: int = 2) -> tuple[int, ...]:
        name = theirs(ours)[0]
        if ours not in tensors:
            hint = f"{name}, from which sizes are read, or the argument that leaves this part out"
            raise checks.bad(checkpoint.where, f"no {name} ({layout} layout)", hint)
        size = tuple(tensors[ours].shape)
        if len(size) != ndim or 0 in size:
            raise checks.bad(f"{checkpoint.where}, {name}", f"shape {size}", f"{ndim} dimensions, none of them 0")
        return size

    _, channels, *patch = shape(PATCH_EMBED, 5)
    sizes = say(f"shape of {theirs(PATCH_EMBED)[0]}", channels=channels, patch_size=tuple(patch))
    stacks = {"encoder": ("", PATCH_EMBED)}
    if (head := "classifier.head.weight") in tensors:
        sizes |= say(f"shape of {theirs(head)[0]}", num_classes=shape(head)[0])
    if checkpoint.said["classifier"][0] == "bridging" and checkpoint.has("classifier"):
        stacks["classifier"] = ("bridge_", "classifier.proj.weight")
    if checkpoint.has("decoder"):
        stacks["decoder"] = ("decoder_", "encoder_to_decoder.weight")
    for stem, (prefix, weight) in stacks.items():
        width = shape(weight, 5 if weight == PATCH_EMBED else 2)[0]
        depth = checkpoint.depth(stem)
        if not depth:
            raise checks.bad(checkpoint.where, f"no blocks of the {stem} ({layout} layout)", "one or more")
        # Another block's where the first one lacks it: a missing entry is named by the check of all names.
        fc1 = [f"{stem}.blocks.{i}.mlp.fc1.weight" for i in range(depth)]
        ratio = shape(next((name for name in fc1 if name in tensors), fc1[0]))[0] / width
        sizes |= say(f"shape of {theirs(weight)[0]}", **{f"{prefix}embed_dim": width})
        sizes |= say("blocks in the file", **{f"{prefix}depth": depth, f"{prefix}mlp_ratio": ratio})
    return sizes


def _parts(checkpoint: Checkpoint, said: Said, overrides: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Which parts are made anew, and which are left out, by the caller's wish."""
    fresh: dict[str, str] = {}
    dropped: dict[str, str] = {}
    kind = said["classifier"][0]
    wanted = overrides.get("classifier", kind)
    if wanted is None and kind is None and "num_classes" in overrides and "classifier" not in overrides:
        wanted = "bridging"
        said["classifier"] = (wanted, "num_classes is given: a new one, as MAR fine-tunes")
    if kind == TOKEN_0 and wanted in (TOKEN_0, "linear"):
        got = "a classifier that reads token 0 after the last norm (no mean pooling), which no MARConfig expresses"
        accepted = "one that averages over tokens (fc_norm); classifier=None reads the encoder alone"
        raise checks.bad(checkpoint.where, got, accepted)
    depth, norm = said["decoder_depth"][0] or checkpoint.has("decoder"), said["final_norm"][0]
    for part, field, there, wished, title in (
        ("classifier", "classifier", kind, wanted, f"{wanted} classifier"),
        ("decoder", "decoder_depth", depth, overrides.get("decoder_depth", depth), "pixel decoder"),
        ("final_norm", "final_norm", norm, overrides.get("final_norm", norm), "last norm"),
    ):
        if there == wished or (part == "decoder" and there and wished):
            continue  # `plan` refuses a decoder of another depth
        if there:
            dropped[part] = f"{field}={wished!r} was asked for"
        if wished:
            fresh[part] = f"new: the file has no {title}"
    if "classifier" in fresh and "num_classes" not in overrides:
        accepted = f"num_classes=, since the file has no {wanted} classifier and a new one is made"
        raise checks.bad("num_classes", "none", accepted)
    return fresh, dropped


def _position(
    checkpoint: Checkpoint, said: Said, grid_said: bool, position: Position | None, overrides: Mapping[str, Any]
) -> Any:
    """The grid that position tables are made for, None for the model's own; the checkpoint gets a remark on it."""
    if "position_grid" in overrides:
        if position is not None:
            raise checks.bad("position", repr(position), "None where position_grid is given")
        checkpoint.remarks.append("position table: interpolated from the position_grid given")
        return None
    (frames, _), (size, _), (patch, _) = said["num_frames"], said["image_size"], said["patch_size"]
    clips = f"{frames} frames of {size[0]} x {size[1]}"
    own = said.get("position_grid", (None, ""))[0]
    new_frames, new_size = overrides.get("num_frames", frames), overrides.get("image_size", size)
    same = new_frames == frames and _agree(new_size, size)
    new, base = _grid(new_frames, new_size, patch), own or _grid(frames, size, patch)
    tokens = checkpoint.position_tokens
    if tokens is not None and base is not None:
        confirmed = tokens == math.prod(base)
        if not confirmed and (grid_said or (not same and tokens != (new and math.prod(new)))):
            got = f"a position table of {tokens} tokens"
            raise checks.bad(checkpoint.where, got, f"{math.prod(base)}, for {clips}")
        if not confirmed and same:
            got = f"none for {checkpoint.where}, whose position table has {tokens} tokens"
            raise checks.bad("num_frames and image_size", got, "the size of clip that it was trained on")
        # The table confirms the usual size or, where it does not, the one that the caller gives.
        base, grid_said = base if confirmed else new, True
    if same or new is None or new == base:
        return own if same else None
    if position is None and not grid_said:
        accepted = (
            "'formula' if the checkpoint was trained on clips of this size, or 'interpolate' from "
            f"{clips}, the usual ones: the file does not say"
        )
        raise checks.bad("position", f"none, with clips of another size than {frames} x {size}", accepted)
    if position == "formula":
        its = f"; the checkpoint's grid is {base}" if grid_said else ""
        checkpoint.remarks.append(f"position table: by the formula for the grid {new}{its}")
        return None
    if base is None:
        got = f"none, and clips of {clips} do not fit the patch {patch}"
        raise checks.bad("position_grid", got, "the grid that the checkpoint was trained with")
    how = "as asked for" if position else "the default where the size of clips differs; position='formula' is the other"
    if not grid_said:
        how += "; the checkpoint's size is assumed, since the file does not say"
    checkpoint.remarks.append(f"position table: interpolated from the checkpoint's grid {base} to {new}: {how}")
    return base


def _grid(frames: Any, size: Any, patch: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """Tubelets; None where the sizes do not fit, which `MARConfig` will say."""
    try:
        return MARConfig(num_frames=frames, image_size=size, patch_size=patch, mask_ratio=0.0).grid
    except (TypeError, ValueError):
        return None
