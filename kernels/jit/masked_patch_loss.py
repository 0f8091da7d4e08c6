"""masked_patch_loss in Triton: one program makes the target of one dropped tubelet in registers, and nowhere else.

P = t * h * w positions of C channels, in the order (t, h, w, C) of the pixels; statistics and sums in float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_config import launch_config
from .launch import as_rows, block, launch


@triton.jit
def tubelet(
    video, drop_idx, row, count, grid_h, grid_w, drop_stride_b, drop_stride_m,
    stride_b, stride_t, stride_h, stride_w, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Its first pixel, in the first channel."""
    clip = (row // count).to(tl.int64)
    index = tl.load(drop_idx + clip * drop_stride_b + (row % count).to(tl.int64) * drop_stride_m).to(tl.int64)
    o_t = index // (grid_h * grid_w) * T
    o_h = index // grid_w % grid_h * H
    o_w = index % grid_w * W
    return video + clip * stride_b + o_t * stride_t + o_h * stride_h + o_w * stride_w


@triton.jit
def positions(
    first, stride_c, stride_t, stride_h, stride_w, SCALE: tl.constexpr, SHIFT: tl.constexpr, NORMALIZE: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Offsets of a tubelet's pixels, which of them there are, and their target: [BLOCK_P, BLOCK_C].

    For planar clips: along x the loads are wide, and those of the pixels, whose channels lie side by side, narrow.
    """
    o_position = tl.arange(0, BLOCK_P)
    o_channel = tl.arange(0, BLOCK_C)
    m_tile = (o_position < T * H * W)[:, None] & (o_channel < C)[None, :]
    o_video = (o_position // (H * W)).to(tl.int64) * stride_t + (o_position // W % H).to(tl.int64) * stride_h
    o_video += (o_position % W).to(tl.int64) * stride_w
    p_channel = first + o_channel.to(tl.int64) * stride_c
    b_target = tl.load(p_channel[None, :] + o_video[:, None], mask=m_tile, other=0).to(tl.float32)
    b_scale = tl.full((BLOCK_C,), SCALE[0], dtype=tl.float32)
    for c in tl.static_range(1, C):
        b_scale = tl.where(o_channel == c, SCALE[c], b_scale)
    if NORMALIZE:
        # Seen from the first pixel a flat patch is exactly zero, and a shift of the channel is gone.
        b_first = tl.load(p_channel, mask=o_channel < C, other=0).to(tl.float32)
        b_target = tl.where(m_tile, (b_target - b_first[None, :]) * b_scale[None, :], 0.0)
        b_target = tl.where(m_tile, b_target - tl.sum(b_target, axis=0)[None, :] / (T * H * W), 0.0)
        b_variance = tl.sum(b_target * b_target, axis=0) / (T * H * W - 1)
        b_target /= (tl.sqrt_rn(b_variance) + 1e-6)[None, :]
    else:
        b_shift = tl.full((BLOCK_C,), SHIFT[0], dtype=tl.float32)
        for c in tl.static_range(1, C):
            b_shift = tl.where(o_channel == c, SHIFT[c], b_shift)
        b_target = b_target * b_scale[None, :] + b_shift[None, :]
    return o_position[:, None] * C + o_channel[None, :], m_tile, b_target


@triton.jit
def values(
    first, stride_c, stride_t, stride_h, stride_w, SCALE: tl.constexpr, SHIFT: tl.constexpr, NORMALIZE: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same as one row, [BLOCK], for clips whose channels lie side by side too: all loads are wide."""
    o_value = tl.arange(0, BLOCK)
    o_channel = o_value % C
    m_value = o_value < T * H * W * C
    o_line = o_value // (W * C)
    o_video = (o_line // H).to(tl.int64) * stride_t + (o_line % H).to(tl.int64) * stride_h + o_value % (W * C)
    b_video = tl.load(first + o_video, mask=m_value, other=0).to(tl.float32)
    b_target = tl.full((BLOCK,), 0.0, dtype=tl.float32)
    for c in tl.static_range(C):
        m_channel = m_value & (o_channel == c)
        if NORMALIZE:
            b_first = tl.load(first + c).to(tl.float32)
            b_channel = tl.where(m_channel, (b_video - b_first) * SCALE[c], 0.0)
            b_channel = tl.where(m_channel, b_channel - tl.sum(b_channel, axis=0) / (T * H * W), 0.0)
            b_variance = tl.sum(b_channel * b_channel, axis=0) / (T * H * W - 1)
            b_target += b_channel / (tl.sqrt_rn(b_variance) + 1e-6)
        else:
            b_target = tl.where(m_channel, b_video * SCALE[c] + SHIFT[c], b_target)
    return o_value, m_value, b_target


@triton.jit
def kernel(
    pixels, video, drop_idx, grad, out, count, grid_h, grid_w, factor, pixel_stride, drop_stride_b, drop_stride_m,
    stride_b, stride_c, stride_t, stride_h, stride_w, SCALE: tl.constexpr, SHIFT: tl.constexpr, NORMALIZE: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
):  # fmt: skip
    """The sum of squared errors of a tubelet in its place of ``out``; with ``grad`` its gradient of the pixels."""
    row = tl.program_id(0)
    first = tubelet(
        video, drop_idx, row, count, grid_h, grid_w, drop_stride_b, drop_stride_m,
        stride_b, stride_t, stride_h, stride_w, T, H, W,
    )  # fmt: skip
    if SIDE_BY_SIDE:
        o_pixel, m_pixel, b_target = values(
            first, stride_c, stride_t, stride_h, stride_w, SCALE, SHIFT, NORMALIZE, C, T, H, W, BLOCK_P * BLOCK_C
        )
    else:
        o_pixel, m_pixel, b_target = positions(
            first, stride_c, stride_t, stride_h, stride_w, SCALE, SHIFT, NORMALIZE, C, T, H, W, BLOCK_P, BLOCK_C
        )
    b_pixel = tl.load(pixels + row.to(tl.int64) * pixel_stride + o_pixel, mask=m_pixel, other=0.0).to(tl.float32)
    b_error = tl.where(m_pixel, b_pixel - b_target, 0.0)
    if grad is None:
        tl.store(out + row, tl.sum(b_error * b_error))
    else:
        b_error *= tl.load(grad).to(tl.float32) * factor
        p_out = out + row.to(tl.int64) * (T * H * W * C) + o_pixel
        tl.store(p_out, b_error.to(out.dtype.element_ty), mask=m_pixel)


def _launch(
    name: str,
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    grad: Tensor | None,
    out: Tensor,
    patch: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    normalize: bool,
) -> None:
    channels, (t, h, w), count = video.shape[1], patch, drop_idx.shape[1]
    rows = as_rows(pixels)
    scale, shift = (1.0,) * channels, (0.0,) * channels
    if video.dtype == torch.uint8:
        scale = (1 / 255,) * channels
    elif mean is not None and std is not None:
        scale, shift = tuple(std), tuple(mean)
    side_by_side = video.stride(1) == 1 and video.stride(4) == channels
    block_p, block_c = block(t * h * w), block(channels)
    if side_by_side:
        block_p = block(t * h * w * channels, block_c) // block_c
    stride_b, stride_c, stride_t, stride_h, stride_w = video.stride()
    config = launch_config(name, pixels, values=t * h * w * channels, side_by_side=int(side_by_side))
    launch(
        name, kernel, (len(rows),),
        (rows, video, drop_idx, grad, out, count, video.shape[3] // h, video.shape[4] // w, 2 / pixels.numel(),
         rows.stride(0), *drop_idx.stride(), stride_b, stride_c, stride_t, stride_h, stride_w),
        config, SCALE=scale, SHIFT=shift, NORMALIZE=normalize, C=channels, T=t, H=h, W=w,
        BLOCK_P=block_p, BLOCK_C=block_c, SIDE_BY_SIDE=side_by_side,
    )  # fmt: skip


def forward(
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    patch: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    normalize: bool,
) -> Tensor:
    """The mean squared error, a float32 scalar; shapes as in `mar_fast.kernels.masked_patch_loss`."""
    if pixels.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=pixels.device)
    part = torch.empty(pixels.shape[:2], dtype=torch.float32, device=pixels.device)
    _launch("masked_patch_loss.forward", pixels, video, drop_idx, None, part, patch, mean, std, normalize)
    return part.sum() / pixels.numel()


def backward(
    grad: Tensor,
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    patch: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    normalize: bool,
) -> Tensor:
    """The gradient of pixels, from a target made once more; ``grad`` stays on the device."""
    grad_pixels = torch.empty(pixels.shape, dtype=pixels.dtype, device=pixels.device)
    if grad_pixels.numel() != 0:
        _launch("masked_patch_loss.backward", pixels, video, drop_idx, grad, grad_pixels, patch, mean, std, normalize)
    return grad_pixels
