"""What a model costs, by arithmetic alone: parameters, multiply-adds, bytes moved, and the time floor on a device.

Only matrix products count as multiply-adds, as in the paper's table (MAR, arXiv 2207.11660, "GFLOPs" there); one
multiply-add is two FLOPs. The method "visible" counts what `mar_fast.MAR` computes; "original" counts what
`mar_fast.reference.MAR` and the original code compute: all tubelets embedded, attention matrices written out, the pixel
decoder's last block and head on every token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .config import MARConfig
from .kernels import checks

Method = Literal["visible", "original"]


@dataclass(frozen=True)
class Part:
    """One kind of work in the model, summed over the batch and the layers.

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
        """The shortest time possible (roofline) at this peak rate (FLOP/s) and memory bandwidth (bytes/s)."""
        return max(2 * self.multiply_adds / peak_flops, self.bytes_moved / bandwidth)


@dataclass(frozen=True)
class Cost:
    """The parts of a model and their sums, for the whole batch; the pixel decoder is one only with ``reconstruct``."""

    parts: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        """Trainable values."""
        return sum(part.parameters for part in self.parts)

    @property
    def multiply_adds(self) -> int:
        """Of all matrix products."""
        return sum(part.multiply_adds for part in self.parts)

    @property
    def bytes_moved(self) -> int:
        """Of all parts."""
        return sum(part.bytes_moved for part in self.parts)

    def floor_seconds(self, peak_flops: float, bandwidth: float) -> float:
        """The shortest time possible for the parts one after the other: peak in FLOP/s, bandwidth in bytes/s.

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
        visible: Visible tokens of each clip, instead of mask_ratio, for numbers that no ratio of cells gives.
        method: "visible" for what `mar_fast.MAR` computes, "original" for what the original code does.
        reconstruct: Include the pixel decoder and its loss.
        training: Add backward, counted as twice the forward; the clip itself needs no gradient.
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
    checks.whole("batch", batch, 0)
    checks.whole("bytes_per_value", bytes_per_value)
    checks.whole("bytes_per_pixel", bytes_per_pixel)
    if method not in ("visible", "original"):
        raise checks.bad("method", repr(method), "'visible' or 'original'")
    if reconstruct and not config.decoder_depth:
        raise checks.bad("reconstruct", reconstruct, "False: this model has no decoder (decoder_depth is 0)")
    counter = _Counter(config, batch, visible, bytes_per_value, bytes_per_pixel, original=method == "original")
    parts = [*counter.encoder(), *counter.classifier(), *(counter.decoder() if reconstruct else ())]
    return Cost(tuple(_merged(parts, training)))


def _merged(parts: list[Part], training: bool) -> Iterator[Part]:
    """Parts with the same name added up, in order of first appearance; with ``training`` backward is included."""
    for name in dict.fromkeys(part.name for part in parts):
        own = Cost(tuple(part for part in parts if part.name == name))
        times = 1
        if training:
            times = 2 if name == "encoder.patch_embed" else 3  # its only gradient is the weight's
        if own.parameters or own.bytes_moved:
            yield Part(name, own.parameters, times * own.multiply_adds, times * own.bytes_moved)


@dataclass(frozen=True)
class _Counter:
    """Formulas of the parts; ``value`` and ``pixel`` are bytes."""

    config: MARConfig
    batch: int
    visible: int
    value: int
    pixel: int
    original: bool

    def linear(self, name: str, tokens: int, inputs: int, outputs: int, *, bias: bool = True, layers: int = 1) -> Part:
        weights = inputs * outputs + bias * outputs
        products = layers * self.batch * tokens * inputs * outputs
        values = layers * (weights + self.batch * tokens * (inputs + outputs))
        return Part(name, layers * weights, products, values * self.value)

    def norms(self, name: str, tokens: int, dim: int, layers: int) -> Part:
        """Add to the residual and normalise: reads both, writes the sum and its norm."""
        return Part(name, layers * 2 * dim, 0, layers * (2 * dim + self.batch * tokens * 4 * dim) * self.value)

    def attention(self, name: str, queries: int, keys: int, dim: int, heads: int, layers: int) -> Part:
        values = 2 * (queries + keys) * dim  # query, key, value and output
        if self.original:
            values += 4 * heads * queries * keys  # scores and probabilities, each written and read
        products = 2 * queries * keys * dim
        return Part(name, 0, layers * self.batch * products, layers * self.batch * values * self.value)

    def blocks(
        self,
        name: str,
        tokens: int,
        dim: int,
        heads: int,
        mlp_ratio: float,
        layers: int,
        *,
        key_bias: bool = False,
        last_rows: int | None = None,
    ) -> Iterator[Part]:
        """``last_rows``: how many tokens the last layer returns, if not all of them."""
        hidden = round(dim * mlp_ratio)
        groups = [(layers, tokens)] if last_rows is None else [(layers - 1, tokens), (1, last_rows)]
        for depth, rows in groups:
            yield self.linear(f"{name}.qkv", rows, dim, dim, layers=depth)
            yield self.linear(f"{name}.qkv", tokens, dim, dim, bias=key_bias, layers=depth)
            yield self.linear(f"{name}.qkv", tokens, dim, dim, layers=depth)
            yield self.attention(f"{name}.attention", rows, tokens, dim, heads, depth)
            yield self.linear(f"{name}.proj", rows, dim, dim, layers=depth)
            yield self.linear(f"{name}.mlp", rows, dim, hidden, layers=depth)
            yield self.linear(f"{name}.mlp", rows, hidden, dim, layers=depth)
            yield self.norms(f"{name}.norms", tokens, dim, depth)
            yield self.norms(f"{name}.norms", rows, dim, depth)

    def encoder(self) -> Iterator[Part]:
        config, visible, dim = self.config, self.visible, self.config.embed_dim
        embedded = config.num_tokens if self.original else visible
        patch = self.linear("encoder.patch_embed", embedded, config.patch_values, dim)
        pixels = self.batch * embedded * config.patch_values
        yield replace(patch, bytes_moved=patch.bytes_moved + pixels * (self.pixel - self.value))
        yield from self.blocks("encoder", visible, dim, config.num_heads, config.mlp_ratio, config.depth)
        yield self.norms("encoder.norms", visible, dim, int(config.final_norm))

    def classifier(self) -> Iterator[Part]:
        config, visible, dim = self.config, self.visible, self.config.embed_dim
        if config.classifier is None:
            return
        if config.classifier == "bridging":
            dim = config.bridge_embed_dim
            shape = (visible, dim, config.bridge_num_heads, config.bridge_mlp_ratio, config.bridge_depth)
            yield self.linear("classifier.proj_in", visible, config.embed_dim, dim, bias=False)
            yield from self.blocks("classifier", *shape, key_bias=True)
        yield self.norms("classifier.norms", 1, dim, 1)
        if config.num_classes:
            yield self.linear("classifier.head", 1, dim, config.num_classes)

    def decoder(self) -> Iterator[Part]:
        config, visible, dim = self.config, self.visible, self.config.decoder_embed_dim
        tokens = config.num_tokens
        rows = tokens if self.original else tokens - visible
        shape = (tokens, dim, config.decoder_num_heads, config.decoder_mlp_ratio, config.decoder_depth)
        yield self.linear("decoder.proj_in", visible, config.embed_dim, dim, bias=False)
        yield Part("decoder.scatter", dim, 0, self.batch * (visible + tokens) * dim * self.value)
        yield from self.blocks("decoder", *shape, last_rows=rows)
        yield self.norms("decoder.norms", rows, dim, 1)
        yield self.linear("decoder.head", rows, dim, config.patch_values)
        yield Part("decoder.loss", 0, 0, self.batch * rows * config.patch_values * (self.pixel + self.value))
