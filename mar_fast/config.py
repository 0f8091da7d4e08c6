"""MARConfig: every size and rate of a model, and the named models."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from .kernels import checks

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class MARConfig:
    """A masked video transformer: encoder, classifier and, in training, pixel decoder (arXiv 2207.11660).

    Sizes are in pixels and frames, rates in [0, 1). Each LayerNorm has its own ``eps``, since checkpoints differ in
    them. The defaults are MAR's ViT-B.
    """

    # The clip
    num_frames: int = 16
    image_size: tuple[int, int] = (224, 224)
    channels: int = 3
    patch_size: tuple[int, int, int] = (2, 16, 16)
    """The tubelet (t, h, w)."""
    position_grid: tuple[int, int, int] | None = None
    """For weights that were trained at another size: the grid of their position tables, which are interpolated
    trilinearly to the model's grid. None means the model's own."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    """Normalisation of pixels in [0, 1], applied to uint8 clips and undone for the reconstruction target."""

    # Cell running masking, for calls without a mask
    mask_ratio: float = 0.5
    cell: tuple[int, int, int] = (1, 2, 2)

    # Encoder
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    encoder_eps: float = 1e-6
    final_norm: bool = True
    """A LayerNorm on the visible tokens after the last block; VideoMAE's mean-pooling classifiers have none."""
    final_norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    """Stochastic depth of the encoder's last block; it grows linearly from 0 (arXiv 1603.09382)."""

    # Classifier
    classifier: Literal["bridging", "linear"] | None = "bridging"
    num_classes: int = 400
    """0, for the linear classifier only, is no head: logits are (B, embed_dim), the mean of the tokens, normalised."""
    bridge_embed_dim: int = 512
    bridge_depth: int = 2
    bridge_num_heads: int = 4
    bridge_mlp_ratio: float = 4.0
    bridge_eps: float = 1e-6
    bridge_dropout: float = 0.0
    """In the bridging blocks: after the attention projection, after GELU and after the second linear layer."""
    classifier_norm_eps: float = 1e-6
    head_dropout: float = 0.0
    """Before the linear layer to the classes."""

    # Pixel decoder; depth 0 means none
    decoder_embed_dim: int = 384
    decoder_depth: int = 4
    decoder_num_heads: int = 6
    decoder_mlp_ratio: float = 4.0
    decoder_eps: float = 1e-6
    decoder_norm_eps: float = 1e-6
    norm_pix_loss: bool = True

    # Accepted only as 0: the attention ops have no dropout
    attention_dropout: float = 0.0
    gradient_checkpointing: bool = False
    """Recompute each block in backward instead of keeping its activations."""

    def __post_init__(self) -> None:
        for name, size in _LENGTHS.items():
            value = getattr(self, name)
            if value is None and name == "position_grid":
                continue
            if not isinstance(value, tuple | list):
                raise checks.bad_type(name, repr(value), "a tuple")
            object.__setattr__(self, name, tuple(value))
            if size and (len(value) != size or not all(isinstance(part, int) and part > 0 for part in value)):
                raise checks.bad(name, value, f"{size} whole numbers above 0")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise checks.bad(name, getattr(self, name), f"{self.channels} numbers, one for each channel")
        if min(self.std) <= 0:
            raise checks.bad("std", self.std, "numbers above 0")
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int:
                headless = name == "num_classes" and self.classifier == "linear"
                checks.whole(name, value, 0 if name == "decoder_depth" or headless else 1)
            elif name in _RATES:
                if not isinstance(value, int | float) or not 0 <= value < 1:
                    raise checks.bad(name, value, "a number in [0, 1)")
            elif field.type is float:
                checks.positive(name, value)
            elif field.type is bool and not isinstance(value, bool):
                raise checks.bad(name, repr(value), "true or false")
        if self.attention_dropout:
            raise checks.bad("attention_dropout", self.attention_dropout, "0: attention dropout is not supported")
        if self.classifier not in ("bridging", "linear", None):
            raise checks.bad("classifier", repr(self.classifier), "'bridging', 'linear' or None")
        for part in ("", "bridge_", "decoder_"):
            embed_dim, num_heads = getattr(self, f"{part}embed_dim"), getattr(self, f"{part}num_heads")
            if embed_dim % num_heads:
                raise checks.bad(f"{part}num_heads", num_heads, f"a divisor of {part}embed_dim {embed_dim}")
        extents = (("num_frames", self.num_frames), *(("image_size", side) for side in self.image_size))
        for (name, extent), step in zip(extents, self.patch_size, strict=True):
            if extent % step:
                raise checks.bad(name, extent, f"a multiple of the patch's {step}")
        if self.mask_ratio:
            masked_slots("mask_ratio", self.mask_ratio, self.cell)
            check_cell(self.cell, self.grid)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tubelets along time, height and width."""
        t, h, w = self.patch_size
        return self.num_frames // t, self.image_size[0] // h, self.image_size[1] // w

    @property
    def num_tokens(self) -> int:
        """L, the tubelets of a clip."""
        return math.prod(self.grid)

    @property
    def num_visible(self) -> int:
        """N, the tubelets that ``mask_ratio`` leaves visible."""
        if not self.mask_ratio:
            return self.num_tokens
        slots = math.prod(self.cell)
        return self.num_tokens // slots * (slots - masked_slots("mask_ratio", self.mask_ratio, self.cell))

    @property
    def patch_values(self) -> int:
        """Values in a tubelet: t * h * w * C."""
        return math.prod(self.patch_size) * self.channels


FIELDS = tuple(field.name for field in fields(MARConfig))
_RATES = ("mask_ratio", "drop_path_rate", "bridge_dropout", "head_dropout", "attention_dropout")


# Fields that are tuples, which JSON gives as lists, and how many whole numbers they hold; mean and std are others.
_LENGTHS = {"image_size": 2, "patch_size": 3, "cell": 3, "position_grid": 3, "mean": None, "std": None}


def masked_slots(argument: str, ratio: float, cell: tuple[int, int, int]) -> int:
    """How many slots of each cell a ratio masks.

    Raises:
        ValueError: that is not a whole number, or no slot stays visible.
    """
    slots = math.prod(cell)
    count = round(ratio * slots)
    if not 0 <= count < slots or abs(count - ratio * slots) > 1e-6:
        accepted = ", ".join(f"{k}/{slots}" for k in range(slots))
        raise checks.bad(argument, ratio, f"a whole number of the {slots} slots of cell {cell}: one of {accepted}")
    return count


def check_cell(cell: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
    """Check that cells fill the grid exactly."""
    if any(extent % step for extent, step in zip(grid, cell, strict=True)):
        raise checks.bad("cell", cell, f"a cell whose sides divide the grid {grid}")


# Encoders are VideoMAE's (arXiv 2203.12602), giant is VideoMAE v2's (arXiv 2303.16727). The pixel decoders of base and
# large are MAR's, the others are the pre-training decoders of these papers.
_COLUMNS = ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
_ROWS = {
    "small": (384, 12, 6, 192, 4, 3),
    "base": (768, 12, 12, 384, 4, 6),
    "large": (1024, 24, 16, 512, 12, 8),
    "huge": (1280, 32, 16, 640, 12, 8),
    "giant": (1408, 40, 16, 512, 4, 8),
}
_SIZES: dict[str, dict[str, Any]] = {size: dict(zip(_COLUMNS, row, strict=True)) for size, row in _ROWS.items()}
_SIZES["giant"] |= dict(mlp_ratio=48 / 11, patch_size=(2, 14, 14))

# A dense VideoMAE classifier: mean pooling and its own norm instead of the encoder's last one, no decoder.
_DENSE: dict[str, Any] = dict(classifier="linear", final_norm=False, mask_ratio=0.0, decoder_depth=0)

SIZES = tuple(_SIZES)
"""Sizes of the named models: "small", "base", ..."""


def list_models() -> list[str]:
    """The names that `create_model` and `named_config` take."""
    return [f"{family}_vit_{size}" for family in ("mar", "videomae") for size in _SIZES]


def named_config(name: str, **overrides: Any) -> MARConfig:
    """The configuration of a named model, with any field overridden.

    Args:
        name: One of `list_models`: ``mar_vit_*`` has the bridging classifier, 50 % masking and a pixel decoder,
            ``videomae_vit_*`` is the dense classifier.
        **overrides: Fields of `MARConfig`.

    Raises:
        ValueError: an unknown name or a value that does not fit.
        TypeError: an unknown field.
    """
    if name not in list_models():
        raise checks.bad("name", repr(name), "one of " + ", ".join(list_models()))
    for key in overrides:
        if key not in FIELDS:
            raise checks.bad_type(key, "an unknown field", "one of " + ", ".join(sorted(FIELDS)))
    family, _, size = name.split("_")
    return replace(MARConfig(), **{**_SIZES[size], **(_DENSE if family == "videomae" else {}), **overrides})


def known_heads(prefix: str, embed_dim: int, depth: int) -> int | None:
    """Heads of a named model's encoder (prefix ""), bridging classifier ("bridge_") or pixel decoder ("decoder_").

    None if no named model has one of this embed_dim and, for the encoder, of this depth.
    """
    for name in list_models():
        known = asdict(named_config(name))
        if known[f"{prefix}embed_dim"] == embed_dim and (prefix or known["depth"] == depth):
            return int(known[f"{prefix}num_heads"])
    return None
