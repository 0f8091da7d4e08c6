"""Formulas of our ops for ``torch.utils.flop_counter.FlopCounterMode``, which cannot see inside them.

Only matrix products count; one multiply-add is 2 FLOPs. A backward pass includes what it recomputes, as in PyTorch's
own formulas for attention. Arguments are those of the op.
"""

import math
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

# Forward: scores and output. Backward: scores again, and the gradients of the probabilities, q, k and v.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def attention(qkv: Any, *rest: Any, products: int = FORWARD_PRODUCTS, **options: Any) -> int:
    """qkv (B, N, 3, H, d)."""
    batch, tokens, _, heads, head_dim = qkv.shape
    return 2 * products * batch * heads * tokens**2 * head_dim


def attention_backward(grad: Any, grad_lse: Any, qkv: Any, *rest: Any, **options: Any) -> int:
    """qkv (B, N, 3, H, d)."""
    return attention(qkv, products=BACKWARD_PRODUCTS)


def attention_kvpacked(q: Any, kv: Any, *rest: Any, products: int = FORWARD_PRODUCTS, **options: Any) -> int:
    """q (B, M, H, d), kv (B, N, 2, H, d)."""
    return 2 * products * q.numel() * kv.shape[1]


def attention_kvpacked_backward(grad: Any, grad_lse: Any, q: Any, kv: Any, *rest: Any, **options: Any) -> int:
    """q (B, M, H, d), kv (B, N, 2, H, d)."""
    return attention_kvpacked(q, kv, products=BACKWARD_PRODUCTS)


def _varlen(products: int, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> int:
    """Without values in ``cu_seqlens`` every sequence counts as the longest."""
    if cu_seqlens.is_meta or is_fake(cu_seqlens):
        pairs = (len(cu_seqlens) - 1) * max_seqlen**2
    else:
        pairs = sum(length**2 for length in cu_seqlens.diff().tolist())
    return 2 * products * pairs * math.prod(qkv.shape[2:])


def attention_varlen(qkv: Tensor, cu_seqlens: Tensor, bias: Any, max_seqlen: int, *rest: Any, **options: Any) -> int:
    """qkv (total, 3, H, d)."""
    return _varlen(FORWARD_PRODUCTS, qkv, cu_seqlens, max_seqlen)


def attention_varlen_backward(
    grad: Any, grad_lse: Any, qkv: Any, cu_seqlens: Any, bias: Any, out: Any, lse: Any, max_seqlen: int, *rest: Any,
    **options: Any,
) -> int:  # fmt: skip
    """qkv (total, 3, H, d)."""
    return _varlen(BACKWARD_PRODUCTS, qkv, cu_seqlens, max_seqlen)


def gather_patch_embed(video: Any, keep_idx: Any, weight: Any, *rest: Any, **options: Any) -> int:
    """The projection of visible tubelets."""
    return 2 * keep_idx.numel() * weight.numel()


def gather_patch_embed_backward(grad: Any, video: Any, keep_idx: Any, weight: Any, *rest: Any, **options: Any) -> int:
    """One such product for each of the gradients of clip and weight that is wanted."""
    wanted = sum(options.get("needs", rest[-1])[:2])
    return wanted * gather_patch_embed(video, keep_idx, weight)


def linear_gelu(x: Any, weight: Any, *rest: Any, **options: Any) -> int:
    """x (..., K), weight (D, K)."""
    return 2 * x.numel() * weight.shape[0]


def linear_gelu_backward(grad: Any, x: Any, weight: Any, *rest: Any, **options: Any) -> int:
    """One such product for each of the gradients of x and weight that is wanted."""
    return sum(options.get("needs", rest[-1])[:2]) * linear_gelu(x, weight)


def mlp(x: Any, fc1_weight: Any, fc1_bias: Any, fc2_weight: Any, *rest: Any, **options: Any) -> int:
    """x (..., K), fc1_weight (D, K), fc2_weight (E, D)."""
    return linear_gelu(x, fc1_weight) + 2 * math.prod(x.shape[:-1]) * fc2_weight.numel()


def mlp_backward(grad: Any, x: Any, fc1_weight: Any, fc1_bias: Any, fc2_weight: Any, *rest: Any, **options: Any) -> int:
    """One product for each of x and the weights that is wanted, and one for the hidden layer unless only fc2's are."""
    needs = options.get("needs", rest[-1])
    first, second = linear_gelu(x, fc1_weight), 2 * math.prod(x.shape[:-1]) * fc2_weight.numel()
    return (needs[0] + needs[1]) * first + (any(needs[:3]) + needs[3]) * second
