"""How a clip lies in memory for gather_patch_embed, and the weight in the same order.

A tubelet of K = C * t * h * w values consists of lines, whose values are neighbours in memory: a thread loads along a
line, 16 bytes at a time where possible.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DENSE, Launch, LaunchConfig, block, choose, like

Channels = Sequence[float] | None

# uint8 pixels enter products as -128 .. 127: exact in every dtype, and near the mean, for which the sum then needs only
# a small correction. The weight is multiplied by 64 / 255: with 1 / 255 alone small weights would lose digits in
# float16. The 64, a power of two, is divided out of the sum without rounding.
UINT8_CENTRE, UINT8_SCALE = 128, 64


@triton.jit
def tubelet_start(
    index, clip_idx, o_row, rows, per_clip, grid_rows, grid_columns, s_clip, s_frame, s_line,
    T: tl.constexpr, H: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Flat index of each row's tubelet, and the offset of its first pixel. Rows beyond the last repeat it.

    ``clip_idx`` is each row's clip; without it a clip has ``per_clip`` rows.
    """
    o_row = tl.minimum(o_row, rows - 1)
    b_index = tl.load(index + o_row).to(tl.int32)
    b_clip = o_row // per_clip if clip_idx is None else tl.load(clip_idx + o_row)
    clip = b_clip.to(tl.int64)
    frame = (b_index // (grid_rows * grid_columns)).to(tl.int64) * T
    line = (b_index // grid_columns % grid_rows).to(tl.int64) * H
    column = (b_index % grid_columns).to(tl.int64)
    return b_index, (clip * s_clip + frame * s_frame + line * s_line) * VECTOR + column * RUN


@triton.jit
def offset_in_tubelet(
    o_k, s_channel, s_frame, s_line, T: tl.constexpr, H: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr
):
    """Offset of the k-th value of a tubelet from its first; constexprs show Triton that RUN of them are neighbours."""
    line = o_k // RUN
    channel = (line // (T * H)).to(tl.int64)
    frame = (line // H % T).to(tl.int64)
    return (channel * s_channel + frame * s_frame + (line % H).to(tl.int64) * s_line) * VECTOR + o_k % RUN


@triton.jit
def centred(b_video, dtype: tl.constexpr):
    """Pixels as they enter a product; see UINT8_CENTRE."""
    if b_video.dtype == tl.uint8:
        return (b_video ^ 128).to(tl.int8, bitcast=True).to(dtype)
    return b_video.to(dtype)


@triton.jit
def of_channel(VALUES: tl.constexpr, o_channel, C: tl.constexpr):
    """The number for each channel."""
    b_value = tl.full(o_channel.shape, VALUES[0], dtype=tl.float32)
    for c in tl.static_range(1, C):
        b_value = tl.where(o_channel == c, VALUES[c], b_value)
    return b_value


@triton.jit
def fold_weight_kernel(
    weight, bias, folded, folded_bias, s_column, s_channel, s_frame, s_line, s_pixel, s_bias,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program writes one row of the (D, K) weight; with ``folded_bias`` for uint8 pixels, and the bias for it."""
    column = tl.program_id(0).to(tl.int64)
    b_offset = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, C * T * H * W, BLOCK_N):
        o_k = first + tl.arange(0, BLOCK_N)
        m_k = o_k < C * T * H * W
        # Loads run along the lines of the weight, whatever the order of the clip.
        o_channel, o_line, o_x = o_k // (T * H * W), o_k // W % (T * H), o_k % W
        o_weight = o_channel.to(tl.int64) * s_channel + (o_line // H).to(tl.int64) * s_frame
        o_weight += (o_line % H).to(tl.int64) * s_line + o_x.to(tl.int64) * s_pixel
        b_weight = tl.load(weight + column * s_column + o_weight, mask=m_k, other=0.0).to(tl.float32)
        if folded_bias is not None:
            b_weight *= of_channel(SCALE, o_channel, C)
        b_folded = b_weight.to(folded.dtype.element_ty)
        o_folded = o_k % (T * H * W) * C + o_channel if CHANNELS_LAST else o_k
        tl.store(folded + column * (C * T * H * W) + o_folded, b_folded, mask=m_k)
        if folded_bias is not None:
            # With the rounded weight: its rounding error is then multiplied by normalised pixels, not by their offset.
            b_offset += b_folded.to(tl.float32) * of_channel(OFFSET, o_channel, C)
    if folded_bias is not None:
        tl.store(folded_bias + column, tl.load(bias + column * s_bias).to(tl.float32) - tl.sum(b_offset))


class ClipLayout(NamedTuple):
    """A clip in memory: lines of ``run`` neighbours, in which ``vector`` values at a time are loaded.

    Planar clips have the values of a tubelet in the order (c, t, y, x) and a line of w; channels-last clips have
    (t, y, x, c) and a line of w * C. Strides are those of clip, channel, frame and line, in units of ``vector``, so
    that the compiler sees that offsets are multiples of it.
    """

    channels_last: bool
    run: int
    vector: int
    strides: tuple[int, ...]


def memory_order(video: Tensor) -> str | None:
    """ "planar" if W has stride 1, "channels-last" if C has stride 1 and W stride C; None for anything else."""
    if video.stride(4) == 1 or video.shape[4] == 1:
        return "planar"
    return "channels-last" if video.stride(1) == 1 and video.stride(4) == video.shape[1] else None


def gradient_memory(video: Tensor) -> Tensor:
    """Memory for the clip's gradient: dense, in the clip's own order of dimensions where the kernels can write that."""
    memory = torch.empty_like(video)
    return memory if memory_order(memory) else torch.empty(video.shape, dtype=video.dtype, device=video.device)


def layout_of(video: Tensor, patch_size: Sequence[int]) -> tuple[ClipLayout, bool]:
    """The layout of a clip for the kernels, and whether it must first be copied to be contiguous."""
    found = _layout(video, patch_size)
    if found is not None:
        return found, False
    found = _layout(torch.empty(video.shape, dtype=video.dtype, device="meta"), patch_size)
    assert found is not None
    return found, True


def _aligned(video: Tensor) -> bool:
    """Whether the clip begins at a multiple of 16 bytes, as memory yet to be allocated will."""
    if type(video) in (Tensor, torch.nn.Parameter) and not video.is_meta:
        return video.data_ptr() % 16 == 0
    return video.storage_offset() * video.element_size() % 16 == 0


def _layout(video: Tensor, patch_size: Sequence[int]) -> ClipLayout | None:
    """None for a clip of which a thread cannot load neighbours at once, such as a misaligned crop."""
    order = memory_order(video)
    if order is None:
        return None
    channels_last = order == "channels-last"
    # The stride of an extent of 1 says nothing.
    clip, channel, frame, line = (video.stride(i) if video.shape[i] > 1 else 0 for i in range(4))
    strides = (clip, 0 if channels_last else channel, frame, line)
    run = patch_size[2] * video.shape[1] if channels_last else patch_size[2]
    vector = 16 // video.element_size()
    while run % vector:
        vector //= 2
    if vector > 1 and (not _aligned(video) or any(step % vector for step in strides)):
        return None
    return ClipLayout(channels_last, run, vector, tuple(step // vector for step in strides))


def normalisation(
    mean: Channels, std: Channels, channels: int, zero: int = UINT8_CENTRE
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """slope and offset of each channel: a normalised uint8 pixel is slope * (pixel - zero) - offset."""
    mean, std = mean or [0.0] * channels, std or [1.0] * channels
    slope = tuple(1 / (255 * spread) for spread in std)
    return slope, tuple((centre - zero / 255) / spread for centre, spread in zip(mean, std, strict=True))


def config(arch: str, dtype: torch.dtype) -> LaunchConfig:
    """``block_n`` values at a time of a row: 8 for each thread. Compiled clean, not measured."""
    return LaunchConfig(1, 2048, num_warps=8)


def fold_weight(
    weight, bias, layout: ClipLayout, dtype: torch.dtype, mean: Channels = None, std: Channels = None
) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """A function of weight (D, C, t, h, w), and bias (D,) if given, that returns both as the product needs them.

    That is a weight (D, K) in ``dtype`` with its values in the clip's order. None if the weight is that already.

    Args:
        weight: The weight.
        bias: Only for `centred` uint8 pixels: the result is then weight * 64 * slope, and a float32 bias.
        layout: The clip's.
        dtype: The product's.
        mean: As in `mar_fast.kernels.gather_patch_embed`.
        std: The same.
    """
    if bias is None and weight.dtype == dtype and not layout.channels_last and weight.is_contiguous():
        return None
    columns, channels, t, h, w = weight.shape
    values = channels * t * h * w
    slope, offset = normalisation(mean, std, channels)
    choice = choose("fold_weight", config, weight)
    launch = Launch(
        fold_weight_kernel, (columns,), (*weight.stride(), 0 if bias is None else bias.stride(0)), choice,
        SCALE=tuple(UINT8_SCALE * value for value in slope),
        OFFSET=tuple(shift / (UINT8_SCALE * value) for shift, value in zip(offset, slope, strict=True)),
        CHANNELS_LAST=layout.channels_last, C=channels, T=t, H=h, W=w,
        BLOCK_N=min(choice.config.block_n, block(values)),
    )  # fmt: skip
    made = like((columns, values), dtype, weight.device)
    made_bias = None if bias is None else like((columns,), torch.float32, weight.device)

    def run(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        folded = torch.empty_like(made, memory_format=DENSE)
        folded_bias = None if made_bias is None else torch.empty_like(made_bias, memory_format=DENSE)
        launch(weight, bias, folded, folded_bias)
        return folded, folded_bias

    return run
