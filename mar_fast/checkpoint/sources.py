"""The door: a file of any source to one state dict in our names, and what the source says about the configuration.

What comes after this knows our names only; theirs are kept for messages.
"""

import math
import re
from collections.abc import Collection
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor

from ..config import FIELDS, MARConfig
from ..kernels import checks
from ..layers import sinusoid_table
from . import config_json, layouts, processors
from .layouts import BIASES, EPS, Checkpoint, Layout, part_of
from .report import Said, say, some

NORMALISATION = ("mean", "std")
PATCH_EMBED = "encoder.patch_embed.proj.weight"
TOKEN_0 = "token 0"
"""A linear classifier that reads token 0 after the last norm (no mean pooling), which no `MARConfig` expresses."""
# Position tables are not learned in any layout, but MAR and some trainers save them.
_TABLES = ("pos_embed", "encoder.pos_embed", "decoder.pos_embed")


# The patch embedding's weight, of which each model has one, and what its names begin with inside another model.
_INSIDE = re.compile(
    r"(.+?)\.((videomae\.)?embeddings\.patch_embeddings\.projection|((backbone|encoder)\.)?patch_embed\.proj)\.weight"
)


def convert(checkpoint: Checkpoint, given: Collection[str] = ()) -> Checkpoint:
    """Recognise the source by its names, and convert; what it says of fields that are ``given`` does not matter.

    Raises:
        ValueError: no source that is known, or entries that contradict each other.
    """

    def has(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in checkpoint.entries)

    config = checkpoint.configs.get("config.json", {})
    hugging_face = has(r"(videomae\.)?(embeddings\.patch_embeddings|encoder\.layer)\.")
    v2 = config_json.V2_KEY in config and has(r"(model\.)?(patch_embed|blocks)\.")
    if hugging_face:
        _from_hugging_face(checkpoint)
    elif v2:
        _from_videomae2(checkpoint)
    elif has(r"backbone\.(patch_embed|blocks)\."):
        _from_mar(checkpoint)
    elif has(r"encoder\.(patch_embed|blocks)\."):
        (_from_ours if has(r"classifier\.") else _from_pretraining)(checkpoint)
    elif has(r"(patch_embed|blocks)\."):
        _from_fine_tuned(checkpoint)
    else:
        # A module of Lightning, for example, has its model as an attribute, and may have other things beside it.
        inside = [found[1] for name in checkpoint.entries if (found := _INSIDE.fullmatch(name))]
        if len(inside) == 1:
            stem = f"{inside[0]}."
            checkpoint.entries = {name.removeprefix(stem): tensor for name, tensor in checkpoint.entries.items()}
            checkpoint.remarks.append(f"'{stem}' taken off names")
            return convert(checkpoint, given)
        first = ", ".join(sorted(checkpoint.entries)[:5]) or "no tensors"
        known = "the names of MAR, VideoMAE (pre-training or fine-tuned), Hugging Face VideoMAE, or mar_fast itself"
        if keys := [repr(key) for key in (*inside, *checkpoint.groups)]:
            known += f"; model_key= opens one of {some(keys, 6)}"
        raise checks.bad(checkpoint.where, f"entries such as {first}", known)
    checkpoint.entries = {}  # in `tensors` now; where these are copies, they need not stay in memory twice
    checkpoint.own, checkpoint.labels = _own_config(checkpoint), config_json.labels(config)
    said = checkpoint.own | checkpoint.said
    if said.get("num_classes", (None, ""))[0] == 0:
        reason = "new: the file has no head (num_classes 0)"
        checkpoint.absent |= {f"classifier.head.{end}": reason for end in ("weight", "bias")}
    # Another program's config.json must agree with the weights even beside our own.
    if checkpoint.own and not (hugging_face or v2):
        checkpoint.said = {}
        return checkpoint
    files = processors.found(checkpoint.where, checkpoint.configs)
    if not set(NORMALISATION) <= {*given, *checkpoint.said}:
        checkpoint.said = processors.normalisation(checkpoint.where, files, _channels(checkpoint)) | checkpoint.said
    checkpoint.remarks += processors.other_frames(files, said.get("image_size", ((224, 224), ""))[0])
    return checkpoint


def _channels(checkpoint: Checkpoint) -> int:
    patch = checkpoint.tensors.get(PATCH_EMBED)
    return patch.shape[1] if patch is not None and patch.ndim == 5 else 3


def _from_ours(checkpoint: Checkpoint) -> None:
    _rename(checkpoint, layouts.OURS)
    if any(name.startswith(("classifier.proj.", "classifier.blocks.")) for name in checkpoint.tensors):
        checkpoint.said |= say("mar_fast: always there", classifier="bridging", final_norm=True)
    else:
        checkpoint.said |= say("entries in the file", classifier="linear")


