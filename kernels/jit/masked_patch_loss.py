"""masked_patch_loss in Triton: a program makes the target of one dropped tubelet, which never leaves its registers.

P = t * h * w positions of C channels, in the order (t, h, w, C) of the pixels; statistics and sums in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DENSE, TUNED, Launch, LaunchConfig, block, choose, like, rows
from .op import Op, Run
from .tubelets import of_channel


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
    b_scale = of_channel(SCALE, o_channel, C)
    if NORMALIZE:
        # Seen from the first pixel a flat patch is exactly zero, and a shift of the channel is gone.
        b_first = tl.load(p_channel, mask=o_channel < C, other=0).to(tl.float32)
        b_target = tl.where(m_tile, (b_target - b_first[None, :]) * b_scale[None, :], 0.0)
        b_target = tl.where(m_tile, b_target - tl.sum(b_target, axis=0)[None, :] / (T * H * W), 0.0)
        b_variance = tl.sum(b_target * b_target, axis=0) / (T * H * W - 1)
        b_target /= (tl.sqrt_rn(b_variance) + 1e-6)[None, :]
    else:
        b_target = b_target * b_scale[None, :] + of_channel(SHIFT, o_channel, C)[None, :]
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
def masked_patch_loss_kernel(
    pixels, video, drop_idx, grad, out, count, grid_h, grid_w, factor, pixel_stride, drop_stride_b, drop_stride_m,
    stride_b, stride_c, stride_t, stride_h, stride_w, SCALE: tl.constexpr, SHIFT: tl.constexpr, NORMALIZE: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
):  # fmt: skip
    """A tubelet's part of the loss, to its slot in ``out``; with ``grad`` the gradient of its pixels."""
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
    factor = tl.cast(factor, tl.float32)  # inductor hands floats over as float64
    b_error = tl.where(m_pixel, b_pixel - b_target, 0.0)
    if grad is None:
        tl.store(out + row, tl.sum(b_error * b_error) * factor)
    else:
        b_error *= tl.load(grad).to(tl.float32) * factor
        p_out = out + row.to(tl.int64) * (T * H * W * C) + o_pixel
        tl.store(p_out, b_error.to(out.dtype.element_ty), mask=m_pixel)


@triton.jit
def masked_patch_loss_sum_kernel(part, out, count, BLOCK_N: tl.constexpr):
    """One program adds up all parts, in a fixed order."""
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, count, BLOCK_N):
        o_part = first + tl.arange(0, BLOCK_N)
        b_sum += tl.load(part + o_part, mask=o_part < count, other=0.0)
    tl.store(out, tl.sum(b_sum))


def config(arch: str, dtype: torch.dtype, *, backward: bool, values: int, side_by_side: bool) -> LaunchConfig:
    """Warps for a tubelet of so many ``values``. Compiled clean, not measured, where nothing else is said."""
    if values > 2048:
        return LaunchConfig(1, num_warps=8)  # no case of real size
    if arch == "sm_90" and values <= 1536:
        # H200, Triton 3.6, bc236cf: forward 144 us, backward 145, 4 warps took 210; compared at 663e046.
        return LaunchConfig(1, num_warps=1)
    if arch in TUNED and backward and side_by_side and dtype == torch.float32:
        return LaunchConfig(1, num_warps=8)  # at most 61 registers
    # Tubelets of one frame are 768 values: with 4 warps no thread has 16 bytes of them to load.
    return LaunchConfig(1, num_warps=2 if values <= 1024 else 4)  # at most 96 registers


def config_sum(arch: str, dtype: torch.dtype) -> LaunchConfig:
    """``block_n`` parts at a time, by the only program: 16 for each thread. Compiled clean, not measured."""
    return LaunchConfig(1, 4096, num_warps=8)


def outputs(
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    patch_size: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    normalize: bool,
) -> Tensor:
    """A float32 scalar."""
    return torch.empty((), dtype=torch.float32, device=pixels.device)


def _launch(
    name: str,
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    patch_size: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    normalize: bool,
    *,
    backward: bool,
) -> Launch:
    channels, (t, h, w), count = video.shape[1], patch_size, drop_idx.shape[1]
    pixel_stride, copied = rows(pixels)
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
    return Launch(
        masked_patch_loss_kernel, (pixels.shape[0] * count,),
        (count, video.shape[3] // h, video.shape[4] // w, (2 if backward else 1) / pixels.numel(),
         pixel_stride, *drop_idx.stride(), stride_b, stride_c, stride_t, stride_h, stride_w),
        choose(name, config, pixels, backward=backward, values=t * h * w * channels, side_by_side=side_by_side),
        (copied,),
        SCALE=scale, SHIFT=shift, NORMALIZE=normalize, C=channels, T=t, H=h, W=w,
        BLOCK_P=block_p, BLOCK_C=block_c, SIDE_BY_SIDE=side_by_side,
    )  # fmt: skip


def forward(*inputs: Any) -> Run:
    """The mean squared error, for the inputs of `outputs`."""
    (pixels, video, drop_idx), options = inputs[:3], inputs[3:]
    if pixels.numel() == 0:
        return lambda *tensors: outputs(*tensors, *options).zero_()
    launch = _launch("masked_patch_loss_forward", pixels, video, drop_idx, *options, backward=False)
    choice, count = choose("masked_patch_loss_sum", config_sum, pixels), pixels.shape[0] * pixels.shape[1]
    add = Launch(masked_patch_loss_sum_kernel, (1,), (count,), choice, BLOCK_N=min(choice.config.block_n, block(count)))

    loss, parts = (like(shape, torch.float32, pixels.device) for shape in ((), (count,)))

    def run(pixels: Tensor, video: Tensor, drop_idx: Tensor) -> Tensor:
        out, part = torch.empty_like(loss), torch.empty_like(parts, memory_format=DENSE)
        launch(pixels, video, drop_idx, None, part)
        add(part, out)
        return out

    return run


def gradients(
    grad: Tensor,
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    patch_size: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    normalize: bool,
    needs: Sequence[bool],
) -> tuple[Tensor]:
    """Of pixels."""
    return (torch.empty_like(pixels, memory_format=DENSE),)


def backward(*inputs: Any) -> Run:
    """From a target made once more, for the inputs of `gradients`; ``grad`` stays on the device."""
    (pixels, video, drop_idx), options = inputs[1:4], inputs[4:]
    if pixels.numel() == 0:
        return lambda *operands: gradients(*operands, *options)
    launch = _launch("masked_patch_loss_backward", pixels, video, drop_idx, *options[:-1], backward=True)

    def run(grad: Tensor, pixels: Tensor, video: Tensor, drop_idx: Tensor) -> tuple[Tensor]:
        results = gradients(grad, pixels, video, drop_idx, *options)
        launch(pixels, video, drop_idx, grad, *results)
        return results

    return run


masked_patch_loss = Op(
    "masked_patch_loss",
    outputs=outputs,
    forward=forward,
    gradients=gradients,
    backward=backward,
    saves=lambda tensors, outputs: tensors[:3],
    differentiable=("pixels",),
    opaque=("backward",),
)
