"""scatter_tokens: the pixel decoder's input in one write."""

import torch
from torch import Tensor

from . import checks, eager, op
from .device import takes_triton


def _forward(visible: Tensor, keep_idx: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    from .jit import scatter_tokens as launch

    return launch.forward(visible, keep_idx, mask_token, pos_embed)


def _forward_shape(visible: Tensor, keep_idx: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    shape = (visible.shape[0], *pos_embed.shape)
    return torch.empty(shape, dtype=visible.dtype, device=visible.device)


def _backward(
    grad: Tensor, keep_idx: Tensor, mask_token: Tensor, pos_embed: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    from .jit import scatter_tokens as launch

    return launch.backward(grad, keep_idx, (grad.dtype, mask_token.dtype, pos_embed.dtype), needs)


def _backward_shape(
    grad: Tensor, keep_idx: Tensor, mask_token: Tensor, pos_embed: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((*keep_idx.shape, grad.shape[2]), mask_token.shape, pos_embed.shape)
    dtypes = (grad.dtype, mask_token.dtype, pos_embed.dtype)
    visible, token, position = (
        torch.empty(shape if need else (0,), dtype=dtype, device=grad.device)
        for need, shape, dtype in zip(needs, shapes, dtypes, strict=True)
    )
    return visible, token, position


_triton_scatter_tokens = op.declare(
    "scatter_tokens",
    forward=_forward,
    forward_shape=_forward_shape,
    backward=_backward,
    backward_shape=_backward_shape,
    saves=lambda inputs, outputs: inputs[1:],
    gradients=("visible", "mask_token", "pos_embed"),
)


def scatter_tokens(visible: Tensor, keep_idx: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    """Put visible tokens back at their places, the mask token at all others, and add the position table to all.

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
    checks.tensor("visible", visible, 3, checks.FLOATS, "(B, N, D)")
    batch, count, width = visible.shape
    checks.tensor("keep_idx", keep_idx, 2, checks.INDICES, "(B, N)")
    checks.size("keep_idx", keep_idx, (batch, count), "visible's (B, N)")
    checks.tensor("mask_token", mask_token, 1, checks.FLOATS, "(D,)")
    checks.size("mask_token", mask_token, (width,), "(D,)")
    checks.tensor("pos_embed", pos_embed, 2, checks.FLOATS, "(L, D)")
    checks.size("pos_embed", pos_embed, (pos_embed.shape[0], width), "(L, D)")
    checks.same_device("visible", visible.device, keep_idx=keep_idx, mask_token=mask_token, pos_embed=pos_embed)
    checks.index_range("keep_idx", keep_idx, pos_embed.shape[0])
    checks.strictly_ascending("keep_idx", keep_idx)
    if takes_triton("scatter_tokens", visible):
        out: Tensor = _triton_scatter_tokens(visible, keep_idx, mask_token, pos_embed)
        return out
    return eager.scatter_tokens(visible, keep_idx, mask_token, pos_embed)
