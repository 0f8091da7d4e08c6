"""attention, attention_varlen and attention_kvpacked in Triton: FlashAttention-2 (arXiv 2307.08691). The forward pass.

One program takes BLOCK_M queries of one head and loops over the keys in tiles of BLOCK_N, with an online softmax; the
scores never leave the chip. The remainder of the keys is a smaller tile, and only that one is masked: 784 tokens cost
12 * 64 + 16 keys, not 13 * 64.

The bias of the linear layer that made q, k and v may come apart from them. That of the queries is then added to the
tile that a program owns, and that of the values to its output, since probabilities sum to 1. That of the keys adds the
same number to all scores of a row, which changes no probability.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import flops
from ..device import HALF
from . import attention_backward
from .attention_tiles import (
    ANY,
    LOG2_E,
    Tables,
    add_product,
    add_product_of_loaded,
    addressable,
    by_shape,
    described,
    inner,
    inner_of_loaded,
    layout,
    load_described,
    load_owned_tiles,
    load_tiles,
    locate,
    lse_row,
    shape_constants,
    store_tiles,
    tail,
    zero_tiles,
)
from .launch import Launch, LaunchConfig, choose, scattered
from .op import Op, Run


@triton.jit
def attend(
    b_q, b_out, b_max, b_sum, query, key, value, bias, query_row, row_stride, o_m, m_m, o_n, m_n,
    wide, narrow, clip, head, row, scale_log2,
    MASKED: tl.constexpr, WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, RESIDENT: tl.constexpr,
    KEY_PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the online softmax: rows o_n from ``key`` on, or by descriptors from ``row`` on."""
    # [BLOCK_M, BLOCK_N]
    if wide is not None:
        b_s = inner(b_q, load_described(wide, narrow, clip, KEY_PART, head, row, WIDTHS), PRECISION)
    elif RESIDENT:
        b_s = inner(b_q, load_tiles(key, o_n, m_n, row_stride, MASKED, WIDTHS, HEAD_DIM), PRECISION)
    else:
        b_s = inner_of_loaded(
            query, o_m, m_m, query_row, key, o_n, m_n, row_stride, WIDTHS, HEAD_DIM, PRECISION, row_bias=bias
        )
    if MASKED:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - b_new_max[:, None])
    b_rescale = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_rescaled = ()
    for i in tl.static_range(len(b_out)):
        b_rescaled = b_rescaled + (b_out[i] * b_rescale[:, None],)
    if wide is not None:
        b_v = load_described(wide, narrow, clip, KEY_PART + 1, head, row, WIDTHS)
        b_out = add_product(b_rescaled, b_p, b_v, PRECISION)
    elif RESIDENT:
        b_v = load_tiles(value, o_n, m_n, row_stride, MASKED, WIDTHS, HEAD_DIM)
        b_out = add_product(b_rescaled, b_p, b_v, PRECISION)
    else:
        b_out = add_product_of_loaded(b_rescaled, b_p, value, o_n, m_n, row_stride, WIDTHS, HEAD_DIM, PRECISION)
    return b_out, b_new_max, b_sum


