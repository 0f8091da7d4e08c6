"""What a model costs, by arithmetic alone: parameters, multiply-adds, bytes moved, and the time floor on a device.

Only matrix products count as multiply-adds, as in the paper's table (MAR, arXiv 2207.11660, "GFLOPs" there); one
multiply-add is two FLOPs. Two ways are counted: "visible", what `mar_fast.MAR` computes, and "original", what
`mar_fast.reference.MAR` computes, as the original code does: all tubelets embedded, attention matrices written out,
the pixel decoder's last block and head run on every token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .config import MARConfig
from .kernels import checks

Method = Literal["visible", "original"]


@dataclass(frozen=True)
class Part:
    """One kind of work in the model, summed over the batch and over its layers.

    Attributes:
        name: "encoder.attention", "classifier.mlp", ...
        parameters: Trainable values.
        multiply_adds: Of its matrix products.
        bytes_moved: Weights, inputs and outputs, each read or written once.
    """

    name: str
    parameters: int
    multiply_adds: int
    bytes_moved: int

    def floor_seconds(self, peak_flops: float, bandwidth: float) -> float:
        """No device of this peak rate (FLOP/s) and memory bandwidth (bytes/s) can be faster (roofline)."""
        return max(2 * self.multiply_adds / peak_flops, self.bytes_moved / bandwidth)


@dataclass(frozen=True)
class Cost:
    """The parts of a model and their sums."""

    parts: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        """Trainable values in the parts that run: without the pixel decoder, unless it was counted."""
        return sum(part.parameters for part in self.parts)

    @property
    def multiply_adds(self) -> int:
        """For the whole batch."""
        return sum(part.multiply_adds for part in self.parts)

    @property
    def bytes_moved(self) -> int:
        """For the whole batch."""
        return sum(part.bytes_moved for part in self.parts)

    def floor_seconds(self, peak_flops: float, bandwidth: float) -> float:
        """The parts one after the other, each at its roofline: peak in FLOP/s, bandwidth in bytes/s.

        Raises:
            ValueError: a rate is not above 0.
        """
        checks.positive("peak_flops", peak_flops)
        checks.positive("bandwidth", bandwidth)
        return sum(part.floor_seconds(peak_flops, bandwidth) for part in self.parts)


def count(
    config: MARConfig,
    mask_ratio: float | None = None,
    batch: int = 1,
    *,
    visible: int | None = None,
    method: Method = "visible",
    reconstruct: bool = False,
    training: bool = False,
    bytes_per_value: int = 2,
    bytes_per_pixel: int = 1,
) -> Cost:
    """Count a forward pass, or forward and backward.

    Args:
        config: The model.
        mask_ratio: Share of masked tokens; None is the config's own.
        batch: Clips.
        visible: Visible tokens of each clip, for masks that no mask_ratio of the config's cells gives; in place of it.
        method: "visible" as `mar_fast.MAR` computes, "original" as the original code does.
        reconstruct: Include the pixel decoder and its loss.
        training: Add backward, taken as twice the forward; the clip itself needs no gradient.
        bytes_per_value: Of weights and activations: 2 for bf16, 4 for float32.
        bytes_per_pixel: Of the clip: 1 for uint8.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    if not isinstance(config, MARConfig):
        raise checks.bad_type("config", type(config).__name__, "a MARConfig")
    if mask_ratio is not None:
        config = replace(config, mask_ratio=mask_ratio)
    if visible is None:
        visible = config.num_visible
    elif mask_ratio is not None:
        raise checks.bad("mask_ratio and visible", f"{mask_ratio} and {visible}", "one of them")
    elif not isinstance(visible, int) or not 1 <= visible <= config.num_tokens:
        raise checks.bad("visible", repr(visible), f"a whole number from 1 to {config.num_tokens}")
    for name, value in (("batch", batch), ("bytes_per_value", bytes_per_value), ("bytes_per_pixel", bytes_per_pixel)):
        if not isinstance(value, int) or value < (0 if name == "batch" else 1):
            raise checks.bad(name, repr(value), "a whole number")
    if method not in ("visible", "original"):
        raise checks.bad("method", repr(method), "'visible' or 'original'")
    if reconstruct and not config.decoder_depth:
        raise checks.bad("reconstruct", reconstruct, "False: this model has no decoder (decoder_depth is 0)")
    counter = _Counter(batch, visible, bytes_per_value, bytes_per_pixel, original=method == "original")
    parts = [*counter.encoder(config), *counter.classifier(config)]
    if reconstruct:
        parts += counter.decoder(config)
    if training:
        parts = [_with_backward(part) for part in parts]
    return Cost(tuple(part for part in parts if part.parameters or part.bytes_moved))


def _with_backward(part: Part) -> Part:
    times = 2 if part.name == "encoder.patch_embed" else 3  # gradient of the weight only
    return replace(part, multiply_adds=times * part.multiply_adds, bytes_moved=times * part.bytes_moved)


