"""attention, attention_varlen and attention_kvpacked: softmax attention without copies in or out.

All take the bias of the linear layer that made their operands, if that layer was called without it: its gradient then
comes out of attention's backward pass, and needs no reduction over the gradient of qkv.
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, checks, cpu_attention
from .device import HAS_TRITON, architecture, attention_backend, takes_triton, without_autocast, working_dtype
from .plan import Plans, Run
from .varlen import check_offsets, clip_index

if HAS_TRITON:
    from .jit import attention as jit

# Larger heads do not fit the kernels' registers and run in plain PyTorch.
MAX_HEAD_DIM = 128

_plans, _varlen_plans, _kvpacked_plans = Plans(), Plans(), Plans()


@overload
def attention(
    qkv: Tensor, bias: Tensor | None = None, *, scale: float | None = None, return_lse: Literal[False] = False
) -> Tensor: ...
@overload
def attention(
    qkv: Tensor, bias: Tensor | None = None, *, scale: float | None = None, return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def attention(
    qkv: Tensor, bias: Tensor | None = None, *, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Full (non-causal) softmax attention over N tokens (FlashAttention-2, arXiv 2307.08691).

    Args:
        qkv: (B, N, 3, H, d), the output of a linear layer to 3 * H * d, unflattened. Any strides; it is copied only if
            that of the last dimension is not 1.
        bias: (3, H, d), added to qkv; of any floating dtype. The sum is rounded to qkv's dtype.
        scale: Factor on the scores; None means d ** -0.5.
        return_lse: Also return the log-sum-exp of the scaled scores, (B, H, N) float32.

    Returns:
        (B, N, H * d) in qkv's dtype (autocast's if it is on), heads concatenated. Gradients flow to qkv and bias from
        both results. Backward saves qkv, the output and the log-sum-exp, never the N x N scores.

    Raises:
        ValueError, TypeError: a shape, dtype, device or scale does not fit; the message names it.
        RuntimeError: ``use_backend`` names a backend that cannot run this call.
    """
    key, run = _plans.find(qkv, bias, scale, return_lse)
    if run is None:
        checks.tensor("qkv", qkv, 5, checks.FLOATS, "(B, N, 3, H, d)")
        if qkv.shape[2] != 3:
            raise checks.bad("qkv", f"shape {tuple(qkv.shape)}", "size 3 (q, k, v) in dimension 2 of (B, N, 3, H, d)")
        factor = _check_scale("qkv", qkv, scale)
        _check_bias("qkv", qkv, bias)
        dtype = working_dtype(qkv, qkv.dtype)
        backend = _backend("attention", qkv, qkv.shape[-1], dtype)
        if backend == "eager":
            qkv = _biased(qkv, bias)
            out = eager_attention(qkv, factor)
            return (out, eager_attention_lse(qkv, factor)) if return_lse else out
        if backend != "triton":
            return backends.ATTENTION[backend](_biased(qkv, bias).to(dtype), factor, return_lse)
        run = _plans.keep(key, _in(dtype, qkv, jit.attention.plan(qkv.to(dtype), bias, factor, return_lse)))
    out, lse = run(qkv, bias)
    if not return_lse:
        return out
    lse = lse[..., : qkv.shape[1]]
    return out, lse if bias is None else lse + _key_bias_score(qkv, bias, scale)