@triton.jit
def attend_tile(
    query, key, value, bias, out, lse, start, length, keys, lse_length, query_row, row_stride,
    out_stride, wide, narrow, clip, head, row, zero, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, RESIDENT: tl.constexpr, KEY_PART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M queries from ``start`` on."""
    o_m = tl.arange(0, BLOCK_M)
    m_m = start + o_m < length
    query += tl.cast(start, tl.int64) * query_row
    b_q = load_owned_tiles(query, o_m, m_m, query_row, WIDTHS, HEAD_DIM, bias)
    b_out = zero_tiles(BLOCK_M, WIDTHS)
    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    o_n = tl.arange(0, BLOCK_N)
    whole = keys // BLOCK_N * BLOCK_N if RESIDENT else keys
    for at in range(0, whole, BLOCK_N):
        b_out, b_max, b_sum = attend(
            b_q, b_out, b_max, b_sum, query, key, value, bias, query_row, row_stride, o_m, m_m,
            o_n, at + o_n < keys, wide, narrow, clip, head, row + at, scale_log2,
            not RESIDENT, WIDTHS, HEAD_DIM, RESIDENT, KEY_PART, PRECISION,
        )  # fmt: skip
        query += zero
        if wide is None:
            key += BLOCK_N * row_stride
            value += BLOCK_N * row_stride
    if TAIL > 0:
        if wide is not None:
            key += tl.cast(whole, tl.int64) * row_stride
            value += tl.cast(whole, tl.int64) * row_stride
        o_tail = tl.arange(0, TAIL)
        b_out, b_max, b_sum = attend(
            b_q, b_out, b_max, b_sum, query, key, value, bias, query_row, row_stride, o_m, m_m,
            o_tail, whole + o_tail < keys, None, None, clip, head, row, scale_log2,
            True, WIDTHS, HEAD_DIM, RESIDENT, KEY_PART, PRECISION,
        )  # fmt: skip
    if bias is not None:
        bias += 2 * out_stride  # (3, H, d): from queries to values
    store_tiles(out, b_out, (1.0 / b_sum)[:, None], o_m, m_m, out_stride, WIDTHS, HEAD_DIM, bias)
    if lse is not None:
        # The padding of a row is written too: every value of an op's outputs must be the same each time.
        tl.store(lse + start + o_m, (b_max + tl.log2(b_sum)) * 0.6931471805599453, mask=start + o_m < lse_length)


@triton.jit
def attention_forward_kernel(
    query, key_value, wide, narrow, cu_seqlens, bias, out, lse, queries, keys, tiles, heads,
    query_clip, query_row, query_head, key_first, clip_stride, row_stride, part_stride, head_stride, lse_stride,
    zero, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, HALVE_LAST: tl.constexpr,
    WIDTHS: tl.constexpr, HEAD_DIM: tl.constexpr, VEC: tl.constexpr, VARLEN: tl.constexpr, RESIDENT: tl.constexpr,
    KEY_PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Strides are divided by VEC, so that the compiler sees that loads of VEC values are aligned; see `Layout`.

    With ``wide`` and ``narrow``, descriptors of key_value, whole tiles of keys and values are loaded by TMA; the last
    tile of a clip, if it is not whole, never is. KEY_PART is the part of key_value that holds the keys.

    Unless RESIDENT, the tile that a program owns is loaded again at each step of the loop: kept, it would occupy
    registers all the time, in float32 twice (rounded part and remainder). ``zero`` is 0, but the compiler does not
    know that and so cannot move these loads out of the loop.
    """
    tile, head, clip, first, length = locate(tl.program_id(0), cu_seqlens, queries, tiles, heads, VARLEN)
    if VARLEN:
        keys = length
    query_row, row_stride = query_row * VEC, row_stride * VEC
    scale_log2 = tl.cast(scale_log2, tl.float32)  # inductor hands floats over as float64
    start = tile * BLOCK_M
    if start < length:
        query += head * (query_head * VEC) + (first * query_row if VARLEN else clip * (query_clip * VEC))
        base = first * row_stride if VARLEN else clip * (clip_stride * VEC)
        key = key_value + (base + key_first * VEC + head * (head_stride * VEC))
        value = key + part_stride * VEC
        if bias is not None:
            bias += head * HEAD_DIM
        out += ((first + start) * heads + head) * HEAD_DIM
        if lse is not None:
            lse += head * lse_stride + first if VARLEN else (clip * heads + head) * lse_stride
        lse_length = length if VARLEN else lse_stride
        out_stride = heads * HEAD_DIM
        box_clip, row = (0, first) if VARLEN else (clip, 0)
        if HALVE_LAST and start + BLOCK_M // 2 >= length:
            attend_tile(
                query, key, value, bias, out, lse, start, length, keys, lse_length, query_row,
                row_stride, out_stride, wide, narrow, box_clip, head, row, zero, scale_log2,
                BLOCK_M // 2, BLOCK_N, TAIL, WIDTHS, HEAD_DIM, RESIDENT, KEY_PART, PRECISION,
            )  # fmt: skip
        else:
            attend_tile(
                query, key, value, bias, out, lse, start, length, keys, lse_length, query_row,
                row_stride, out_stride, wide, narrow, box_clip, head, row, zero, scale_log2,
                BLOCK_M, BLOCK_N, TAIL, WIDTHS, HEAD_DIM, RESIDENT, KEY_PART, PRECISION,
            )  # fmt: skip


# See `Tables`. BLOCK_M is queries, BLOCK_N keys; queries are resident. Compiled clean by Triton 3.6 and 3.9 and not
# measured, unless a comment says more.
# With TMA up to 64 values and 1100 tokens: prototype, H200, Triton 3.6, bc236cf, 186 us at 784 tokens and 69 at 392,
# where 128 x 128, 4 warps, 3 stages by pointers took 198 and 73; the machine code has as many registers and, in the
# loop, instructions. Beyond 1100 tokens pointers were faster there: 585 us at 1568, the best with TMA 609.
# Larger heads by arithmetic. Tiles of 64 queries read K and V from L2 once for 64 queries, which at the 5.6 TB/s that
# the prototype drew at 1568 tokens allows 64 x 5.6 = 358 TFLOP/s: 150, 164 and 239 us for heads of 80, 88 and 128 (16
# clips, 784 tokens, 16 heads), where pointers took 271, 301 and 289 and cuDNN 195, 203 and 198. Heads of 128 need 128
# queries to be as fast as that: 128 x 64 and 128 x 32 in four warps spill, in eight there is one program on an SM.
FORWARD: Tables = ({
    "sm_80": {(64, 64): (64, 32, 128, 4, 2), (64, ANY): (128, 128, 128, 8, 3), (80, ANY): (128, 64, 128, 8, 3),
              (96, ANY): (128, 64, 128, 8, 2), (128, ANY): (128, 64, 64, 8, 2)},
    "sm_90": {(64, 64): (64, 64, 128, 4, 2), (64, 1100): (64, 64, 64, 4, 3), (64, ANY): (128, 128, 128, 8, 3),
              (96, ANY): (128, 128, 128, 8, 2), (128, ANY): (128, 64, 128, 8, 3)},
    "sm_90 with TMA": {(64, 64): (64, 64, 128, 4, 2), (64, 1100): (64, 64, 64, 4, 2, True, True),
                       (64, ANY): (128, 128, 128, 8, 3), (128, ANY): (64, 64, 128, 4, 2, True, True)},
    "sm_100": {(64, 64): (64, 64, 128, 4, 2), (64, ANY): (128, 128, 128, 8, 3), (128, ANY): (128, 128, 128, 8, 2)},
    "": {(128, ANY): (64, 64, 64, 4, 1)},
}, {
    # Not 64 x 16 with 8 warps on sm_90: scores in the layout of m64n8k8 are right to 5e-8 on an H200, but as left
    # operand of the second product they give errors of 2e-4 or garbage (Triton 3.6). The compile check refuses it.
    "sm_80": {(32, ANY): (64, 64, 32, 8, 1, False), (64, ANY): (64, 32, 32, 4, 1), (95, ANY): (32, 16, 32, 4, 1),
              (96, ANY): (64, 16, 32, 4, 1), (128, ANY): (32, 16, 32, 4, 1, False)},
    "sm_90": {(32, ANY): (64, 64, 32, 8, 1, False), (64, ANY): (64, 32, 32, 4, 1), (95, ANY): (64, 16, 32, 4, 1, False),
              (96, ANY): (64, 16, 32, 4, 1), (128, ANY): (128, 32, 32, 8, 1, False)},
    "sm_100": {(32, ANY): (64, 64, 32, 8, 1, False), (64, ANY): (64, 32, 32, 4, 1),
               (95, ANY): (16, 16, 32, 4, 1, False), (96, ANY): (64, 32, 32, 8, 1, False),
               (128, ANY): (16, 16, 64, 8, 1, False)},
    "": {(128, ANY): (32, 32, 32, 4, 1, False)},
})  # fmt: skip


def config(
    arch: str, dtype: torch.dtype, *, head_dim: int, tokens: int, ragged: bool, tma: bool, bias: bool
) -> LaunchConfig:
    """From the tables, with exceptions. sm_90 up to 1100 tokens by pointers is measured: H200, Triton 3.6, bc236cf, 198
    us at 784, where 128 x 128 x 128 took 268; values compared there at 663e046. With a bias it would spill."""
    # float32: with a bias, or for ragged clips, tiles that are not resident would spill.
    single = dtype == torch.float32
    if single and bias and arch == "sm_90" and head_dim > 64:
        return LaunchConfig(64, 16, 32, 4, 1)
    head_dim = max(head_dim, 64) if single and ragged else head_dim
    chosen = by_shape(FORWARD, arch, dtype, head_dim=head_dim, tokens=tokens, ragged=ragged, tma=tma)
    if chosen == LaunchConfig(64, 64, 64, 4, 3) and not ragged and not bias and tokens % 128 <= 16:
        return LaunchConfig(128, 128, 64, 4, 3)
    return chosen


# The largest head size for which float32 was verified on hardware, with a size for each row of the tables: H200, Triton
# 3.6, 663e046.
_VERIFIED_IN_FLOAT32 = {"sm_90": 128}


def verified_in_float32(arch: str, head_dim: int) -> bool:
    """Whether float32 attention takes these kernels by default; otherwise it runs in plain PyTorch."""
    return head_dim <= _VERIFIED_IN_FLOAT32.get(arch, 0)


def _allocate(like: Tensor, lead: Sequence[int], rows: Sequence[int], save: bool) -> tuple[Tensor, Tensor]:
    """out (*lead, H * d) and the log-sum-exp (*rows) for ``like`` (..., H, d)."""
    heads, head_dim = like.shape[-2:]
    out = torch.empty((*lead, heads * head_dim), dtype=like.dtype, device=like.device)
    lse = torch.empty(rows, dtype=torch.float32, device=like.device) if save else None
    return out, lse  # type: ignore[return-value]


def outputs(qkv: Tensor, bias: Tensor | None, scale: float, save: bool) -> tuple[Tensor, Tensor]:
    """out (B, N, H * d), and the log-sum-exp (B, H, `lse_row` (N)) float32: the first N of each row, then padding.

    The log-sum-exp is that of scores without the key bias, which changes no output of this op.
    """
    batch, count = qkv.shape[:2]
    return _allocate(qkv, (batch, count), (batch, qkv.shape[3], lse_row(count)), save)


def outputs_varlen(
    qkv: Tensor, cu_seqlens: Tensor, bias: Tensor | None, max_seqlen: int, scale: float, save: bool
) -> tuple[Tensor, Tensor]:
    """out (total, H * d) and the log-sum-exp (H, total)."""
    total = qkv.shape[0]
    return _allocate(qkv, (total,), (qkv.shape[2], total), save)


def outputs_kvpacked(q: Tensor, kv: Tensor, bias: Tensor | None, scale: float, save: bool) -> tuple[Tensor, Tensor]:
    """out (B, M, H * d), and the log-sum-exp (B, H, `lse_row` (M)), as those of `outputs`."""
    batch, count, heads, _ = q.shape
    return _allocate(q, (batch, count), (batch, heads, lse_row(count)), save)


def forward(qkv: Tensor, bias: Tensor | None, scale: float, save: bool) -> Run:
    """Attention within each clip; with ``save`` also the log-sum-exp."""
    count = qkv.shape[1]
    run = _run(qkv, None, None, bias, count, count, lse_row(count), scale)
    return lambda qkv, bias: run(qkv, None, None, bias, outputs(qkv, bias, scale, save))


def forward_varlen(
    qkv: Tensor, cu_seqlens: Tensor, bias: Tensor | None, max_seqlen: int, scale: float, save: bool
) -> Run:
    """`forward` for ragged clips."""
    run = _run(qkv, None, cu_seqlens, bias, max_seqlen, max_seqlen, qkv.shape[0], scale)
    allocate = partial(outputs_varlen, max_seqlen=max_seqlen, scale=scale, save=save)
    return lambda qkv, cu_seqlens, bias: run(qkv, None, cu_seqlens, bias, allocate(qkv, cu_seqlens, bias))


def forward_kvpacked(q: Tensor, kv: Tensor, bias: Tensor | None, scale: float, save: bool) -> Run:
    """`forward` for queries apart from keys and values."""
    count = q.shape[1]
    run = _run(q, kv, None, bias, count, kv.shape[1], lse_row(count), scale)
    return lambda q, kv, bias: run(q, kv, None, bias, outputs_kvpacked(q, kv, bias, scale, save))


def _run(query, key_value, cu_seqlens, bias, queries: int, keys: int, lse_stride: int, scale: float) -> Run:
    """A function of these tensors and the outputs, which it writes and returns.

    ``query`` is a qkv if ``key_value`` is None. ``queries`` and ``keys`` are the numbers of tokens of each clip, with
    ``cu_seqlens`` those of the longest.
    """
    if query.numel() == 0:
        return lambda query, key_value, cu_seqlens, bias, results: results
    ragged = cu_seqlens is not None
    heads, head_dim = query.shape[-2:]
    clips = len(cu_seqlens) - 1 if ragged else query.shape[0]
    copied, vector, strides = layout(query, key_value, ragged)
    source = query if key_value is None else key_value
    tma = described((source[None] if ragged else source).permute(0, 2, 3, 1, 4))
    shape = dict(head_dim=head_dim, tokens=keys, ragged=ragged, tma=tma is not None, bias=bias is not None)
    choice = choose("attention_forward", config, query, **shape)
    tile = choice.config
    if tile.cudnn and not ragged and tma is not None and query.dtype in HALF:
        return partial(_by_cudnn, scale)
    constants = shape_constants(query, tile, vector)
    widths = list(dict.fromkeys(constants["WIDTHS"]))
    blocks = {}
    if tile.tma and tile.resident and tma is not None and len(widths) <= 2:
        blocks = {position: tma(tile.block_n, width) for position, width in enumerate(widths, 2)}
    tiles = triton.cdiv(queries, tile.block_m)
    last = queries % tile.block_m
    launch = Launch(
        attention_forward_kernel,
        (tiles * heads * clips,),
        (queries, keys, tiles, heads, *strides, lse_stride, 0, scale * LOG2_E),
        choice,
        (False, False, False, False, scattered(cu_seqlens), scattered(bias)),
        blocks,
        TAIL=tail(keys, tile.block_n, ragged, tile.resident),
        # With TMA 64 rows are the least: wgmma has no fewer, and other instructions need twice the registers.
        HALVE_LAST=tile.block_m >= (128 if blocks else 64) and (ragged or 0 < last <= tile.block_m // 2),
        VARLEN=ragged,
        KEY_PART=int(key_value is None),
        **constants,
    )
    has_wide, has_narrow = 2 in blocks, 3 in blocks

    def run(query, key_value, cu_seqlens, bias, results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key_value = addressable(query, key_value, copied)
        wide, narrow = key_value if has_wide else None, key_value if has_narrow else None
        launch(query, key_value, wide, narrow, cu_seqlens, bias, *results)
        return results

    return run


def _by_cudnn(scale: float, query, key_value, cu_seqlens, bias, results) -> tuple[Tensor, Tensor | None]:
    """The function of `_run`, by cuDNN. Its log-sum-exp (B, H, M, 1) is that of scaled scores too, to base e."""
    q, k, v = query.unbind(2) if key_value is None else (query, *key_value.unbind(2))
    if bias is not None:
        q = (q + bias[0]).to(q.dtype)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, M or N, d)
    save = results[1] is not None
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, save, scale=scale)
    out = out.transpose(1, 2)  # laid out as q
    if bias is not None:
        out = (out + bias[2]).to(out.dtype)
    return out.flatten(2), F.pad(lse[..., 0], (0, results[1].shape[-1] - lse.shape[2])) if save else None


attention = Op(
    "attention",
    outputs=outputs,
    forward=forward,
    gradients=attention_backward.gradients,
    backward=attention_backward.backward,
    saves=lambda tensors, outputs: (*tensors, *outputs),
    differentiable=("qkv", "bias"),
    public=2,
    flops=(flops.attention, flops.attention_backward),
)

attention_varlen = Op(
    "attention_varlen",
    outputs=outputs_varlen,
    forward=forward_varlen,
    gradients=attention_backward.gradients_varlen,
    backward=attention_backward.backward_varlen,
    saves=lambda tensors, outputs: (*tensors, *outputs),
    differentiable=("qkv", "bias"),
    public=2,
    flops=(flops.attention_varlen, flops.attention_varlen_backward),
    opaque=("forward", "backward"),
)

attention_kvpacked = Op(
    "attention_kvpacked",
    outputs=outputs_kvpacked,
    forward=forward_kvpacked,
    gradients=attention_backward.gradients_kvpacked,
    backward=attention_backward.backward_kvpacked,
    saves=lambda tensors, outputs: (*tensors, *outputs),
    differentiable=("q", "kv", "bias"),
    public=2,
    flops=(flops.attention_kvpacked, flops.attention_kvpacked_backward),
)
