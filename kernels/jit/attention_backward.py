"""attention and attention_varlen in Triton: the backward pass, from the saved log-sum-exp (arXiv 2307.08691).

Two kernels, so that no sum needs atomics and the result is the same every time: one for the gradient of the queries,
which also leaves delta = sum(out * grad, 1) - grad_lse for the other, and one for those of keys and values.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_config import launch_config
from .attention import (
    LOG2_E,
    add_product,
    add_product_of_loaded,
    addressable,
    inner,
    inner_of_loaded,
    load_tiles,
    place,
    shape_constants,
    store_tiles,
    tail,
    vector,
    zero_tiles,
)
from .launch import launch


@triton.jit
def add_query_gradient(
    b_dq, b_q, b_do, b_lse, b_delta, query, grad, key, value, row_stride, grad_row_stride, o_m, m_m, o_n, m_n,
    nothing, scale_log2,
    MASKED: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to the gradient of some queries, without the scale."""
    # [BLOCK_M, BLOCK_N]
    if RESIDENT:
        b_k = load_tiles(key, o_n, m_n, row_stride, MASKED, WIDTHS, HEAD_DIM)
        b_s = inner(b_q, b_k, PRECISION)
        b_dp = inner(b_do, load_tiles(value, o_n, m_n, row_stride, MASKED, WIDTHS, HEAD_DIM), PRECISION)
    else:
        b_s = inner_of_loaded(query, o_m, m_m, row_stride, key, o_n, m_n, row_stride, WIDTHS, HEAD_DIM, PRECISION)
        b_dp = inner_of_loaded(
            grad, o_m, m_m, grad_row_stride, value, o_n, m_n, row_stride, WIDTHS, HEAD_DIM, PRECISION
        )  # fmt: skip
    b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    if MASKED:
        b_p = tl.where(m_n[None, :], b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if RESIDENT:
        return add_product(b_dq, b_ds, b_k, PRECISION)
    return add_product_of_loaded(b_dq, b_ds, key + nothing, o_n, m_n, row_stride, WIDTHS, HEAD_DIM, PRECISION)


@triton.jit
def query_kernel(
    qkv, cu_seqlens, out, grad, lse, grad_lse, delta, dqkv, tokens, tiles, heads,
    clip_stride, row_stride, part_stride, head_stride, grad_clip_stride, grad_row_stride, lse_stride, nothing,
    scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, WIDTHS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VEC: tl.constexpr, GRAD_VEC: tl.constexpr, VARLEN: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M queries, and their delta."""
    tile, head, clip, first, length = place(cu_seqlens, tokens, tiles, heads, VARLEN)
    start = tile * BLOCK_M
    if start < length:
        row_stride, grad_row_stride = row_stride * VEC, grad_row_stride * GRAD_VEC
        base = first * row_stride if VARLEN else clip * (clip_stride * VEC)
        query = qkv + (base + head * (head_stride * VEC))
        key = query + part_stride * VEC
        value = key + part_stride * VEC
        query += tl.cast(start, tl.int64) * row_stride
        grad += first * grad_row_stride if VARLEN else clip * (grad_clip_stride * GRAD_VEC)
        grad += tl.cast(start, tl.int64) * grad_row_stride + head * HEAD_DIM
        out += ((first + start) * heads + head) * HEAD_DIM
        at_lse = (head * lse_stride + first if VARLEN else (clip * heads + head) * lse_stride) + start
        o_m = tl.arange(0, BLOCK_M)
        m_m = start + o_m < length
        b_q = load_tiles(query, o_m, m_m, row_stride, True, WIDTHS, HEAD_DIM)
        b_grad = load_tiles(grad, o_m, m_m, grad_row_stride, True, WIDTHS, HEAD_DIM)
        b_out = load_tiles(out, o_m, m_m, heads * HEAD_DIM, True, WIDTHS, HEAD_DIM)
        b_delta = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for i in tl.static_range(len(WIDTHS)):
            b_delta += tl.sum(b_out[i].to(tl.float32) * b_grad[i].to(tl.float32), 1)
        if grad_lse is not None:
            b_delta -= tl.load(grad_lse + at_lse + o_m, mask=m_m, other=0.0)
        tl.store(delta + at_lse + o_m, b_delta, mask=m_m)
        b_lse = tl.load(lse + at_lse + o_m, mask=m_m, other=float("inf")) * 1.4426950408889634
        b_dq = zero_tiles(BLOCK_M, WIDTHS)
        o_n = tl.arange(0, BLOCK_N)
        whole = length // BLOCK_N * BLOCK_N if RESIDENT else length
        for at in range(0, whole, BLOCK_N):
            b_dq = add_query_gradient(
                b_dq, b_q, b_grad, b_lse, b_delta, query, grad, key, value, row_stride, grad_row_stride, o_m, m_m,
                o_n, at + o_n < length, nothing, scale_log2, not RESIDENT, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
            )  # fmt: skip
            query += nothing
            grad += nothing
            key += BLOCK_N * row_stride
            value += BLOCK_N * row_stride
        if TAIL > 0:
            o_tail = tl.arange(0, TAIL)
            b_dq = add_query_gradient(
                b_dq, b_q, b_grad, b_lse, b_delta, query, grad, key, value, row_stride, grad_row_stride, o_m, m_m,
                o_tail, whole + o_tail < length, nothing, scale_log2, True, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
            )  # fmt: skip
        dqkv += ((first + start) * 3 * heads + head) * HEAD_DIM
        store_tiles(dqkv, b_dq, scale, o_m, m_m, 3 * heads * HEAD_DIM, WIDTHS, HEAD_DIM)


@triton.jit
def add_key_value_gradient(
    b_dk, b_dv, b_k, b_v, query, grad, lse, delta, key, value, row_stride, grad_row_stride, o_m, m_m, o_n, m_n,
    nothing, scale_log2,
    MASKED: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to the gradients of some keys (without the scale) and values."""
    # Queries that are not there have weight exp(-inf) = 0.
    b_lse = tl.load(lse + o_m, mask=m_m, other=float("inf")) if MASKED else tl.load(lse + o_m)
    b_delta = tl.load(delta + o_m, mask=m_m, other=0.0) if MASKED else tl.load(delta + o_m)
    # [BLOCK_N, BLOCK_M]: transposed, so that both sums below take it as it is
    if RESIDENT:
        b_q = load_tiles(query, o_m, m_m, row_stride, MASKED, WIDTHS, HEAD_DIM)
        b_do = load_tiles(grad, o_m, m_m, grad_row_stride, MASKED, WIDTHS, HEAD_DIM)
        b_s = inner(b_k, b_q, PRECISION)
    else:
        b_s = inner_of_loaded(key, o_n, m_n, row_stride, query, o_m, m_m, row_stride, WIDTHS, HEAD_DIM, PRECISION)
    b_p = tl.exp2(b_s * scale_log2 - (b_lse * 1.4426950408889634)[None, :])
    if RESIDENT:
        b_dv = add_product(b_dv, b_p, b_do, PRECISION)
        b_dp = inner(b_v, b_do, PRECISION)
    else:
        b_dv = add_product_of_loaded(b_dv, b_p, grad + nothing, o_m, m_m, grad_row_stride, WIDTHS, HEAD_DIM, PRECISION)
        b_dp = inner_of_loaded(
            value, o_n, m_n, row_stride, grad, o_m, m_m, grad_row_stride, WIDTHS, HEAD_DIM, PRECISION
        )  # fmt: skip
    b_ds = b_p * (b_dp - b_delta[None, :])
    if RESIDENT:
        b_dk = add_product(b_dk, b_ds, b_q, PRECISION)
    else:
        b_dk = add_product_of_loaded(b_dk, b_ds, query + nothing, o_m, m_m, row_stride, WIDTHS, HEAD_DIM, PRECISION)
    return b_dk, b_dv


@triton.jit
def key_value_kernel(
    qkv, cu_seqlens, grad, lse, delta, dqkv, tokens, tiles, heads,
    clip_stride, row_stride, part_stride, head_stride, grad_clip_stride, grad_row_stride, lse_stride, nothing,
    scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, WIDTHS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VEC: tl.constexpr, GRAD_VEC: tl.constexpr, VARLEN: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_N keys and values, from all queries in tiles of BLOCK_M."""
    tile, head, clip, first, length = place(cu_seqlens, tokens, tiles, heads, VARLEN)
    start = tile * BLOCK_N
    if start < length:
        row_stride, grad_row_stride = row_stride * VEC, grad_row_stride * GRAD_VEC
        base = first * row_stride if VARLEN else clip * (clip_stride * VEC)
        query = qkv + (base + head * (head_stride * VEC))
        key = query + part_stride * VEC + tl.cast(start, tl.int64) * row_stride
        value = key + part_stride * VEC
        grad += (first * grad_row_stride if VARLEN else clip * (grad_clip_stride * GRAD_VEC)) + head * HEAD_DIM
        at_lse = head * lse_stride + first if VARLEN else (clip * heads + head) * lse_stride
        lse += at_lse
        delta += at_lse
        o_n = tl.arange(0, BLOCK_N)
        m_n = start + o_n < length
        b_k = load_tiles(key, o_n, m_n, row_stride, True, WIDTHS, HEAD_DIM)
        b_v = load_tiles(value, o_n, m_n, row_stride, True, WIDTHS, HEAD_DIM)
        b_dk = zero_tiles(BLOCK_N, WIDTHS)
        b_dv = zero_tiles(BLOCK_N, WIDTHS)
        o_m = tl.arange(0, BLOCK_M)
        whole = length // BLOCK_M * BLOCK_M if RESIDENT else length
        for at in range(0, whole, BLOCK_M):
            b_dk, b_dv = add_key_value_gradient(
                b_dk, b_dv, b_k, b_v, query, grad, lse, delta, key, value, row_stride, grad_row_stride, o_m,
                at + o_m < length, o_n, m_n, nothing, scale_log2, not RESIDENT, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
            )  # fmt: skip
            key += nothing
            value += nothing
            query += BLOCK_M * row_stride
            grad += BLOCK_M * grad_row_stride
            lse += BLOCK_M
            delta += BLOCK_M
        if TAIL > 0:
            o_tail = tl.arange(0, TAIL)
            b_dk, b_dv = add_key_value_gradient(
                b_dk, b_dv, b_k, b_v, query, grad, lse, delta, key, value, row_stride, grad_row_stride, o_tail,
                whole + o_tail < length, o_n, m_n, nothing, scale_log2, True, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
            )  # fmt: skip
        dkey = dqkv + ((first + start) * 3 * heads + heads + head) * HEAD_DIM
        store_tiles(dkey, b_dk, scale, o_n, m_n, 3 * heads * HEAD_DIM, WIDTHS, HEAD_DIM)
        store_tiles(dkey + heads * HEAD_DIM, b_dv, 1.0, o_n, m_n, 3 * heads * HEAD_DIM, WIDTHS, HEAD_DIM)


def backward(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
) -> Tensor:
    """The gradient of qkv, of its shape and contiguous; arguments as `forward` took and gave them.

    ``grad`` and ``grad_lse`` are the gradients of out and lse, None where it was not used.
    """
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if dqkv.numel() == 0:
        return dqkv
    varlen = cu_seqlens is not None
    *lead, _, heads, head_dim = qkv.shape
    qkv = addressable(qkv)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    if grad is None:
        grad = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    grad, grad_vec = readable(grad, head_dim)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty(lse.shape, dtype=torch.float32, device=qkv.device)
    tokens = max_seqlen if varlen else lead[1]
    clips = len(cu_seqlens) - 1 if cu_seqlens is not None else lead[0]
    vec = vector(qkv)
    strides = (
        0 if varlen else qkv.stride(0) // vec, *(stride // vec for stride in qkv.stride()[-4:-1]),
        0 if varlen else grad.stride(0) // grad_vec, grad.stride(-2) // grad_vec, lse.shape[-1], 0,
        scale, scale * LOG2_E,
    )  # fmt: skip

    def run(name: str, kernel: Any, own: str, other: str, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel whose programs each own a tile of ``own`` and walk over tiles of ``other``."""
        config = launch_config(name, qkv, head_dim=head_dim, tokens=tokens)
        tiles = triton.cdiv(tokens, getattr(config, own))
        rest = tail(tokens, getattr(config, other), varlen, config.resident)
        launch(
            name, kernel, (tiles * heads * clips,), (*arguments, tokens, tiles, heads, *strides), config,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, TAIL=rest,
            VARLEN=varlen, GRAD_VEC=grad_vec, **shape_constants(qkv, config),
        )  # fmt: skip

    operands = (qkv, cu_seqlens, out, grad, lse, grad_lse, delta, dqkv)
    run("attention.backward_query", query_kernel, "block_m", "block_n", operands)
    with_delta = (qkv, cu_seqlens, grad, lse, delta, dqkv)
    run("attention.backward_key_value", key_value_kernel, "block_n", "block_m", with_delta)
    return dqkv


def readable(grad: Tensor, head_dim: int) -> tuple[Tensor, int]:
    """The gradient of out with unit stride in the last dimension, and how many of its values are loaded at once."""
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    values = vector(grad)
    return grad, values if head_dim % values == 0 else 1
