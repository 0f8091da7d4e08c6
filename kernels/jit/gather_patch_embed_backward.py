"""gather_patch_embed in Triton, backward. Letters as in the forward: M visible tubelets of K values, D columns."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DENSE, TUNED, Launch, LaunchConfig, block, choose, like, precision, rows, scattered
from .op import Run
from .tubelets import (
    Channels,
    centred,
    fold_weight,
    gradient_memory,
    layout_of,
    normalisation,
    of_channel,
    offset_in_tubelet,
    tubelet_start,
)


@triton.jit
def gather_patch_embed_backward_weight_kernel(
    grad, video, index, clip_idx, part, rows, columns, per_clip, grid_rows, grid_columns, tiles,
    s_grad, s_clip, s_channel, s_frame, s_line,
    T: tl.constexpr, H: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program sums ``tiles`` tiles of rows into its slot of ``part``: the parts are added in a fixed order
    afterwards, so the result is the same every time. Programs of the same rows run next to each other."""
    tiles_m, tiles_n = tl.cdiv(columns, BLOCK_M), tl.cdiv(K, BLOCK_N)
    split = tl.program_id(0) // (tiles_m * tiles_n)
    o_column = tl.program_id(0) // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column, m_k = o_column < columns, o_k < K
    in_tubelet = offset_in_tubelet(o_k, s_channel, s_frame, s_line, T, H, RUN, VECTOR)
    # [BLOCK_M, BLOCK_N]
    b_part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tile in range(tiles):
        o_row = (split * tiles + tile) * BLOCK_K + tl.arange(0, BLOCK_K)
        _, start = tubelet_start(
            index, clip_idx, o_row, rows, per_clip, grid_rows, grid_columns, s_clip, s_frame, s_line, T, H, RUN, VECTOR
        )
        p_video = video + start[:, None] + in_tubelet[None, :]
        p_grad = grad + o_row.to(tl.int64)[:, None] * s_grad + o_column[None, :]
        # [BLOCK_K, BLOCK_N], [BLOCK_K, BLOCK_M]
        b_video = tl.load(p_video) if K % BLOCK_N == 0 else tl.load(p_video, mask=m_k[None, :], other=0)
        b_grad = tl.load(p_grad, mask=(o_row < rows)[:, None] & m_column[None, :], other=0.0)
        b_part = tl.dot(tl.trans(b_grad), centred(b_video, b_grad.dtype), b_part, input_precision=PRECISION)
    p_part = part + (split.to(tl.int64) * columns + o_column)[:, None] * K + o_k[None, :]
    tl.store(p_part, b_part, mask=m_column[:, None] & m_k[None, :])


