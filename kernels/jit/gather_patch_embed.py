"""gather_patch_embed in Triton, forward: M visible tubelets of all clips, K = C * t * h * w values in each, D columns.

Either one kernel, a matrix product whose left operand is gathered from the clip as it is needed; or, where the launch
choice is not ``fused`` and TMA is possible, a kernel that gathers (gather_tubelets.py) and one for the product.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import flops
from ..derived import Derived, Slot
from .gather_patch_embed_backward import backward, config_video, gradients
from .gather_tubelets import gather_tubelets
from .launch import (
    DENSE,
    TUNED,
    Block,
    Launch,
    LaunchConfig,
    choose,
    like,
    multiprocessors,
    precision,
    rows,
    scattered,
    takes_tma,
)
from .op import Op, Run
from .tubelets import UINT8_SCALE, centred, fold_weight, layout_of, offset_in_tubelet, tubelet_start


@triton.jit
def halves(b_out):
    """The left and the right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(b_out, (b_out.shape[0], 2, b_out.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def finish(b_out, first, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE: tl.constexpr):
    """Add bias and position to a product, the columns from ``first`` on, and store it."""
    o_column = first + tl.arange(0, b_out.shape[1])
    m_column = o_column < columns
    m_tile = (o_row < rows)[:, None] & m_column[None, :]
    b_out = b_out * (1.0 / SCALE) + tl.load(bias + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    p_position = position + b_index.to(tl.int64)[:, None] * s_position + o_column[None, :]
    b_out += tl.load(p_position, mask=m_tile, other=0.0).to(tl.float32)
    p_out = out + o_row.to(tl.int64)[:, None] * columns + o_column[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_tile)


@triton.jit
def finish_halves(b_out, first, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE: tl.constexpr):
    b_left, b_right = halves(b_out)
    right = first + b_out.shape[1] // 2
    finish(b_left, first, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE)
    finish(b_right, right, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE)


@triton.jit
def finish_tile(b_out, first, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE: tl.constexpr):
    """`finish`, 64 columns at a time: all positions of a tile and its product do not fit into the registers."""
    if b_out.shape[1] <= 64:
        finish(b_out, first, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE)
    elif b_out.shape[1] == 128:
        finish_halves(b_out, first, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE)
    else:
        b_left, b_right = halves(b_out)
        right = first + b_out.shape[1] // 2
        finish_halves(b_left, first, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE)
        finish_halves(b_right, right, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE)


@triton.jit
def gather_patch_embed_forward_kernel(
    video, index, clip_idx, weight, bias, position, out, rows, columns, values, per_clip, grid_rows, grid_columns,
    s_clip, s_channel, s_frame, s_line, s_position,
    T: tl.constexpr, H: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``weight`` (D, K) is a TMA descriptor if ``TMA``."""
    # Column tiles of the same rows run next to each other: the clip's pixels come from memory once, then from L2.
    column_tiles = tl.cdiv(columns, BLOCK_N)
    o_row = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % column_tiles * BLOCK_N
    b_index, start = tubelet_start(
        index, clip_idx, o_row, rows, per_clip, grid_rows, grid_columns, s_clip, s_frame, s_line, T, H, RUN, VECTOR
    )
    if not TMA:
        # Columns beyond the last repeat it: a mask would stay in registers for the whole loop.
        p_weight = weight + tl.minimum(first + tl.arange(0, BLOCK_N), columns - 1)[None, :] * K
    # [BLOCK_M, BLOCK_N]
    b_out = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # ``values`` is K as a run-time bound: the loop would be unrolled with a constant one, at the cost of registers.
    for k in range(0, values, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        p_video = (
            video + start[:, None] + offset_in_tubelet(o_k, s_channel, s_frame, s_line, T, H, RUN, VECTOR)[None, :]
        )
        m_k = o_k < K
        # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        b_video = tl.load(p_video) if K % BLOCK_K == 0 else tl.load(p_video, mask=m_k[None, :], other=0)
        if TMA:
            b_weight = weight.load([first, k]).T
        elif K % BLOCK_K == 0:
            b_weight = tl.load(p_weight + o_k[:, None])
        else:
            b_weight = tl.load(p_weight + o_k[:, None], mask=m_k[:, None], other=0.0)
        b_out = tl.dot(centred(b_video, b_weight.dtype), b_weight, b_out, input_precision=PRECISION)
    finish_tile(b_out, first, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE)


@triton.jit
def gather_patch_embed_product_kernel(
    patches, index, weight, bias, position, out, rows, columns, values, s_position,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """patches (M, K), the gathered tubelets, by weight (D, K), both TMA descriptors. A program takes several tiles in
    turn: the first loads of the next one overlap with the end of this one."""
    column_tiles = tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * column_tiles, tl.num_programs(0), flatten=True):
        first_row, first = tile // column_tiles * BLOCK_M, tile % column_tiles * BLOCK_N
        # [BLOCK_M, BLOCK_N]
        b_out = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, values, BLOCK_K):
            b_patches, b_weight = patches.load([first_row, k]), weight.load([first, k]).T
            b_out = tl.dot(b_patches, b_weight, b_out, input_precision=PRECISION)
        o_row = first_row + tl.arange(0, BLOCK_M)
        b_index = tl.load(index + o_row, mask=o_row < rows, other=0).to(tl.int32)
        finish_tile(b_out, first, bias, position, b_index, out, o_row, rows, columns, s_position, 1)


def config(arch: str, dtype: torch.dtype, *, pixel_bytes: int, rows: int, columns: int, tma: bool) -> LaunchConfig:
    """``block_m`` tubelets by ``block_n`` columns, ``block_k`` values at a time. ``dtype`` is the product's; ``tma``
    says whether TMA is possible.

    Compiled clean, not measured, where nothing else is said.
    """
    if arch not in TUNED or dtype == torch.float32:
        return config_video(arch, dtype, pixel_bytes=pixel_bytes, rows=rows)
    if arch == "sm_90" and pixel_bytes == 1 and rows >= 4096:
        # H200, Triton 3.6, 25088 and 12544 rows of 768 columns. Fused 170 and 98 us (663e046). Prototypes (bc236cf):
        # gathering 53 and 31, then cuBLAS with bias 101 and 50; this product, of twice the columns and half the values
        # and without positions (77 MB from L2), was as fast as cuBLAS.
        if tma:
            return LaunchConfig(128, 256, 64, num_warps=8, num_stages=4, tma=True)
        return LaunchConfig(64, 256, 64, num_stages=3)
    if rows <= 2048:
        return LaunchConfig(64, 64, 64, num_stages=4)  # at most 128 registers
    wide = rows > 4096 and columns > 512  # at most 255 registers, else 187
    return LaunchConfig(128, 256 if wide else 128, 64, num_warps=8, num_stages=3)


def outputs(
    video: Tensor,
    keep_idx: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    clip_idx: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    work: torch.dtype,
) -> Tensor:
    """(B, N, D) or (total, D) in the weight's dtype."""
    return torch.empty((*keep_idx.shape, weight.shape[0]), dtype=weight.dtype, device=weight.device)


def forward(*inputs: Any, kept: Derived | None = None) -> Run:
    """Embedded tubelets, for the inputs of `outputs`.

    Args:
        *inputs: The last one, ``work``, is the dtype of the product.
        kept: A cache for the folded weight; None if each call must make it anew.
    """
    (video, keep_idx, weight, bias, pos_embed, clip_idx), options = inputs[:6], inputs[6:]
    (columns, channels, t, h, w), (mean, std, work) = weight.shape, options
    count = keep_idx.numel()
    if count * columns == 0:
        return lambda *tensors: outputs(*tensors, *options)
    layout, copied = layout_of(video, (t, h, w))
    uint8, values = video.dtype == torch.uint8, channels * t * h * w
    can_tma = takes_tma(weight, values) and takes_tma(like((count, values), work, weight.device), values)
    shape = dict(pixel_bytes=video.element_size(), rows=count, columns=columns, tma=can_tma)
    choice = choose("gather_patch_embed_forward", config, video, work, **shape)
    tile = choice.config
    tma = can_tma and tile.tma
    fused = tile.fused or not tma
    centred = uint8 and fused  # the weight, not the pixels, carries the normalisation
    fold: Any = fold_weight(weight, bias if centred else None, layout, work, mean, std)
    if fold is not None and kept is not None:
        fold = Slot(kept, (centred, layout.channels_last, *options), fold)
    pos_stride, pos_copied = rows(pos_embed)
    template = like((*keep_idx.shape, columns), weight.dtype, weight.device)
    tiles = triton.cdiv(count, tile.block_m) * triton.cdiv(columns, tile.block_n)
    of_weight = Block((columns, values), (values, 1), (tile.block_n, tile.block_k))
    if fused:
        gather = None
        launch = Launch(
            gather_patch_embed_forward_kernel, (tiles,),
            (count, columns, values, keep_idx.shape[-1], video.shape[3] // h, video.shape[4] // w,
             *layout.strides, pos_stride), choice,
            (False, scattered(keep_idx), scattered(clip_idx), False, not uint8 and scattered(bias), pos_copied),
            {3: of_weight} if tma else {},
            T=t, H=h, RUN=layout.run, VECTOR=layout.vector, K=values, SCALE=UINT8_SCALE if uint8 else 1, TMA=tma,
            PRECISION=precision(video),
        )  # fmt: skip
    else:
        gather = gather_tubelets(video, keep_idx, clip_idx, weight, work, mean, std)
        launch = Launch(
            gather_patch_embed_product_kernel, (min(tiles, multiprocessors(video)),),
            (count, columns, values, pos_stride), choice,
            (False, scattered(keep_idx), False, scattered(bias), pos_copied),
            {0: Block((count, values), (values, 1), (tile.block_m, tile.block_k)), 2: of_weight},
            PRECISION=precision(video),
        )  # fmt: skip

    def run(video, keep_idx, weight, bias, pos_embed, clip_idx) -> Tensor:
        out = torch.empty_like(template, memory_format=DENSE)
        if centred:
            weight, bias = fold(weight, bias)
        elif fold is not None:
            weight, _ = fold(weight)
        if gather is not None:
            launch(gather(video, keep_idx, clip_idx), keep_idx, weight, bias, pos_embed, out)
            return out
        if copied:
            video = video.clone(memory_format=torch.contiguous_format)
        launch(video, keep_idx, clip_idx, weight, bias, pos_embed, out)
        return out

    return run


gather_patch_embed = Op(
    "gather_patch_embed",
    outputs=outputs,
    forward=forward,
    gradients=gradients,
    backward=backward,
    saves=lambda tensors, outputs: (*tensors[:3], *tensors[4:6]),
    differentiable=("video", "weight", "bias", "pos_embed"),
    flops=(flops.gather_patch_embed, flops.gather_patch_embed_backward),
    opaque=("backward",),
)
