"""gather_patch_embed in Triton, forward: a matrix product whose left operand is gathered from the clip as it is needed.

M = B * N visible tubelets, K = C * t * h * w values in each, D columns. A tubelet is lines of neighbours in memory
(`Pixels`): loads of a thread run along a line, so that they are 16 bytes wide.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import eager
from ..gather_patch_embed import Channels, memory_order
from ..launch_config import launch_config
from .launch import block, launch, precision

Triple = tuple[int, int, int]

# uint8 pixels enter products as -128 .. 127, exact in every dtype, and near the mean: what is taken off for that is a
# small difference, not one of large sums. The weight carries 64 / 255: beside 1 / 255 alone, small weights would have
# too few digits left in float16. A power of two is taken out of the sum again without rounding.
UINT8_CENTRE, UINT8_SCALE = 128, 64


@triton.jit
def tubelet_start(
    index, o_row, rows, per_clip, grid_rows, grid_columns, s_clip, s_frame, s_line,
    T: tl.constexpr, H: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Flat index of each row's tubelet, and the offset of its first pixel. Rows beyond the last repeat that one."""
    o_row = tl.minimum(o_row, rows - 1)
    b_index = tl.load(index + o_row).to(tl.int32)
    clip = (o_row // per_clip).to(tl.int64)
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
    """Pixels as a product takes them; see UINT8_CENTRE."""
    if b_video.dtype == tl.uint8:
        return (b_video ^ 128).to(tl.int8, bitcast=True).to(dtype)
    return b_video.to(dtype)


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
def forward_kernel(
    video, index, weight, bias, position, out, rows, columns, values, per_clip, grid_rows, grid_columns,
    s_clip, s_channel, s_frame, s_line, s_position,
    T: tl.constexpr, H: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Column tiles of the same rows run next to each other: the clip's pixels come from memory once, then from L2.
    column_tiles = tl.cdiv(columns, BLOCK_N)
    o_row = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    b_index, start = tubelet_start(
        index, o_row, rows, per_clip, grid_rows, grid_columns, s_clip, s_frame, s_line, T, H, RUN, VECTOR
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


@dataclass(frozen=True)
class Pixels:
    """A clip in memory: lines of ``run`` neighbours, in which ``vector`` values at a time are loaded.

    Planar clips have the values of a tubelet in the order (c, t, y, x) and a line of w; channels-last clips have
    (t, y, x, c) and a line of w * C. Strides are those of clip, channel, frame and line, in units of ``vector``: their
    divisibility need not be known to be used.
    """

    memory: Tensor
    channels_last: bool
    run: int
    vector: int
    strides: tuple[int, int, int, int]

    @classmethod
    def of(cls, video: Tensor, patch: Triple) -> "Pixels | None":
        """The clip where it is; None where a thread could not load neighbours at once, as in a misaligned crop."""
        order = memory_order(video)
        if order is None:
            return None
        channels_last = order == "channels-last"
        # The stride of an extent of 1 says nothing.
        strides = [stride if extent > 1 else 0 for stride, extent in zip(video.stride(), video.shape, strict=True)]
        line_strides = (strides[0], 0 if channels_last else strides[1], strides[2], strides[3])
        run = patch[2] * video.shape[1] if channels_last else patch[2]
        vector = 16 // video.element_size()
        while run % vector:
            vector //= 2
        aligned = vector == 1 or (video.is_meta or video.data_ptr() % 16 == 0)
        if not aligned or any(stride % vector for stride in line_strides):
            return None
        return cls(video, channels_last, run, vector, tuple(stride // vector for stride in line_strides))  # type: ignore[arg-type]

    def order(self, weight: Tensor) -> Tensor:
        """(D, C, t, h, w) -> (D, K), the values in this clip's order."""
        return (weight.permute(0, 2, 3, 4, 1) if self.channels_last else weight).flatten(1).contiguous()

    def unorder(self, values: Tensor, shape: torch.Size) -> Tensor:
        """(D, K) -> (D, C, t, h, w): the reverse."""
        if self.channels_last:
            channels, *patch = shape[1:]
            return values.view(-1, *patch, channels).permute(0, 4, 1, 2, 3)
        return values.view(shape)


def pixels_of(video: Tensor, patch: Triple) -> Pixels:
    """The clip where it is, or a contiguous copy of it."""
    pixels = Pixels.of(video, patch) or Pixels.of(video.clone(memory_format=torch.contiguous_format), patch)
    assert pixels is not None
    return pixels


def normalisation(mean: Channels, std: Channels, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """slope and offset, (C,) float32: a normalised uint8 pixel is slope * (pixel - 128) - offset."""
    mean, std = mean or [0.0] * channels, std or [1.0] * channels
    slope = tuple(1 / (255 * spread) for spread in std)
    offset = tuple((centre - UINT8_CENTRE / 255) / spread for centre, spread in zip(mean, std, strict=True))
    return eager.per_channel(slope, device), eager.per_channel(offset, device)


def fold_normalisation(
    weight: Tensor, bias: Tensor, work: torch.dtype, mean: Channels, std: Channels
) -> tuple[Tensor, Tensor]:
    """Weight and bias for centred uint8 pixels: w' = w * 64 * slope, rounded to ``work``, and the bias that fits it.

    That is computed from the rounded w', so that its rounding meets normalised pixels and not their offset.
    """
    slope, offset = normalisation(mean, std, weight.shape[1], weight.device)
    folded = (weight.float() * (UINT8_SCALE * slope).view(-1, 1, 1, 1)).to(work)
    return folded, bias.float() - (folded.float().sum((2, 3, 4)) * (offset / (UINT8_SCALE * slope))).sum(1)


def features(video: Tensor, rows: int, columns: int) -> dict[str, int]:
    """What launch tables go by; rows only roughly, since every number of them would be a choice of its own."""
    return dict(pixel_bytes=video.element_size(), rows=block(rows), columns=columns)


def forward(
    video: Tensor,
    keep_idx: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    mean: Channels,
    std: Channels,
    work: torch.dtype,
) -> Tensor:
    """See `mar_fast.kernels.gather_patch_embed`; the product works in ``work``."""
    columns, channels, t, h, w = weight.shape
    out = torch.empty((*keep_idx.shape, columns), dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    pixels = pixels_of(video, (t, h, w))
    scale = 1
    if video.dtype == torch.uint8:
        scale = UINT8_SCALE
        weight, bias = fold_normalisation(weight, bias, work, mean, std)
    pos_embed = pos_embed if pos_embed.stride(1) == 1 else pos_embed.contiguous()
    rows, values = keep_idx.numel(), channels * t * h * w
    config = launch_config("gather_patch_embed.forward", video, work, **features(video, rows, columns))
    launch(
        "gather_patch_embed.forward", forward_kernel,
        (triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),),
        (
            pixels.memory, keep_idx.contiguous(), pixels.order(weight.to(work)), bias.contiguous(), pos_embed, out,
            rows, columns, values, keep_idx.shape[1], video.shape[3] // h, video.shape[4] // w,
            *pixels.strides, pos_embed.stride(0),
        ),
        config, T=t, H=h, RUN=pixels.run, VECTOR=pixels.vector, K=values, SCALE=scale,
        PRECISION=precision(video), BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
    )  # fmt: skip
    return out