@triton.jit
def gather_patch_embed_backward_video_kernel(
    grad, weight, index, clip_idx, grad_video, rows, columns, per_clip, grid_rows, grid_columns,
    s_grad, s_clip, s_channel, s_frame, s_line,
    T: tl.constexpr, H: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(K, BLOCK_N)
    o_row = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row, m_k = o_row < rows, o_k < K
    # [BLOCK_M, BLOCK_N]
    b_video = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for column in range(0, columns, BLOCK_K):
        o_column = column + tl.arange(0, BLOCK_K)
        m_column = o_column < columns
        # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        p_grad = grad + o_row.to(tl.int64)[:, None] * s_grad + o_column[None, :]
        b_grad = tl.load(p_grad, mask=m_row[:, None] & m_column[None, :], other=0.0)
        p_weight = weight + o_column.to(tl.int64)[:, None] * K + o_k[None, :]
        b_weight = tl.load(p_weight, mask=m_column[:, None] & m_k[None, :], other=0.0)
        b_video = tl.dot(b_grad, b_weight, b_video, input_precision=PRECISION)
    _, start = tubelet_start(
        index, clip_idx, o_row, rows, per_clip, grid_rows, grid_columns, s_clip, s_frame, s_line, T, H, RUN, VECTOR
    )
    p_video = (
        grad_video + start[:, None] + offset_in_tubelet(o_k, s_channel, s_frame, s_line, T, H, RUN, VECTOR)[None, :]
    )
    tl.store(p_video, b_video.to(grad_video.dtype.element_ty), mask=m_row[:, None] & m_k[None, :])


@triton.jit
def gather_patch_embed_backward_weight_sum_kernel(
    part, grad_sum, out, splits, values, SLOPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    C: tl.constexpr, AREA: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up ``part`` (splits, D, K) in a fixed order and put its values in the order of ``out`` (D, C, t, h, w).

    With ``grad_sum`` (D,) of centred uint8 pixels: the weight met slope * pixel - offset.
    """
    o_value = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_value = o_value < values
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    p_part = part + o_value
    for _ in range(splits):
        b_sum += tl.load(p_part, mask=m_value, other=0.0)
        p_part += values
    o_row, o_k = o_value // (C * AREA), (o_value % (C * AREA)).to(tl.int32)
    if CHANNELS_LAST:
        o_channel, o_pixel = o_k % C, o_k // C
    else:
        o_channel, o_pixel = o_k // AREA, o_k % AREA
    if grad_sum is not None:
        b_grad = tl.load(grad_sum + o_row, mask=m_value, other=0.0)
        b_sum = b_sum * of_channel(SLOPE, o_channel, C) - b_grad * of_channel(OFFSET, o_channel, C)
    o_out = o_row * (C * AREA) + o_channel * AREA + o_pixel
    tl.store(out + o_out, b_sum.to(out.dtype.element_ty), mask=m_value)


@triton.jit
def gather_patch_embed_backward_position_kernel(
    grad, index, out, rows, length, columns, s_grad,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program adds up the rows of each position in its tile; a position without any gets zero."""
    o_position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, rows, BLOCK_K):
        o_row = first + tl.arange(0, BLOCK_K)
        b_index = tl.load(index + o_row, mask=o_row < rows, other=-1).to(tl.int32)
        # [BLOCK_M, BLOCK_K]
        m_here = o_position[:, None] == b_index[None, :]
        b_row = tl.zeros((BLOCK_M,), dtype=tl.int32) + rows
        # Never for most blocks, and as often as there are clips in a block where those are small; the last row first.
        for _ in range(tl.max(tl.sum(m_here.to(tl.int32), axis=1), axis=0)):
            m_left = m_here & (o_row[None, :] < b_row[:, None])
            b_row = tl.max(tl.where(m_left, o_row[None, :], -1), axis=1)
            # [BLOCK_M, BLOCK_N]
            p_grad = grad + b_row.to(tl.int64)[:, None] * s_grad + o_column[None, :]
            m_grad = (b_row >= 0)[:, None] & m_column[None, :]
            b_sum += tl.load(p_grad, mask=m_grad, other=0.0).to(tl.float32)
    p_out = out + o_position.to(tl.int64)[:, None] * columns + o_column[None, :]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=(o_position < length)[:, None] & m_column[None, :])


# Two for each multiprocessor of a large GPU. A number of our own, not the device's: so many parts are summed, and the
# result shall be the same everywhere.
WEIGHT_PROGRAMS = 264


def config_weight(arch: str, dtype: torch.dtype, *, pixel_bytes: int, columns: int) -> LaunchConfig:
    """``block_m`` columns of the gradient by ``block_n`` values, ``block_k`` tubelets at a time. No choice of this file
    is measured, all compiled clean."""
    if arch not in TUNED:  # fits 64 KB of shared memory
        return LaunchConfig(64, 64, 32) if dtype == torch.float32 else LaunchConfig(64, 128, 32, num_stages=2)
    if dtype == torch.float32:
        return LaunchConfig(64 if arch == "sm_80" else 128, 128, 32, num_warps=8)  # at most 210 registers
    # At most 244 registers; sm_80 has them for wide tiles beside pixels of 16 bits alone.
    wide = columns > 512 and (arch != "sm_80" or pixel_bytes == 2)
    return LaunchConfig(128, 256 if wide else 128, 64, num_warps=8, num_stages=4)


def config_video(arch: str, dtype: torch.dtype, *, pixel_bytes: int, rows: int) -> LaunchConfig:
    """``block_m`` tubelets by ``block_n`` values, ``block_k`` columns of the gradient at a time."""
    if arch not in TUNED:
        return LaunchConfig(64 if dtype == torch.float32 else 128, 64, 32, num_stages=2)  # fits 64 KB of shared memory
    if dtype == torch.float32:
        return LaunchConfig(128, 64 if arch == "sm_80" else 128, 32, num_warps=8, num_stages=3)
    # At most 254 registers; pixels of 32 bits leave none for wide tiles.
    return LaunchConfig(128, 256 if rows > 4096 and pixel_bytes <= 2 else 128, 64, num_warps=8, num_stages=3)