def attention_varlen(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, bias: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Full softmax attention within each of B concatenated sequences.

    Args:
        qkv: (total, 3, H, d), the tokens of all sequences.
        cu_seqlens: (B + 1,) int32 or int64 on qkv's device; sequence i is [cu_seqlens[i], cu_seqlens[i + 1]).
        max_seqlen: Length of the longest sequence, or more. A Python number, so that nothing waits for the device.
        bias: (3, H, d), added to qkv, as in `attention`.
        scale: Factor on the scores; None means d ** -0.5.

    Returns:
        (total, H * d) in qkv's dtype (autocast's if it is on).

    Raises:
        ValueError, TypeError: a shape, dtype, device or offset does not fit; the message names it.
        RuntimeError: ``use_backend`` names a backend that cannot run this call.
    """
    key, run = _varlen_plans.find(qkv, cu_seqlens, max_seqlen, bias, scale)
    if run is None:
        checks.tensor("qkv", qkv, 4, checks.FLOATS, "(total, 3, H, d)")
        if qkv.shape[1] != 3:
            raise checks.bad("qkv", f"shape {tuple(qkv.shape)}", "size 3 (q, k, v) in dimension 1 of (total, 3, H, d)")
        checks.tensor("cu_seqlens", cu_seqlens, 1, checks.INDICES, "(B + 1,)")
        if cu_seqlens.shape[0] == 0:
            raise checks.bad("cu_seqlens", "no values", "B + 1 offsets that begin with 0")
        if not isinstance(max_seqlen, int) or max_seqlen < 0:
            raise checks.bad("max_seqlen", repr(max_seqlen), "a whole number of tokens, 0 or more")
        factor = _check_scale("qkv", qkv, scale)
        _check_bias("qkv", qkv, bias)
        checks.same_device("qkv", qkv.device, cu_seqlens=cu_seqlens)
    if checks.may_read(cu_seqlens):
        longest = max(check_offsets("cu_seqlens", cu_seqlens, qkv.shape[0]).tolist(), default=0)
        if longest > max_seqlen:
            raise checks.bad("max_seqlen", max_seqlen, f"at least {longest}, the longest sequence")
    if run is None:
        dtype = working_dtype(qkv, qkv.dtype)
        backend = _backend("attention_varlen", qkv, qkv.shape[-1], dtype)
        if backend == "eager":
            qkv = _biased(qkv, bias)
            if qkv.shape[0] == 0:
                return qkv.flatten(2)[:, 0].to(dtype)
            return eager_attention_varlen(qkv, cu_seqlens, max_seqlen, factor)
        if backend != "triton":
            return backends.VARLEN[backend](_biased(qkv, bias).to(dtype), cu_seqlens, max_seqlen, factor)
        plan = jit.attention_varlen.plan(qkv.to(dtype), cu_seqlens, bias, max_seqlen, factor, False)
        run = _varlen_plans.keep(key, _in(dtype, qkv, plan))
    return run(qkv, cu_seqlens, bias)[0]


def attention_kvpacked(q: Tensor, kv: Tensor, bias: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    """Full softmax attention of M queries to N keys, as where only some of the tokens are queries.

    Args:
        q: (B, M, H, d).
        kv: (B, N, 2, H, d) in q's dtype, N at least 1. For strides of both see `attention`.
        bias: (3, H, d), for queries, keys and values, as in `attention`.
        scale: Factor on the scores; None means d ** -0.5.

    Returns:
        (B, M, H * d) in q's dtype (autocast's if it is on). Gradients flow to q, kv and bias.

    Raises:
        ValueError, TypeError: a shape, dtype, device or scale does not fit; the message names it.
        RuntimeError: ``use_backend("triton")`` is on and the kernels cannot run this call. "flash_attn" and "xformers"
            do not apply to this op.
    """
    key, run = _kvpacked_plans.find(q, kv, bias, scale)
    if run is None:
        checks.tensor("q", q, 4, checks.FLOATS, "(B, M, H, d)")
        checks.tensor("kv", kv, 5, (q.dtype,), "(B, N, 2, H, d)")
        batch, _, heads, size = q.shape
        checks.size("kv", kv, (batch, kv.shape[1], 2, heads, size), "(B, N, 2, H, d), with B, H and d of q")
        if kv.shape[1] == 0:
            raise checks.bad("kv", "no tokens", "at least one key")
        checks.same_device("q", q.device, kv=kv)
        factor = _check_scale("q", q, scale)
        _check_bias("q", q, bias)
        dtype = working_dtype(q, q.dtype)
        if not takes_triton("attention_kvpacked", q, *_limits(q, size, dtype)):
            query_bias, key_value_bias = (None, None) if bias is None else (bias[0], bias[1:])
            return eager_attention_kvpacked(_biased(q, query_bias), _biased(kv, key_value_bias), factor)
        plan = jit.attention_kvpacked.plan(q.to(dtype), kv.to(dtype), bias, factor, False)
        if dtype != q.dtype:
            narrow, plan = plan, lambda q, kv, bias: narrow(q.to(dtype), kv.to(dtype), bias)
        run = _kvpacked_plans.keep(key, plan)
    return run(q, kv, bias)[0]


def _check_scale(argument: str, operand: Tensor, scale: float | None) -> float:
    """The given factor on the scores, or d ** -0.5 of an operand (..., d)."""
    if operand.shape[-1] == 0:
        raise checks.bad(argument, "head size 0", "at least 1")
    if scale is None:
        return operand.shape[-1] ** -0.5
    checks.positive("scale", scale)
    return float(scale)


def _check_bias(argument: str, operand: Tensor, bias: Tensor | None) -> None:
    """Check a bias (3, H, d) for an operand (..., H, d)."""
    if bias is not None:
        checks.tensor("bias", bias, 3, checks.FLOATS, "(3, H, d)")
        checks.size("bias", bias, (3, *operand.shape[-2:]), f"(3, H, d), with H and d of {argument}")
        checks.same_device(argument, operand.device, bias=bias)


def _biased(operand: Tensor, bias: Tensor | None) -> Tensor:
    """operand + bias, rounded to the operand's dtype."""
    return operand if bias is None else (operand + bias).to(operand.dtype)


