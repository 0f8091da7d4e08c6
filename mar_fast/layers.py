"""What encoder, decoder and classifier are made of: constants, attention, MLP and the block, on the ops of kernels/.

In comments: B clips, L tokens in the grid, N visible, M dropped, D width.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .kernels import add_layer_norm, attention, attention_varlen, linear_gelu
from .kernels.derived import Derived
from .packed import Segments


class Constant(nn.Module):
    """A tensor given by a formula: not in the state dict, not rounded by ``.bfloat16()``, right after ``to_empty``."""

    def __init__(self, formula: Callable[[], Tensor]) -> None:
        super().__init__()
        self.formula = formula
        self.value: Tensor
        self.register_buffer("value", formula(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Constant":
        super()._apply(fn, recurse)
        self.value = self.formula().to(self.value.device)
        return self


def sinusoid_table(tokens: int, width: int) -> Tensor:
    """(L, D) float32: angle(p, i) = p / 10000 ** (2 * (i // 2) / D), even columns sin, odd cos; from float64."""
    position = torch.arange(tokens, dtype=torch.float64)[:, None]
    column = torch.arange(width)
    angle = position / 10000.0 ** (2 * (column // 2).double() / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


def position_table(grid: tuple[int, int, int], made_for: tuple[int, int, int] | None, width: int) -> Tensor:
    """(L, D) float32: the sinusoid table of ``grid``, or that of ``made_for`` interpolated trilinearly to ``grid``.

    Between the centres of tubelets, as F.interpolate without align_corners; beyond the outermost ones the table goes on
    as it is there. The interpolation is done in float64.
    """
    if made_for is None or made_for == grid:
        return sinusoid_table(math.prod(grid), width)
    table = sinusoid_table(math.prod(made_for), width).double()
    volume = table.T.reshape(1, width, *made_for)
    resized = F.interpolate(volume, size=grid, mode="trilinear", align_corners=False)
    return resized.reshape(width, -1).T.contiguous().float()


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, L, D), (B, M) -> (B, M, D)."""
    return tokens.gather(1, index.long()[..., None].expand(-1, -1, tokens.shape[-1]))


def attend(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    scale: float | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Self-attention before its last projection: x (B, N, D), packed qkv weight (3 * D, D), bias (3 * D,).

    Packed tokens (total, 1, D) attend within their ``segments``.
    """
    qkv = F.linear(x, weight, bias).unflatten(-1, (3, heads, -1))
    if segments is None:
        return attention(qkv, scale=scale)
    return attention_varlen(qkv.flatten(0, 1), segments.cu_seqlens, segments.max_seqlen, scale=scale)[:, None]


def attend_rows(
    x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, heads: int, scale: float | None = None
) -> Tensor:
    """The same with keys and values from all tokens x (B, L, D), and queries only from ``rows`` (B, M, D)."""
    width = weight.shape[0] // 3
    query_bias, key_value_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    query = F.linear(rows, weight[:width], query_bias).unflatten(-1, (heads, -1)).transpose(1, 2)
    key_value = F.linear(x, weight[width:], key_value_bias).unflatten(-1, (2, heads, -1))
    key, value = (part.transpose(1, 2) for part in key_value.unbind(2))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention. The qkv bias is (q_bias, 0, v_bias), or a full one with ``key_bias``."""

    def __init__(self, width: int, heads: int, key_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
        self.q_bias = None if key_bias else nn.Parameter(torch.zeros(width))
        self.v_bias = None if key_bias else nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        # Zeros that are there already: packing is one launch then.
        self.k_bias = None if key_bias else Constant(partial(torch.zeros, width))
        self._packed = Derived()

    def qkv_bias(self) -> Tensor:
        """(3 * D,), made once for calls without gradients."""
        if self.q_bias is None or self.v_bias is None or self.k_bias is None:
            return self.qkv.bias
        zeros = self.k_bias.value.to(self.q_bias.dtype)
        return self._packed.get(
            (self.q_bias, self.v_bias), None, lambda q_bias, v_bias: torch.cat((q_bias, zeros, v_bias))
        )

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); packed tokens (total, 1, D) attend within their ``segments``."""
        return self.proj(attend(x, self.qkv.weight, self.qkv_bias(), self.heads, segments=segments))

    def forward_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """Keys and values from all tokens x (B, L, D), queries only from ``rows`` (B, M, D) -> (B, M, D)."""
        return self.proj(attend_rows(x, rows, self.qkv.weight, self.qkv_bias(), self.heads))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = linear_gelu(x, self.fc1.weight, self.fc1.bias)
        if not (self.training and self.dropout):
            return self.fc2(x)
        return F.dropout(self.fc2(F.dropout(x, self.dropout)), self.dropout)


# What goes from block to block: x, the output of the last sub-layer; the residual that it is added to, None before the
# first one; and the drop path's scale of x, (B,). The sum is left to the next norm, which does both in one pass.
Stream = tuple[Tensor, Tensor | None, Tensor | None]


class Block(nn.Module):
    """Pre-norm transformer block: x += attention(norm1(x)), x += mlp(norm2(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        eps: float,
        *,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        key_bias: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, key_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, round(width * mlp_ratio), dropout)
        self.drop_path = drop_path
        self.dropout = dropout

    def row_scale(self, x: Tensor, segments: Segments | None = None) -> Tensor | None:
        """(B,) 0 for the samples whose x is dropped, 1 / keep probability for the others; (total,) if packed."""
        if not self.training or not self.drop_path:
            return None
        keep, batch = 1 - self.drop_path, x.shape[0] if segments is None else segments.batch
        scale = torch.empty(batch, dtype=torch.float32, device=x.device).bernoulli_(keep).div_(keep)
        return scale if segments is None else scale.index_select(0, segments.clip_idx)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        row_scale: Tensor | None,
        rows: Tensor | None = None,
        segments: Segments | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One block of the `Stream`; with ``rows`` (B, M) only these tokens come out of it."""
        y, residual = norm(self.norm1, x, residual, row_scale)
        if rows is None:
            x = self.attn(y, segments)
        else:
            x, residual = self.attn.forward_rows(y, take(y, rows)), take(residual, rows)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        y, residual = norm(self.norm2, x, residual, self.row_scale(x, segments))
        return self.mlp(y), residual, self.row_scale(x, segments)


def norm(
    layer: nn.LayerNorm, x: Tensor, residual: Tensor | None, row_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add x to the residual and normalise: (the norm, the new residual)."""
    return add_layer_norm(x, residual, layer.weight, layer.bias, eps=layer.eps, row_scale=row_scale)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    checkpointing: bool,
    last_rows: Tensor | None = None,
    segments: Segments | None = None,
) -> Stream:
    """x (B, N, D) through all blocks; the last one gives only ``last_rows`` (B, M), where they are given.

    With ``segments`` x is packed, (total, 1, D).
    """
    stream: Stream = (x, None, None)
    for number, block in enumerate(blocks, 1):
        rows = last_rows if number == len(blocks) else None
        if checkpointing and torch.is_grad_enabled():
            stream = checkpoint(block, *stream, rows, segments, use_reentrant=False)
        else:
            stream = block(*stream, rows, segments)
    return stream