def config_position(arch: str, dtype: torch.dtype) -> LaunchConfig:
    """``block_m`` positions by ``block_n`` columns, ``block_k`` indices at a time: at most 63 registers."""
    return LaunchConfig(8, 256, 256, num_warps=8)


def config_sum(arch: str, dtype: torch.dtype) -> LaunchConfig:
    """``block_n`` values: 4 for each thread."""
    return LaunchConfig(1, 512)


def gradients(
    grad: Tensor,
    video: Tensor,
    keep_idx: Tensor,
    weight: Tensor,
    pos_embed: Tensor,
    clip_idx: Tensor | None,
    mean: Channels,
    std: Channels,
    work: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Of video, weight, bias and pos_embed."""
    return (
        gradient_memory(video) if needs[0] else None,
        torch.empty_like(weight, memory_format=DENSE) if needs[1] else None,
        torch.empty(weight.shape[:1], dtype=weight.dtype, device=weight.device) if needs[2] else None,
        torch.empty_like(pos_embed, memory_format=DENSE) if needs[3] else None,
    )


def backward(*inputs: Any) -> Run:
    """Each gradient by launches of its own, for the inputs of `gradients`; one that is not needed is not computed."""
    (grad, video, keep_idx, weight, pos_embed, clip_idx), options, needs = inputs[:6], inputs[6:9], inputs[9]
    work = options[2]
    if grad.numel() == 0:
        return lambda *operands: [
            value if value is None else value.zero_() for value in gradients(*operands, *options, needs)
        ]
    stride, copied = rows(grad)
    cast, indices_copied = grad.dtype != work, scattered(keep_idx) or scattered(clip_idx)
    work_stride = grad.shape[-1] if cast else stride
    every_row = tuple(range(grad.ndim - 1))
    of_video = _video_gradient(work_stride, grad, video, keep_idx, weight, work) if needs[0] else None
    of_weight = _weight_gradient(work_stride, grad, video, keep_idx, weight, *options) if needs[1] else None
    of_positions = _position_gradient(stride, grad, keep_idx, pos_embed) if needs[3] else None
    # The offset of uint8 pixels belongs to the rounded values that the product reads.
    sums = needs[1] and video.dtype == torch.uint8
    written = (needs[0], needs[1], False, needs[3])  # the bias's is a sum of PyTorch's

    def run(
        grad: Tensor, video: Tensor, keep_idx: Tensor, weight: Tensor, pos_embed: Tensor, clip_idx: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        grad_video, grad_weight, grad_bias, grad_pos = gradients(
            grad, video, keep_idx, weight, pos_embed, clip_idx, *options, written
        )
        if copied:
            grad = grad.contiguous()
        if indices_copied:
            keep_idx, clip_idx = keep_idx.contiguous(), None if clip_idx is None else clip_idx.contiguous()
        # Products read the gradient many times.
        rounded = grad.to(work, memory_format=torch.contiguous_format) if cast else grad
        if of_video is not None:
            of_video(rounded, keep_idx, clip_idx, weight, grad_video)
        if needs[2]:
            grad_bias = grad.sum(every_row)
        if of_weight is not None:
            grad_sum = None
            if sums:
                same = grad_bias is not None and rounded is grad and grad.dtype == torch.float32
                grad_sum = grad_bias if same else rounded.sum(every_row, dtype=torch.float32)
            of_weight(rounded, video, keep_idx, clip_idx, grad_sum, grad_weight)
        if of_positions is not None:
            of_positions(grad, keep_idx, grad_pos)
        return grad_video, grad_weight, grad_bias, grad_pos

    return run


def _weight_gradient(
    stride: int,
    grad: Tensor,
    video: Tensor,
    keep_idx: Tensor,
    weight: Tensor,
    mean: Channels,
    std: Channels,
    work: torch.dtype,
) -> Run:
    """``run(grad, video, keep_idx, clip_idx, grad_sum, out)``: (M, D) -> (D, C, t, h, w)."""
    columns, channels, t, h, w = weight.shape
    count, values = keep_idx.numel(), channels * t * h * w
    layout, copied = layout_of(video, (t, h, w))
    choice = choose(
        "gather_patch_embed_backward_weight",
        config_weight,
        grad,
        work,
        pixel_bytes=video.element_size(),
        columns=columns,
    )
    tile = choice.config
    programs = triton.cdiv(columns, tile.block_m) * triton.cdiv(values, tile.block_n)
    row_tiles = triton.cdiv(count, tile.block_k)
    tiles = triton.cdiv(row_tiles, max(1, WEIGHT_PROGRAMS // programs))
    splits = triton.cdiv(row_tiles, tiles)
    launch = Launch(
        gather_patch_embed_backward_weight_kernel, (programs * splits,),
        (count, columns, keep_idx.shape[-1], video.shape[3] // h, video.shape[4] // w, tiles, stride, *layout.strides),
        choice, T=t, H=h, RUN=layout.run, VECTOR=layout.vector, K=values,
        PRECISION=precision(grad), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
    )  # fmt: skip
    parts = like((splits, columns, values), torch.float32, grad.device)
    sum_choice = choose("gather_patch_embed_backward_weight_sum", config_sum, grad)
    block_n = min(sum_choice.config.block_n, block(columns * values))
    slope, offset = normalisation(mean, std, channels)
    add = Launch(
        gather_patch_embed_backward_weight_sum_kernel, (triton.cdiv(columns * values, block_n),),
        (splits, columns * values), sum_choice, SLOPE=slope, OFFSET=offset, CHANNELS_LAST=layout.channels_last,
        C=channels, AREA=t * h * w, BLOCK_N=block_n,
    )  # fmt: skip

    def run(
        grad: Tensor, video: Tensor, keep_idx: Tensor, clip_idx: Tensor | None, grad_sum: Tensor | None, out: Tensor
    ) -> None:
        part = torch.empty_like(parts, memory_format=DENSE)
        if copied:
            video = video.clone(memory_format=torch.contiguous_format)
        launch(grad, video, keep_idx, clip_idx, part)
        add(part, grad_sum, out)

    return run


def _video_gradient(
    stride: int, grad: Tensor, video: Tensor, keep_idx: Tensor, weight: Tensor, work: torch.dtype
) -> Run:
    """``run(grad, keep_idx, clip_idx, weight, out)``: (M, D) -> (B, C, T, H, W), zero but for the indexed tubelets."""
    columns, channels, t, h, w = weight.shape
    count, values = keep_idx.numel(), channels * t * h * w
    layout, copied = layout_of(gradient_memory(video), (t, h, w))
    assert not copied
    fold = fold_weight(weight, None, layout, work)
    choice = choose(
        "gather_patch_embed_backward_video", config_video, grad, work, pixel_bytes=video.element_size(), rows=count
    )
    tile = choice.config
    launch = Launch(
        gather_patch_embed_backward_video_kernel,
        (triton.cdiv(count, tile.block_m) * triton.cdiv(values, tile.block_n),),
        (count, columns, keep_idx.shape[-1], video.shape[3] // h, video.shape[4] // w, stride, *layout.strides),
        choice, T=t, H=h, RUN=layout.run, VECTOR=layout.vector, K=values,
        PRECISION=precision(grad), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
    )  # fmt: skip

    def run(grad: Tensor, keep_idx: Tensor, clip_idx: Tensor | None, weight: Tensor, out: Tensor) -> None:
        if fold is not None:
            weight, _ = fold(weight)
        launch(grad, weight, keep_idx, clip_idx, out.zero_())

    return run


def _position_gradient(stride: int, grad: Tensor, keep_idx: Tensor, pos_embed: Tensor) -> Run:
    """``run(grad, keep_idx, out)``: (M, D) -> (L, D)."""
    length, columns = pos_embed.shape
    choice = choose("gather_patch_embed_backward_position", config_position, grad)
    tile = choice.config
    launch = Launch(
        gather_patch_embed_backward_position_kernel,
        (triton.cdiv(length, tile.block_m), triton.cdiv(columns, tile.block_n)),
        (keep_idx.numel(), length, columns, stride),
        choice,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
    )
    return launch
