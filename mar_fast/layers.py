"""What encoder, decoder and classifier are made of: constants, attention, MLP and the block, on the ops of kernels/.

In comments: B clips, L tokens in the grid, N visible, M dropped, D channels of a token. If clips keep different numbers
of tokens, these are packed as (total, D) instead of (B, N, D), and `Segments` say where clips begin and end.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .fallbacks import Fallbacks, Fused, unhooked, untouched
from .kernels import (
    add_layer_norm,
    add_layer_norm_rows,
    attention,
    attention_kvpacked,
    attention_varlen,
    bias_gelu,
    bias_gelu_rows,
    linear_gelu,
    mlp,
)
from .kernels.attention import takes_bias
from .kernels.derived import Derived
from .kernels.device import takes_triton
from .scaled_linear import ScaledLinear
from .token_mask import Segments


def in_fp8(layer: nn.Module, needs_bias: bool = False) -> TypeGuard[ScaledLinear]:
    """Whether ``layer`` is an `untouched` ScaledLinear of `mar_fast.quantize`, which takes QuantizedRows too."""
    return untouched(layer, ScaledLinear, needs_bias)


def like_weight(x: Tensor, layer: nn.Module) -> Tensor:
    """x in the dtype of the layer's weight; unchanged if that is no tensor or not floating point."""
    weight = getattr(layer, "weight", None)
    return x.to(weight.dtype) if isinstance(weight, Tensor) and weight.is_floating_point() else x


