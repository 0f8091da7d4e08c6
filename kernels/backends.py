"""attention by flash-attn or xformers, for comparison and for machines where one of these packages is faster.

Chosen by ``use_backend("flash_attn" | "xformers")``, and imported only then. Arguments and results are those of
`mar_fast.kernels.attention` and `attention_varlen`, which check them; qkv is on a GPU, in the dtype to work in.

flash-attn is called by version 2's documented interface and tested with a stand-in: it must be built from source for a
GPU, and has not been run here. Of xformers, which has no CPU path, only the interface (0.0.35) was checked.
"""

import importlib

import torch
from torch import Tensor

from .checks import NoGradient


def flash_attn_attention(qkv: Tensor, scale: float, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` by flash-attn, deterministic in backward too. The log-sum-exp has no gradient."""
    if qkv.numel() == 0:
        return _empty(qkv, return_lse)
    run = importlib.import_module("flash_attn").flash_attn_qkvpacked_func
    options = dict(dropout_p=0.0, softmax_scale=scale, causal=False, deterministic=True)
    if not return_lse:
        return run(qkv, **options).flatten(2)
    out, lse, _ = run(qkv, **options, return_attn_probs=True)
    message = "backend 'flash_attn' has no gradient of the log-sum-exp; expected 'triton' or 'eager'"
    return out.flatten(2), NoGradient.apply(message, lse[..., : qkv.shape[1]])


def flash_attn_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """`attention_varlen` by flash-attn, deterministic in backward too."""
    if qkv.numel() == 0:
        return qkv[:, 0].flatten(1)
    run = importlib.import_module("flash_attn").flash_attn_varlen_qkvpacked_func
    options = dict(dropout_p=0.0, softmax_scale=scale, causal=False, deterministic=True)
    return run(qkv, cu_seqlens.to(torch.int32), max_seqlen, **options).flatten(1)


def xformers_attention(qkv: Tensor, scale: float, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` by xformers, which chooses a kernel itself. Its gradients need not have the same bits every time.

    Raises:
        RuntimeError: ``return_lse`` where qkv needs a gradient.
    """
    if return_lse and torch.is_grad_enabled() and qkv.requires_grad:
        raise RuntimeError(
            "backend 'xformers' gives the log-sum-exp only without gradients: got return_lse=True for a qkv that "
            "requires them, expected torch.no_grad(), or backend 'triton' or 'eager'"
        )
    if qkv.numel() == 0:
        return _empty(qkv, return_lse)
    package = importlib.import_module("xformers.ops")
    query, key, value = _unit_stride(qkv).unbind(2)  # (B, N, H, d) each, views
    if not return_lse:
        return package.memory_efficient_attention(query, key, value, scale=scale).flatten(2)
    run = package.fmha.memory_efficient_attention_forward_requires_grad
    out, lse = run(query, key, value, scale=scale)
    return out.flatten(2), lse[..., : qkv.shape[1]].float()  # some of its kernels pad the rows


def xformers_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """`attention_varlen` by xformers under a block-diagonal mask; ``max_seqlen`` is not used.

    The mask needs lengths on the host, so each call **waits for the device** and cannot be captured in a CUDA graph.
    """
    if qkv.numel() == 0:
        return qkv[:, 0].flatten(1)
    package = importlib.import_module("xformers.ops")
    lengths = cu_seqlens.diff().tolist()
    mask = package.fmha.BlockDiagonalMask.from_seqlens(lengths, device=qkv.device)
    query, key, value = _unit_stride(qkv)[None].unbind(2)  # (1, total, H, d) each, views
    out = package.memory_efficient_attention(query, key, value, attn_bias=mask, scale=scale)
    return out[0].flatten(1)


def _unit_stride(qkv: Tensor) -> Tensor:
    return qkv if qkv.stride(-1) == 1 else qkv.contiguous()


def _empty(qkv: Tensor, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """The results for a qkv without tokens, which no package needs to see."""
    batch, count, _, heads, head_dim = qkv.shape
    out = qkv.sum(2).reshape(batch, count, heads * head_dim)  # keeps the autograd graph
    return (out, out.new_empty((batch, heads, count), dtype=torch.float32)) if return_lse else out


ATTENTION = {"flash_attn": flash_attn_attention, "xformers": xformers_attention}
VARLEN = {"flash_attn": flash_attn_varlen, "xformers": xformers_varlen}
