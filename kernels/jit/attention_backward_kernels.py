"""The kernels of attention's backward pass, from the saved log-sum-exp (arXiv 2307.08691); see `attention_backward`.

ds is the gradient of the scores. No sum needs atomics, so that the result has the same bits every time.

The bias of the linear layer that made q, k and v may come apart from them. That of the keys changes no gradient, and
that of the values only the output, from which delta is computed. The kernel that runs first stores the queries with
their bias, rounded as in the forward pass, so that loops over queries load them straight into the products.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    add_product,
    add_product_of_loaded,
    begin,
    inner,
    inner_of_loaded,
    load_bias,
    load_described,
    load_owned_tiles,
    load_tiles,
    locate,
    store_tiles,
    zero_tiles,
)


@triton.jit
def head_of(base, clip, first, head, clip_stride, row_stride, head_stride, VARLEN: tl.constexpr):
    """Where a head begins: in clip ``clip`` of a batch, or (VARLEN) at row ``first`` of packed tokens."""
    return base + (head * head_stride + (first * row_stride if VARLEN else clip * clip_stride))


@triton.jit
def load_step(
    wide, narrow, clip, part: tl.constexpr, head, row, base, o_row, m_row, row_stride,
    MASKED: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """`load_described` if there are descriptors, `load_tiles` if not or if MASKED: for the last tile of a clip."""
    if wide is None or MASKED:
        tiles = load_tiles(base, o_row, m_row, row_stride, MASKED, WIDTHS, HEAD_DIM)
    else:
        tiles = load_described(wide, narrow, clip, part, head, row, WIDTHS)
    return tiles


@triton.jit
def store_sums(part, b_tiles, factor, m_row, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store the sum over rows of each column tile: a program's part of a bias's gradient."""
    for i in tl.static_range(len(WIDTHS)):
        o_d = begin(WIDTHS, i) + tl.arange(0, WIDTHS[i])
        b_sum = tl.sum(tl.where(m_row[:, None], b_tiles[i].to(tl.float32) * factor, 0.0), 0)
        tl.store(part + o_d, b_sum, mask=o_d < HEAD_DIM)