def _key_bias_score(qkv: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """(B, H, N) float32: what the key bias adds to the scores of each query, and so to their log-sum-exp."""
    with without_autocast(qkv):
        query = _biased(qkv[:, :, 0], bias[0]).float()
        return torch.einsum("bnhd,hd->bhn", query, bias[1].float()) * _check_scale("qkv", qkv, scale)


def _limits(operand: Tensor, size: int, dtype: torch.dtype) -> tuple[str, bool]:
    """The limit of the kernels that heads of ``size`` exceed, and whether they were not verified in float32."""
    limit = f"with head sizes up to {MAX_HEAD_DIM}, got {size}" if size > MAX_HEAD_DIM else ""
    on_gpu_in_float32 = operand.is_cuda and dtype == torch.float32
    return limit, on_gpu_in_float32 and not jit.verified_in_float32(architecture(operand), size)


def _backend(op: str, operand: Tensor, size: int, dtype: torch.dtype) -> str:
    """The backend of this call. Head sizes that were not verified in float32 on hardware run in plain PyTorch."""
    limit, unverified = _limits(operand, size, dtype)
    return attention_backend(operand, op, limit, dtype, unverified)


def takes_bias(x: Tensor, bias: Tensor | None, num_heads: int) -> bool:
    """Whether attention, and not the linear layer on x (..., D) before it, should add that layer's bias (3 * H * d,).

    It should on the Triton path if the bias gets a gradient: that is then a by-product and needs no reduction of its
    own. Otherwise the layer's matrix product adds the bias at no cost.
    """
    if bias is None or not (torch.is_grad_enabled() and bias.requires_grad):
        return False
    return _backend("attention", x, bias.shape[0] // (3 * num_heads), working_dtype(x, x.dtype)) == "triton"


def _in(dtype: torch.dtype, qkv: Tensor, plan: Run) -> Run:
    """``plan`` for a qkv that is first converted to ``dtype``; autograd converts the gradient back."""
    return plan if dtype == qkv.dtype else lambda qkv, *rest: plan(qkv.to(dtype), *rest)


def eager_attention(qkv: Tensor, scale: float) -> Tensor:
    """`attention` in plain PyTorch."""
    dtype = working_dtype(qkv, qkv.dtype)
    if cpu_attention.takes(qkv, dtype):
        return cpu_attention.attention(qkv.to(dtype), scale)
    return _sdpa(qkv.unbind(2), scale).flatten(2).to(dtype)  # autocast does not convert empty tensors


def eager_attention_kvpacked(q: Tensor, kv: Tensor, scale: float) -> Tensor:
    """`attention_kvpacked` in plain PyTorch."""
    return _sdpa((q, *kv.unbind(2)), scale).flatten(2).to(working_dtype(q, q.dtype))


def _sdpa(parts: Sequence[Tensor], scale: float, mask: Tensor | None = None) -> Tensor:
    """PyTorch's attention; ``parts`` are query (B, M, H, d), key and value (B, N, H, d); returns (B, M, H, d)."""
    query, key, value = (part.transpose(1, 2) for part in parts)  # (B, H, M or N, d)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


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
    # A row without any key would be NaN, and so would its gradient: slot 0 is always a key. Padded rows are not read.
    is_key = (slot < lengths) | (slot == 0)
    out = _sdpa(padded.unbind(2), scale, is_key[:, None, None])
    clip = clip_index(cu_seqlens, total)
    return out[clip, torch.arange(total, device=device) - cu_seqlens[clip]].flatten(1)
