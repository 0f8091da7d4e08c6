"""scatter_tokens: the pixel decoder's input in one write."""

from torch import Tensor

from . import checks
from .device import HAS_TRITON, takes_triton
from .plan import Plans

if HAS_TRITON:
    from .jit import scatter_tokens as jit

_plans = Plans()


def scatter_tokens(visible: Tensor, keep_idx: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    """Put visible tokens back at their positions, the mask token at all others, and add the position table to all.

    Args:
        visible: (B, N, D).
        keep_idx: (B, N) int32 or int64, sorted and unique in every row.
        mask_token: (D,).
        pos_embed: (L, D), added in float32.

    Returns:
        (B, L, D) in visible's dtype. Gradients flow to visible, mask_token and pos_embed.

    Raises:
        ValueError, TypeError: a shape, dtype, device or index does not fit; the message names it.
    """
    key, run = _plans.find(visible, keep_idx, mask_token, pos_embed)
    if run is None:
        checks.tensor("visible", visible, 3, checks.FLOATS, "(B, N, D)")
        batch, count, columns = visible.shape
        checks.tensor("keep_idx", keep_idx, 2, checks.INDICES, "(B, N)")
        checks.size("keep_idx", keep_idx, (batch, count), "visible's (B, N)")
        checks.tensor("mask_token", mask_token, 1, checks.FLOATS, "(D,)")
        checks.size("mask_token", mask_token, (columns,), "(D,)")
        checks.tensor("pos_embed", pos_embed, 2, checks.FLOATS, "(L, D)")
        checks.size("pos_embed", pos_embed, (pos_embed.shape[0], columns), "(L, D)")
        checks.same_device("visible", visible.device, keep_idx=keep_idx, mask_token=mask_token, pos_embed=pos_embed)
    if checks.may_read(keep_idx):
        checks.index_range("keep_idx", keep_idx, pos_embed.shape[0])
        checks.strictly_ascending("keep_idx", keep_idx)
    if run is None:
        if not takes_triton("scatter_tokens", visible):
            return eager_scatter_tokens(visible, keep_idx, mask_token, pos_embed)
        run = _plans.keep(key, jit.scatter_tokens.plan(visible, keep_idx, mask_token, pos_embed))
    out: Tensor = run(visible, keep_idx, mask_token, pos_embed)
    return out


def eager_scatter_tokens(visible: Tensor, keep_idx: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    """What `scatter_tokens` means, in plain PyTorch."""
    batch, _, columns = visible.shape
    tokens = mask_token.to(visible.dtype).expand(batch, pos_embed.shape[0], columns)
    tokens = tokens.scatter(1, keep_idx.long()[..., None].expand(-1, -1, columns), visible)
    return (tokens + pos_embed).to(visible.dtype)
