"""What the passes of attention share: column tiles of a head, their products, and the layout of operands in memory.

A head is a tuple of column tiles whose widths are powers of two: 80 is 64 + 16, 96 is 64 + 32. Narrower tiles also need
fewer registers at a time, which matters in float32 and on older architectures.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Block, LaunchConfig, precision, takes_tma

LOG2_E = 1.4426950408889634


@triton.constexpr_function
def begin(widths, index):
    """The first column of a column tile."""
    return sum(widths[:index])


@triton.jit
def load_bias(bias, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of a head's bias, as a row of float32."""
    o_d = FIRST + tl.arange(0, WIDTH)
    return tl.load(bias + o_d, mask=o_d < HEAD_DIM, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_tile(
    base, o_row, m_row, row_stride,
    MASKED: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, bias=None,
):  # fmt: skip
    """Columns FIRST to FIRST + WIDTH of the rows: [rows, WIDTH]; 0 beyond HEAD_DIM and, if MASKED, outside m_row.

    The head's ``bias``, if there is one, is added to each row; the sum is rounded to the rows' dtype.
    """
    o_d = FIRST + tl.arange(0, WIDTH)
    p_tile = base + o_row[:, None] * row_stride + o_d[None, :]
    if FIRST + WIDTH > HEAD_DIM:
        m_d = (o_d < HEAD_DIM)[None, :]
        b_tile = tl.load(p_tile, mask=m_d & m_row[:, None] if MASKED else m_d, other=0.0)
    else:
        b_tile = tl.load(p_tile, mask=m_row[:, None], other=0.0) if MASKED else tl.load(p_tile)
    if bias is not None:
        b_tile = (b_tile.to(tl.float32) + load_bias(bias, FIRST, WIDTH, HEAD_DIM)).to(b_tile.dtype)
    return b_tile


@triton.jit
def load_tiles(
    base, o_row, m_row, row_stride, MASKED: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, bias=None
):
    """All column tiles of the rows."""
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        tile = load_tile(base, o_row, m_row, row_stride, MASKED, begin(WIDTHS, i), WIDTHS[i], HEAD_DIM, bias)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def load_owned_tiles(base, o_row, m_row, row_stride, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, bias=None):
    """`load_tiles` of the rows that a program owns: masked, and with ``bias`` the sum stays in shared memory.

    The compiler keeps a left operand that elementwise code computes in registers, for the whole loop: 34 more in the
    forward pass, one program fewer on an SM. An ``if`` that is always true hides from it that the sum is elementwise.
    """
    b_tiles = load_tiles(base, o_row, m_row, row_stride, True, WIDTHS, HEAD_DIM)
    if bias is None:
        return b_tiles
    else:  # otherwise Triton would compile this without a bias too
        sums = ()
        for i in tl.static_range(len(WIDTHS)):
            b_tile = b_tiles[i]
            if row_stride >= 0:
                b_bias = load_bias(bias, begin(WIDTHS, i), WIDTHS[i], HEAD_DIM)
                b_tile = (b_tile.to(tl.float32) + b_bias).to(b_tile.dtype)
            sums = sums + (b_tile,)
        return sums


@triton.jit
def load_described(wide, narrow, clip, part, head, row, WIDTHS: tl.constexpr):
    """All column tiles of the rows from ``row`` on by descriptors, see `described`; 0 beyond the last row and column.

    ``wide`` is as wide as the first column tile, ``narrow`` as those column tiles that have another width.
    """
    clip, head, row = tl.cast(clip, tl.int32), tl.cast(head, tl.int32), tl.cast(row, tl.int32)
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        if WIDTHS[i] == WIDTHS[0]:
            b_tile = wide.load([clip, part, head, row, begin(WIDTHS, i)])
        else:
            b_tile = narrow.load([clip, part, head, row, begin(WIDTHS, i)])
        # The dimensions of size 1 come first, so that the compiler loads two dimensions.
        tiles = tiles + (tl.reshape(b_tile, (wide.block_shape[3], WIDTHS[i])),)
    return tiles


@triton.jit
def store_tile(
    base, b_tile, o_row, m_row, row_stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """The inverse of `load_tile`, rounded to the dtype of ``base``."""
    o_d = FIRST + tl.arange(0, WIDTH)
    mask = m_row[:, None] & (o_d < HEAD_DIM)[None, :] if FIRST + WIDTH > HEAD_DIM else m_row[:, None]
    tl.store(base + o_row[:, None] * row_stride + o_d[None, :], b_tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_tiles(
    base, b_tiles, factor, o_row, m_row, row_stride, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, bias=None
):
    """Store all column tiles of the rows, times ``factor``, a number or [rows, 1], plus the head's ``bias`` if any."""
    for i in tl.static_range(len(WIDTHS)):
        b_tile = b_tiles[i] * factor
        if bias is not None:
            b_tile += load_bias(bias, begin(WIDTHS, i), WIDTHS[i], HEAD_DIM)
        store_tile(base, b_tile, o_row, m_row, row_stride, begin(WIDTHS, i), WIDTHS[i], HEAD_DIM)


@triton.jit
def zero_tile(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros((ROWS, WIDTH), dtype=tl.float32)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """A zero float32 tile [ROWS, width] for each width."""
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
    WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, row_bias=None,
):  # fmt: skip
    """`inner`, each column tile loaded just before it is used, which takes the fewest registers."""
    b_row = load_tile(rows, o_rows, m_rows, row_stride, True, 0, WIDTHS[0], HEAD_DIM, row_bias)
    b_column = load_tile(columns, o_columns, m_columns, column_stride, True, 0, WIDTHS[0], HEAD_DIM)
    b_product = tl.dot(b_row, tl.trans(b_column), input_precision=PRECISION)
    for i in tl.static_range(1, len(WIDTHS)):
        b_row = load_tile(rows, o_rows, m_rows, row_stride, True, begin(WIDTHS, i), WIDTHS[i], HEAD_DIM, row_bias)
        b_column = load_tile(columns, o_columns, m_columns, column_stride, True, begin(WIDTHS, i), WIDTHS[i], HEAD_DIM)
        b_product = tl.dot(b_row, tl.trans(b_column), b_product, input_precision=PRECISION)
    return b_product


@triton.jit
def add_product(b_sums, b_weights, b_tiles, PRECISION: tl.constexpr):
    """sums + weights @ tile for each column tile, multiplied in the tile's dtype, summed in float32."""
    sums = ()
    for i in tl.static_range(len(b_sums)):
        sums = sums + (tl.dot(b_weights.to(b_tiles[i].dtype), b_tiles[i], b_sums[i], input_precision=PRECISION),)
    return sums


@triton.jit
def add_product_of_loaded(
    b_sums, b_weights, base, o_row, m_row, row_stride,
    WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`add_product`, each column tile loaded just before it is used."""
    sums = ()
    for i in tl.static_range(len(b_sums)):
        b_tile = load_tile(base, o_row, m_row, row_stride, True, begin(WIDTHS, i), WIDTHS[i], HEAD_DIM)
        sums = sums + (tl.dot(b_weights.to(b_tile.dtype), b_tile, b_sums[i], input_precision=PRECISION),)
    return sums


@triton.jit
def locate(program, cu_seqlens, tokens, tiles, heads, VARLEN: tl.constexpr):
    """What a program works on: (tile, head, clip, the clip's first token among all, its length).

    Programs of one head have consecutive numbers, so that they find its keys in L2.
    """
    clip = (program // (tiles * heads)).to(tl.int64)
    if VARLEN:
        first = tl.load(cu_seqlens + clip).to(tl.int64)
        length = (tl.load(cu_seqlens + clip + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = clip * tokens
        length = tokens
    return program % tiles, (program // tiles % heads).to(tl.int64), clip, first, length


class Addresses(NamedTuple):
    """How a kernel addresses a tensor of heads.

    Attributes:
        copied: Whether the tensor must be copied first, because the values of a head are not contiguous.
        vector: How many values are loaded at once.
        strides: Of clip (0 if clips are ragged), row and so on, without the last dimension, divided by ``vector``, so
            that the compiler sees that loads of that many values are aligned.
    """

    copied: bool
    vector: int
    strides: tuple[int, ...]


def addresses(tensor: Tensor, head_dim: int, ragged: bool) -> Addresses:
    """For q, kv or qkv (B, N, ..., H, d), or a gradient (B, N, H * d) of the output; without B if clips are ragged.

    16 bytes are loaded at once if all strides and the head size are multiples of that, else one value. A stride of more
    than 32 bits is not divided: the kernel would take the quotient for 32 bits wide.
    """
    copied = tensor.stride(-1) != 1 and tensor.shape[-1] != 1
    stride = torch.empty(tensor.shape, device="meta").stride() if copied else tensor.stride()
    stride = stride[:-1]
    values = 16 // tensor.element_size()
    # In a gradient the next head follows at once, so the head size counts. Columns beyond a head of qkv are masked.
    whole = head_dim % values == 0 or tensor.shape[-1] == head_dim
    vector = values if whole and all(step % values == 0 and step < 2**31 for step in stride) else 1
    return Addresses(copied, vector, ((0,) if ragged else ()) + tuple(step // vector for step in stride))


class Layout(NamedTuple):
    """How the kernels address queries, and keys and values.

    Attributes:
        copied: Whether queries, and keys and values, must be copied first.
        vector: As in `Addresses`.
        strides: Queries: clip, row, head. Then the offset of the keys. Keys and values: clip, row, part, head.
    """

    copied: tuple[bool, bool]
    vector: int
    strides: tuple[int, ...]


def addressable(query: Tensor, key_value: Tensor | None, copied: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Queries, and keys and values, copied where `Layout` says so. Without key_value query is a qkv, returned twice."""
    if copied[0]:
        query = query.contiguous()
    if key_value is None:
        return query, query
    return query, key_value.contiguous() if copied[1] else key_value


def layout(query: Tensor, key_value: Tensor | None, ragged: bool) -> Layout:
    """For queries (B, M, H, d), and keys and values (B, N, 2, H, d); or for a qkv (B, N, 3, H, d), and None."""
    copied, vector, strides = addresses(query, query.shape[-1], ragged)
    if key_value is None:
        clip, row, part, head = strides
        return Layout((copied, copied), vector, (clip, row, head, part, *strides))
    other = addresses(key_value, query.shape[-1], ragged)
    least = min(vector, other.vector)
    of_query = (step * vector // least for step in strides)
    of_key_value = (step * other.vector // least for step in other.strides)
    return Layout((copied, other.copied), least, (*of_query, 0, *of_key_value))


def described(x: Tensor) -> Callable[[int, int], Block] | None:
    """TMA descriptors of x, a view (clip, part, head, row, column); None if it cannot have any.

    The result is a function (rows, columns) -> `Block` of that size within one head. The hardware fills in zeros beyond
    the last row of a clip and beyond the last column of a head, so that neighbours are never read.
    """
    steps = [step for size, step in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    possible = x.numel() > 0 and x.stride(-1) == 1 and takes_tma(x, 0)
    if not possible or not all(step > 0 and takes_tma(x, step) for step in steps):
        return None
    # A dimension of size 1 may have any stride; 16 values are always allowed.
    allowed = [step if size > 1 else 16 for size, step in zip(x.shape[:-1], x.stride(), strict=False)]
    shape, strides = tuple(x.shape), (*allowed, 1)
    return lambda rows, width: Block(shape, strides, (1, 1, 1, rows, width))


def tail(tokens: int, step: int, ragged: bool, resident: bool) -> int:
    """Size of the last, masked tile of ``tokens`` in steps of ``step``; 0 means that there is none.

    Ragged clips have different remainders, so their last tile is a whole step. Without resident tiles registers are
    scarce: every tile is masked then, and no separate last one is compiled, which would need more of them.
    """
    if not resident:
        return 0
    if ragged:
        return step
    left = tokens % step
    return max(16, triton.next_power_of_2(left)) if left else 0


def column_tiles(head_dim: int, widest: int) -> tuple[int, ...]:
    """Widths of the column tiles that cover a head, each a power of two from 16 to ``widest``.

    If ``widest`` is at most 32 all have the same width, since a mixture needs more registers; otherwise they cover
    fewer than 16 columns too many.
    """
    if widest <= 32:
        return (widest,) * triton.cdiv(head_dim, widest)
    widths: list[int] = []
    while (rest := head_dim - sum(widths)) > 0:
        above = max(16, triton.next_power_of_2(rest))
        widths.append(min(widest, above if above - rest < 16 else above // 2))
    return tuple(widths)


def shape_constants(qkv: Tensor, config: LaunchConfig, vector: int) -> dict[str, Any]:
    """Constants of a kernel other than its tiles of tokens; ``block_k`` is the widest column tile."""
    return dict(
        WIDTHS=column_tiles(qkv.shape[-1], config.block_k),
        HEAD_DIM=qkv.shape[-1],
        VEC=vector,
        RESIDENT=config.resident,
        PRECISION=precision(qkv),
    )


def lse_row(tokens: int) -> int:
    """Length of a row of the log-sum-exp: the next multiple of 16, so that rows are aligned for wide loads."""
    return (tokens + 15) // 16 * 16


# A table for 16 bits and one for float32: {architecture ("" is any other): {(largest head size, most tokens): row}}. A
# row is (block_m, block_n, block_k, num_warps, num_stages, resident, tma). Where operands allow TMA, the rows of "sm_90
# with TMA" are tried first.
Tables = Sequence[Mapping[str, Mapping[tuple[int, int], Sequence[Any]]]]
ANY = 2**31


def by_shape(
    tables: Tables, arch: str, dtype: torch.dtype, *, head_dim: int, tokens: int, ragged: bool, tma: bool = False
) -> LaunchConfig:
    """The first row that covers a call; ``tma`` says whether its operands allow TMA."""
    table = tables[dtype == torch.float32]
    rows = [*(table.get(f"{arch} with TMA", {}) if tma else {}).items(), *table.get(arch, table[""]).items()]
    return LaunchConfig(*next(row for (size, most), row in rows if head_dim <= size and tokens <= most))