def _from_pretraining(checkpoint: Checkpoint) -> None:
    """VideoMAE's encoder and pixel decoder; an encoder alone is read too, with a warning."""
    _rename(checkpoint, layouts.PRETRAINING)
    checkpoint.said |= say("VideoMAE pre-training: always there", final_norm=True)
    checkpoint.said |= say("entries in the file", classifier=None)
    if not checkpoint.has("decoder"):
        checkpoint.warnings.append("the encoder alone: there is no pixel decoder in the file")


def _from_fine_tuned(checkpoint: Checkpoint) -> None:
    """VideoMAE's classifiers, v2 too; and its encoders alone, which end with their norm."""
    _rename(checkpoint, layouts.FINE_TUNED)
    final_norm = checkpoint.has("final_norm")
    # Where both are lacking the classifier has been lost, and must not pass for one that never was.
    _say_classifier(checkpoint, checkpoint.has("classifier") or not final_norm, final_norm)


def _from_videomae2(checkpoint: Checkpoint) -> None:
    """VideoMAE v2's folders on the hub: fine-tuned names, with or without "model." in front, and a config.json."""
    content, layout = checkpoint.configs["config.json"], layouts.VIDEOMAE2
    if not any(name.startswith("model.") for name in checkpoint.entries):
        layout = layouts.fine_tuned(layout.title)
    _rename(checkpoint, layout)
    said, remarks = config_json.said_by_videomae2(checkpoint.where, content)
    checkpoint.said |= said
    checkpoint.remarks += remarks
    final_norm = said.get("final_norm", (checkpoint.has("final_norm"), ""))[0]
    # Without a head these are features: averaged and normalised or, without mean pooling, each token's.
    features = final_norm and said.get("num_classes", (None, ""))[0] == 0
    _say_classifier(checkpoint, not features, final_norm)
    if features:
        del checkpoint.said["num_classes"]
    if content[config_json.V2_KEY].get("qkv_bias") is False:
        _no_biases(checkpoint)


def _from_mar(checkpoint: Checkpoint) -> None:
    """MAR's original files, which keep mean and std, as constants, with the weights."""
    _rename(checkpoint, layouts.MAR_LAYOUT)
    checkpoint.said |= say("MAR: always there", classifier="bridging", final_norm=True)
    if "classifier.mask_token" in checkpoint.tensors:
        checkpoint.pass_over("classifier.mask_token", "nothing in MAR uses it")
    channels = _channels(checkpoint)
    for name in NORMALISATION:
        if "mar_fast" in checkpoint.configs or name not in checkpoint.tensors:
            continue
        tensor = checkpoint.pass_over(name, "read into the configuration")
        if tensor.numel() != channels or not tensor.is_floating_point():
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise checks.bad(f"{checkpoint.where}, {name}", got, f"{channels} floating-point values")
        # The shortest decimal of a float32: 0.485, and not 0.48500001430511475.
        values = tuple(float(str(np.float32(value))) for value in tensor.flatten().tolist())
        if not all(0 <= value <= 1 for value in values):
            raise checks.bad(f"{checkpoint.where}, {name}", values, "values in [0, 1], as of pixels in [0, 1]")
        checkpoint.said |= say(f"{name} in the file", **{name: values})


def _from_hugging_face(checkpoint: Checkpoint) -> None:
    """The three classes of transformers, under either name that it has had for biases."""
    names, kind = checkpoint.entries, "VideoMAEModel"
    if any(name.startswith("videomae.") for name in names):
        decoder = any(part_of(name) == "decoder" for name in names)
        kind = "VideoMAEForPreTraining" if decoder else "VideoMAEForVideoClassification"
    linear_biases = not any(name.endswith(("q_bias", "v_bias")) for name in names)
    _rename(checkpoint, layouts.hugging_face(kind, linear_biases))
    _join_qkv(checkpoint)
    for name, tensor in list(checkpoint.tensors.items()):
        if name.endswith(".attn.key.bias") and is_finite(tensor):
            checkpoint.pass_over(name, "it adds the same to all scores of a query, which softmax takes out")
    checkpoint.said, remarks = config_json.said_by_transformers(checkpoint, kind)
    checkpoint.remarks += remarks
    final_norm = checkpoint.has("final_norm") or checkpoint.said.get("final_norm", (False, ""))[0]
    _say_classifier(checkpoint, kind == "VideoMAEForVideoClassification", final_norm)
    config = checkpoint.configs.get("config.json", {})
    if not config.get("qv_bias", config.get("qkv_bias", True)):
        _no_biases(checkpoint)


def _say_classifier(checkpoint: Checkpoint, there: bool, final_norm: bool) -> None:
    """Say the kind of a classifier without blocks; mean pooling has a norm of its own, and no last norm before it."""
    pooled = any(name.startswith("classifier.norm.") for name in checkpoint.tensors)
    kind = None if not there else TOKEN_0 if final_norm and not pooled else "linear"
    checkpoint.said |= say("entries in the file", classifier=kind)


def _no_biases(checkpoint: Checkpoint) -> None:
    """Let the biases of query and value be absent: config.json says that there are none."""
    blocks = [name.removesuffix("attn.qkv.weight") for name in checkpoint.tensors if name.endswith("qkv.weight")]
    reason = "zero: config.json says that query and value have no bias"
    checkpoint.absent |= {block + bias: reason for block in blocks for bias in BIASES}


