"""attention: softmax attention on packed qkv, without copies in or out."""

from typing import Literal, overload

import torch
from torch import Tensor

from . import backends, checks, eager, op
from .device import attention_backend

# Larger heads do not fit the kernels' registers; they run in plain PyTorch.
MAX_HEAD_DIM = 128


def lse_row(tokens: int) -> int:
    """Length of a row of the kernels' log-sum-exp: whole multiples of 16, so that rows are aligned for wide loads."""
    return (tokens + 15) // 16 * 16


def _forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from .jit import attention as launch

    return launch.forward(qkv, scale)


def _forward_shape(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, count, _, heads, head_dim = qkv.shape
    lse = torch.empty((batch, heads, lse_row(count)), dtype=torch.float32, device=qkv.device)
    return torch.empty((batch, count, heads * head_dim), dtype=qkv.dtype, device=qkv.device), lse


def _backward(
    grad: Tensor | None, grad_lse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, needs: list[bool]
) -> Tensor:
    from .jit import attention_backward as launch

    return launch.backward(grad, grad_lse, qkv, out, lse, scale)


def _backward_shape(
    grad: Tensor | None, grad_lse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, needs: list[bool]
) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


_triton_attention = op.declare(
    "attention",
    forward=_forward,
    forward_shape=_forward_shape,
    backward=_backward,
    backward_shape=_backward_shape,
    saves=lambda inputs, outputs: (inputs[0], *outputs),
    gradients=("qkv",),
)


@overload
def attention(qkv: Tensor, *, scale: float | None = None, return_lse: Literal[False] = False) -> Tensor: ...
@overload
def attention(qkv: Tensor, *, scale: float | None = None, return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...
def attention(qkv: Tensor, *, scale: float | None = None, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Full (non-causal) softmax attention over N tokens (FlashAttention-2, arXiv 2307.08691).

    Args:
        qkv: (B, N, 3, H, d), as a linear layer with rows (q, k, v), head, head_dim gives it. Any strides; nothing is
            copied as long as that of the last dimension is 1.
        scale: Factor on the scores; None means d ** -0.5.
        return_lse: Also return the log-sum-exp of the scaled scores, (B, H, N) float32.

    Returns:
        (B, N, H * d) in qkv's dtype (autocast's, where that is on), heads concatenated. Gradients flow to qkv from
        both results; saved for them are qkv, the output and the log-sum-exp, never the N x N scores.

    Raises:
        ValueError, TypeError: a shape, dtype or scale does not fit; the message names it.
        RuntimeError: ``use_backend`` names a backend that cannot run this call.
    """
    checks.tensor("qkv", qkv, 5, checks.FLOATS, "(B, N, 3, H, d)")
    if qkv.shape[2] != 3:
        raise checks.bad("qkv", f"shape {tuple(qkv.shape)}", "size 3 (q, k, v) in dimension 2 of (B, N, 3, H, d)")
    scale = check_scale(scale, qkv.shape[-1])
    dtype = eager.working_dtype(qkv, qkv.dtype)
    backend = attention_backend(qkv, "attention", beyond_kernel(qkv), dtype)
    if backend == "triton":
        out, lse = _triton_attention(qkv.to(dtype), scale)
        return (out, lse[..., : qkv.shape[1]]) if return_lse else out
    if backend != "eager":
        return backends.ATTENTION[backend](qkv, scale, return_lse)
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


def beyond_kernel(qkv: Tensor) -> str:
    """What of this call the kernels do not take: "" where they take it."""
    size = qkv.shape[-1]
    return f"with head sizes up to {MAX_HEAD_DIM}, got {size}" if size > MAX_HEAD_DIM else ""
