"""The checkpoint layouts: what each calls the parameters of `mar_fast.MAR`, and how a layout is recognised."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from ..kernels import checks

# A rename turns one of our names into one of theirs: pattern and replacement of re.sub, applied in order.
Renames = tuple[tuple[str, str], ...]

# Parts that a checkpoint may have or lack as a whole: what their names begin with.
_OUR_PARTS = {"classifier": r"classifier\.", "decoder": r"decoder\.|mask_token$|encoder_to_decoder\."}


@dataclass(frozen=True)
class Layout:
    """One way of naming the parameters.

    Attributes:
        key: "mar_fast", "mar", "videomae" or "hf".
        title: For people.
        renames: From our names to theirs.
        parts: For "classifier", "decoder" and "final_norm", what their names in this layout begin with.
        classifier: The kind that this layout has, where it has one.
        always_final_norm: The encoder ends with a norm in every model of this layout.
        split_qkv: Query, key and value are three weights.
        unused: Entries that the layout's own models hold and do not need, and why.
    """

    key: str
    title: str
    renames: Renames
    parts: dict[str, str]
    classifier: str | None = None
    always_final_norm: bool = False
    split_qkv: bool = False
    unused: dict[str, str] = field(default_factory=dict)

    def theirs(self, ours: str) -> tuple[str, ...]:
        """The layout's name of a parameter; three where query, key and value make up ours, in this order."""
        names = [ours]
        if self.split_qkv and ours.endswith(".attn.qkv.weight"):
            names = [ours.replace(".attn.qkv.", f".attn.{part}.") for part in ("query", "key", "value")]
        for pattern, replacement in self.renames:
            names = [re.sub(pattern, replacement, name) for name in names]
        return tuple(names)

    def part(self, name: str) -> str | None:
        """Which part, other than the encoder, an entry of a checkpoint belongs to."""
        return next((part for part, begins in self.parts.items() if re.match(begins, name)), None)

    def has(self, part: str, names: Collection[str]) -> bool:
        """Whether there is anything of a part among these names."""
        return any(self.part(name) == part for name in names)

    def depth(self, stem: str, names: Collection[str]) -> int:
        """Blocks under ``stem``, "encoder" for example: one more than the highest number."""
        begins = self.theirs(f"{stem}.blocks.0.norm1.weight")[0].split(".0.")[0]
        numbers = [re.match(rf"{re.escape(begins)}\.(\d+)\.", name) for name in names]
        return max((int(number[1]) + 1 for number in numbers if number), default=0)


OURS = Layout("mar_fast", "mar_fast", (), {**_OUR_PARTS, "final_norm": r"encoder\.norm\."})

PRETRAINING = Layout("videomae", "VideoMAE pre-training", (), OURS.parts, always_final_norm=True)

FINE_TUNED = Layout(
    "videomae",
    "VideoMAE fine-tuned",
    ((r"^encoder\.", ""), (r"^classifier\.norm\.", "fc_norm."), (r"^classifier\.", "")),
    {"classifier": r"fc_norm\.|head\.", "decoder": _OUR_PARTS["decoder"], "final_norm": r"norm\."},
    classifier="linear",
)

_IN_BRIDGE = r"^(classifier\.blocks\.\d+)"
MAR_LAYOUT = Layout(
    "mar",
    "MAR",
    (
        (rf"{_IN_BRIDGE}\.norm1\.", r"\1.norm."),
        (rf"{_IN_BRIDGE}\.norm2\.", r"\1.norm_ffn."),
        (rf"{_IN_BRIDGE}\.attn\.qkv\.", r"\1.attn.to_qkv."),
        (rf"{_IN_BRIDGE}\.mlp\.fc1\.", r"\1.ffn.net.0."),
        (rf"{_IN_BRIDGE}\.mlp\.fc2\.", r"\1.ffn.net.3."),
        (r"^classifier\.proj\.", "encoder_to_cls_decoder."),
        (r"^classifier\.", "cls_head."),
        (r"^encoder\.", "backbone."),
    ),
    {
        "classifier": r"cls_head\.|encoder_to_cls_decoder\.",
        "decoder": _OUR_PARTS["decoder"],
        "final_norm": r"backbone\.norm\.",
    },
    classifier="bridging",
    always_final_norm=True,
    unused={"cls_head.mask_token": "nothing in MAR uses it"},
)


def hugging_face(kind: str, linear_biases: bool = False) -> Layout:
    """The layout of a transformers class.

    Args:
        kind: "VideoMAEModel", "VideoMAEForPreTraining" or "VideoMAEForVideoClassification".
        linear_biases: Biases are called query.bias and value.bias, not q_bias and v_bias as in the files of the hub.
    """
    root = "" if kind == "VideoMAEModel" else "videomae."
    inside = r"(\.layer\.\d+|\.decoder_layers\.\d+)"
    query, value = ("query.bias", "value.bias") if linear_biases else ("q_bias", "v_bias")
    return Layout(
        "hf",
        f"Hugging Face {kind}",
        (
            (r"^classifier\.norm\.", "fc_norm."),
            (r"^classifier\.head\.", "classifier."),
            (r"^encoder\.patch_embed\.proj\.", f"{root}embeddings.patch_embeddings.projection."),
            (r"^encoder\.norm\.", f"{root}layernorm."),
            (r"^encoder\.blocks\.", f"{root}encoder.layer."),
            (r"^decoder\.blocks\.", "decoder.decoder_layers."),
            (rf"{inside}\.norm1\.", r"\1.layernorm_before."),
            (rf"{inside}\.norm2\.", r"\1.layernorm_after."),
            (rf"{inside}\.attn\.proj\.", r"\1.attention.output.dense."),
            (rf"{inside}\.mlp\.fc1\.", r"\1.intermediate.dense."),
            (rf"{inside}\.mlp\.fc2\.", r"\1.output.dense."),
            (rf"{inside}\.attn\.q_bias$", rf"\1.attention.attention.{query}"),
            (rf"{inside}\.attn\.v_bias$", rf"\1.attention.attention.{value}"),
            (rf"{inside}\.attn\.(query|key|value)\.", r"\1.attention.attention.\2."),
        ),
        {
            "classifier": r"fc_norm\.|classifier\.",
            "decoder": _OUR_PARTS["decoder"],
            "final_norm": rf"{re.escape(root)}layernorm\.",
        },
        classifier="linear" if kind == "VideoMAEForVideoClassification" else None,
        split_qkv=True,
    )


def detect(where: str, names: Collection[str]) -> Layout:
    """The layout that these names follow.

    Raises:
        ValueError: none that is known.
    """

    def some(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in names)

    if some(r"(videomae\.)?(embeddings\.patch_embeddings|encoder\.layer)\."):
        linear_biases = not any(name.endswith(("q_bias", "v_bias")) for name in names)
        kind = "VideoMAEModel"
        if some(r"videomae\."):
            kind = "VideoMAEForPreTraining" if some(_OUR_PARTS["decoder"]) else "VideoMAEForVideoClassification"
        return hugging_face(kind, linear_biases)
    if some(r"backbone\.(patch_embed|blocks)\."):
        return MAR_LAYOUT
    if some(r"encoder\.(patch_embed|blocks)\."):
        return OURS if some(r"classifier\.") else PRETRAINING
    if some(r"(patch_embed|blocks)\."):
        return FINE_TUNED
    first = ", ".join(sorted(names)[:5]) or "no tensors"
    known = "MAR, VideoMAE (pre-training or fine-tuned), Hugging Face VideoMAE, or mar_fast itself"
    raise checks.bad(where, f"entries such as {first}", f"the names of {known}")