class Constant(nn.Module):
    """A tensor given by a formula: not in the state dict, not rounded by ``.bfloat16()``, kept by ``to_empty``."""

    def __init__(self, formula: Callable[[], Tensor]) -> None:
        super().__init__()
        self.formula = formula
        self.value: Tensor
        self.register_buffer("value", formula(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Constant":
        super()._apply(fn, recurse)
        self.value = self.formula().to(self.value.device)
        return self


def sinusoid_table(tokens: int, dim: int) -> Tensor:
    """(L, D) float32: angle(p, i) = p / 10000 ** (2 * (i // 2) / D), even columns sin, odd cos; from float64."""
    position = torch.arange(tokens, dtype=torch.float64)[:, None]
    column = torch.arange(dim)
    angle = position / 10000.0 ** (2 * (column // 2).double() / dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


def position_table(grid: tuple[int, int, int], made_for: tuple[int, int, int] | None, dim: int) -> Tensor:
    """(L, D) float32: the sinusoid table of ``grid``, or that of ``made_for`` interpolated trilinearly to ``grid``.

    As F.interpolate without align_corners: linear between the centres of tubelets, constant beyond the outermost ones.
    The interpolation is done in float64.
    """
    if made_for is None or made_for == grid:
        return sinusoid_table(math.prod(grid), dim)
    table = sinusoid_table(math.prod(made_for), dim).double()
    volume = table.T.reshape(1, dim, *made_for)
    resized = F.interpolate(volume, size=grid, mode="trilinear", align_corners=False)
    return resized.reshape(dim, -1).T.contiguous().float()


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, L, D), (B, M) -> (B, M, D)."""
    return tokens.gather(1, index.long()[..., None].expand(-1, -1, tokens.shape[-1]))


def attend(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_heads: int,
    scale: float | None = None,
    segments: Segments | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Self-attention before its last projection: x (B, N, D), qkv weight (3 * D, D), bias (3 * D,) -> (B, N, D).

    Packed tokens (total, D) attend to those of their own clip. With ``rows`` (B, M) keys and values come from all
    tokens, and queries only from these: (B, N, D) -> (B, M, D).
    """
    later = bias if takes_bias(x, bias, num_heads) else None  # added by attention
    bias = bias if later is None else None
    if rows is None:
        return attend_packed(F.linear(x, weight, bias), num_heads, scale, segments, later)
    dim = weight.shape[0] // 3
    query_bias, key_value_bias = (None, None) if bias is None else (bias[:dim], bias[dim:])
    q = F.linear(take(x, rows), weight[:dim], query_bias).unflatten(-1, (num_heads, -1))  # (B, M, H, d)
    kv = F.linear(x, weight[dim:], key_value_bias).unflatten(-1, (2, num_heads, -1))  # (B, N, 2, H, d)
    return attention_kvpacked(q, kv, _by_head(later, num_heads), scale=scale)


def attend_packed(
    qkv: Tensor,
    num_heads: int,
    scale: float | None = None,
    segments: Segments | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`attend` from queries, keys and values side by side: (B, N, 3 * D) -> (B, N, D), or both packed.

    ``bias`` (3 * D,), if given, has not been added to them yet.
    """
    qkv = qkv.unflatten(-1, (3, num_heads, -1))  # (B, N, 3, H, d) or (total, 3, H, d)
    bias = _by_head(bias, num_heads)
    if segments is None:
        return attention(qkv, bias, scale=scale)
    return attention_varlen(qkv, segments.cu_seqlens, segments.max_seqlen, bias, scale=scale)


def _by_head(bias: Tensor | None, num_heads: int) -> Tensor | None:
    """(3 * D,) -> (3, H, d)."""
    return None if bias is None else bias.unflatten(0, (3, num_heads, -1))


class Attention(Fused):
    """Multi-head self-attention. The qkv bias is (q_bias, 0, v_bias), or a full one with ``key_bias``."""

    def __init__(self, dim: int, num_heads: int, key_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=key_bias)
        self.q_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.v_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        # Zeros are made in advance, so that one launch joins the three biases.
        self.k_bias = None if key_bias else Constant(partial(torch.zeros, dim))
        self._packed = Derived()

    def qkv_bias(self) -> Tensor:
        """(3 * D,), made once for calls without gradients."""
        if self.q_bias is None or self.v_bias is None or self.k_bias is None:
            return self.qkv.bias
        zeros = self.k_bias.value.to(self.q_bias.dtype)
        sources = self.q_bias, self.v_bias
        return self._packed.get(sources, None, lambda q_bias, v_bias: torch.cat((q_bias, zeros, v_bias)))

    def forward(
        self, x: Tensor, segments: Segments | None = None, rows: Tensor | None = None, add_bias: bool = True
    ) -> Tensor:
        """(B, N, D) -> (B, N, D), or packed (total, D) -> (total, D); ``add_bias`` False leaves out proj's bias.

        With ``rows`` (B, M) keys and values come from all tokens, and queries only from these: (B, N, D) -> (B, M, D).
        """
        qkv, heads = self.qkv, self.num_heads
        if in_fp8(qkv):
            packed = qkv.product(x, self.qkv_bias())
        elif not self.fallbacks.fuses(qkv, nn.Linear, False) or (self.q_bias is not None and qkv.bias is not None):
            packed = qkv(x)
            if self.q_bias is not None:
                packed = packed + self.qkv_bias().to(packed.dtype)
        else:
            y = attend(x, qkv.weight, self.qkv_bias(), heads, segments=segments, rows=rows)
            return product(self.proj, y, add_bias)
        y = attend_packed(packed, heads, segments=segments)
        return product(self.proj, y if rows is None else take(y, rows), add_bias)


class Mlp(Fused):
    """Two linear layers with an exact GELU between."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """(..., D) -> (..., D); ``add_bias`` False leaves out fc2's bias."""
        fc1, fc2, dropout = self.fc1, self.fc2, self.training and self.dropout
        if in_fp8(fc1, needs_bias=True):
            gelu: Any = bias_gelu_rows if in_fp8(fc2) and not dropout else bias_gelu
            x = gelu(fc1.product(x), fc1.bias)
        elif not self.fallbacks.fuses(fc1, nn.Linear):
            x = F.gelu(fc1(x))
        elif dropout or not untouched(fc2, nn.Linear):
            x = linear_gelu(x, fc1.weight, fc1.bias)  # (..., hidden_dim)
        else:
            return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias if add_bias else None)
        if not dropout:
            return product(fc2, x, add_bias)
        return F.dropout(self.fc2(F.dropout(x, self.dropout)), self.dropout)


class Stream(NamedTuple):
    """What goes from block to block. The next norm adds x to the residual and normalises, in one pass.

    Attributes:
        x: (B, N, D) or packed (total, D), the output of the last sub-layer.
        residual: Of x's shape; None before the first block.
        row_scale: Drop path's scale of x, (B,) or (total,).
        x_bias: (D,), the bias that is still to be added to x: see `deferred_bias`.
    """

    x: Tensor
    residual: Tensor | None = None
    row_scale: Tensor | None = None
    x_bias: Tensor | None = None


def deferred_bias(layer: nn.Linear, x: Tensor) -> Tensor | None:
    """The bias of ``layer`` if the norm that follows is to add it, None if ``layer`` adds it to its product with x.

    In training with kernels the gradient of the bias is a by-product of that norm's backward; the layer's own backward
    would read the whole gradient of its output for it.
    """
    if not (torch.is_grad_enabled() and untouched(layer, nn.Linear, True) and layer.bias.requires_grad):
        return None
    return layer.bias if isinstance(x, Tensor) and takes_triton("add_layer_norm", x) else None


def product(layer: nn.Linear, x: Tensor, add_bias: bool) -> Tensor:
    """layer(x), or the same without its bias."""
    return layer(x) if add_bias else F.linear(x, layer.weight)


def sub_layer(
    part: nn.Module, kind: type[nn.Module], last: str, x: Tensor, defer: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """part(x, **options), an Attention or an Mlp, and the `deferred_bias` of its last layer."""
    bias = deferred_bias(getattr(part, last), x) if defer and untouched(part, kind) else None
    return part(x, **options) if bias is None else part(x, **options, add_bias=False), bias


class Block(Fused):
    """Pre-norm transformer block: x += attention(norm1(x)), x += mlp(norm2(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        eps: float,
        *,
        drop_path_rate: float = 0.0,
        dropout: float = 0.0,
        key_bias: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, key_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), dropout)
        self.drop_path_rate = drop_path_rate
        self.dropout = dropout

    def row_scale(self, x: Tensor, segments: Segments | None = None) -> Tensor | None:
        """(B,) 0 for clips whose x is dropped, 1 / keep probability for the others; (total,) if packed."""
        if not self.training or not self.drop_path_rate:
            return None
        keep, batch = 1 - self.drop_path_rate, x.shape[0] if segments is None else segments.cu_seqlens.shape[0] - 1
        scale = torch.empty(batch, dtype=torch.float32, device=x.device).bernoulli_(keep).div_(keep)
        return scale if segments is None else scale.index_select(0, segments.clip_idx)

    def forward(self, stream: Stream, rows: Tensor | None = None, segments: Segments | None = None) -> Stream:
        """One block; with ``rows`` (B, M) only these tokens come out of it."""
        dropout = self.dropout if self.training else 0.0
        y, residual = norm_for(self.attn, self.attn.qkv, self.fallbacks, self.norm1, stream)
        of_rows = dict(segments=segments) if rows is None else dict(rows=rows)
        x, bias = sub_layer(self.attn, Attention, "proj", y, not dropout, **of_rows)
        if rows is not None:
            residual = take(residual, rows)
        if dropout:
            x = F.dropout(x, dropout)
        stream = Stream(x, residual, self.row_scale(x, segments), bias)
        y, residual = norm_for(self.mlp, self.mlp.fc1, self.fallbacks, self.norm2, stream)
        # FSDP2's hooks free a block's weights after its forward, and this bias would be used later.
        x, bias = sub_layer(self.mlp, Mlp, "fc2", y, not dropout and unhooked(self))
        return Stream(x, residual, self.row_scale(x, segments), bias)


def norm(fallbacks: Fallbacks, layer: nn.LayerNorm, stream: Stream) -> tuple[Tensor, Tensor]:
    """Add x to the residual and normalise by ``layer``: (the norm, the new residual)."""
    if fallbacks.fuses(layer, nn.LayerNorm):
        x, residual, row_scale, x_bias = stream
        options: dict[str, Any] = dict(eps=layer.eps, row_scale=row_scale, x_bias=x_bias)
        return add_layer_norm(x, residual, layer.weight, layer.bias, **options)
    whole = total(stream)
    return layer(whole), whole


def norm_for(
    part: nn.Module, first: nn.Module, fallbacks: Fallbacks, layer: nn.LayerNorm, stream: Stream
) -> tuple[Any, Tensor]:
    """`norm` before ``part``; its norm is QuantizedRows if ``first``, the first layer of the part, is in fp8."""
    x, residual, row_scale, x_bias = stream
    plain = in_fp8(first) and untouched(part, type(part)) and untouched(layer, nn.LayerNorm, True)
    if plain and row_scale is None and x_bias is None:
        return add_layer_norm_rows(x, residual, layer.weight, layer.bias, eps=layer.eps)
    return norm(fallbacks, layer, stream)


def total(stream: Stream) -> Tensor:
    """The residual after x is added, in the residual's dtype."""
    x, residual, row_scale, x_bias = stream
    if residual is None:
        return x
    if x_bias is not None:
        x = x + x_bias
    if row_scale is not None:
        x = row_scale.view(-1, *[1] * (x.ndim - 1)) * x
    return (residual + x).to(residual.dtype)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    checkpointing: bool,
    last_rows: Tensor | None = None,
    segments: Segments | None = None,
) -> Stream:
    """x (B, N, D), or packed (total, D), through all blocks; the last one gives only ``last_rows`` (B, M) if given."""
    stream = Stream(x)
    for number, block in enumerate(blocks, 1):
        rows = last_rows if number == len(blocks) else None
        if checkpointing and torch.is_grad_enabled():
            stream = checkpoint(block, stream, rows, segments, use_reentrant=False)
        else:
            stream = block(stream, rows, segments)
    return stream


def mean_of_tokens(x: Tensor, segments: Segments | None) -> Tensor:
    """(B, N, D), or packed (total, D) -> (B, D): packed tokens are summed in float32 at least, in a fixed order."""
    if segments is None:
        return x.mean(1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = torch.segment_reduce(wide, "sum", offsets=segments.cu_seqlens, axis=0, unsafe=True)
    return total / segments.cu_seqlens.diff()[:, None]
