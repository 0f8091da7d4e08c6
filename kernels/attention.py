"""attention: softmax attention on packed qkv, without copies in or out."""

from typing import Literal, overload

from torch import Tensor

from . import checks, eager
from .device import eager_only


@overload
def attention(qkv: Tensor, *, scale: float | None = None, return_lse: Literal[False] = False) -> Tensor: ...
@overload
def attention(qkv: Tensor, *, scale: float | None = None, return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...
def attention(qkv: Tensor, *, scale: float | None = None, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Full (non-causal) softmax attention over N tokens.

    Args:
        qkv: (B, N, 3, H, d), as a linear layer with rows (q, k, v), head, head_dim gives it.
        scale: Factor on the scores; None means d ** -0.5.
        return_lse: Also return the log-sum-exp of the scaled scores, (B, H, N) float32.

    Returns:
        (B, N, H * d) in qkv's dtype (autocast's, where that is on), heads concatenated.

    Raises:
        ValueError, TypeError: a shape, dtype or scale does not fit; the message names it.
    """
    checks.tensor("qkv", qkv, 5, checks.FLOATS, "(B, N, 3, H, d)")
    if qkv.shape[2] != 3:
        raise checks.bad("qkv", f"shape {tuple(qkv.shape)}", "size 3 (q, k, v) in dimension 2 of (B, N, 3, H, d)")
    scale = check_scale(scale, qkv.shape[-1])
    eager_only("attention", qkv)
    out = eager.attention(qkv, scale)
    return (out, eager.attention_lse(qkv, scale)) if return_lse else out


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor on the scores: the given one, or head_dim ** -0.5."""
    if head_dim == 0:
        raise checks.bad("qkv", "head size 0", "at least 1")
    if scale is None:
        return head_dim**-0.5
    checks.positive("scale", scale)
    return float(scale)
