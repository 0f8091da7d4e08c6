"""gather_patch_embed in Triton, forward: a matrix product whose left operand is gathered from the clip as it is needed.

M visible tubelets of all clips, K = C * t * h * w values in each (see tubelets.py), D columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import flops
from ..derived import Derived, Slot
from .gather_patch_embed_backward import backward, gradients
from .launch import DENSE, TUNED, Launch, LaunchConfig, choose, like, precision, rows, scattered
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
def gather_patch_embed_forward_kernel(
    video, index, clip_idx, weight, bias, position, out, rows, columns, values, per_clip, grid_rows, grid_columns,
    s_clip, s_channel, s_frame, s_line, s_position,
    T: tl.constexpr, H: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Column tiles of the same rows run next to each other: the clip's pixels come from memory once, then from L2.
    column_tiles = tl.cdiv(columns, BLOCK_N)
    o_row = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    b_index, start = tubelet_start(
        index, clip_idx, o_row, rows, per_clip, grid_rows, grid_columns, s_clip, s_frame, s_line, T, H, RUN, VECTOR
    )
    # Columns beyond the last repeat that one: a mask would be held in registers all along.
    p_weight = weight + tl.minimum(o_column, columns - 1)[None, :] * K
    # [BLOCK_M, BLOCK_N]
    b_out = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # A run-time bound, K again: a constant one is unrolled, at the cost of registers.
    for k in range(0, values, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        p_video = (
            video + start[:, None] + offset_in_tubelet(o_k, s_channel, s_frame, s_line, T, H, RUN, VECTOR)[None, :]
        )
        # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        if K % BLOCK_K == 0:
            b_video = tl.load(p_video)
            b_weight = tl.load(p_weight + o_k[:, None])
        else:
            m_k = o_k < K
            b_video = tl.load(p_video, mask=m_k[None, :], other=0)
            b_weight = tl.load(p_weight + o_k[:, None], mask=m_k[:, None], other=0.0)
        b_out = tl.dot(centred(b_video, b_weight.dtype), b_weight, b_out, input_precision=PRECISION)
    # A whole tile of positions beside the product does not fit into the registers; 64 columns at a time do.
    first = tl.program_id(0) % column_tiles * BLOCK_N
    if BLOCK_N <= 64:
        finish(b_out, first, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE)
    elif BLOCK_N == 128:
        finish_halves(b_out, first, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE)
    else:
        b_left, b_right = halves(b_out)
        right = first + BLOCK_N // 2
        finish_halves(b_left, first, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE)
        finish_halves(b_right, right, bias, position, b_index, out, o_row, rows, columns, s_position, SCALE)


def config(arch: str, dtype: torch.dtype, *, pixel_bytes: int, rows: int, columns: int) -> LaunchConfig:
    """``block_m`` tubelets by ``block_n`` columns, ``block_k`` values at a time. ``dtype`` is the product's.

    Compiled clean, not measured, where nothing else is said.
    """
    if arch not in TUNED:
        return LaunchConfig(64 if dtype == torch.float32 else 128, 64, 32, num_stages=2)  # fits 64 KB of shared memory
    if dtype == torch.float32:  # at most 218 registers
        return LaunchConfig(128, 64 if arch == "sm_80" else 128, 32, num_warps=8, num_stages=3)
    if arch == "sm_90" and pixel_bytes == 1 and rows >= 4096:
        # H200, Triton 3.6, bc236cf: 228 us for 25088 rows and 768 columns, 128 x 256 x 64 took 265; compared at 663e046
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
        *inputs: The product works in ``work``, the last one.
        kept: Where the weight as the product takes it is kept between calls; None if it must be made in each.
    """
    (video, keep_idx, weight, bias, pos_embed, clip_idx), options = inputs[:6], inputs[6:]
    (columns, channels, t, h, w), (mean, std, work) = weight.shape, options
    count = keep_idx.numel()
    if count * columns == 0:
        return lambda *tensors: outputs(*tensors, *options)
    layout, copied = layout_of(video, (t, h, w))
    uint8 = video.dtype == torch.uint8
    fold: Any = fold_weight(weight, bias if uint8 else None, layout, work, mean, std)
    if fold is not None and kept is not None:
        fold = Slot(kept, (uint8, layout.channels_last, *options), fold, *((weight, bias) if uint8 else (weight,)))
    pos_stride, pos_copied = rows(pos_embed)
    template = like((*keep_idx.shape, columns), weight.dtype, weight.device)
    choice = choose(
        "gather_patch_embed_forward",
        config,
        video,
        work,
        pixel_bytes=video.element_size(),
        rows=count,
        columns=columns,
    )
    tile = choice.config
    launch = Launch(
        gather_patch_embed_forward_kernel, (triton.cdiv(count, tile.block_m) * triton.cdiv(columns, tile.block_n),),
        (count, columns, channels * t * h * w, keep_idx.shape[-1], video.shape[3] // h, video.shape[4] // w,
         *layout.strides, pos_stride), choice,
        (False, scattered(keep_idx), scattered(clip_idx), False, not uint8 and scattered(bias), pos_copied),
        T=t, H=h, RUN=layout.run, VECTOR=layout.vector, K=channels * t * h * w, SCALE=UINT8_SCALE if uint8 else 1,
        PRECISION=precision(video), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
    )  # fmt: skip

    def run(
        video: Tensor, keep_idx: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, clip_idx: Tensor | None
    ) -> Tensor:
        out = torch.empty_like(template, memory_format=DENSE)
        if copied:
            video = video.clone(memory_format=torch.contiguous_format)
        if uint8:
            weight, bias = fold(weight, bias)
        elif fold is not None:
            weight, _ = fold(weight)
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
