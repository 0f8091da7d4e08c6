"""gather_patch_embed in Triton, backward: M visible tubelets of all clips, K values in each, D columns."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gather_tubelets import gather_tubelets
from .launch import DENSE, TUNED, Launch, LaunchConfig, choose, like, precision, rows, scattered
from .op import Results, Run
from .tubelets import Channels, fold_weight, gradient_memory, layout_of, offset_in_tubelet, tubelet_start


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
def gather_patch_embed_backward_position_kernel(
    grad, index, out, rows, length, columns, s_grad,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program adds up the rows of each position in its tile; a position without rows gets zero."""
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
        # No round for most blocks, at most one for each clip of which a block has rows; the last row comes first.
        for _ in range(tl.max(tl.sum(m_here.to(tl.int32), axis=1), axis=0)):
            m_left = m_here & (o_row[None, :] < b_row[:, None])
            b_row = tl.max(tl.where(m_left, o_row[None, :], -1), axis=1)
            # [BLOCK_M, BLOCK_N]
            p_grad = grad + b_row.to(tl.int64)[:, None] * s_grad + o_column[None, :]
            m_grad = (b_row >= 0)[:, None] & m_column[None, :]
            b_sum += tl.load(p_grad, mask=m_grad, other=0.0).to(tl.float32)
    p_out = out + o_position.to(tl.int64)[:, None] * columns + o_column[None, :]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=(o_position < length)[:, None] & m_column[None, :])


def config_video(arch: str, dtype: torch.dtype, *, pixel_bytes: int, rows: int) -> LaunchConfig:
    """``block_m`` tubelets by ``block_n`` values, ``block_k`` columns of the gradient at a time.

    No choice in this file was measured; all compiled clean.
    """
    if arch not in TUNED:
        return LaunchConfig(64 if dtype == torch.float32 else 128, 64, 32, num_stages=2)  # fits 64 KB of shared memory
    if dtype == torch.float32:  # at most 218 registers, forward too
        return LaunchConfig(128, 64 if arch == "sm_80" else 128, 32, num_warps=8, num_stages=3)
    # At most 254 registers; pixels of 32 bits leave none for wide tiles.
    return LaunchConfig(128, 256 if rows > 4096 and pixel_bytes <= 2 else 128, 64, num_warps=8, num_stages=3)


def config_position(arch: str, dtype: torch.dtype) -> LaunchConfig:
    """``block_m`` positions by ``block_n`` columns, ``block_k`` indices at a time: at most 63 registers."""
    return LaunchConfig(8, 256, 256, num_warps=8)


def gradients(grad, video, keep_idx, weight, pos_embed, clip_idx, *options: Any) -> Results:
    """Memory for the gradients of video, weight, bias and pos_embed."""
    needs = options[-1]
    return (
        gradient_memory(video) if needs[0] else None,
        torch.empty_like(weight, memory_format=DENSE) if needs[1] else None,
        torch.empty(weight.shape[:1], dtype=weight.dtype, device=weight.device) if needs[2] else None,
        torch.empty_like(pos_embed, memory_format=DENSE) if needs[3] else None,
    )


def backward(*inputs: Any) -> Run:
    """Separate launches for each gradient that is needed, for the inputs of `gradients`."""
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
    of_weight = _weight_gradient(work_stride, video, keep_idx, weight, clip_idx, *options) if needs[1] else None
    of_positions = _position_gradient(stride, grad, keep_idx, pos_embed) if needs[3] else None

    def run(grad, video, keep_idx, weight, pos_embed, clip_idx) -> Results:
        grad_video = grad_weight = grad_bias = grad_pos = None
        if copied:
            grad = grad.contiguous()
        if indices_copied:
            keep_idx, clip_idx = keep_idx.contiguous(), None if clip_idx is None else clip_idx.contiguous()
        # Cast once, since the products read the gradient many times.
        rounded = grad.to(work, memory_format=torch.contiguous_format) if cast else grad
        if of_video is not None:
            grad_video = gradient_memory(video).zero_()
            of_video(rounded, keep_idx, clip_idx, weight, grad_video)
        if needs[2]:
            grad_bias = grad.sum(every_row)
        if of_weight is not None:
            grad_weight = of_weight(rounded, video, keep_idx, clip_idx, weight)
        if of_positions is not None:
            grad_pos = torch.empty_like(pos_embed, memory_format=DENSE)
            of_positions(grad, keep_idx, grad_pos)
        return grad_video, grad_weight, grad_bias, grad_pos

    return run


def _weight_gradient(
    stride: int, video, keep_idx, weight, clip_idx, mean: Channels, std: Channels, work: torch.dtype
) -> Run:
    """``run(grad, video, keep_idx, clip_idx, weight)``: (M, D) -> (D, C, t, h, w), by PyTorch's matrix product.

    The tubelets are gathered again. Keeping them from the forward pass would save one launch, but hold 77 MB for 25088
    of them in 16 bits through the whole step.
    """
    columns, channels, t, h, w = weight.shape
    values, count = channels * t * h * w, keep_idx.numel()
    gather = gather_tubelets(video, keep_idx, clip_idx, weight, work, mean, std)
    channels_last = layout_of(video, (t, h, w))[0].channels_last
    moved = channels_last or weight.dtype != work
    inner = (1, h * w * channels, w * channels, channels) if channels_last else (t * h * w, h * w, w, 1)
    shape, strides = weight.shape, (values, *inner)
    template = like((columns, values) if moved else shape, work, weight.device)

    def run(grad, video, keep_idx, clip_idx, weight) -> Tensor:
        product = torch.empty_like(template, memory_format=DENSE)
        patches = gather(video, keep_idx, clip_idx)
        # Autocast does not change a product with ``out``.
        out = product if moved else product.view(columns, values)
        torch.mm(grad.as_strided((columns, count), (1, stride)), patches, out=out)
        if not moved:
            return product
        return torch.empty_like(weight, memory_format=DENSE).copy_(product.as_strided(shape, strides))

    return run


def _video_gradient(stride: int, grad, video, keep_idx, weight, work: torch.dtype) -> Run:
    """``run(grad, keep_idx, clip_idx, weight, out)``: (M, D) -> the indexed tubelets of (B, C, T, H, W)."""
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
        PRECISION=precision(grad),
    )  # fmt: skip

    def run(grad, keep_idx, clip_idx, weight, out) -> None:
        if fold is not None:
            weight, _ = fold(weight)
        launch(grad, weight, keep_idx, clip_idx, out)

    return run


def _position_gradient(stride: int, grad, keep_idx, pos_embed) -> Run:
    """``run(grad, keep_idx, out)``: (M, D) -> (L, D)."""
    length, columns = pos_embed.shape
    choice = choose("gather_patch_embed_backward_position", config_position, grad)
    tile = choice.config
    grid = (triton.cdiv(length, tile.block_m), triton.cdiv(columns, tile.block_n))
    numbers = (keep_idx.numel(), length, columns, stride)
    return Launch(gather_patch_embed_backward_position_kernel, grid, numbers, choice)
