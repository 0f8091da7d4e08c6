"""scatter_tokens: the pixel decoder's input in one write."""

from torch import Tensor

from . import checks
from .device import HAS_TRITON, takes_triton
from .plan import Plans
from .varlen import check_offsets, clip_index

if HAS_TRITON:
    from .jit import scatter_tokens as jit

_plans = Plans()


def scatter_tokens(
    visible: Tensor, keep_idx: Tensor, mask_token: Tensor, pos_embed: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Put visible tokens back at their positions, the mask token at all others, and add the position table to all.

    Args:
        visible: (B, N, D); (total, D) where clips have different numbers of visible tokens.
        keep_idx: (B, N) or (total,) int32 or int64, sorted and unique in every clip.
        mask_token: (D,).
        pos_embed: (L, D), added in float32.
        cu_seqlens: (B + 1,) int32 or int64: the tokens of clip i are [cu_seqlens[i], cu_seqlens[i + 1]) of (total, D).
            None for (B, N, D).

    Returns:
        (B, L, D) in visible's dtype. Gradients flow to visible, mask_token and pos_embed.

    Raises:
        ValueError, TypeError: a shape, dtype, device or index does not fit; the message names it.
    """
    key, run = _plans.find(visible, keep_idx, mask_token, pos_embed, cu_seqlens)
    if run is None:
        if cu_seqlens is None:
            shape, ndim = "(B, N", 3
        else:
            shape, ndim = "(total", 2
            checks.tensor("cu_seqlens", cu_seqlens, 1, checks.INDICES, "(B + 1,)")
            if cu_seqlens.shape[0] == 0:
                raise checks.bad("cu_seqlens", "no values", "B + 1 offsets that begin with 0")
        checks.tensor("visible", visible, ndim, checks.FLOATS, f"{shape}, D)")
        columns = visible.shape[-1]
        checks.tensor("keep_idx", keep_idx, ndim - 1, checks.INDICES, f"{shape})")
        checks.size("keep_idx", keep_idx, visible.shape[:-1], f"visible's {shape})")
        checks.tensor("mask_token", mask_token, 1, checks.FLOATS, "(D,)")
        checks.size("mask_token", mask_token, (columns,), "(D,)")
        checks.tensor("pos_embed", pos_embed, 2, checks.FLOATS, "(L, D)")
        checks.size("pos_embed", pos_embed, (pos_embed.shape[0], columns), "(L, D)")
        others = dict(keep_idx=keep_idx, mask_token=mask_token, pos_embed=pos_embed, cu_seqlens=cu_seqlens)
        checks.same_device("visible", visible.device, **others)
    if cu_seqlens is not None and checks.may_read(cu_seqlens):
        check_offsets("cu_seqlens", cu_seqlens, keep_idx.shape[0])
    if checks.may_read(keep_idx):
        checks.index_range("keep_idx", keep_idx, pos_embed.shape[0])
        rows = keep_idx if cu_seqlens is None else _rows(keep_idx, cu_seqlens, pos_embed.shape[0])[None]
        checks.strictly_ascending("keep_idx", rows)
    if run is None:
        if not takes_triton("scatter_tokens", visible):
            return eager_scatter_tokens(visible, keep_idx, mask_token, pos_embed, cu_seqlens)
        run = _plans.keep(key, jit.scatter_tokens.plan(visible, keep_idx, mask_token, pos_embed, cu_seqlens))
    return run(visible, keep_idx, mask_token, pos_embed, cu_seqlens)


def _rows(keep_idx: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """(total,) int64, the visible tokens among the B * L of all clips."""
    return clip_index(cu_seqlens, keep_idx.shape[0]).long() * length + keep_idx


def eager_scatter_tokens(
    visible: Tensor, keep_idx: Tensor, mask_token: Tensor, pos_embed: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """What `scatter_tokens` means, in plain PyTorch."""
    (length, columns), mask_token = pos_embed.shape, mask_token.to(visible.dtype)
    if cu_seqlens is None:
        tokens = mask_token.expand(visible.shape[0], length, columns)
        tokens = tokens.scatter(1, keep_idx.long()[..., None].expand(-1, -1, columns), visible)
    else:
        batch = cu_seqlens.shape[0] - 1
        rows = _rows(keep_idx, cu_seqlens, length)[:, None].expand(-1, columns)
        tokens = mask_token.expand(batch * length, columns).scatter(0, rows, visible).view(batch, length, columns)
    return (tokens + pos_embed).to(visible.dtype)
