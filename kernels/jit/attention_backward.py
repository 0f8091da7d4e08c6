"""attention and attention_varlen in Triton: the backward pass, from the saved log-sum-exp (arXiv 2307.08691).

Two kernels, so that no sum needs atomics and the result has the same bits every time: one for the gradient of the
queries, which also stores delta = sum(out * grad, 1) - grad_lse for the other, and one for those of keys and values.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import (
    ANY,
    LOG2_E,
    Tables,
    add_product,
    add_product_of_loaded,
    addresses,
    by_shape,
    inner,
    inner_of_loaded,
    load_tiles,
    locate,
    shape_constants,
    store_tiles,
    tail,
    zero_tiles,
)
from .launch import DENSE, Launch, choose, scattered
from .op import Run


@triton.jit
def add_query_gradient(
    b_dq, b_q, b_do, b_lse, b_delta, query, grad, key, value, row_stride, grad_row_stride, o_m, m_m, o_n, m_n,
    zero, scale_log2,
    MASKED: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the gradient of BLOCK_M queries, which is still to be scaled."""
    # [BLOCK_M, BLOCK_N]
    if RESIDENT:
        b_k = load_tiles(key, o_n, m_n, row_stride, MASKED, WIDTHS, HEAD_DIM)
        b_s = inner(b_q, b_k, PRECISION)
        b_dp = inner(b_do, load_tiles(value, o_n, m_n, row_stride, MASKED, WIDTHS, HEAD_DIM), PRECISION)
    else:
        b_s = inner_of_loaded(query, o_m, m_m, row_stride, key, o_n, m_n, row_stride, WIDTHS, HEAD_DIM, PRECISION)
        b_dp = inner_of_loaded(
            grad, o_m, m_m, grad_row_stride, value, o_n, m_n, row_stride, WIDTHS, HEAD_DIM, PRECISION
        )
    b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    if MASKED:
        b_p = tl.where(m_n[None, :], b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if RESIDENT:
        return add_product(b_dq, b_ds, b_k, PRECISION)
    return add_product_of_loaded(b_dq, b_ds, key + zero, o_n, m_n, row_stride, WIDTHS, HEAD_DIM, PRECISION)


@triton.jit
def attention_backward_query_kernel(
    qkv, cu_seqlens, out, grad, lse, grad_lse, delta, dqkv, tokens, tiles, heads,
    clip_stride, row_stride, part_stride, head_stride, grad_clip_stride, grad_row_stride, lse_stride, zero,
    scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, WIDTHS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VEC: tl.constexpr, GRAD_VEC: tl.constexpr, VARLEN: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M queries and their delta, from all keys in tiles of BLOCK_N."""
    tile, head, clip, first, length = locate(tl.program_id(0), cu_seqlens, tokens, tiles, heads, VARLEN)
    start = tile * BLOCK_M
    # inductor hands floats over as float64
    scale, scale_log2 = tl.cast(scale, tl.float32), tl.cast(scale_log2, tl.float32)
    row_stride, grad_row_stride = row_stride * VEC, grad_row_stride * GRAD_VEC
    if start < length:
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
                o_n, at + o_n < length, zero, scale_log2, not RESIDENT, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
            )  # fmt: skip
            query += zero
            grad += zero
            key += BLOCK_N * row_stride
            value += BLOCK_N * row_stride
        if TAIL > 0:
            o_tail = tl.arange(0, TAIL)
            b_dq = add_query_gradient(
                b_dq, b_q, b_grad, b_lse, b_delta, query, grad, key, value, row_stride, grad_row_stride, o_m, m_m,
                o_tail, whole + o_tail < length, zero, scale_log2, True, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
            )  # fmt: skip
        dqkv += ((first + start) * 3 * heads + head) * HEAD_DIM
        store_tiles(dqkv, b_dq, scale, o_m, m_m, 3 * heads * HEAD_DIM, WIDTHS, HEAD_DIM)


@triton.jit
def add_key_value_gradient(
    b_dk, b_dv, b_k, b_v, query, grad, lse, delta, key, value, row_stride, grad_row_stride, o_m, m_m, o_n, m_n,
    zero, scale_log2,
    MASKED: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to the gradients of BLOCK_N keys, still to be scaled, and values."""
    # Queries beyond the last one get probability exp(-inf) = 0.
    b_lse = tl.load(lse + o_m, mask=m_m, other=float("inf")) if MASKED else tl.load(lse + o_m)
    b_delta = tl.load(delta + o_m, mask=m_m, other=0.0) if MASKED else tl.load(delta + o_m)
    # [BLOCK_N, BLOCK_M]: transposed, as both products with it need it
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
        b_dv = add_product_of_loaded(b_dv, b_p, grad + zero, o_m, m_m, grad_row_stride, WIDTHS, HEAD_DIM, PRECISION)
        b_dp = inner_of_loaded(
            value, o_n, m_n, row_stride, grad, o_m, m_m, grad_row_stride, WIDTHS, HEAD_DIM, PRECISION
        )
    b_ds = b_p * (b_dp - b_delta[None, :])
    if RESIDENT:
        b_dk = add_product(b_dk, b_ds, b_q, PRECISION)
    else:
        b_dk = add_product_of_loaded(b_dk, b_ds, query + zero, o_m, m_m, row_stride, WIDTHS, HEAD_DIM, PRECISION)
    return b_dk, b_dv


@triton.jit
def attention_backward_key_value_kernel(
    qkv, cu_seqlens, grad, lse, delta, dqkv, tokens, tiles, heads,
    clip_stride, row_stride, part_stride, head_stride, grad_clip_stride, grad_row_stride, lse_stride, zero,
    scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, WIDTHS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VEC: tl.constexpr, GRAD_VEC: tl.constexpr, VARLEN: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_N keys and values, from all queries in tiles of BLOCK_M."""
    tile, head, clip, first, length = locate(tl.program_id(0), cu_seqlens, tokens, tiles, heads, VARLEN)
    start = tile * BLOCK_N
    # inductor hands floats over as float64
    scale, scale_log2 = tl.cast(scale, tl.float32), tl.cast(scale_log2, tl.float32)
    row_stride, grad_row_stride = row_stride * VEC, grad_row_stride * GRAD_VEC
    if start < length:
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
                at + o_m < length, o_n, m_n, zero, scale_log2, not RESIDENT, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
            )  # fmt: skip
            key += zero
            value += zero
            query += BLOCK_M * row_stride
            grad += BLOCK_M * grad_row_stride
            lse += BLOCK_M
            delta += BLOCK_M
        if TAIL > 0:
            o_tail = tl.arange(0, TAIL)
            b_dk, b_dv = add_key_value_gradient(
                b_dk, b_dv, b_k, b_v, query, grad, lse, delta, key, value, row_stride, grad_row_stride, o_tail,
                whole + o_tail < length, o_n, m_n, zero, scale_log2, True, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
            )  # fmt: skip
        dkey = dqkv + ((first + start) * 3 * heads + heads + head) * HEAD_DIM
        store_tiles(dkey, b_dk, scale, o_n, m_n, 3 * heads * HEAD_DIM, WIDTHS, HEAD_DIM)
        store_tiles(dkey + heads * HEAD_DIM, b_dv, 1.0, o_n, m_n, 3 * heads * HEAD_DIM, WIDTHS, HEAD_DIM)


# See `Tables`. BLOCK_M is queries, BLOCK_N keys; resident are queries, and keys and values in the second pair.
# Compiled clean by Triton 3.6 and 3.9 and not measured but for sm_90 up to 1100 tokens: H200, Triton 3.6, bc236cf, both
# kernels 581 us at 784 tokens, 674 before (only that of queries: 658); values compared there at 663e046.
QUERY: Tables = ({
    "sm_80": {(64, 64): (64, 64, 128, 4, 2), (64, ANY): (128, 64, 128, 8, 3), (128, ANY): (128, 32, 64, 8, 2)},
    "sm_90": {(64, 64): (64, 64, 128, 4, 2), (64, 1100): (64, 32, 64, 4, 3), (64, ANY): (128, 64, 128, 8, 3),
              (128, ANY): (128, 64, 128, 8, 2)},
    "sm_100": {(64, 64): (64, 64, 128, 4, 2), (64, ANY): (128, 64, 128, 8, 3), (80, ANY): (128, 64, 128, 8, 2),
               (95, ANY): (64, 64, 128, 4, 2), (96, ANY): (64, 32, 128, 4, 2), (128, ANY): (128, 64, 128, 8, 2)},
    "": {(128, ANY): (64, 32, 64, 4, 1)},
}, {
    "sm_80": {(32, ANY): (64, 32, 32, 4, 1), (64, ANY): (64, 16, 32, 4, 1, False), (95, ANY): (64, 16, 32, 8, 1, False),
              (128, ANY): (64, 32, 32, 4, 1, False)},
    "sm_90": {(32, ANY): (64, 32, 32, 4, 1), (64, ANY): (64, 32, 32, 4, 1, False),
              (128, ANY): (64, 16, 32, 4, 1, False)},
    "sm_100": {(32, ANY): (64, 32, 32, 4, 1), (96, ANY): (64, 16, 32, 4, 1, False),
               (128, ANY): (64, 16, 32, 8, 1, False)},
    "": {(128, ANY): (32, 32, 32, 4, 1, False)},
})  # fmt: skip
KEY_VALUE: Tables = ({
    "sm_80": {(64, 64): (32, 64, 64, 4, 2), (32, ANY): (64, 128, 128, 8, 3), (64, ANY): (32, 128, 64, 8, 3),
              (80, ANY): (16, 64, 64, 4, 2), (96, ANY): (16, 128, 128, 8, 2), (128, ANY): (16, 64, 32, 4, 2, False)},
    "sm_90": {(64, 64): (64, 64, 128, 4, 2), (64, 1100): (32, 64, 64, 4, 3), (64, ANY): (64, 128, 128, 8, 3),
              (80, ANY): (64, 128, 128, 8, 2), (128, ANY): (64, 64, 128, 8, 2)},
    "sm_100": {(64, 64): (32, 64, 64, 4, 2), (64, ANY): (64, 128, 128, 8, 3), (80, ANY): (64, 64, 128, 8, 2),
               (95, ANY): (32, 64, 128, 4, 2), (128, ANY): (64, 64, 128, 8, 2)},
    "": {(32, ANY): (32, 64, 32, 4, 1), (64, ANY): (32, 128, 64, 8, 1), (128, ANY): (16, 32, 32, 4, 1, False)},
}, {
    "sm_80": {(32, ANY): (32, 64, 32, 8, 1, False), (64, ANY): (16, 32, 32, 8, 1, False),
              (95, ANY): (32, 16, 32, 4, 1, False), (128, ANY): (16, 16, 32, 4, 1, False)},
    "sm_90": {(32, ANY): (32, 64, 32, 4, 1, False), (64, ANY): (32, 64, 32, 8, 1, False),
              (96, ANY): (16, 16, 32, 4, 1, False), (128, ANY): (32, 16, 32, 8, 1, False)},
    "sm_100": {(32, ANY): (32, 64, 32, 4, 1, False), (64, ANY): (32, 64, 32, 8, 1, False),
               (80, ANY): (32, 16, 32, 4, 1, False), (128, ANY): (16, 16, 64, 8, 1, False)},
    "": {(128, ANY): (32, 32, 32, 4, 1, False)},
})  # fmt: skip
config_query = partial(by_shape, QUERY)
config_key_value = partial(by_shape, KEY_VALUE)


def gradients(grad, grad_lse, qkv, bias, out, lse, *options: Any) -> tuple[Tensor, Tensor | None]:
    """Of qkv and bias, contiguous."""
    return torch.empty_like(qkv, memory_format=DENSE), _like(bias)


def backward(grad, grad_lse, qkv, bias, out, lse, scale, save, needs) -> Run:
    """The gradients of qkv and bias from those of out and lse, each None if that output was not used."""
    qkv = qkv if bias is None else qkv.contiguous()
    run = _run(grad, grad_lse, qkv, None, out, lse, qkv.shape[1], scale)
    return lambda grad, grad_lse, qkv, bias, out, lse: _with_bias(run, grad, grad_lse, qkv, None, bias, out, lse)


def gradients_varlen(grad, grad_lse, qkv, cu_seqlens, bias, out, lse, *options: Any) -> tuple[Tensor, Tensor | None]:
    """Of qkv and bias, contiguous."""
    return torch.empty_like(qkv, memory_format=DENSE), _like(bias)


def backward_varlen(grad, grad_lse, qkv, cu_seqlens, bias, out, lse, max_seqlen, scale, save, needs) -> Run:
    """`backward` for ragged clips."""
    qkv = qkv if bias is None else qkv.contiguous()
    return partial(_with_bias, _run(grad, grad_lse, qkv, cu_seqlens, out, lse, max_seqlen, scale))


def gradients_kvpacked(grad, grad_lse, q, kv, bias, out, lse, *options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of q, kv and bias, contiguous."""
    return torch.empty_like(q, memory_format=DENSE), torch.empty_like(kv, memory_format=DENSE), _like(bias)


def backward_kvpacked(grad, grad_lse, q, kv, bias, out, lse, scale, save, needs) -> Run:
    """`backward` for queries apart from keys and values."""

    def run(grad, grad_lse, q, kv, bias, out, lse) -> tuple[Any, ...]:
        query, (key, value) = q.float(), kv.float().unbind(2)
        grad, out = (x.float().unflatten(-1, q.shape[-2:]) for x in (grad, out))
        if bias is not None:
            query, out = query + bias[0].float(), out - bias[2].float()
        p = (torch.einsum("bmhd,bnhd->bhmn", query, key) * scale - lse[..., : q.shape[1], None]).exp()
        dp = torch.einsum("bmhd,bnhd->bhmn", grad, value)
        ds = p * (dp - (out * grad).sum(-1).transpose(1, 2)[..., None]) * scale
        dq, dk = torch.einsum("bhmn,bnhd->bmhd", ds, key), torch.einsum("bhmn,bmhd->bnhd", ds, query)
        dv = torch.einsum("bhmn,bmhd->bnhd", p, grad)
        dbias = None
        if bias is not None:
            dbias = torch.stack((dq.sum((0, 1)), 0 * dq.sum((0, 1)), grad.sum((0, 1)))).to(bias.dtype)
        return dq.to(q.dtype), torch.stack((dk, dv), 2).to(kv.dtype), dbias

    return run


def _like(bias) -> Tensor | None:
    return None if bias is None else torch.empty_like(bias, memory_format=DENSE)


def _with_bias(run, grad, grad_lse, qkv, cu_seqlens, bias, out, lse) -> tuple[Any, ...]:
    """A stopgap: the bias is added, and its gradient summed, in passes of their own."""
    if bias is None:
        return (*run(grad, grad_lse, qkv, cu_seqlens, out, lse), None)
    rounded = (qkv.float() + torch.stack((bias[0], 0 * bias[1], bias[2])).float()).to(qkv.dtype)
    (dqkv,) = run(grad, grad_lse, rounded, cu_seqlens, out, lse)
    dbias = dqkv.float().flatten(0, -4).sum(0).to(bias.dtype)
    dbias[1] = 0
    return dqkv, dbias


def _run(grad, grad_lse, qkv, cu_seqlens, out, lse, tokens: int, scale: float) -> Run:
    """Both launches, for clips of ``tokens`` each, or of at most so many with ``cu_seqlens``.

    Hooks on saved tensors may have changed the strides of anything that was saved.
    """
    if qkv.numel() == 0:
        return lambda grad, grad_lse, qkv, *saved: (torch.empty_like(qkv, memory_format=DENSE),)
    ragged = cu_seqlens is not None
    heads, head_dim = qkv.shape[-2:]
    clips = len(cu_seqlens) - 1 if ragged else qkv.shape[0]
    copied, vector, strides = addresses(qkv, head_dim, ragged)
    if grad is None:
        grad = _zero(qkv)
    grad_copied, grad_vector, grad_strides = addresses(grad, head_dim, ragged)
    numbers = (heads, *strides, *grad_strides, lse.shape[-1], 0, scale, scale * LOG2_E)

    def launch(kernel: Any, config: Any, owned: str, other: str, copies: Sequence[bool]) -> Launch:
        """Each program owns a tile of ``owned`` and loops over tiles of ``other``."""
        name = kernel.__name__.removesuffix("_kernel")
        choice = choose(name, config, qkv, head_dim=head_dim, tokens=tokens, ragged=ragged)
        tile = choice.config
        tiles = triton.cdiv(tokens, getattr(tile, owned))
        return Launch(
            kernel,
            (tiles * heads * clips,),
            (tokens, tiles, *numbers),
            choice,
            copies,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            TAIL=tail(tokens, getattr(tile, other), ragged, tile.resident),
            VARLEN=ragged,
            GRAD_VEC=grad_vector,
            **shape_constants(qkv, tile, vector),
        )

    copies = (copied, scattered(cu_seqlens))
    query_copies = (*copies, scattered(out), grad_copied, scattered(lse), scattered(grad_lse))
    query = launch(attention_backward_query_kernel, config_query, "block_m", "block_n", query_copies)
    key_value_copies = (*copies, grad_copied, scattered(lse))
    key_value = launch(attention_backward_key_value_kernel, config_key_value, "block_n", "block_m", key_value_copies)

    def run(grad, grad_lse, qkv, cu_seqlens, out, lse) -> tuple[Tensor]:
        dqkv = torch.empty_like(qkv, memory_format=DENSE)
        delta = torch.empty_like(lse)
        if grad is None:
            grad = _zero(qkv)
        query(qkv, cu_seqlens, out, grad, lse, grad_lse, delta, dqkv)
        key_value(qkv, cu_seqlens, grad, lse, delta, dqkv)
        return (dqkv,)

    return run


def _zero(qkv: Tensor) -> Tensor:
    """The gradient of an output that was not used."""
    *lead, _, heads, head_dim = qkv.shape
    return torch.zeros((), dtype=qkv.dtype, device=qkv.device).expand(*lead, heads * head_dim)
