"""attention_varlen: attention over a ragged batch, each clip with its own number of tokens."""

import torch
from torch import Tensor

from . import backends, checks, eager, op
from .attention import beyond_kernel, check_scale
from .device import attention_backend


def _forward(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    from .jit import attention as launch

    return launch.forward(qkv, scale, cu_seqlens, max_seqlen)


def _forward_shape(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    total, _, heads, head_dim = qkv.shape
    lse = torch.empty((heads, total), dtype=torch.float32, device=qkv.device)
    return torch.empty((total, heads * head_dim), dtype=qkv.dtype, device=qkv.device), lse


def _backward(
    grad: Tensor | None, grad_lse: Tensor | None, qkv: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor,
    max_seqlen: int, scale: float, needs: list[bool],
) -> Tensor:  # fmt: skip
    from .jit import attention_backward as launch

    return launch.backward(grad, grad_lse, qkv, out, lse, scale, cu_seqlens, max_seqlen)


def _backward_shape(
    grad: Tensor | None, grad_lse: Tensor | None, qkv: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor,
    max_seqlen: int, scale: float, needs: list[bool],
) -> Tensor:  # fmt: skip
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


_triton_attention_varlen = op.declare(
    "attention_varlen",
    forward=_forward,
    forward_shape=_forward_shape,
    backward=_backward,
    backward_shape=_backward_shape,
    saves=lambda inputs, outputs: (inputs[0], inputs[1], *outputs),
    gradients=("qkv",),
)


def attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None = None) -> Tensor:
    """Full softmax attention within each of B sequences that stand one after the other.

    Args:
        qkv: (total, 3, H, d), the tokens of all sequences.
        cu_seqlens: (B + 1,) int32 or int64 on qkv's device; sequence i is [cu_seqlens[i], cu_seqlens[i + 1]).
        max_seqlen: The longest sequence, or more. A number of the host, so that nothing waits for the device.
        scale: Factor on the scores; None means d ** -0.5.

    Returns:
        (total, H * d) in qkv's dtype (autocast's, where that is on).

    Raises:
        ValueError, TypeError: a shape, dtype or offset does not fit; the message names it.
        RuntimeError: ``use_backend`` names a backend that cannot run this call.
    """
    checks.tensor("qkv", qkv, 4, checks.FLOATS, "(total, 3, H, d)")
    if qkv.shape[1] != 3:
        raise checks.bad("qkv", f"shape {tuple(qkv.shape)}", "size 3 (q, k, v) in dimension 1 of (total, 3, H, d)")
    checks.tensor("cu_seqlens", cu_seqlens, 1, checks.INDICES, "(B + 1,)")
    if cu_seqlens.shape[0] == 0:
        raise checks.bad("cu_seqlens", "no values", "B + 1 offsets that begin with 0")
    if not isinstance(max_seqlen, int) or max_seqlen < 0:
        raise checks.bad("max_seqlen", repr(max_seqlen), "a whole number of tokens, 0 or more")
    scale = check_scale(scale, qkv.shape[-1])
    checks.same_device("qkv", qkv.device, cu_seqlens=cu_seqlens)
    _check_offsets(cu_seqlens, qkv.shape[0], max_seqlen)
    dtype = eager.working_dtype(qkv, qkv.dtype)
    backend = attention_backend(qkv, "attention_varlen", beyond_kernel(qkv), dtype)
    if backend == "triton":
        out: Tensor = _triton_attention_varlen(qkv.to(dtype), cu_seqlens, max_seqlen, scale)[0]
        return out
    if backend != "eager":
        return backends.VARLEN[backend](qkv, cu_seqlens, max_seqlen, scale)
    if qkv.shape[0] == 0:
        return qkv.flatten(2)[:, 0].to(dtype)
    return eager.attention_varlen(qkv, cu_seqlens, max_seqlen, scale)


def _check_offsets(cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    if not checks.may_read(cu_seqlens):
        return
    lengths = cu_seqlens.diff()
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != total or bool((lengths < 0).any()):
        raise checks.bad("cu_seqlens", f"offsets from {first} to {last}", f"rising offsets from 0 to total = {total}")
    longest = int(torch.max(lengths)) if lengths.numel() else 0
    if longest > max_seqlen:
        raise checks.bad("max_seqlen", max_seqlen, f"at least {longest}, the longest sequence")
