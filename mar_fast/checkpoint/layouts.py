"""What each checkpoint layout calls our parameters: one table for each, read both ways; and a checkpoint in one."""

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..config import MARConfig
from .report import Said

BIASES = ("attn.q_bias", "attn.v_bias")
EPS = ("encoder_eps", "final_norm_eps", "classifier_norm_eps", "bridge_eps", "decoder_eps", "decoder_norm_eps")


@dataclass(frozen=True)
class Layout:
    """One way to name the parameters of `mar_fast.MAR`."""

    title: str  # for people
    # How names begin: (ours, theirs). The first row that fits counts, N is a block's number, and a name that no row
    # fits is the same in both.
    table: tuple[tuple[str, str], ...] = ()
    split_qkv: bool = False  # query, key and value are three weights
    joint_bias: bool = False  # their biases are one, in encoder and pixel decoder too, as timm has them

    def theirs(self, ours: str) -> tuple[str, ...]:
        """The layout's name of one of our parameters; three where query, key and value make up ours, in this order."""
        names = [ours]
        if self.split_qkv and ours.endswith(".attn.qkv.weight"):
            names = [ours.replace(".qkv.", f".{part}.") for part in ("query", "key", "value")]
        if self.joint_bias and ours.endswith(BIASES):
            names = [re.sub(r"[qv]_bias$", "qkv.bias", ours)]
        return tuple(_rename(name, self.table) for name in names)

    def ours(self, theirs: str) -> str | None:
        """Our name of one of theirs (of one third of ``attn.qkv``: ``attn.query``, ...); None if it is no such name."""
        name = _rename(theirs, tuple((after, before) for before, after in self.table))
        return name if self.theirs(name) == (theirs,) else None


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for before, after in table:
        if found := re.match(re.escape(before).replace("N", r"(\d+)"), name):
            number = found[1] if "N" in before else ""
            return after.replace("N", number) + name[found.end() :]
    return name


def part_of(name: str) -> str | None:
    """The part that a parameter or a field of `MARConfig` belongs to, of those that a model may lack; else None."""
    for part, begins in {
        "classifier": ("classifier.", "classifier_", "num_classes", "head_dropout", "bridge_"),
        "final_norm": ("encoder.norm.", "final_norm_eps"),
        "decoder": ("decoder.", "mask_token", "encoder_to_decoder.", "decoder_", "norm_pix_loss"),
    }.items():
        if name.startswith(begins) and name != "decoder_depth":
            return part
    return None


def matters(config: MARConfig, field: str) -> bool:
    """Whether a field means something for a model of this configuration."""
    if field.startswith("bridge_"):
        return config.classifier == "bridging"
    if field == "position_grid":
        return config.position_grid is not None
    there = {"classifier": config.classifier, "final_norm": config.final_norm, "decoder": config.decoder_depth}
    return bool(there.get(part_of(field) or "", True))


OURS = Layout("mar_fast")
PRETRAINING = Layout("VideoMAE pre-training")


def fine_tuned(title: str, root: str = "") -> Layout:
    """VideoMAE's fine-tuned names, which v2's folders have under a root of theirs."""
    table = (
        ("classifier.norm.", f"{root}fc_norm."),
        ("classifier.head.", f"{root}head."),
        ("decoder.", "decoder."),
        ("mask_token", "mask_token"),
        ("encoder_to_decoder.", "encoder_to_decoder."),
        ("encoder.", root),
    )
    return Layout(title, table)


FINE_TUNED = fine_tuned("VideoMAE fine-tuned")
VIDEOMAE2 = fine_tuned("VideoMAE v2 hub", "model.")
MAR_LAYOUT = Layout(
    "MAR",
    (
        ("classifier.blocks.N.norm1.", "cls_head.blocks.N.norm."),
        ("classifier.blocks.N.norm2.", "cls_head.blocks.N.norm_ffn."),
        ("classifier.blocks.N.attn.qkv.", "cls_head.blocks.N.attn.to_qkv."),
        ("classifier.blocks.N.mlp.fc1.", "cls_head.blocks.N.ffn.net.0."),
        ("classifier.blocks.N.mlp.fc2.", "cls_head.blocks.N.ffn.net.3."),
        ("classifier.proj.", "encoder_to_cls_decoder."),
        ("classifier.", "cls_head."),
        ("encoder.", "backbone."),
    ),
)