@dataclass(frozen=True)
class _Counter:
    """Formulas of the parts. B clips, L tokens in the grid, N visible, D width, as everywhere."""

    batch: int
    visible: int
    value: int
    pixel: int
    original: bool

    def linear(self, name: str, tokens: int, inputs: int, outputs: int, *, bias: bool = True, layers: int = 1) -> Part:
        weights = inputs * outputs + bias * outputs
        values = weights + self.batch * tokens * (inputs + outputs)
        return Part(
            name, layers * weights, layers * self.batch * tokens * inputs * outputs, layers * values * self.value
        )

    def norms(self, name: str, tokens: int, width: int, layers: int) -> Part:
        """Add to the residual and normalise: reads both, writes sum and norm."""
        return Part(name, layers * 2 * width, 0, layers * (2 * width + self.batch * tokens * 4 * width) * self.value)

    def attention(self, name: str, queries: int, keys: int, width: int, heads: int, layers: int) -> Part:
        values = 2 * (queries + keys) * width  # query, key, value and output
        if self.original:
            values += 4 * heads * queries * keys  # scores and probabilities, each written and read
        operations = 2 * queries * keys * width
        return Part(name, 0, layers * self.batch * operations, layers * self.batch * values * self.value)

    def blocks(
        self, name: str, tokens: int, width: int, heads: int, hidden: int, layers: int, *,
        key_bias: bool = False, rows: int | None = None,
    ) -> Iterator[Part]:  # fmt: skip
        """``rows``: how many tokens of the last layer come out of it, where that is not all of them."""
        groups = [(layers, tokens)] if rows is None else [(layers - 1, tokens), (1, rows)]
        for count_, out in groups:
            query = self.linear("", out, width, width, layers=count_)
            key = self.linear("", tokens, width, width, bias=key_bias, layers=count_)
            value = self.linear("", tokens, width, width, layers=count_)
            yield _sum(f"{name}.qkv", query, key, value)
            yield self.attention(f"{name}.attention", out, tokens, width, heads, count_)
            yield self.linear(f"{name}.proj", out, width, width, layers=count_)
            up = self.linear("", out, width, hidden, layers=count_)
            yield _sum(f"{name}.mlp", up, self.linear("", out, hidden, width, layers=count_))
            norms = self.norms("", tokens, width, count_), self.norms("", out, width, count_)
            yield _sum(f"{name}.norms", *norms)

    def encoder(self, config: MARConfig) -> list[Part]:
        visible, width = self.visible, config.embed_dim
        embedded = config.num_tokens if self.original else visible
        patch = self.linear("encoder.patch_embed", embedded, config.patch_values, width)
        pixels = self.batch * embedded * config.patch_values
        patch = replace(patch, bytes_moved=patch.bytes_moved + pixels * (self.pixel - self.value))
        hidden = round(width * config.mlp_ratio)
        blocks = self.blocks("encoder", visible, width, config.num_heads, hidden, config.depth)
        return _merge([patch, *blocks, self.norms("encoder.norms", visible, width, int(config.final_norm))])

    def classifier(self, config: MARConfig) -> list[Part]:
        visible, width, blocks = self.visible, config.embed_dim, list[Part]()
        if config.classifier is None:
            return []
        if config.classifier == "bridging":
            width = config.bridge_embed_dim
            hidden = round(width * config.bridge_mlp_ratio)
            shape = (visible, width, config.bridge_num_heads, hidden, config.bridge_depth)
            blocks = [self.linear("classifier.proj_in", visible, config.embed_dim, width, bias=False)]
            blocks += self.blocks("classifier", *shape, key_bias=True)
        blocks.append(self.norms("classifier.norms", 1, width, 1))
        return _merge([*blocks, self.linear("classifier.head", 1, width, config.num_classes)])

    def decoder(self, config: MARConfig) -> list[Part]:
        tokens, width = config.num_tokens, config.decoder_embed_dim
        dropped = tokens - self.visible
        rows = tokens if self.original else dropped
        hidden = round(width * config.decoder_mlp_ratio)
        shape = (tokens, width, config.decoder_num_heads, hidden, config.decoder_depth)
        loss_bytes = self.batch * rows * config.patch_values * (self.pixel + self.value)
        token = Part("decoder.scatter", width, 0, self.batch * (self.visible + tokens) * width * self.value)
        return _merge([
            self.linear("decoder.proj_in", self.visible, config.embed_dim, width, bias=False),
            token,
            *self.blocks("decoder", *shape, rows=rows),
            self.norms("decoder.norms", rows, width, 1),
            self.linear("decoder.head", rows, width, config.patch_values),
            Part("decoder.loss", 0, 0, loss_bytes),
        ])  # fmt: skip


def _sum(name: str, *parts: Part) -> Part:
    return Part(
        name,
        sum(part.parameters for part in parts),
        sum(part.multiply_adds for part in parts),
        sum(part.bytes_moved for part in parts),
    )


def _merge(parts: list[Part]) -> list[Part]:
    """Parts of one name become one, in the order of their first appearance."""
    names = list(dict.fromkeys(part.name for part in parts))
    return [_sum(name, *(part for part in parts if part.name == name)) for name in names]
