"""attention on other packages: flash-attn and xformers, chosen by ``use_backend("flash_attn" | "xformers")``.

Neither is needed: they are here for comparison, and for machines where one of them is faster. Both are imported when
they are first asked for. Operands are those of `mar_fast.kernels.attention` and `attention_varlen`, checked there.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from .device import working_dtype


class _NoGradient(torch.autograd.Function):
    """The identity on a log-sum-exp whose package would silently leave its gradient out."""

    @staticmethod
    def forward(ctx: Any, backend: str, lse: Tensor) -> Tensor:
        ctx.backend = backend
        return lse.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(f"backend {ctx.backend!r} has no gradient of the log-sum-exp; expected 'triton' or 'eager'")


def flash_attn_attention(qkv: Tensor, scale: float, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` by ``flash_attn_qkvpacked_func`` of flash-attn, deterministic in its backward too.

    Written to flash-attn 2's documented interface and tested with a stand-in for it: the package is built from source
    for a GPU, and has not run here.

    Args:
        qkv: (B, N, 3, H, d) float16 or bfloat16 on a GPU.
        scale: Factor on the scores.
        return_lse: Also return the log-sum-exp, which has no gradient.

    Returns:
        (B, N, H * d), and (B, H, N) float32 if asked for.
    """
    qkv = _in_working_dtype(qkv)
    if qkv.numel() == 0:
        return _eager(qkv, scale, return_lse)
    package = importlib.import_module("flash_attn")
    options = dict(dropout_p=0.0, softmax_scale=scale, causal=False, deterministic=True)
    if not return_lse:
        return package.flash_attn_qkvpacked_func(qkv, **options).flatten(2)
    out, lse, _ = package.flash_attn_qkvpacked_func(qkv, **options, return_attn_probs=True)
    return out.flatten(2), _NoGradient.apply("flash_attn", lse[..., : qkv.shape[1]])


def flash_attn_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """`attention_varlen` by ``flash_attn_varlen_qkvpacked_func``: like `flash_attn_attention`, not run here either.

    Args:
        qkv: (total, 3, H, d) float16 or bfloat16 on a GPU.
        cu_seqlens: (B + 1,) int32 or int64.
        max_seqlen: The longest sequence, or more.
        scale: Factor on the scores.

    Returns:
        (total, H * d).
    """
    qkv = _in_working_dtype(qkv)
    if qkv.numel() == 0:
        return qkv[:, 0].flatten(1)
    package = importlib.import_module("flash_attn")
    options = dict(dropout_p=0.0, softmax_scale=scale, causal=False, deterministic=True)
    offsets = cu_seqlens.to(torch.int32)
    return package.flash_attn_varlen_qkvpacked_func(qkv, offsets, max_seqlen, **options).flatten(1)


def xformers_attention(qkv: Tensor, scale: float, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` by ``memory_efficient_attention`` of xformers, which chooses a kernel by itself.

    Its gradients need not be the same bits every time. It has no CPU path, so only its interface (0.0.35) was checked
    here.

    Args:
        qkv: (B, N, 3, H, d) float32, float16 or bfloat16 on a GPU.
        scale: Factor on the scores.
        return_lse: Also return the log-sum-exp; only without gradients.

    Returns:
        (B, N, H * d), and (B, H, N) float32 if asked for.

    Raises:
        RuntimeError: the log-sum-exp is asked for where a gradient will be.
    """
    qkv = _in_working_dtype(qkv)
    if return_lse and torch.is_grad_enabled() and qkv.requires_grad:
        raise RuntimeError(
            "backend 'xformers' gives the log-sum-exp only without gradients: got return_lse=True for a qkv that "
            "requires them, expected torch.no_grad(), or backend 'triton' or 'eager'"
        )
    if qkv.numel() == 0:
        return _eager(qkv, scale, return_lse)
    package = importlib.import_module("xformers.ops")
    query, key, value = _unit_stride(qkv).unbind(2)  # (B, N, H, d) each, views
    if not return_lse:
        return package.memory_efficient_attention(query, key, value, scale=scale).flatten(2)
    run = package.fmha.memory_efficient_attention_forward_requires_grad
    out, lse = run(query, key, value, scale=scale)
    return out.flatten(2), lse[..., : qkv.shape[1]].float()  # some of its kernels pad the rows


def xformers_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """`attention_varlen` by ``memory_efficient_attention`` under a block-diagonal mask.

    The mask is made from lengths on the host, so every call **waits for the device** to read ``cu_seqlens``; it cannot
    be captured in a CUDA graph.

    Args:
        qkv: (total, 3, H, d) float32, float16 or bfloat16 on a GPU.
        cu_seqlens: (B + 1,) int32 or int64.
        max_seqlen: Not used: the mask knows the lengths.
        scale: Factor on the scores.

    Returns:
        (total, H * d).
    """
    qkv = _in_working_dtype(qkv)
    if qkv.numel() == 0:
        return qkv[:, 0].flatten(1)
    package = importlib.import_module("xformers.ops")
    lengths = cu_seqlens.diff().tolist()
    mask = package.fmha.BlockDiagonalMask.from_seqlens(lengths, device=qkv.device)
    query, key, value = _unit_stride(qkv)[None].unbind(2)  # (1, total, H, d) each, views
    out = package.memory_efficient_attention(query, key, value, attn_bias=mask, scale=scale)
    return out[0].flatten(1)


def _in_working_dtype(qkv: Tensor) -> Tensor:
    return qkv.to(working_dtype(qkv, qkv.dtype))


def _unit_stride(qkv: Tensor) -> Tensor:
    return qkv if qkv.stride(-1) == 1 else qkv.contiguous()


def _eager(qkv: Tensor, scale: float, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Without tokens there is nothing to launch."""
    batch, count, _, heads, head_dim = qkv.shape
    out = qkv.sum(2).reshape(batch, count, heads * head_dim)  # still connected to qkv
    return (out, out.new_empty((batch, heads, count), dtype=torch.float32)) if return_lse else out


ATTENTION = {"flash_attn": flash_attn_attention, "xformers": xformers_attention}
VARLEN = {"flash_attn": flash_attn_varlen, "xformers": xformers_varlen}
