"""attention and attention_varlen: softmax attention on packed qkv, without copies in or out."""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, checks, cpu_attention
from .device import HAS_TRITON, architecture, attention_backend, without_autocast, working_dtype
from .plan import Plans, Run
from .varlen import check_offsets, clip_index

if HAS_TRITON:
    from .jit import attention as jit

# Larger heads do not fit the kernels' registers and run in plain PyTorch.
MAX_HEAD_DIM = 128

_plans, _varlen_plans = Plans(), Plans()


@overload
def attention(qkv: Tensor, *, scale: float | None = None, return_lse: Literal[False] = False) -> Tensor: ...
@overload
def attention(qkv: Tensor, *, scale: float | None = None, return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...
def attention(qkv: Tensor, *, scale: float | None = None, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Full (non-causal) softmax attention over N tokens (FlashAttention-2, arXiv 2307.08691).

    Args:
        qkv: (B, N, 3, H, d), the output of a linear layer to 3 * H * d, unflattened. Any strides; it is copied only if
            that of the last dimension is not 1.
        scale: Factor on the scores; None means d ** -0.5.
        return_lse: Also return the log-sum-exp of the scaled scores, (B, H, N) float32.

    Returns:
        (B, N, H * d) in qkv's dtype (autocast's if it is on), heads concatenated. Gradients flow to qkv from both
        results. Backward saves qkv, the output and the log-sum-exp, never the N x N scores.

    Raises:
        ValueError, TypeError: a shape, dtype or scale does not fit; the message names it.
        RuntimeError: ``use_backend`` names a backend that cannot run this call.
    """
    key, run = _plans.find(qkv, scale, return_lse)
    if run is None:
        checks.tensor("qkv", qkv, 5, checks.FLOATS, "(B, N, 3, H, d)")
        if qkv.shape[2] != 3:
            raise checks.bad("qkv", f"shape {tuple(qkv.shape)}", "size 3 (q, k, v) in dimension 2 of (B, N, 3, H, d)")
        scale = _check_scale(scale, qkv.shape[-1])
        dtype = working_dtype(qkv, qkv.dtype)
        backend = _backend("attention", qkv, dtype)
        if backend == "eager":
            out = eager_attention(qkv, scale)
            return (out, eager_attention_lse(qkv, scale)) if return_lse else out
        if backend != "triton":
            return backends.ATTENTION[backend](qkv, scale, return_lse)
        run = _plans.keep(key, _in(dtype, qkv, jit.attention.plan(qkv.to(dtype), scale, return_lse)))
    out, lse = run(qkv)
    return (out, lse[..., : qkv.shape[1]]) if return_lse else out


def attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None = None) -> Tensor:
    """Full softmax attention within each of B concatenated sequences.

    Args:
        qkv: (total, 3, H, d), the tokens of all sequences.
        cu_seqlens: (B + 1,) int32 or int64 on qkv's device; sequence i is [cu_seqlens[i], cu_seqlens[i + 1]).
        max_seqlen: Length of the longest sequence, or more. A Python number, so that nothing waits for the device.
        scale: Factor on the scores; None means d ** -0.5.

    Returns:
        (total, H * d) in qkv's dtype (autocast's if it is on).

    Raises:
        ValueError, TypeError: a shape, dtype or offset does not fit; the message names it.
        RuntimeError: ``use_backend`` names a backend that cannot run this call.
    """
    key, run = _varlen_plans.find(qkv, cu_seqlens, max_seqlen, scale)
    if run is None:
        checks.tensor("qkv", qkv, 4, checks.FLOATS, "(total, 3, H, d)")
        if qkv.shape[1] != 3:
            raise checks.bad("qkv", f"shape {tuple(qkv.shape)}", "size 3 (q, k, v) in dimension 1 of (total, 3, H, d)")
        checks.tensor("cu_seqlens", cu_seqlens, 1, checks.INDICES, "(B + 1,)")
        if cu_seqlens.shape[0] == 0:
            raise checks.bad("cu_seqlens", "no values", "B + 1 offsets that begin with 0")
        if not isinstance(max_seqlen, int) or max_seqlen < 0:
            raise checks.bad("max_seqlen", repr(max_seqlen), "a whole number of tokens, 0 or more")
        scale = _check_scale(scale, qkv.shape[-1])
        checks.same_device("qkv", qkv.device, cu_seqlens=cu_seqlens)
    if checks.may_read(cu_seqlens):
        longest = max(check_offsets("cu_seqlens", cu_seqlens, qkv.shape[0]).tolist(), default=0)
        if longest > max_seqlen:
            raise checks.bad("max_seqlen", max_seqlen, f"at least {longest}, the longest sequence")
    if run is None:
        assert scale is not None
        dtype = working_dtype(qkv, qkv.dtype)
        backend = _backend("attention_varlen", qkv, dtype)
        if backend == "eager":
            if qkv.shape[0] == 0:
                return qkv.flatten(2)[:, 0].to(dtype)
            return eager_attention_varlen(qkv, cu_seqlens, max_seqlen, scale)
        if backend != "triton":
            return backends.VARLEN[backend](qkv, cu_seqlens, max_seqlen, scale)
        plan = jit.attention_varlen.plan(qkv.to(dtype), cu_seqlens, max_seqlen, scale, False)
        run = _varlen_plans.keep(key, _in(dtype, qkv, plan))
    out: Tensor = run(qkv, cu_seqlens)[0]
    return out


def _check_scale(scale: float | None, head_dim: int) -> float:
    """The given factor on the scores, or head_dim ** -0.5."""
    if head_dim == 0:
        raise checks.bad("qkv", "head size 0", "at least 1")
    if scale is None:
        return head_dim**-0.5
    checks.positive("scale", scale)
    return float(scale)


def _backend(op: str, qkv: Tensor, dtype: torch.dtype) -> str:
    """The backend of this call. Head sizes that were not verified in float32 on hardware run in plain PyTorch."""
    size = qkv.shape[-1]
    limit = f"with head sizes up to {MAX_HEAD_DIM}, got {size}" if size > MAX_HEAD_DIM else ""
    unverified = qkv.is_cuda and dtype == torch.float32 and not jit.verified_in_float32(architecture(qkv), size)
    return attention_backend(qkv, op, limit, dtype, unverified)


def _in(dtype: torch.dtype, qkv: Tensor, plan: Run) -> Run:
    """``plan`` after qkv is converted to ``dtype``; autograd converts the gradient back."""
    return plan if dtype == qkv.dtype else lambda qkv, *rest: plan(qkv.to(dtype), *rest)


def eager_attention(qkv: Tensor, scale: float) -> Tensor:
    """`attention` in plain PyTorch."""
    dtype = working_dtype(qkv, qkv.dtype)
    if cpu_attention.takes(qkv, dtype):
        return cpu_attention.attention(qkv.to(dtype), scale)
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, N, d)
    out = F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)
    return out.to(dtype)  # autocast does not convert empty tensors


def eager_attention_lse(qkv: Tensor, scale: float) -> Tensor:
    """Log-sum-exp of the scaled scores: (B, N, 3, H, d) -> (B, H, N) float32."""
    query, key, _ = (part.transpose(1, 2) for part in qkv.unbind(2))
    wide = torch.promote_types(qkv.dtype, torch.float32)
    with without_autocast(qkv):  # rounding a score to 16 bits can change it by more than 1
        return (query.to(wide) @ key.to(wide).transpose(2, 3)).mul(scale).logsumexp(-1)


def eager_attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """`attention_varlen` in plain PyTorch. Pads to ``max_seqlen``, so that no shape depends on the data."""
    total, device = qkv.shape[0], qkv.device
    starts, lengths = cu_seqlens[:-1, None], cu_seqlens.diff()[:, None]  # (B, 1)
    slot = torch.arange(max_seqlen, device=device)[None]  # (1, S)
    # Padding repeats the sequence's own last token: the mask does not stop a NaN of another sequence (0 x NaN).
    source = (starts + slot.minimum((lengths - 1).clamp(min=0))).clamp(max=total - 1)
    padded = qkv[source]  # (B, S, 3, H, d)
    query, key, value = (part.transpose(1, 2) for part in padded.unbind(2))
    # A row without any key would be NaN, and so would its gradient: slot 0 is always a key. Padded rows are not read.
    is_key = (slot < lengths) | (slot == 0)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=is_key[:, None, None], scale=scale)
    clip = clip_index(cu_seqlens, total)
    return out.transpose(1, 2)[clip, torch.arange(total, device=device) - cu_seqlens[clip]].flatten(1)