def _join_qkv(checkpoint: Checkpoint) -> None:
    """Make one weight of those of query, key and value, where all three are there."""
    tensors = checkpoint.tensors
    ends = (".attn.query.weight", ".attn.key.weight", ".attn.value.weight")
    for stem in {name.rpartition(".attn.")[0] for name in tensors if name.endswith(ends)}:
        ours = [stem + end for end in ends]
        there = {checkpoint.layout.theirs(name)[0]: tensors[name] for name in ours if name in tensors}
        if len(there) < 3:
            # They stay among the tensors: the block that they belong to counts.
            checkpoint.unused |= dict.fromkeys(there, f"the rest of {stem}.attn.qkv.weight is missing")
            continue
        kinds = [(t.dtype in checks.FLOATS or t.dtype, tuple(t.shape), t.layout, t.device) for t in there.values()]
        if len(set(kinds)) > 1 or len(kinds[0][1]) != 2:
            got = ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in there.items())
            raise checks.bad(checkpoint.where, got, "three matrices of the same shape and kind")
        tensors[f"{stem}.attn.qkv.weight"] = torch.cat([tensors.pop(name) for name in ours])


def _rename(checkpoint: Checkpoint, layout: Layout) -> None:
    """Make a state dict of our names, and say what is the same for all sources but transformers."""
    joint = re.compile(r"(encoder|decoder)\.blocks\.\d+\.attn\.qkv\.bias")
    joint_bias = any(joint.fullmatch(layout.ours(name) or "") for name in checkpoint.entries)
    checkpoint.layout = replace(layout, joint_bias=joint_bias)
    checkpoint.said |= say(f"{layout.title}: all of its norms", **dict.fromkeys(EPS, 1e-6))
    for name, tensor in checkpoint.entries.items():
        if (ours := checkpoint.layout.ours(name)) is None:
            checkpoint.unknown[name] = ""
        elif joint.fullmatch(ours):
            query, key, value = tensor.tensor_split(3) if tensor.ndim == 1 else (tensor,) * 3
            stem = ours.removesuffix("qkv.bias")
            checkpoint.tensors |= {f"{stem}q_bias": query, f"{stem}v_bias": value}
            if not is_finite(key):
                checkpoint.unknown[name] = "its part for the key is not finite"
        else:
            checkpoint.tensors[ours] = tensor
    _recognise_tables(checkpoint)
    # VideoMAE's own files keep the arguments of the run.
    args = checkpoint.configs.get("args", {})
    frames, size = args.get("num_frames"), args.get("input_size")
    if isinstance(frames, int) and frames > 0:
        checkpoint.said |= say("args in the file", num_frames=frames)
    if isinstance(size, int) and size > 0:
        checkpoint.said |= say("args in the file", image_size=(size, size))


def _own_config(checkpoint: Checkpoint) -> Said:
    if "mar_fast" not in checkpoint.configs:
        return {}
    values = checkpoint.configs["mar_fast"]
    where = f"{checkpoint.where}, configuration of mar_fast in it"
    if not isinstance(values, dict):
        raise checks.bad(where, type(values).__name__, "an object of MARConfig's fields")
    if unknown := sorted(set(values) - set(FIELDS)):
        accepted = "fields of MARConfig; it may be of a newer mar_fast"
        raise checks.bad(where, f"unknown fields {', '.join(unknown)}", accepted)
    origin = "mar_fast in config.json" if "config.json" in checkpoint.configs else "the file's own configuration"
    try:
        return say(origin, **asdict(MARConfig(**values)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _recognise_tables(checkpoint: Checkpoint) -> None:
    """Position tables: those of the formula are not needed, others are unknown; and how many tokens they have."""
    tokens = set()
    for name in _TABLES:
        if (table := checkpoint.tensors.get(name)) is None:
            continue
        fault = f"{table.dtype} of shape {tuple(table.shape)}"
        if table.is_floating_point() and table.ndim in (2, 3) and 0 < table.numel() == math.prod(table.shape[-2:]):
            tokens.add(table.shape[-2])
            formula = sinusoid_table(*table.shape[-2:])
            difference = float((table.reshape(formula.shape).float() - formula).abs().max())
            # Half-precision files have rounded it.
            same = difference <= max(1e-5, torch.finfo(table.dtype).eps)
            fault = "" if same else f"values up to {difference:.1e} from the sinusoid, as if it were learned"
        if fault:
            checkpoint.unknown[checkpoint.layout.theirs(name)[0]] = fault
        else:
            checkpoint.pass_over(name, "the position table of the formula, which the model makes itself")
    if len(tokens) == 1:
        (checkpoint.position_tokens,) = tokens


def is_finite(tensor: Tensor) -> bool:
    """Whether these are floating-point values without NaN and infinity."""
    return tensor.is_floating_point() and bool(tensor.isfinite().all())