@triton.jit
def store_delta(
    out, grad, grad_lse, delta, bias, part, start, length, heads, grad_row,
    BLOCK: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Store delta = sum((out - value bias) * grad, 1) - grad_lse of BLOCK queries, and sums of grad: (grad, delta)."""
    o_m = tl.arange(0, BLOCK)
    m_m = start + o_m < length
    b_grad = load_tiles(grad, o_m, m_m, grad_row, True, WIDTHS, HEAD_DIM)
    b_out = load_tiles(out, o_m, m_m, heads * HEAD_DIM, True, WIDTHS, HEAD_DIM)
    b_delta = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        b_part = b_out[i].to(tl.float32)
        if bias is not None:
            b_part -= load_bias(bias + 2 * heads * HEAD_DIM, begin(WIDTHS, i), WIDTHS[i], HEAD_DIM)
        b_delta += tl.sum(b_part * b_grad[i].to(tl.float32), 1)
    if grad_lse is not None:
        b_delta -= tl.load(grad_lse + o_m, mask=m_m, other=0.0)
    tl.store(delta + o_m, b_delta, mask=m_m)
    if part is not None:  # rows of ds sum to 0, so the gradient of the key bias is 0
        store_sums(part + heads * HEAD_DIM, zero_tiles(BLOCK, WIDTHS), 0.0, m_m, WIDTHS, HEAD_DIM)
        store_sums(part + 2 * heads * HEAD_DIM, b_grad, 1.0, m_m, WIDTHS, HEAD_DIM)
    return b_grad, b_delta


@triton.jit
def add_query_gradient(
    b_dq, b_q, b_do, b_lse, b_delta, wide, narrow, clip, head, row, query, bias, grad, key, value,
    query_row, row_stride, grad_row, o_m, m_m, o_n, m_n, zero, scale_log2,
    KEY_PART: tl.constexpr, MASKED: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the gradient of BLOCK_M queries, which is still to be scaled."""
    # [BLOCK_M, BLOCK_N]
    if RESIDENT:
        b_k = load_step(
            wide, narrow, clip, KEY_PART, head, row, key, o_n, m_n, row_stride, MASKED, WIDTHS, HEAD_DIM
        )  # fmt: skip
        b_s = inner(b_q, b_k, PRECISION)
        b_v = load_step(
            wide, narrow, clip, KEY_PART + 1, head, row, value, o_n, m_n, row_stride, MASKED, WIDTHS, HEAD_DIM
        )  # fmt: skip
        b_dp = inner(b_do, b_v, PRECISION)
    else:
        b_s = inner_of_loaded(query, o_m, m_m, query_row, key, o_n, m_n, row_stride, WIDTHS, HEAD_DIM, PRECISION, bias)
        b_dp = inner_of_loaded(grad, o_m, m_m, grad_row, value, o_n, m_n, row_stride, WIDTHS, HEAD_DIM, PRECISION)
    b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    if MASKED:
        b_p = tl.where(m_n[None, :], b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if RESIDENT:
        return add_product(b_dq, b_ds, b_k, PRECISION)
    return add_product_of_loaded(b_dq, b_ds, key + zero, o_n, m_n, row_stride, WIDTHS, HEAD_DIM, PRECISION)


@triton.jit
def attention_backward_query_kernel(
    query, key_value, wide, narrow, cu_seqlens, bias, out, grad, lse, grad_lse, delta, biased, dquery, part,
    queries, keys, tiles, heads, query_clip, query_row, query_head, key_first, clip_stride, row_stride, part_stride,
    head_stride, grad_clip, grad_row, lse_stride, zero, scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, KEY_PART: tl.constexpr, WIDTHS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VEC: tl.constexpr, GRAD_VEC: tl.constexpr, VARLEN: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M queries and their delta, from all keys in tiles of BLOCK_N.

    Keys and values are parts KEY_PART and KEY_PART + 1 of ``key_value``. With a bias, the queries with theirs go to
    ``biased`` [rows, heads, ROW]; if the bias gets a gradient, a program's sums over its queries go to ``part`` (clips
    * tiles, 3, heads, HEAD_DIM) float32.
    """
    program = tl.program_id(0)
    tile, head, clip, first, length = locate(program, cu_seqlens, queries, tiles, heads, VARLEN)
    start = tile * BLOCK_M
    # inductor hands floats over as float64
    scale, scale_log2 = tl.cast(scale, tl.float32), tl.cast(scale_log2, tl.float32)
    query_row, row_stride, grad_row = query_row * VEC, row_stride * VEC, grad_row * GRAD_VEC
    o_m = tl.arange(0, BLOCK_M)
    m_m = start + o_m < length
    if part is not None:
        part += ((clip * tiles + tile) * 3 * heads + head) * HEAD_DIM
    if start < length:
        if VARLEN:
            keys = length
        query = head_of(query, clip, first, head, query_clip * VEC, query_row, query_head * VEC, VARLEN)
        key = head_of(key_value, clip, first, head, clip_stride * VEC, row_stride, head_stride * VEC, VARLEN)
        key += key_first * VEC
        value = key + part_stride * VEC
        grad = head_of(grad, clip, first, head, grad_clip * GRAD_VEC, grad_row, HEAD_DIM, VARLEN)
        query += tl.cast(start, tl.int64) * query_row
        grad += tl.cast(start, tl.int64) * grad_row
        out += ((first + start) * heads + head) * HEAD_DIM
        at_lse = head_of(0, clip * heads, first, head, lse_stride, 1, lse_stride, VARLEN) + start
        if grad_lse is not None:
            grad_lse += at_lse
        if bias is not None:
            bias += head * HEAD_DIM
        b_grad, b_delta = store_delta(
            out, grad, grad_lse, delta + at_lse, bias, part, start, length, heads,
            grad_row, BLOCK_M, WIDTHS, HEAD_DIM,
        )  # fmt: skip
        b_q = load_owned_tiles(query, o_m, m_m, query_row, WIDTHS, HEAD_DIM, bias)
        if biased is not None:
            biased += ((first + start) * heads + head) * ROW
            store_tiles(biased, b_q, 1.0, o_m, m_m, heads * ROW, WIDTHS, HEAD_DIM)
        b_lse = tl.load(lse + at_lse + o_m, mask=m_m, other=float("inf")) * 1.4426950408889634
        b_dq = zero_tiles(BLOCK_M, WIDTHS)
        o_n = tl.arange(0, BLOCK_N)
        whole = keys // BLOCK_N * BLOCK_N if RESIDENT else keys
        block_clip, block_row = (clip * 0, first) if VARLEN else (clip, first * 0)
        for at in range(0, whole, BLOCK_N):
            b_dq = add_query_gradient(
                b_dq, b_q, b_grad, b_lse, b_delta, wide, narrow, block_clip, head, block_row + at, query, bias, grad,
                key, value, query_row, row_stride, grad_row, o_m, m_m, o_n, at + o_n < keys, zero, scale_log2,
                KEY_PART, not RESIDENT, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
            )  # fmt: skip
            query += zero
            grad += zero
            key += BLOCK_N * row_stride
            value += BLOCK_N * row_stride
        if TAIL > 0:
            o_tail = tl.arange(0, TAIL)
            b_dq = add_query_gradient(
                b_dq, b_q, b_grad, b_lse, b_delta, wide, narrow, block_clip, head, block_row, query, bias, grad,
                key, value, query_row, row_stride, grad_row, o_m, m_m, o_tail, whole + o_tail < keys, zero, scale_log2,
                KEY_PART, True, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
            )  # fmt: skip
        out_row = (1 + 2 * KEY_PART) * heads * HEAD_DIM
        dquery += (first + start) * out_row + head * HEAD_DIM
        store_tiles(dquery, b_dq, scale, o_m, m_m, out_row, WIDTHS, HEAD_DIM)
        if part is not None:
            store_sums(part, b_dq, scale, m_m, WIDTHS, HEAD_DIM)
    elif part is not None:  # a clip may have fewer tiles than the longest one
        for i in tl.static_range(3):
            store_sums(part + i * heads * HEAD_DIM, zero_tiles(BLOCK_M, WIDTHS), 0.0, m_m, WIDTHS, HEAD_DIM)


@triton.jit
def add_key_value_gradient(
    b_dk, b_dv, b_k, b_v, q_wide, q_narrow, do_wide, do_narrow, clip, head, row, query, grad, lse,
    delta, key, value, scores, query_row, row_stride, grad_row, scores_row, o_m, m_m, o_n, m_n, zero, scale_log2,
    MASKED: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to the gradients of BLOCK_N keys (not yet scaled) and values; store ds in ``scores``."""
    # Queries beyond the last one get probability exp(-inf) = 0.
    b_lse = tl.load(lse + o_m, mask=m_m, other=float("inf")) if MASKED else tl.load(lse + o_m)
    b_delta = tl.load(delta + o_m, mask=m_m, other=0.0) if MASKED else tl.load(delta + o_m)
    # [BLOCK_N, BLOCK_M]: transposed, as both products with it need it
    if RESIDENT:
        b_q = load_step(q_wide, q_narrow, clip, 0, head, row, query, o_m, m_m, query_row, MASKED, WIDTHS, HEAD_DIM)
        b_do = load_step(do_wide, do_narrow, clip, 0, head, row, grad, o_m, m_m, grad_row, MASKED, WIDTHS, HEAD_DIM)
        b_s = inner(b_k, b_q, PRECISION)
    else:
        b_s = inner_of_loaded(key, o_n, m_n, row_stride, query, o_m, m_m, query_row, WIDTHS, HEAD_DIM, PRECISION)
    b_p = tl.exp2(b_s * scale_log2 - (b_lse * 1.4426950408889634)[None, :])
    if RESIDENT:
        b_dv = add_product(b_dv, b_p, b_do, PRECISION)
        b_dp = inner(b_v, b_do, PRECISION)
    else:
        b_dv = add_product_of_loaded(b_dv, b_p, grad + zero, o_m, m_m, grad_row, WIDTHS, HEAD_DIM, PRECISION)
        b_dp = inner_of_loaded(value, o_n, m_n, row_stride, grad, o_m, m_m, grad_row, WIDTHS, HEAD_DIM, PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    if scores is not None:
        mask = m_n[:, None] & m_m[None, :] if MASKED else m_n[:, None]
        p_scores = scores + o_n[:, None] * scores_row + o_m[None, :]
        tl.store(p_scores, b_ds.to(scores.dtype.element_ty), mask=mask)
    if RESIDENT:
        b_dk = add_product(b_dk, b_ds, b_q, PRECISION)
    else:
        b_dk = add_product_of_loaded(b_dk, b_ds, query + zero, o_m, m_m, query_row, WIDTHS, HEAD_DIM, PRECISION)
    return b_dk, b_dv


@triton.jit
def key_value_tile(
    q_wide, q_narrow, do_wide, do_narrow, query, key, value, grad, lse, delta, dkey, scores, clip, head, row,
    start, queries, length, heads, query_row, row_stride, grad_row, scores_row, zero, scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, KEY_PART: tl.constexpr, WIDTHS: tl.constexpr,
    HEAD_DIM: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_N keys and values, from all queries in tiles of BLOCK_M.

    The descriptors are read at (clip, 0, head, row + token). ds goes to ``scores`` [keys, queries] unless it is None.
    """
    o_n = tl.arange(0, BLOCK_N)
    m_n = start + o_n < length
    key += tl.cast(start, tl.int64) * row_stride
    value += tl.cast(start, tl.int64) * row_stride
    if scores is not None:
        scores += tl.cast(start, tl.int64) * scores_row
    b_k = load_tiles(key, o_n, m_n, row_stride, True, WIDTHS, HEAD_DIM)
    b_v = load_tiles(value, o_n, m_n, row_stride, True, WIDTHS, HEAD_DIM)
    b_dk = zero_tiles(BLOCK_N, WIDTHS)
    b_dv = zero_tiles(BLOCK_N, WIDTHS)
    o_m = tl.arange(0, BLOCK_M)
    whole = queries // BLOCK_M * BLOCK_M if RESIDENT else queries
    for at in range(0, whole, BLOCK_M):
        b_dk, b_dv = add_key_value_gradient(
            b_dk, b_dv, b_k, b_v, q_wide, q_narrow, do_wide, do_narrow, clip, head, row + at, query,
            grad, lse, delta, key, value, scores, query_row, row_stride, grad_row, scores_row, o_m, at + o_m < queries,
            o_n, m_n, zero, scale_log2, not RESIDENT, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
        )  # fmt: skip
        key += zero
        value += zero
        query += BLOCK_M * query_row
        grad += BLOCK_M * grad_row
        lse += BLOCK_M
        delta += BLOCK_M
        if scores is not None:
            scores += BLOCK_M
    if TAIL > 0:
        o_tail = tl.arange(0, TAIL)
        b_dk, b_dv = add_key_value_gradient(
            b_dk, b_dv, b_k, b_v, q_wide, q_narrow, do_wide, do_narrow, clip, head, row, query, grad,
            lse, delta, key, value, scores, query_row, row_stride, grad_row, scores_row, o_tail,
            whole + o_tail < queries, o_n, m_n, zero, scale_log2, True, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
        )  # fmt: skip
    out_row = (2 + KEY_PART) * heads * HEAD_DIM
    dkey += tl.cast(start, tl.int64) * out_row
    store_tiles(dkey, b_dk, scale, o_n, m_n, out_row, WIDTHS, HEAD_DIM)
    store_tiles(dkey + heads * HEAD_DIM, b_dv, 1.0, o_n, m_n, out_row, WIDTHS, HEAD_DIM)


@triton.jit
def attention_backward_key_value_kernel(
    query, key_value, q_wide, q_narrow, do_wide, do_narrow, cu_seqlens, grad, lse, delta, dkey_value,
    queries, keys, tiles, heads, query_clip, query_row, query_head, key_first, clip_stride, row_stride, part_stride,
    head_stride, grad_clip, grad_row, lse_stride, zero, scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, KEY_PART: tl.constexpr, WIDTHS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VEC: tl.constexpr, GRAD_VEC: tl.constexpr, VARLEN: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_N keys and values, from all queries, to parts KEY_PART and KEY_PART + 1 of dkey_value."""
    program = tl.program_id(0)
    tile, head, clip, first, length = locate(program, cu_seqlens, keys, tiles, heads, VARLEN)
    # inductor hands floats over as float64
    scale, scale_log2 = tl.cast(scale, tl.float32), tl.cast(scale_log2, tl.float32)
    query_row, row_stride, grad_row = query_row * VEC, row_stride * VEC, grad_row * GRAD_VEC
    if tile * BLOCK_N < length:
        if VARLEN:
            queries = length
        query = head_of(query, clip, first, head, query_clip * VEC, query_row, query_head * VEC, VARLEN)
        key = head_of(key_value, clip, first, head, clip_stride * VEC, row_stride, head_stride * VEC, VARLEN)
        key += key_first * VEC
        grad = head_of(grad, clip, first, head, grad_clip * GRAD_VEC, grad_row, HEAD_DIM, VARLEN)
        at_lse = head_of(0, clip * heads, first, head, lse_stride, 1, lse_stride, VARLEN)
        dkey = dkey_value + ((first * (2 + KEY_PART) + KEY_PART) * heads + head) * HEAD_DIM
        block_clip, block_row = (clip * 0, first) if VARLEN else (clip, first * 0)
        key_value_tile(
            q_wide, q_narrow, do_wide, do_narrow, query, key, key + part_stride * VEC, grad, lse + at_lse,
            delta + at_lse, dkey, None, block_clip, head, block_row, tile * BLOCK_N, queries, length, heads, query_row,
            row_stride, grad_row, 0, zero, scale, scale_log2,
            BLOCK_M, BLOCK_N, TAIL, KEY_PART, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
        )  # fmt: skip
