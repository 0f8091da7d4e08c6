"""The ops and their peers: for one op and shape, every way to compute it that is present on this machine.

Each case holds operands, a set of them for each turn so that none is left in a cache, and providers: functions of the
operands that give the same output. The first provider is ours.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mar_fast import kernels
from mar_fast.config import IMAGENET_MEAN, IMAGENET_STD
from mar_fast.kernels.gather_patch_embed import eager_gather_patch_embed, gather_tubelets, per_channel
from mar_fast.kernels.masked_patch_loss import eager_masked_patch_loss
from mar_fast.kernels.scatter_tokens import eager_scatter_tokens

Operands = dict[str, Any]
Provider = Callable[..., Any]
GRID, PATCH, CHANNELS = (8, 14, 14), (2, 16, 16), 3
TOKENS = 1568


@dataclass(frozen=True)
class OpCase:
    """One op at one shape. ``flops`` and ``bytes`` are of the forward pass: the least that any provider must do.

    ``backward`` says how many times as much of each the backward pass must do at least: it reads the gradients of the
    outputs and what it recomputes from, and writes those of the differentiated operands.

    ``bounds`` are functions that do only a part of the work, for comparison: their results are not checked. ``graph``
    says whether the forward pass is timed as a CUDA graph.
    """

    op: str
    label: str
    tokens: int
    dtype: torch.dtype
    operands: Callable[[], Operands]
    providers: Mapping[str, Provider]
    differentiated: tuple[str, ...]
    flops: float
    bytes: float
    backward: tuple[float, float]
    bounds: Mapping[str, Provider] = field(default_factory=dict)
    graph: bool = False


def random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Standard normal values; zeros would flatter, since a chip runs faster on them."""
    return torch.randn(*shape, device=device).to(dtype)


def index(device: torch.device, batch: int, count: int) -> Tensor:
    """(B, N) int32, sorted, another choice in each clip."""
    return torch.rand(batch, TOKENS, device=device).argsort(1)[:, :count].sort(1).values.int()


