"""The ops and their peers: for one op and shape its operands, and every way to the same output on this machine."""

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mar_fast import kernels
from mar_fast.config import IMAGENET_MEAN, IMAGENET_STD
from mar_fast.kernels.gather_patch_embed import eager_gather_patch_embed, gather_tubelets, per_channel
from mar_fast.kernels.linear_gelu import eager_linear_gelu
from mar_fast.kernels.masked_patch_loss import eager_masked_patch_loss
from mar_fast.kernels.scatter_tokens import eager_scatter_tokens

Operands = dict[str, Any]
Function = Callable[..., Any]
PATCH, CHANNELS = (2, 16, 16), 3
TOKENS = 1568
PART = "cuBLAS on gathered patches"  # a peer that does a part of the forward pass: its results are not checked


@dataclass(frozen=True)
class OpCase:
    """One op at one shape.

    Attributes:
        op: Its name.
        label: The shape in words.
        tokens: Of a clip, for the x axis.
        dtype: Of the operands that are activations or weights.
        operands: Makes a set of operands.
        ours: The op.
        peers: Other functions of the operands with the same output; the first one that is measured is the baseline.
            On a CPU the first one is what our op runs there.
        differentiated: Operands that get gradients.
        flops, bytes: The least that the forward pass must compute and move.
        backward: How many times as much of each the backward pass must do at least: it reads the gradients of the
            outputs and what it recomputes from, and writes those of the differentiated operands.
    """

    op: str
    label: str
    tokens: int
    dtype: torch.dtype
    operands: Callable[[], Operands]
    ours: Function
    peers: Mapping[str, Function]
    differentiated: tuple[str, ...]
    bytes: float
    backward: tuple[float, float]
    flops: float = 0.0


