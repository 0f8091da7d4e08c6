"""gather_patch_embed in Triton, backward. Letters as in the forward: M visible tubelets of K values, D columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gather_patch_embed import Channels, gradient_memory, gradients
from ..launch_config import launch_config
from .gather_patch_embed import (
    Pixels,
    centred,
    features,
    normalisation,
    offset_in_tubelet,
    pixels_of,
    tubelet_start,
)
from .launch import as_rows, launch, precision


@triton.jit
def weight_kernel(
    grad, video, index, part, rows, columns, per_clip, grid_rows, grid_columns, tiles,
    s_grad, s_clip, s_channel, s_frame, s_line,
    T: tl.constexpr, H: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program sums ``tiles`` tiles of rows into its place of ``part``: the parts are added in a fixed order
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
            index, o_row, rows, per_clip, grid_rows, grid_columns, s_clip, s_frame, s_line, T, H, RUN, VECTOR
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
def video_kernel(
    grad, weight, index, grad_video, rows, columns, per_clip, grid_rows, grid_columns,
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
        index, o_row, rows, per_clip, grid_rows, grid_columns, s_clip, s_frame, s_line, T, H, RUN, VECTOR
    )
    p_video = (
        grad_video + start[:, None] + offset_in_tubelet(o_k, s_channel, s_frame, s_line, T, H, RUN, VECTOR)[None, :]
    )
    tl.store(p_video, b_video.to(grad_video.dtype.element_ty), mask=m_row[:, None] & m_k[None, :])


@triton.jit
def position_kernel(grad, order, bounds, out, columns, s_grad, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program adds up the rows of one position, in the order of the clips; none leave a zero."""
    position = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    start, end = tl.load(bounds + position), tl.load(bounds + position + 1)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_M):
        o_order = first + tl.arange(0, BLOCK_M)
        m_order = o_order < end
        # [BLOCK_M, BLOCK_N]
        o_row = tl.load(order + o_order, mask=m_order, other=0)
        p_grad = grad + o_row[:, None] * s_grad + o_column[None, :]
        b_sum += tl.load(p_grad, mask=m_order[:, None] & m_column[None, :], other=0.0).to(tl.float32)
    p_out = out + position * columns + o_column
    tl.store(p_out, tl.sum(b_sum, axis=0).to(out.dtype.element_ty), mask=m_column)


# Two for each multiprocessor of a large GPU. A number of our own, not the device's: so many parts are summed, and the
# result shall be the same everywhere.
WEIGHT_PROGRAMS = 264


def weight_gradient(
    grad: Tensor, pixels: Pixels, keep_idx: Tensor, weight: Tensor, mean: Channels, std: Channels
) -> Tensor:
    """(M, D) -> (D, C, t, h, w)."""
    columns, channels, t, h, w = weight.shape
    rows, values = len(grad), channels * t * h * w
    height, width = pixels.memory.shape[3:]
    config = launch_config(
        "gather_patch_embed.backward_weight", grad, grad.dtype, **features(pixels.memory, rows, columns)
    )
    programs = triton.cdiv(columns, config.block_m) * triton.cdiv(values, config.block_n)
    row_tiles = triton.cdiv(rows, config.block_k)
    tiles = triton.cdiv(row_tiles, max(1, WEIGHT_PROGRAMS // programs))
    splits = triton.cdiv(row_tiles, tiles)
    part = torch.empty((splits, columns, values), dtype=torch.float32, device=grad.device)
    launch(
        "gather_patch_embed.backward_weight", weight_kernel, (programs * splits,),
        (
            grad, pixels.memory, keep_idx, part, rows, columns, keep_idx.shape[1], height // h, width // w, tiles,
            grad.stride(0), *pixels.strides,
        ),
        config, T=t, H=h, RUN=pixels.run, VECTOR=pixels.vector, K=values,
        PRECISION=precision(grad), BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
    )  # fmt: skip
    total = pixels.unorder(part.sum(0), weight.shape)
    if pixels.memory.dtype == torch.uint8:
        slope, offset = (value.view(-1, 1, 1, 1) for value in normalisation(mean, std, channels, grad.device))
        total = total * slope - grad.sum(0, dtype=torch.float32).view(-1, 1, 1, 1, 1) * offset
    return total.to(weight.dtype).contiguous()


def video_gradient(grad: Tensor, video: Tensor, keep_idx: Tensor, weight: Tensor) -> Tensor:
    """(M, D) -> (B, C, T, H, W): zero but for the indexed tubelets, laid out as `gradient_memory` says."""
    columns, channels, t, h, w = weight.shape
    rows, values = len(grad), channels * t * h * w
    total = gradient_memory(video).zero_()
    pixels = Pixels.of(total, (t, h, w))
    assert pixels is not None
    config = launch_config("gather_patch_embed.backward_video", grad, grad.dtype, **features(video, rows, columns))
    launch(
        "gather_patch_embed.backward_video", video_kernel,
        (triton.cdiv(rows, config.block_m) * triton.cdiv(values, config.block_n),),
        (
            grad, pixels.order(weight.to(grad.dtype)), keep_idx, total, rows, columns, keep_idx.shape[1],
            video.shape[3] // h, video.shape[4] // w, grad.stride(0), *pixels.strides,
        ),
        config, T=t, H=h, RUN=pixels.run, VECTOR=pixels.vector, K=values,
        PRECISION=precision(grad), BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
    )  # fmt: skip
    return total


def position_gradient(grad: Tensor, keep_idx: Tensor, pos_embed: Tensor) -> Tensor:
    """(M, D) -> (L, D)."""
    ascending, order = keep_idx.flatten().sort(stable=True)
    positions = torch.arange(len(pos_embed) + 1, dtype=keep_idx.dtype, device=grad.device)
    bounds = torch.searchsorted(ascending, positions, out_int32=True)
    out = torch.empty(pos_embed.shape, dtype=pos_embed.dtype, device=grad.device)
    config = launch_config("gather_patch_embed.backward_position", grad)
    launch(
        "gather_patch_embed.backward_position", position_kernel,
        (len(pos_embed), triton.cdiv(grad.shape[1], config.block_n)),
        (grad, order, bounds, out, grad.shape[1], grad.stride(0)),
        config, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    video: Tensor,
    keep_idx: Tensor,
    weight: Tensor,
    pos_embed: Tensor,
    mean: Channels,
    std: Channels,
    work: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of video, weight, bias and pos_embed; an empty tensor for what is not needed."""
    if grad.numel() == 0:
        return tuple(memory.zero_() for memory in gradients(video, weight, pos_embed, needs))  # type: ignore[return-value]
    results = list(gradients(video, weight, pos_embed, [False] * 4))
    grad, keep_idx = as_rows(grad), keep_idx.contiguous()
    # Products read the gradient many times, and the offset of uint8 pixels belongs to the same rounded values.
    rounded = grad.to(work)
    if needs[0]:
        results[0] = video_gradient(rounded, video, keep_idx, weight)
    if needs[1]:
        t, h, w = weight.shape[2:]
        pixels = pixels_of(video, (t, h, w))
        results[1] = weight_gradient(rounded, pixels, keep_idx, weight, mean, std)
    if needs[2]:
        results[2] = grad.sum(0, dtype=torch.float32).to(weight.dtype)
    if needs[3]:
        results[3] = position_gradient(grad, keep_idx, pos_embed)
    return tuple(results)  # type: ignore[return-value]
