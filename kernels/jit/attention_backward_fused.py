"""The backward pass of attention with five products; the two kernels of `attention_backward_kernels` compute seven.

ds, the gradient of the scores, is needed for the gradients of queries and of keys, and each of the two kernels computes
it. Here the programs of keys and values store it, in the products' dtype, and others multiply it by the keys. This is
one launch: a program does a tile of keys and values of a head, and then a tile of queries of an earlier head, ``lag``
heads before, whose ds is complete by then, or nearly. There is memory for ds of ``ring`` heads at a time.

Programs wait for others through counters in memory. This cannot deadlock: programs are numbered as they start and wait
only for lower numbers, so the lowest one that is running never waits. How long a program waits changes no result.
"""

import triton
import triton.language as tl

from .attention_backward_kernels import head_of, key_value_tile, store_delta, store_sums
from .attention_tiles import add_product, load_tiles, locate, store_tiles, zero_tiles


@triton.jit
def wait(counter, value):
    """Wait until ``value`` programs have called `signal`; what they stored before it can then be read."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < value:
        pass
    tl.debug_barrier()


@triton.jit
def signal(counter):
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def attention_backward_delta_kernel(
    out, query, cu_seqlens, bias, grad, grad_lse, delta, counters, biased, part,
    queries, tiles, heads, query_clip, query_row, query_head, grad_clip, grad_row, lse_stride, every,
    BLOCK_N: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, VEC: tl.constexpr, GRAD_VEC: tl.constexpr,
    VARLEN: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Before the fused kernel: store delta of BLOCK_N queries and these with their bias; set all counters to 0."""
    program = tl.program_id(0)
    tile, head, clip, first, length = locate(program, cu_seqlens, queries, tiles, heads, VARLEN)
    start = tile * BLOCK_N
    grad_row = grad_row * GRAD_VEC
    if tile == 0:
        index = program // tiles
        tl.store(counters + 1 + index, 0)
        tl.store(counters + 1 + every + index, 0)
        if index == 0:
            tl.store(counters, 0)
    if part is not None:
        part += ((clip * tiles + tile) * 3 * heads + head) * HEAD_DIM
    if start < length:
        grad = head_of(grad, clip, first, head, grad_clip * GRAD_VEC, grad_row, HEAD_DIM, VARLEN)
        at_lse = head_of(0, clip * heads, first, head, lse_stride, 1, lse_stride, VARLEN) + start
        if grad_lse is not None:
            grad_lse += at_lse
        if bias is not None:
            bias += head * HEAD_DIM
            o_m = tl.arange(0, BLOCK_N)
            m_m = start + o_m < length
            query = head_of(query, clip, first, head, query_clip * VEC, query_row * VEC, query_head * VEC, VARLEN)
            query += tl.cast(start, tl.int64) * (query_row * VEC)
            b_q = load_tiles(query, o_m, m_m, query_row * VEC, True, WIDTHS, HEAD_DIM, bias)
            biased += ((first + start) * heads + head) * ROW
            store_tiles(biased, b_q, 1.0, o_m, m_m, heads * ROW, WIDTHS, HEAD_DIM)
        store_delta(
            out + ((first + start) * heads + head) * HEAD_DIM, grad + tl.cast(start, tl.int64) * grad_row, grad_lse,
            delta + at_lse, bias, part, start, length, heads, grad_row,
            BLOCK_N, WIDTHS, HEAD_DIM,
        )  # fmt: skip
    elif part is not None:
        m_m = start + tl.arange(0, BLOCK_N) < length
        for i in tl.static_range(1, 3):
            store_sums(part + i * heads * HEAD_DIM, zero_tiles(BLOCK_N, WIDTHS), 0.0, m_m, WIDTHS, HEAD_DIM)