def bytes_of(*tensors: Tensor) -> int:
    """Bytes that the tensors hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compiled(function: Provider) -> Provider:
    """The same under torch.compile, one graph."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def sdpa(qkv: Tensor) -> Tensor:
    """Attention on packed qkv by the backend that PyTorch chooses, without a copy where it takes strides."""
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def with_sdpa(backend: SDPBackend) -> Provider:
    """The same by one of its backends."""

    def attend(qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(qkv)

    return attend


def naive_attention(qkv: Tensor) -> Tensor:
    """The whole matrix of scores, as the original does it."""
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    scores = (query * qkv.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def attention_peers(device: torch.device) -> dict[str, Provider]:
    """Every other attention that this machine has."""
    peers = {"SDPA": sdpa, "scores written out": naive_attention}
    if device.type == "cuda":
        peers["SDPA flash"] = with_sdpa(SDPBackend.FLASH_ATTENTION)
        peers["SDPA cuDNN"] = with_sdpa(SDPBackend.CUDNN_ATTENTION)
        peers["SDPA efficient"] = with_sdpa(SDPBackend.EFFICIENT_ATTENTION)
    flex = torch.compile(importlib.import_module("torch.nn.attention.flex_attention").flex_attention, dynamic=False)

    def flex_attention(qkv: Tensor) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        return flex(query, key, value).transpose(1, 2).flatten(2)

    peers["flex_attention"] = flex_attention
    for backend in ("xformers", "flash_attn"):
        peers[backend] = functools.partial(on_backend, backend, kernels.attention)
    return peers


def on_backend(backend: str, op: Provider, *args: Any, **kwargs: Any) -> Any:
    """The op on a named backend; RuntimeError where that is not installed."""
    with kernels.use_backend(backend):
        return op(*args, **kwargs)


def attention(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, heads: int, size: int = 64) -> OpCase:
    """Attention over visible tokens."""
    flops = 4.0 * batch * heads * tokens**2 * size
    return OpCase(
        "attention", f"{batch} clips, {tokens} tokens, {heads} heads of {size}", tokens, dtype,
        lambda: dict(qkv=random(device, dtype, batch, tokens, 3, heads, size)),
        {"mar_fast": kernels.attention} | attention_peers(device), ("qkv",),
        flops, 4.0 * batch * tokens * heads * size * dtype.itemsize, (2.5, 2.0),
    )  # fmt: skip


def gather_patch_embed(
    device: torch.device, dtype: torch.dtype, batch: int, tokens: int, width: int, pixels: torch.dtype
) -> OpCase:
    """Embedding of visible tubelets from a planar floating-point clip, or from a channels-last uint8 one."""
    raw = pixels == torch.uint8
    normalise: Operands = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD) if raw else {}

    def operands() -> Operands:
        if raw:
            clip = torch.randint(256, (batch, 16, 224, 224, 3), dtype=pixels, device=device).permute(0, 4, 1, 2, 3)
        else:
            clip = random(device, pixels, batch, 3, 16, 224, 224)
        return dict(
            video=clip, keep_idx=index(device, batch, tokens), weight=random(device, dtype, width, 3, *PATCH) / 40,
            bias=random(device, dtype, width), pos_embed=random(device, torch.float32, TOKENS, width),
        )  # fmt: skip

    def floating(video: Tensor, weight: Tensor) -> Tensor:
        if not raw:
            return video.to(weight.dtype)
        mean, std = (per_channel(values, video.device).view(3, 1, 1, 1) for values in normalise.values())
        return ((video.float() / 255 - mean) / std).to(weight.dtype)

    def reshape_index_linear(
        video: Tensor, keep_idx: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor
    ) -> Tensor:
        return eager_gather_patch_embed(
            video, keep_idx, weight, bias, pos_embed, **(normalise or dict(mean=None, std=None))
        )

    def conv_then_index(video: Tensor, keep_idx: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor) -> Tensor:
        every = F.conv3d(floating(video, weight), weight, bias, stride=PATCH).flatten(2).transpose(1, 2) + pos_embed
        chosen = every.gather(1, keep_idx.long()[..., None].expand(-1, -1, every.shape[2]))
        return chosen.to(weight.dtype)

    values = CHANNELS * PATCH[0] * PATCH[1] * PATCH[2]
    gathered = functools.cache(lambda: random(device, dtype, batch, tokens, values))

    def linear_of_gathered(weight: Tensor, bias: Tensor, **rest: Tensor) -> Tensor:
        return F.linear(gathered(), weight.flatten(1), bias)

    moved = batch * tokens * (values * pixels.itemsize + width * dtype.itemsize) + values * width * dtype.itemsize
    return OpCase(
        "gather_patch_embed", f"{batch} clips, {tokens} of 1568 tubelets, width {width}, {str(pixels)[6:]} clip",
        tokens, dtype, operands,
        {
            "mar_fast": functools.partial(kernels.gather_patch_embed, **normalise),
            "reshape + index + linear": reshape_index_linear,
            "the same, compiled": compiled(reshape_index_linear),
            "Conv3d of all, then index": conv_then_index,
        },
        ("weight", "bias"), 2.0 * batch * tokens * values * width, float(moved), (1.0, 1.0),
        {"cuBLAS on gathered patches": linear_of_gathered},
    )  # fmt: skip


def add_layer_norm(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, width: int) -> OpCase:
    """Residual add and LayerNorm."""

    def operands() -> Operands:
        x, residual = (random(device, dtype, batch, tokens, width) for _ in range(2))
        return dict(x=x, residual=residual, weight=random(device, dtype, width), bias=random(device, dtype, width))

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return F.layer_norm(residual, weight.shape, weight, bias, 1e-6), residual

    return OpCase(
        "add_layer_norm", f"{batch} clips, {tokens} tokens, width {width}", tokens, dtype, operands,
        {"mar_fast": kernels.add_layer_norm, "PyTorch": plain, "PyTorch, compiled": compiled(plain)},
        ("x", "residual", "weight", "bias"), 0.0, 4.0 * batch * tokens * width * dtype.itemsize, (0.0, 1.0),
    )  # fmt: skip


def bias_gelu(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, width: int) -> OpCase:
    """Bias and GELU of the MLP's hidden activation."""

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    return OpCase(
        "bias_gelu", f"{batch} clips, {tokens} tokens, width {width}", tokens, dtype,
        lambda: dict(x=random(device, dtype, batch, tokens, width), bias=random(device, dtype, width)),
        {"mar_fast": kernels.bias_gelu, "PyTorch": plain, "PyTorch, compiled": compiled(plain)},
        ("x", "bias"), 0.0, 2.0 * batch * tokens * width * dtype.itemsize, (0.0, 1.5),
    )  # fmt: skip


def scatter_tokens(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, width: int) -> OpCase:
    """The decoder's input."""

    def operands() -> Operands:
        return dict(
            visible=random(device, dtype, batch, tokens, width), keep_idx=index(device, batch, tokens),
            mask_token=random(device, dtype, width), pos_embed=random(device, torch.float32, TOKENS, width),
        )  # fmt: skip

    plain = eager_scatter_tokens
    return OpCase(
        "scatter_tokens", f"{batch} clips, {tokens} of 1568 tokens, width {width}", tokens, dtype, operands,
        {"mar_fast": kernels.scatter_tokens, "PyTorch": plain, "PyTorch, compiled": compiled(plain)},
        ("visible", "mask_token"), 0.0, float(batch * (tokens + TOKENS) * width * dtype.itemsize), (0.0, 1.0),
    )  # fmt: skip


def masked_patch_loss(device: torch.device, dtype: torch.dtype, batch: int, tokens: int) -> OpCase:
    """The reconstruction loss from a uint8 clip as a decoder gives it; ``tokens`` are the dropped ones."""
    options: Operands = dict(patch_size=PATCH, mean=IMAGENET_MEAN, std=IMAGENET_STD, normalize=True)

    def operands() -> Operands:
        clip = torch.randint(256, (batch, 16, 224, 224, 3), dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)
        pixels = random(device, dtype, batch, tokens, 1536)
        return dict(pixels=pixels, video=clip, drop_idx=index(device, batch, tokens))

    def all_then_index(pixels: Tensor, video: Tensor, drop_idx: Tensor) -> Tensor:
        """As the original does it: normalise every patch of the clip, then take the dropped ones."""
        every = torch.arange(TOKENS, device=video.device).expand(len(video), -1)
        cells = gather_tubelets(video, every, PATCH).permute(0, 1, 3, 4, 5, 2).flatten(2, 4).float() / 255
        cells = (cells - cells.mean(2, keepdim=True)) / (cells.var(2, unbiased=True, keepdim=True).sqrt() + 1e-6)
        chosen = cells.flatten(2).gather(1, drop_idx.long()[..., None].expand(-1, -1, pixels.shape[2]))
        return F.mse_loss(pixels.float(), chosen)

    plain = functools.partial(eager_masked_patch_loss, **options)
    return OpCase(
        "masked_patch_loss", f"{batch} clips, {tokens} of 1568 tubelets dropped", tokens, dtype, operands,
        {
            "mar_fast": functools.partial(kernels.masked_patch_loss, **options),
            "all patches, then index": all_then_index,
            "PyTorch": plain,
            "PyTorch, compiled": compiled(plain),
        },
        ("pixels",), 0.0, float(batch * tokens * 1536 * (1 + dtype.itemsize)),
        (0.0, 2 * dtype.itemsize / (1 + dtype.itemsize)),  # the error read, if it was kept, and the gradient written
    )  # fmt: skip


# Width and heads of an encoder.
SIZES = {
    "small": (384, 6), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16), "giant": (1408, 16),
}  # fmt: skip
SMALL = ("add_layer_norm", "bias_gelu", "scatter_tokens", "masked_patch_loss")


def op_cases(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[str],
    batches: Sequence[int],
    kept: Sequence[float],
    *,
    graph: bool = False,
) -> Iterator[OpCase]:
    """Every op at every size, batch and keep ratio; ``graph``: small ops are timed as CUDA graphs."""
    for case in _all(device, dtype, sizes, batches, kept):
        yield replace(case, graph=graph and case.op in SMALL)


def _all(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[str], batches: Sequence[int], kept: Sequence[float]
) -> Iterator[OpCase]:
    for size in sizes:
        width, heads = SIZES[size]
        for batch in batches:
            for share in kept:
                tokens = round(TOKENS * share)
                for pixels in (dtype, torch.uint8):
                    yield gather_patch_embed(device, dtype, batch, tokens, width, pixels)
                yield attention(device, dtype, batch, tokens, heads)
                yield add_layer_norm(device, dtype, batch, tokens, width)
                yield bias_gelu(device, dtype, batch, tokens, 4 * width)
                if share < 1:
                    yield scatter_tokens(device, dtype, batch, tokens, width // 2)
                    yield masked_patch_loss(device, dtype, batch, TOKENS - tokens)