def hugging_face(kind: str, linear_biases: bool = False) -> Layout:
    """The layout of a transformers class; its biases are called q_bias, as in the files of the hub, or query.bias."""
    root = "" if kind == "VideoMAEModel" else "videomae."
    query, value = ("query.bias", "value.bias") if linear_biases else ("q_bias", "v_bias")
    block = (
        ("norm1.", "layernorm_before."),
        ("norm2.", "layernorm_after."),
        ("attn.proj.", "attention.output.dense."),
        ("attn.q_bias", f"attention.attention.{query}"),
        ("attn.v_bias", f"attention.attention.{value}"),
        ("attn.query.", "attention.attention.query."),
        ("attn.key.", "attention.attention.key."),
        ("attn.value.", "attention.attention.value."),
        ("mlp.fc1.", "intermediate.dense."),
        ("mlp.fc2.", "output.dense."),
    )
    stems = (("encoder.blocks.N.", f"{root}encoder.layer.N."), ("decoder.blocks.N.", "decoder.decoder_layers.N."))
    table = (
        *((our_stem + ours, their_stem + theirs) for our_stem, their_stem in stems for ours, theirs in block),
        ("encoder.patch_embed.proj.", f"{root}embeddings.patch_embeddings.projection."),
        ("encoder.norm.", f"{root}layernorm."),
        ("classifier.norm.", "fc_norm."),
        ("classifier.head.", "classifier."),
    )
    return Layout(f"Hugging Face {kind}", table, split_qkv=True)


@dataclass(kw_only=True)
class Checkpoint:
    """What a source holds: as it is, and then, by `sources.convert`, in our vocabulary."""

    where: str  # the source, for messages
    entries: dict[str, Tensor]  # by the source's names, without prefixes
    groups: tuple[str, ...]  # keys under which more tensors lie, as model_key takes them
    # If there: "config.json" and those of processors, "mar_fast" of a file of ours, "args" of VideoMAE's own.
    configs: dict[str, dict[str, Any]]
    unknown: dict[str, str]  # the source's names: what is no parameter, and what is wrong with it
    unused: dict[str, str] = field(default_factory=dict)  # the source's names: what is passed over, and why
    layout: Layout = OURS  # what the source calls our parameters, for messages
    tensors: dict[str, Tensor] = field(default_factory=dict)  # a state dict
    said: Said = field(default_factory=dict)  # on the configuration, shapes apart; empty where `own` is all that counts
    own: Said = field(default_factory=dict)  # all fields, by mar_fast's own configuration in the file, if it has one
    absent: dict[str, str] = field(default_factory=dict)  # parameters or parts that are not read, and why
    position_tokens: int | None = None  # of the position tables in the file
    labels: tuple[str, ...] | None = None  # names of the classes
    remarks: list[str]  # what else there is to know: envelope and wrappers' names that were taken off, ...
    warnings: list[str] = field(default_factory=list)  # what may be wrong

    def pass_over(self, ours: str, reason: str) -> Tensor:
        """Take out a tensor that is not needed, for this ``reason``, and return it."""
        for name in self.layout.theirs(ours):
            self.unused[name] = reason
            self.unknown.pop(name, None)
        return self.tensors.pop(ours)

    def has(self, part: str) -> bool:
        """Whether there is anything of a part."""
        return any(part_of(name) == part for name in self.tensors)

    def depth(self, stem: str) -> int:
        """Blocks under ``stem``, "encoder" for example: one more than the highest number."""
        numbers = [re.match(rf"{stem}\.blocks\.(\d+)\.", name) for name in self.tensors]
        return max((int(number[1]) + 1 for number in numbers if number), default=0)