@triton.jit
def add_scores_product(
    b_dq, key, scores, row_stride, scores_row, o_m, o_n, m_n,
    MASKED: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ds @ keys of one tile of keys."""
    p_scores = scores + o_n[:, None] * scores_row + o_m[None, :]
    # [keys, BLOCK_N]; columns beyond the last query only reach rows of dq that are not stored
    b_ds = tl.load(p_scores, mask=m_n[:, None], other=0.0) if MASKED else tl.load(p_scores)
    b_k = load_tiles(key, o_n, m_n, row_stride, MASKED, WIDTHS, HEAD_DIM)
    return add_product(b_dq, tl.trans(b_ds), b_k, PRECISION)


@triton.jit
def attention_backward_fused_kernel(
    query, key_value, q_wide, q_narrow, do_wide, do_narrow, cu_seqlens, grad, lse, delta, dquery, dkey_value,
    scores,
    counters, part, queries, keys, tiles, heads, query_clip, query_row, query_head, key_first, clip_stride, row_stride,
    part_stride, head_stride, grad_clip, grad_row, lse_stride, scores_row, scores_head, every, lag, ring, zero, scale,
    scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, KEY_TAIL: tl.constexpr, KEY_PART: tl.constexpr,
    WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, VEC: tl.constexpr, GRAD_VEC: tl.constexpr, VARLEN: tl.constexpr,
    RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values of a head, then of BLOCK_N queries of the head ``lag`` heads before.

    ``every`` is the number of heads of all clips. ``counters``: how many programs have started; then for each head how
    many have stored its ds; then for each head how many have read it.
    """
    program = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
    # inductor hands floats over as float64
    scale, scale_log2 = tl.cast(scale, tl.float32), tl.cast(scale_log2, tl.float32)
    query_row, row_stride, grad_row = query_row * VEC, row_stride * VEC, grad_row * GRAD_VEC
    index = program // tiles
    if index < every:
        tile, head, clip, first, length = locate(program, cu_seqlens, keys, tiles, heads, VARLEN)
        if index >= ring:
            wait(counters + 1 + every + index - ring, tiles)
        if tile * BLOCK_N < length:
            count = length if VARLEN else queries
            q = head_of(query, clip, first, head, query_clip * VEC, query_row, query_head * VEC, VARLEN)
            key = head_of(key_value, clip, first, head, clip_stride * VEC, row_stride, head_stride * VEC, VARLEN)
            key += key_first * VEC
            do = head_of(grad, clip, first, head, grad_clip * GRAD_VEC, grad_row, HEAD_DIM, VARLEN)
            at_lse = head_of(0, clip * heads, first, head, lse_stride, 1, lse_stride, VARLEN)
            block_clip, block_row = (clip * 0, first) if VARLEN else (clip, first * 0)
            key_value_tile(
                q_wide, q_narrow, do_wide, do_narrow, q, key, key + part_stride * VEC, do, lse + at_lse,
                delta + at_lse,
                dkey_value + ((first * (2 + KEY_PART) + KEY_PART) * heads + head) * HEAD_DIM,
                scores + (index % ring).to(tl.int64) * scores_head, block_clip, head, block_row, tile * BLOCK_N, count,
                length, heads, query_row, row_stride, grad_row, scores_row, zero, scale, scale_log2,
                BLOCK_M, BLOCK_N, TAIL, KEY_PART, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
            )  # fmt: skip
        signal(counters + 1 + index)
    if index >= lag:
        index -= lag
        tile, head, clip, first, length = locate(program - lag * tiles, cu_seqlens, queries, tiles, heads, VARLEN)
        start = tile * BLOCK_N
        o_m = tl.arange(0, BLOCK_N)
        m_m = start + o_m < length
        b_dq = zero_tiles(BLOCK_N, WIDTHS)
        if start < length:
            wait(counters + 1 + index, tiles)
            count = length if VARLEN else keys
            key = head_of(key_value, clip, first, head, clip_stride * VEC, row_stride, head_stride * VEC, VARLEN)
            key += key_first * VEC
            ds = scores + ((index % ring).to(tl.int64) * scores_head + start)
            o_n = tl.arange(0, BLOCK_N)
            whole = count // BLOCK_N * BLOCK_N
            for _ in range(0, whole, BLOCK_N):
                b_dq = add_scores_product(
                    b_dq, key, ds, row_stride, scores_row, o_m, o_n, m_m, False, WIDTHS, HEAD_DIM, PRECISION
                )
                key += BLOCK_N * row_stride
                ds += BLOCK_N * scores_row
            if KEY_TAIL > 0:
                o_tail = tl.arange(0, KEY_TAIL)
                b_dq = add_scores_product(
                    b_dq, key, ds, row_stride, scores_row, o_m, o_tail, whole + o_tail < count, True, WIDTHS, HEAD_DIM,
                    PRECISION,
                )  # fmt: skip
            out_row = (1 + 2 * KEY_PART) * heads * HEAD_DIM
            dq = dquery + (first + start) * out_row + head * HEAD_DIM
            store_tiles(dq, b_dq, scale, o_m, m_m, out_row, WIDTHS, HEAD_DIM)
        if part is not None:
            part += ((clip * tiles + tile) * 3 * heads + head) * HEAD_DIM
            store_sums(part, b_dq, scale, m_m, WIDTHS, HEAD_DIM)
        signal(counters + 1 + every + index)
