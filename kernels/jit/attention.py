"""attention and attention_varlen in Triton: FlashAttention-2 (arXiv 2307.08691) on packed qkv. The forward pass.

One program takes BLOCK_M queries of one head and walks over the keys in tiles of BLOCK_N, with a running softmax; the
scores never leave the chip. What is left over at the end of the keys is a smaller tile of its own, so that 784 tokens
cost 12 * 64 + 16 keys and not 13 * 64: only this tile is masked.

A head is worked on as a tuple of column tiles, each a power of two wide: 80 is 64 + 16, 96 is 64 + 32. Narrower tiles
also need fewer registers at a time, which float32 and older architectures are short of.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import lse_row
from ..launch_config import LaunchConfig, launch_config
from .launch import launch, precision

LOG2_E = 1.4426950408889634


@triton.constexpr_function
def begin(widths, place):
    """The first column of a column tile."""
    return sum(widths[:place])


@triton.jit
def load_tile(
    base, o_row, m_row, row_stride,
    MASKED: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Columns FIRST to FIRST + WIDTH of some tokens: [rows, WIDTH]; zero beyond HEAD_DIM and, if MASKED, off m_row."""
    o_d = FIRST + tl.arange(0, WIDTH)
    p_tile = base + o_row[:, None] * row_stride + o_d[None, :]
    if FIRST + WIDTH > HEAD_DIM:
        m_d = (o_d < HEAD_DIM)[None, :]
        return tl.load(p_tile, mask=m_d & m_row[:, None] if MASKED else m_d, other=0.0)
    return tl.load(p_tile, mask=m_row[:, None], other=0.0) if MASKED else tl.load(p_tile)