def random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Standard normal values; zeros would flatter, since a chip runs faster on them."""
    return torch.randn(*shape, device=device).to(dtype)


def randoms(device: torch.device, dtype: torch.dtype, **shapes: tuple[int, ...]) -> Operands:
    """An operand of each shape; with these weights a product's output is about as large as its input."""
    made = {name: random(device, dtype, *shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name.endswith("weight") and len(shape) > 1:
            made[name] /= math.prod(shape[1:]) ** 0.5
    return made


def index(device: torch.device, batch: int, count: int) -> Tensor:
    """(B, N) int32, sorted, another choice in each clip."""
    return torch.rand(batch, TOKENS, device=device).argsort(1)[:, :count].sort(1).values.int()


def uint8_clips(device: torch.device, batch: int) -> Tensor:
    """(B, 3, 16, 224, 224), channels last as decoders give them."""
    return torch.randint(256, (batch, 16, 224, 224, 3), dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)


def compiled(function: Function) -> Function:
    """The same under torch.compile, one graph."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def scores_written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, H, N, d) each: the whole matrix of scores, as the original does it."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.softmax(-1) @ value


def on_packed(attend: Function) -> Function:
    """A function of query, key and value (B, H, N, d) as one of packed qkv (B, N, 3, H, d), without a copy."""

    def attention(qkv: Tensor) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        return attend(query, key, value).transpose(1, 2).flatten(2)

    return attention


def attention_peers(device: torch.device) -> dict[str, Function]:
    """Every other attention that this machine has; plain "SDPA" is the backend that PyTorch chooses."""
    sdpa = F.scaled_dot_product_attention
    flex = torch.compile(importlib.import_module("torch.nn.attention.flex_attention").flex_attention, dynamic=False)
    backends = {
        "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
        "SDPA flash": SDPBackend.FLASH_ATTENTION,
        "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    backends = backends if device.type == "cuda" else {}
    return {
        **{name: on_packed(sdpa_kernel(backend)(sdpa)) for name, backend in backends.items()},
        "SDPA": on_packed(sdpa),
        "scores written out": on_packed(scores_written_out),
        "flex_attention": on_packed(flex),
        **{name: kernels.use_backend(name)(kernels.attention) for name in ("xformers", "flash_attn")},
    }


def attention(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, heads: int, size: int = 64) -> OpCase:
    """Attention over visible tokens."""
    return OpCase(
        op="attention",
        label=f"{batch} clips, {tokens} tokens, {heads} heads of {size}",
        tokens=tokens,
        dtype=dtype,
        operands=lambda: randoms(device, dtype, qkv=(batch, tokens, 3, heads, size)),
        ours=kernels.attention,
        peers=attention_peers(device),
        differentiated=("qkv",),
        flops=4.0 * batch * heads * tokens**2 * size,
        bytes=4.0 * batch * tokens * heads * size * dtype.itemsize,
        backward=(2.5, 2.0),
    )


def attention_kvpacked(
    device: torch.device, dtype: torch.dtype, batch: int, queries: int, tokens: int, heads: int, size: int = 64
) -> OpCase:
    """Attention of some tokens to all, as in the last decoder block; it has no peers and is in no suite."""
    return OpCase(
        op="attention_kvpacked",
        label=f"{batch} clips, {queries} of {tokens} tokens, {heads} heads of {size}",
        tokens=tokens,
        dtype=dtype,
        operands=lambda: randoms(device, dtype, q=(batch, queries, heads, size), kv=(batch, tokens, 2, heads, size)),
        ours=kernels.attention_kvpacked,
        peers={},
        differentiated=("q", "kv"),
        flops=4.0 * batch * heads * queries * tokens * size,
        bytes=2.0 * batch * (queries + tokens) * heads * size * dtype.itemsize,
        backward=(2.5, 2.0),
    )


def gather_patch_embed(
    device: torch.device, dtype: torch.dtype, batch: int, tokens: int, width: int, pixels: torch.dtype
) -> OpCase:
    """Embedding of visible tubelets from a planar floating-point clip, or from a channels-last uint8 one."""
    raw = pixels == torch.uint8
    normalise: Operands = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD) if raw else {}
    plain = functools.partial(eager_gather_patch_embed, **normalise)

    def conv_then_index(video: Tensor, keep_idx: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor) -> Tensor:
        if raw:
            mean, std = (per_channel(values, video.device).view(3, 1, 1, 1) for values in normalise.values())
            video = (video.float() / 255 - mean) / std
        every = F.conv3d(video.to(weight.dtype), weight, bias, stride=PATCH).flatten(2).transpose(1, 2) + pos_embed
        return every.gather(1, keep_idx.long()[..., None].expand(-1, -1, every.shape[2])).to(weight.dtype)

    values = CHANNELS * PATCH[0] * PATCH[1] * PATCH[2]
    gathered = functools.cache(lambda: random(device, dtype, batch, tokens, values))

    def linear_of_gathered(weight: Tensor, bias: Tensor, **rest: Tensor) -> Tensor:
        return F.linear(gathered(), weight.flatten(1), bias)

    moved = batch * tokens * (values * pixels.itemsize + width * dtype.itemsize) + values * width * dtype.itemsize
    return OpCase(
        op="gather_patch_embed",
        label=f"{batch} clips, {tokens} of 1568 tubelets, width {width}, {str(pixels)[6:]} clip",
        tokens=tokens,
        dtype=dtype,
        operands=lambda: dict(
            video=uint8_clips(device, batch) if raw else random(device, pixels, batch, CHANNELS, 16, 224, 224),
            keep_idx=index(device, batch, tokens),
            pos_embed=random(device, torch.float32, TOKENS, width),
            **randoms(device, dtype, weight=(width, CHANNELS, *PATCH), bias=(width,)),
        ),
        ours=functools.partial(kernels.gather_patch_embed, **normalise),
        peers={
            "reshape + index + linear": plain,
            "reshape + index + linear, compiled": compiled(plain),
            "Conv3d of all, then index": conv_then_index,
            PART: linear_of_gathered,
        },
        differentiated=("weight", "bias"),
        flops=2.0 * batch * tokens * values * width,
        bytes=float(moved),
        backward=(1.0, 1.0),
    )


def add_layer_norm(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, width: int) -> OpCase:
    """Residual add and LayerNorm."""

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return F.layer_norm(residual, weight.shape, weight, bias, 1e-6), residual

    rows = batch, tokens, width
    return OpCase(
        op="add_layer_norm",
        label=f"{batch} clips, {tokens} tokens, width {width}",
        tokens=tokens,
        dtype=dtype,
        operands=lambda: randoms(device, dtype, x=rows, residual=rows, weight=(width,), bias=(width,)),
        ours=kernels.add_layer_norm,
        peers={"PyTorch": plain, "PyTorch, compiled": compiled(plain)},
        differentiated=("x", "residual", "weight", "bias"),
        bytes=4.0 * batch * tokens * width * dtype.itemsize,
        backward=(0.0, 1.0),
    )


def bias_gelu(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, width: int) -> OpCase:
    """Bias and GELU of the MLP's hidden activation."""

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    return OpCase(
        op="bias_gelu",
        label=f"{batch} clips, {tokens} tokens, width {width}",
        tokens=tokens,
        dtype=dtype,
        operands=lambda: randoms(device, dtype, x=(batch, tokens, width), bias=(width,)),
        ours=kernels.bias_gelu,
        peers={"PyTorch": plain, "PyTorch, compiled": compiled(plain)},
        differentiated=("x", "bias"),
        bytes=2.0 * batch * tokens * width * dtype.itemsize,
        backward=(0.0, 1.5),
    )


def linear_gelu(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, width: int, hidden: int) -> OpCase:
    """First half of the MLP."""

    def product_then_bias_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.bias_gelu(F.linear(x, weight), bias)

    rows = batch * tokens
    return OpCase(
        op="linear_gelu",
        label=f"{batch} clips, {tokens} tokens, width {width} to {hidden}",
        tokens=tokens,
        dtype=dtype,
        operands=lambda: randoms(device, dtype, x=(batch, tokens, width), weight=(hidden, width), bias=(hidden,)),
        ours=kernels.linear_gelu,
        peers={
            "PyTorch": eager_linear_gelu,
            "PyTorch, compiled": compiled(eager_linear_gelu),
            "linear, then bias_gelu": product_then_bias_gelu,
        },
        differentiated=("x", "weight", "bias"),
        flops=2.0 * rows * width * hidden,
        bytes=float((rows * (width + hidden) + width * hidden) * dtype.itemsize),
        backward=(2.0, 3.0),
    )


def mlp(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, width: int, hidden: int) -> OpCase:
    """The whole MLP, without the bias of its second layer, as a block calls it in training."""

    def plain(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor) -> Tensor:
        return F.linear(eager_linear_gelu(x, fc1_weight, fc1_bias), fc2_weight)

    weights = dict(fc1_weight=(hidden, width), fc1_bias=(hidden,), fc2_weight=(width, hidden))
    rows = batch * tokens
    return OpCase(
        op="mlp",
        label=f"{batch} clips, {tokens} tokens, width {width}, hidden {hidden}",
        tokens=tokens,
        dtype=dtype,
        operands=lambda: randoms(device, dtype, x=(batch, tokens, width), **weights),
        ours=kernels.mlp,
        peers={"PyTorch": plain, "PyTorch, compiled": compiled(plain)},
        differentiated=("x", "fc1_weight", "fc1_bias", "fc2_weight"),
        flops=4.0 * rows * width * hidden,
        bytes=2.0 * (rows + hidden) * width * dtype.itemsize,
        backward=(2.0, 3.0),
    )


def scatter_tokens(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, width: int) -> OpCase:
    """The decoder's input."""
    return OpCase(
        op="scatter_tokens",
        label=f"{batch} clips, {tokens} of 1568 tokens, width {width}",
        tokens=tokens,
        dtype=dtype,
        operands=lambda: dict(
            keep_idx=index(device, batch, tokens),
            pos_embed=random(device, torch.float32, TOKENS, width),
            **randoms(device, dtype, visible=(batch, tokens, width), mask_token=(width,)),
        ),
        ours=kernels.scatter_tokens,
        peers={"PyTorch": eager_scatter_tokens, "PyTorch, compiled": compiled(eager_scatter_tokens)},
        differentiated=("visible", "mask_token"),
        bytes=float(batch * (tokens + TOKENS) * width * dtype.itemsize),
        backward=(0.0, 1.0),
    )


def masked_patch_loss(device: torch.device, dtype: torch.dtype, batch: int, tokens: int) -> OpCase:
    """The reconstruction loss from a uint8 clip as a decoder gives it; ``tokens`` are the dropped ones."""
    options: Operands = dict(patch_size=PATCH, mean=IMAGENET_MEAN, std=IMAGENET_STD, normalize=True)
    plain = functools.partial(eager_masked_patch_loss, **options)

    def all_then_index(pixels: Tensor, video: Tensor, drop_idx: Tensor) -> Tensor:
        """As the original does it: normalise every patch of the clip, then take the dropped ones."""
        every = torch.arange(TOKENS, device=video.device).expand(len(video), -1)
        cells = gather_tubelets(video, every, PATCH).permute(0, 1, 3, 4, 5, 2).flatten(2, 4).float() / 255
        cells = (cells - cells.mean(2, keepdim=True)) / (cells.var(2, unbiased=True, keepdim=True).sqrt() + 1e-6)
        chosen = cells.flatten(2).gather(1, drop_idx.long()[..., None].expand(-1, -1, pixels.shape[2]))
        return F.mse_loss(pixels.float(), chosen)

    return OpCase(
        op="masked_patch_loss",
        label=f"{batch} clips, {tokens} of 1568 tubelets dropped",
        tokens=tokens,
        dtype=dtype,
        operands=lambda: dict(
            pixels=random(device, dtype, batch, tokens, 1536),
            video=uint8_clips(device, batch),
            drop_idx=index(device, batch, tokens),
        ),
        ours=functools.partial(kernels.masked_patch_loss, **options),
        peers={
            "PyTorch": plain,
            "all patches, then index": all_then_index,
            "PyTorch, compiled": compiled(plain),
        },
        differentiated=("pixels",),
        bytes=float(batch * tokens * 1536 * (1 + dtype.itemsize)),
        backward=(0.0, 2 * dtype.itemsize / (1 + dtype.itemsize)),
    )


# Width and heads of an encoder.
SIZES = {"small": (384, 6), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16), "giant": (1408, 16)}


def op_cases(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[str], batches: Sequence[int], kept: Sequence[float]
) -> Iterator[OpCase]:
    """Every op at every size, batch and keep ratio."""
    for size, batch, share in itertools.product(sizes, batches, kept):
        width, heads = SIZES[size]
        tokens = round(TOKENS * share)
        for pixels in (dtype, torch.uint8):
            yield gather_patch_embed(device, dtype, batch, tokens, width, pixels)
        yield attention(device, dtype, batch, tokens, heads)
        yield add_layer_norm(device, dtype, batch, tokens, width)
        yield bias_gelu(device, dtype, batch, tokens, 4 * width)
        yield linear_gelu(device, dtype, batch, tokens, width, 4 * width)
        yield mlp(device, dtype, batch, tokens, width, 4 * width)
        if share < 1:
            yield scatter_tokens(device, dtype, batch, tokens, width // 2)
            yield masked_patch_loss(device, dtype, batch, TOKENS - tokens)
