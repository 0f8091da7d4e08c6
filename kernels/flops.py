"""Formulas of our ops for ``torch.utils.flop_counter.FlopCounterMode``, which cannot see inside them.

Only matrix products count; one multiply-add is 2 FLOPs. A backward pass includes what it recomputes, as in PyTorch's
own formulas for attention. Arguments are shapes, except in the formulas of attention_varlen.
"""

import math
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

# Forward: scores and output. Backward: scores again, and the gradients of the probabilities, q, k and v.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def attention(qkv: Any, *rest: Any, products: int = FORWARD_PRODUCTS, **options: Any) -> int:
    """qkv (B, N, 3, H, d)."""
    batch, tokens, _, heads, head_dim = qkv
    return 2 * products * batch * heads * tokens**2 * head_dim


def attention_backward(grad: Any, grad_lse: Any, qkv: Any, *rest: Any, **options: Any) -> int:
    """qkv (B, N, 3, H, d)."""
    return attention(qkv, products=BACKWARD_PRODUCTS)


def _varlen(products: int, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> int:
    """Without values in ``cu_seqlens`` every sequence counts as the longest."""
    if cu_seqlens.is_meta or is_fake(cu_seqlens):
        pairs = (len(cu_seqlens) - 1) * max_seqlen**2
    else:
        pairs = sum(length**2 for length in cu_seqlens.diff().tolist())
    return 2 * products * pairs * math.prod(qkv.shape[2:])


def attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *rest: Any, **options: Any) -> int:
    """qkv (total, 3, H, d)."""
    return _varlen(FORWARD_PRODUCTS, qkv, cu_seqlens, max_seqlen)


def attention_varlen_backward(
    grad: Any, grad_lse: Any, qkv: Any, cu_seqlens: Any, out: Any, lse: Any, max_seqlen: int, *rest: Any, **options: Any
) -> int:
    """qkv (total, 3, H, d)."""
    return _varlen(BACKWARD_PRODUCTS, qkv, cu_seqlens, max_seqlen)


def gather_patch_embed(video: Any, keep_idx: Any, weight: Any, *rest: Any, **options: Any) -> int:
    """The projection of visible tubelets."""
    return 2 * math.prod(keep_idx) * math.prod(weight)


def gather_patch_embed_backward(grad: Any, video: Any, keep_idx: Any, weight: Any, *rest: Any, **options: Any) -> int:
    """One such product for each of the gradients of clip and weight that is wanted."""
    wanted = sum(options.get("needs", rest[-1])[:2])
    return wanted * 2 * math.prod(keep_idx) * math.prod(weight)


def linear_gelu(x: Any, weight: Any, *rest: Any, **options: Any) -> int:
    """x (..., K), weight (D, K)."""
    return 2 * math.prod(x) * weight[0]


def linear_gelu_backward(grad: Any, x: Any, weight: Any, *rest: Any, **options: Any) -> int:
    """One such product for each of the gradients of x and weight that is wanted."""
    return sum(options.get("needs", rest[-1])[:2]) * linear_gelu(x, weight)