@triton.jit
def load_tiles(base, o_row, m_row, row_stride, MASKED: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """All column tiles of some tokens."""
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        tile = load_tile(base, o_row, m_row, row_stride, MASKED, begin(WIDTHS, i), WIDTHS[i], HEAD_DIM)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def store_tile(
    base, b_tile, o_row, m_row, row_stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """The inverse of `load_tile`, rounding to the dtype of the memory."""
    o_d = FIRST + tl.arange(0, WIDTH)
    mask = m_row[:, None] & (o_d < HEAD_DIM)[None, :] if FIRST + WIDTH > HEAD_DIM else m_row[:, None]
    tl.store(base + o_row[:, None] * row_stride + o_d[None, :], b_tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_tiles(base, b_tiles, factor, o_row, m_row, row_stride, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """All column tiles of some tokens, times ``factor``: a number, or one for each row [rows, 1]."""
    for i in tl.static_range(len(WIDTHS)):
        store_tile(base, b_tiles[i] * factor, o_row, m_row, row_stride, begin(WIDTHS, i), WIDTHS[i], HEAD_DIM)


@triton.jit
def zero_tile(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros((ROWS, WIDTH), dtype=tl.float32)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """Sums that begin at zero."""
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        tiles = tiles + (zero_tile(ROWS, WIDTHS[i]),)
    return tiles


@triton.jit
def inner(b_rows, b_columns, PRECISION: tl.constexpr):
    """rows @ columns^T over all column tiles: [M, N] float32."""
    b_product = tl.dot(b_rows[0], tl.trans(b_columns[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(b_rows)):
        b_product = tl.dot(b_rows[i], tl.trans(b_columns[i]), b_product, input_precision=PRECISION)
    return b_product


@triton.jit
def inner_of_loaded(
    rows, o_rows, m_rows, row_stride, columns, o_columns, m_columns, column_stride,
    WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same, each column tile loaded where it is used: the fewest registers."""
    b_row = load_tile(rows, o_rows, m_rows, row_stride, True, 0, WIDTHS[0], HEAD_DIM)
    b_column = load_tile(columns, o_columns, m_columns, column_stride, True, 0, WIDTHS[0], HEAD_DIM)
    b_product = tl.dot(b_row, tl.trans(b_column), input_precision=PRECISION)
    for i in tl.static_range(1, len(WIDTHS)):
        b_row = load_tile(rows, o_rows, m_rows, row_stride, True, begin(WIDTHS, i), WIDTHS[i], HEAD_DIM)
        b_column = load_tile(columns, o_columns, m_columns, column_stride, True, begin(WIDTHS, i), WIDTHS[i], HEAD_DIM)
        b_product = tl.dot(b_row, tl.trans(b_column), b_product, input_precision=PRECISION)
    return b_product


@triton.jit
def add_product(b_sums, b_weights, b_tiles, PRECISION: tl.constexpr):
    """sums + weights @ tiles for each column tile, in the tiles' dtype, summed in float32."""
    sums = ()
    for i in tl.static_range(len(b_sums)):
        sums = sums + (tl.dot(b_weights.to(b_tiles[i].dtype), b_tiles[i], b_sums[i], input_precision=PRECISION),)
    return sums


@triton.jit
def add_product_of_loaded(
    b_sums, b_weights, base, o_row, m_row, row_stride,
    WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same, each column tile loaded where it is used."""
    sums = ()
    for i in tl.static_range(len(b_sums)):
        b_tile = load_tile(base, o_row, m_row, row_stride, True, begin(WIDTHS, i), WIDTHS[i], HEAD_DIM)
        sums = sums + (tl.dot(b_weights.to(b_tile.dtype), b_tile, b_sums[i], input_precision=PRECISION),)
    return sums


@triton.jit
def place(cu_seqlens, tokens, tiles, heads, VARLEN: tl.constexpr):
    """Which tile of which head of which clip this program takes: (tile, head, clip, first token, length).

    Tiles of one head run side by side and find its keys in L2.
    """
    program = tl.program_id(0)
    clip = (program // (tiles * heads)).to(tl.int64)
    if VARLEN:
        first = tl.load(cu_seqlens + clip).to(tl.int64)
        length = (tl.load(cu_seqlens + clip + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = clip * tokens
        length = tokens
    return program % tiles, (program // tiles % heads).to(tl.int64), clip, first, length


@triton.jit
def attend(
    b_q, b_out, b_max, b_sum, query, key, value, row_stride, o_m, m_m, o_n, m_n, scale_log2,
    MASKED: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax."""
    # [BLOCK_M, BLOCK_N]
    if RESIDENT:
        b_s = inner(b_q, load_tiles(key, o_n, m_n, row_stride, MASKED, WIDTHS, HEAD_DIM), PRECISION)
    else:
        b_s = inner_of_loaded(
            query, o_m, m_m, row_stride, key, o_n, m_n, row_stride, WIDTHS, HEAD_DIM, PRECISION
        )  # fmt: skip
    if MASKED:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - b_new_max[:, None])
    b_decay = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_faded = ()
    for i in tl.static_range(len(b_out)):
        b_faded = b_faded + (b_out[i] * b_decay[:, None],)
    if RESIDENT:
        b_v = load_tiles(value, o_n, m_n, row_stride, MASKED, WIDTHS, HEAD_DIM)
        b_out = add_product(b_faded, b_p, b_v, PRECISION)
    else:
        b_out = add_product_of_loaded(b_faded, b_p, value, o_n, m_n, row_stride, WIDTHS, HEAD_DIM, PRECISION)
    return b_out, b_new_max, b_sum


@triton.jit
def forward_tile(
    query, key, value, out, lse, start, length, lse_length, row_stride, out_stride, nothing, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries from ``start`` on."""
    o_m = tl.arange(0, BLOCK_M)
    m_m = start + o_m < length
    query += tl.cast(start, tl.int64) * row_stride
    b_q = load_tiles(query, o_m, m_m, row_stride, True, WIDTHS, HEAD_DIM)
    b_out = zero_tiles(BLOCK_M, WIDTHS)
    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    o_n = tl.arange(0, BLOCK_N)
    whole = length // BLOCK_N * BLOCK_N if RESIDENT else length
    for at in range(0, whole, BLOCK_N):
        b_out, b_max, b_sum = attend(
            b_q, b_out, b_max, b_sum, query, key, value, row_stride, o_m, m_m, o_n, at + o_n < length, scale_log2,
            not RESIDENT, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
        )  # fmt: skip
        query += nothing
        key += BLOCK_N * row_stride
        value += BLOCK_N * row_stride
    if TAIL > 0:
        o_tail = tl.arange(0, TAIL)
        b_out, b_max, b_sum = attend(
            b_q, b_out, b_max, b_sum, query, key, value, row_stride, o_m, m_m, o_tail, whole + o_tail < length,
            scale_log2, True, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
        )  # fmt: skip
    out += tl.cast(start, tl.int64) * out_stride
    store_tiles(out, b_out, (1.0 / b_sum)[:, None], o_m, m_m, out_stride, WIDTHS, HEAD_DIM)
    # What pads a row is written too: outputs of an op are the same every time, all of them.
    tl.store(lse + start + o_m, (b_max + tl.log2(b_sum)) * 0.6931471805599453, mask=start + o_m < lse_length)


@triton.jit
def forward_kernel(
    qkv, cu_seqlens, out, lse, tokens, tiles, heads, clip_stride, row_stride, part_stride, head_stride, lse_stride,
    nothing, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, HALVE_LAST: tl.constexpr,
    WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, VEC: tl.constexpr, VARLEN: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Strides of qkv come divided by VEC, so that the compiler sees that loads of VEC values are aligned.

    Where not RESIDENT, the tile that a program owns is loaded anew for each tile that it meets. Kept, it would fill
    registers all along, in float32 twice (as a rounded part and a rest). ``nothing`` is 0, unknown to the compiler,
    which would otherwise move these loads out of the loop.
    """
    tile, head, clip, first, length = place(cu_seqlens, tokens, tiles, heads, VARLEN)
    row_stride = row_stride * VEC
    start = tile * BLOCK_M
    if start < length:
        base = first * row_stride if VARLEN else clip * (clip_stride * VEC)
        query = qkv + (base + head * (head_stride * VEC))
        key = query + part_stride * VEC
        value = key + part_stride * VEC
        out += (first * heads + head) * HEAD_DIM
        lse += head * lse_stride + first if VARLEN else (clip * heads + head) * lse_stride
        lse_length = length if VARLEN else lse_stride
        out_stride = heads * HEAD_DIM
        if HALVE_LAST and start + BLOCK_M // 2 >= length:
            forward_tile(
                query, key, value, out, lse, start, length, lse_length, row_stride, out_stride, nothing, scale_log2,
                BLOCK_M // 2, BLOCK_N, TAIL, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
            )  # fmt: skip
        else:
            forward_tile(
                query, key, value, out, lse, start, length, lse_length, row_stride, out_stride, nothing, scale_log2,
                BLOCK_M, BLOCK_N, TAIL, WIDTHS, HEAD_DIM, RESIDENT, PRECISION,
            )  # fmt: skip


def addressable(qkv: Tensor) -> Tensor:
    """qkv with unit stride in the last dimension; copies only what has another layout."""
    return qkv if qkv.stride(-1) == 1 or qkv.shape[-1] == 1 else qkv.contiguous()


def vector(tensor: Tensor) -> int:
    """How many values are loaded at once: 16 bytes of them where all strides allow that, else 1.

    A stride that takes 64 bits must reach the kernel whole: divided, it could look like one of 32 bits there.
    """
    values = 16 // tensor.element_size()
    return values if all(stride % values == 0 and stride < 2**31 for stride in tensor.stride()[:-1]) else 1


def tail(tokens: int, step: int, varlen: bool, resident: bool) -> int:
    """Width of the last tile over ``tokens`` in steps of ``step``, 0 where nothing is left over.

    Ragged clips each end elsewhere: for them it is a whole step, masked. Where nothing stays in registers, since these
    are scarce, every tile is masked and there is no last one of its own, whose code would need some more.
    """
    if not resident:
        return 0
    if varlen:
        return step
    left = tokens % step
    return max(16, triton.next_power_of_2(left)) if left else 0


def column_tiles(head_dim: int, widest: int) -> tuple[int, ...]:
    """Widths of the column tiles that cover a head, each a power of two from 16 to ``widest``.

    Wide ones leave less than 16 columns to spare; narrow ones are all alike, since a mixture needs more registers.
    """
    if widest <= 32:
        return (widest,) * triton.cdiv(head_dim, widest)
    widths: list[int] = []
    while (rest := head_dim - sum(widths)) > 0:
        above = max(16, triton.next_power_of_2(rest))
        widths.append(min(widest, above if above - rest < 16 else above // 2))
    return tuple(widths)


def shape_constants(qkv: Tensor, config: LaunchConfig) -> dict[str, Any]:
    """What a kernel is compiled for besides its tiles of tokens; ``block_k`` is the widest column tile."""
    head_dim = qkv.shape[-1]
    return dict(
        WIDTHS=column_tiles(head_dim, config.block_k), HEAD_DIM=head_dim, VEC=vector(qkv),
        RESIDENT=config.resident, PRECISION=precision(qkv),
    )  # fmt: skip


def forward(qkv: Tensor, scale: float, cu_seqlens: Tensor | None = None, max_seqlen: int = 0) -> tuple[Tensor, Tensor]:
    """Attention within each clip.

    Args:
        qkv: (B, N, 3, H, d); with cu_seqlens (total, 3, H, d).
        scale: Factor on the scores.
        cu_seqlens: (B + 1,), where each of B ragged clips begins and the last one ends.
        max_seqlen: The longest of them.

    Returns:
        out (B, N, H * d) and log-sum-exp (B, H, `lse_row` (N)) float32, of which the first N are meant; with
        cu_seqlens (total, H * d) and (H, total).
    """
    varlen = cu_seqlens is not None
    *lead, _, heads, head_dim = qkv.shape
    out = torch.empty((*lead, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    lse_shape = (heads, lead[0]) if varlen else (lead[0], heads, lse_row(lead[1]))
    lse = torch.empty(lse_shape, dtype=torch.float32, device=qkv.device)
    if out.numel() == 0:
        return out, lse
    qkv = addressable(qkv)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    tokens = max_seqlen if varlen else lead[1]
    clips = len(cu_seqlens) - 1 if cu_seqlens is not None else lead[0]
    config = launch_config("attention.forward", qkv, head_dim=head_dim, tokens=tokens)
    constants = shape_constants(qkv, config)
    vec = constants["VEC"]
    clip_stride = 0 if varlen else qkv.stride(0)
    tiles = triton.cdiv(tokens, config.block_m)
    last = tokens % config.block_m
    key_tail = tail(tokens, config.block_n, varlen, config.resident)
    launch(
        "attention.forward", forward_kernel, (tiles * heads * clips,),
        (
            qkv, cu_seqlens, out, lse, tokens, tiles, heads, clip_stride // vec,
            *(stride // vec for stride in qkv.stride()[-4:-1]), lse.shape[-1], 0, scale * LOG2_E,
        ),
        config, BLOCK_M=config.block_m, BLOCK_N=config.block_n, TAIL=key_tail,
        HALVE_LAST=config.block_m >= 64 and (varlen or 0 < last <= config.block_m // 2), VARLEN=varlen, **constants,
    )  # fmt: skip
    return out, lse
