"""What PyTorch's flop counter is told of our ops, which it cannot see into: matrix products, one multiply-add 2 FLOPs.

``torch.utils.flop_counter.FlopCounterMode`` then counts a model on these ops as it counts any other. A backward pass
counts what it computes again, as PyTorch's own formulas for attention do.
"""

import math
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

# Scores and output forward; with the scores again, and gradients of probabilities, q, k and v backward.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def _attention(products: int, qkv: Any) -> int:
    batch, tokens, _, heads, size = qkv
    return 2 * products * batch * heads * tokens**2 * size


def attention(qkv: Any, *rest: Any, **options: Any) -> int:
    """(B, N, 3, H, d)."""
    return _attention(FORWARD_PRODUCTS, qkv)


def attention_backward(grad: Any, grad_lse: Any, qkv: Any, *rest: Any, **options: Any) -> int:
    """(B, N, 3, H, d)."""
    return _attention(BACKWARD_PRODUCTS, qkv)


def _attention_varlen(products: int, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> int:
    """Lengths are read where they have values; else every sequence counts as the longest."""
    if cu_seqlens.is_meta or is_fake(cu_seqlens):
        pairs = (len(cu_seqlens) - 1) * max_seqlen**2
    else:
        pairs = sum(length**2 for length in cu_seqlens.diff().tolist())
    return 2 * products * pairs * math.prod(qkv.shape[2:])


def attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *rest: Any, **options: Any) -> int:
    """(total, 3, H, d)."""
    return _attention_varlen(FORWARD_PRODUCTS, qkv, cu_seqlens, max_seqlen)


def attention_varlen_backward(
    grad: Any, grad_lse: Any, qkv: Tensor, cu_seqlens: Tensor, out: Any, lse: Any, max_seqlen: int, *rest: Any,
    **options: Any,
) -> int:  # fmt: skip
    """(total, 3, H, d)."""
    return _attention_varlen(BACKWARD_PRODUCTS, qkv, cu_seqlens, max_seqlen)


def gather_patch_embed(video: Any, keep_idx: Any, weight: Any, *rest: Any, **options: Any) -> int:
    """Of visible tubelets."""
    return 2 * math.prod(keep_idx) * math.prod(weight)


def gather_patch_embed_backward(grad: Any, video: Any, keep_idx: Any, weight: Any, *rest: Any, **options: Any) -> int:
    """As much for the gradient of the weight, and again for that of the clip; only where they are asked for."""
    wanted = sum(options.get("needs", rest[-1])[:2])
    return wanted * 2 * math.prod(keep_idx) * math.prod(weight)
