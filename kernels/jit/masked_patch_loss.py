"""masked_patch_loss in Triton: the target of a dropped tubelet is computed in registers and never leaves them.

A tubelet is split into chunks of WIDTH values that are neighbours in memory, and these into pieces of ROWS chunks,
usually one for each thread. So one address is computed for each chunk, and its values are loaded together.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DENSE, Launch, LaunchConfig, block, choose, like, rows, scattered
from .op import Op, Run
from .tubelets import of_channel


@triton.jit
def tubelet(
    drop_idx, clip_idx, o_row, per_clip, grid_h, grid_w, s_drop_clip, s_drop, s_clip, s_frame, s_line, s_value,
    T: tl.constexpr, H: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Offset of each row's first value. ``clip_idx`` is each row's clip; without it a clip has ``per_clip`` rows."""
    # Unsigned, and remainders from quotients: half the instructions. In 64 bits they would double the kernel.
    per_clip, grid_h, grid_w = tl.cast(per_clip, tl.uint32), tl.cast(grid_h, tl.uint32), tl.cast(grid_w, tl.uint32)
    o_row = o_row.to(tl.uint32)
    b_clip = o_row // per_clip
    o_drop = o_row - b_clip * per_clip
    b_index = tl.load(drop_idx + b_clip.to(tl.int64) * s_drop_clip + o_drop.to(tl.int64) * s_drop).to(tl.uint32)
    if clip_idx is not None:
        b_clip = tl.load(clip_idx + o_row)
    b_line = b_index // grid_w
    b_frame = b_line // grid_h
    column = (b_index - b_line * grid_w).to(tl.int64) * RUN
    line = (b_line - b_frame * grid_h).to(tl.int64) * H
    return b_clip.to(tl.int64) * s_clip + b_frame.to(tl.int64) * T * s_frame + line * s_line + column * s_value


# Statistics are per channel. The values of a piece fall into C classes, such that those of one class in one chunk are
# all of one channel. Values are summed by class, and only a chunk's sums are assigned to channels. In planar clips the
# class is the channel. In channels-last clips, where the compiler knows the class of each value of a chunk, the channel
# is (class + index of the chunk's first value) % C.


@triton.jit
def class_sums(b_piece, classes, channels, C: tl.constexpr, PIECES: tl.constexpr):
    """The sum over each tubelet of the values of each channel: C times [BLOCK_M]."""
    b_class = ()
    for a in tl.static_range(C):
        b_sum = tl.sum(tl.where(classes[0] == a, b_piece[0], -0.0), axis=2)  # x + -0.0 is x, which the compiler knows
        for piece in tl.static_range(1, PIECES):
            b_sum += tl.sum(tl.where(classes[piece] == a, b_piece[piece], -0.0), axis=2)
        b_class = b_class + (b_sum,)
    b_channel = ()
    for c in tl.static_range(C):
        # [BLOCK_M, ROWS]
        b_sum = tl.where(channels[0] == c, b_class[0], 0.0)  # type: ignore[misc]
        for a in tl.static_range(1, C):
            b_sum += tl.where(channels[a] == c, b_class[a], 0.0)
        b_channel = b_channel + (tl.sum(b_sum, axis=1),)
    return b_channel


@triton.jit
def of_classes(b_channel, channels, C: tl.constexpr):
    """From numbers by channel, C times [BLOCK_M], to numbers by class, C times [BLOCK_M, ROWS]."""
    b_class = ()
    for a in tl.static_range(C):
        b_value = b_channel[0][:, None]
        for c in tl.static_range(1, C):
            b_value = tl.where(channels[a] == c, b_channel[c][:, None], b_value)
        b_class = b_class + (b_value,)
    return b_class


@triton.jit
def of_values(b_class, o_class, C: tl.constexpr):
    """From numbers by class to one for each value of a piece."""
    b_value = b_class[0][:, :, None]
    for a in tl.static_range(1, C):
        b_value = tl.where(o_class == a, b_class[a][:, :, None], b_value)
    return b_value


@triton.jit
def masked_patch_loss_kernel(
    pixels, video, drop_idx, clip_idx, grad, out,
    count, per_clip, grid_h, grid_w, factor, s_row, s_drop_clip, s_drop,
    s_clip, s_channel, s_frame, s_line, s_value, SCALE: tl.constexpr, SHIFT: tl.constexpr, NORMALIZE: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The loss of BLOCK_M tubelets, to the program's slot in ``out``; with ``grad`` the gradient of their pixels."""
    RUN: tl.constexpr = W * C if CHANNELS_LAST else W
    AREA: tl.constexpr = T * H * W // WIDTH  # chunks of a channel of a planar clip
    CHUNKS: tl.constexpr = T * H * W * C // WIDTH
    # Whether the mean is exact: a sum of 2^n bytes that fits into the 24 bits of float32.
    EXACT: tl.constexpr = video.dtype.element_ty == tl.uint8 and T * H * W <= 65536 and T * H * W & (T * H * W - 1) == 0
    PIECES: tl.constexpr = (CHUNKS + ROWS - 1) // ROWS
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < count
    o_row = tl.minimum(o_row, count - 1)
    p_row = pixels + (o_row.to(tl.int64) * s_row)[:, None, None]
    o_x = tl.arange(0, WIDTH)
    o_values = (tl.arange(0, ROWS) * WIDTH)[:, None] + o_x[None, :]
    # One item for each piece, [BLOCK_M, ROWS, WIDTH].
    o_pixel, m_piece, classes, b_pixel, b_video = (), (), (), (), ()
    for piece in tl.static_range(PIECES):
        o_chunk = piece * ROWS + tl.arange(0, ROWS)
        if CHANNELS_LAST:
            o_piece = o_values.to(tl.int64) + piece * ROWS * WIDTH
            o_class = ((piece * ROWS * WIDTH + o_x) % C)[None, None, :]
        else:
            channel = o_chunk // AREA
            o_piece = ((o_chunk % AREA * WIDTH)[:, None] + o_x[None, :]) * C + channel[:, None]
            o_class = channel[None, :, None]
        m_chunk = (o_chunk < CHUNKS)[None, :, None]
        o_pixel, m_piece, classes = o_pixel + (o_piece[None, :, :],), m_piece + (m_chunk,), classes + (o_class,)
        b_pixel = b_pixel + (tl.load(p_row + o_pixel[piece], mask=m_chunk, other=0.0),)
    tl.debug_barrier()  # otherwise the compiler delays these loads until the target is computed
    first = tubelet(
        drop_idx, clip_idx, o_row, per_clip, grid_h, grid_w, s_drop_clip, s_drop, s_clip, s_frame, s_line, s_value,
        T, H, RUN,
    )  # fmt: skip
    p_first = video + first[:, None]
    for piece in tl.static_range(PIECES):
        o_chunk = piece * ROWS + tl.arange(0, ROWS)
        line = o_chunk // (RUN // WIDTH)
        o_line = (line // H % T).to(tl.int64) * s_frame + (line % H).to(tl.int64) * s_line
        if not CHANNELS_LAST:
            o_line += (o_chunk // AREA).to(tl.int64) * s_channel
        o_run = (o_chunk % (RUN // WIDTH) * WIDTH)[:, None] + o_x[None, :]
        o_video = (o_line[:, None] + o_run.to(tl.int64) * s_value)[None, :, :]
        b_video = b_video + (tl.load(p_first[:, :, None] + o_video, mask=m_piece[piece], other=0),)
    channels, b_first = (), ()  # by class, [1, ROWS] and [BLOCK_M, ROWS]
    for a in tl.static_range(C):
        o_channel = (tl.arange(0, ROWS) * WIDTH + a) % C if CHANNELS_LAST else tl.full((ROWS,), a, tl.int32)
        channels = channels + (o_channel[None, :],)
        if NORMALIZE and not EXACT:
            b_first = b_first + (tl.load(p_first + channels[a].to(tl.int64) * s_channel).to(tl.float32),)

    b_target = ()
    if NORMALIZE:
        # Subtracting the first pixel makes a flat patch exactly zero and removes any constant added to the channel. The
        # squares are of differences from the mean, accurate whatever the first pixel is; the target needs them anyway.
        b_seen, b_centred, b_square, b_slope = (), (), (), ()
        for piece in tl.static_range(PIECES):
            b_value = b_video[piece].to(tl.float32)  # type: ignore[var-annotated]
            if not EXACT:
                b_value = tl.where(m_piece[piece], b_value - of_values(b_first, classes[piece], C), 0.0)
            b_seen = b_seen + (b_value,)
        b_sum, b_mean = class_sums(b_seen, classes, channels, C, PIECES), ()
        for c in tl.static_range(C):
            b_mean = b_mean + (b_sum[c] / (T * H * W),)
        b_mean = of_classes(b_mean, channels, C)
        for piece in tl.static_range(PIECES):
            b_value = tl.where(m_piece[piece], b_seen[piece] - of_values(b_mean, classes[piece], C), 0.0)
            b_centred, b_square = b_centred + (b_value,), b_square + (b_value * b_value,)
        b_square = class_sums(b_square, classes, channels, C, PIECES)
        for c in tl.static_range(C):
            b_deviation = tl.sqrt(b_square[c] / (T * H * W - 1)) * SCALE[c]
            b_slope = b_slope + (SCALE[c] / (b_deviation + 1e-6),)
        b_slope = of_classes(b_slope, channels, C)
        for piece in tl.static_range(PIECES):
            b_target = b_target + (b_centred[piece] * of_values(b_slope, classes[piece], C),)
    else:
        b_slope, b_shift = (), ()
        for a in tl.static_range(C):
            b_slope = b_slope + (of_channel(SCALE, channels[a], C),)
            b_shift = b_shift + (of_channel(SHIFT, channels[a], C),)
        for piece in tl.static_range(PIECES):
            b_value = b_video[piece].to(tl.float32) * of_values(b_slope, classes[piece], C)
            b_target = b_target + (b_value + of_values(b_shift, classes[piece], C),)

    factor = tl.cast(factor, tl.float32)  # inductor hands floats over as float64
    if grad is None:
        b_square = tl.zeros((BLOCK_M, ROWS, WIDTH), dtype=tl.float32)
        for piece in tl.static_range(PIECES):
            b_error = tl.where(m_piece[piece], b_pixel[piece].to(tl.float32) - b_target[piece], 0.0)
            b_square += b_error * b_error
        b_loss = tl.where(m_row, tl.sum(tl.sum(b_square, axis=2), axis=1), 0.0)
        tl.store(out + tl.program_id(0), tl.sum(b_loss, axis=0) * factor)
    else:
        factor *= tl.load(grad).to(tl.float32)
        p_out = out + (o_row.to(tl.int64) * (T * H * W * C))[:, None, None]
        for piece in tl.static_range(PIECES):
            b_error = (b_pixel[piece].to(tl.float32) - b_target[piece]) * factor
            m_error = m_row[:, None, None] & m_piece[piece]
            tl.store(p_out + o_pixel[piece], b_error.to(out.dtype.element_ty), mask=m_error)


@triton.jit
def masked_patch_loss_sum_kernel(part, out, count, BLOCK_N: tl.constexpr):
    """One program adds up all parts, in a fixed order."""
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, count, BLOCK_N):
        o_part = first + tl.arange(0, BLOCK_N)
        b_sum += tl.load(part + o_part, mask=o_part < count, other=0.0)
    tl.store(out, tl.sum(b_sum))


def config(arch: str, dtype: torch.dtype, *, backward: bool, values: int, channels_last: bool) -> LaunchConfig:
    """``block_m`` tubelets of ``values`` values each. Compiled clean, not measured.

    One warp for 2048 values: its sums need no shared memory and wait for no other warp. (H200, Triton 3.6, bc236cf, the
    kernel before this one: 144 us with 1 warp, 210 with 4, each of which repeated the index arithmetic.)
    """
    if arch == "interpreter":
        return LaunchConfig(16)  # fewer programs, one after the other
    # sm_100: with fewer warps some calls have 8 to 32 bytes of stack.
    warps = block(triton.cdiv(values, 2048)) * (8 if arch == "sm_100" else 1)
    return LaunchConfig(1, num_warps=min(8, warps))


def config_sum(arch: str, dtype: torch.dtype) -> LaunchConfig:
    """``block_n`` parts at a time, in one program: 32 for each thread. Compiled clean, not measured."""
    return LaunchConfig(1, 32768, num_warps=32)


def outputs(
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    clip_idx: Tensor | None,
    patch_size: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    normalize: bool,
) -> Tensor:
    """A float32 scalar."""
    return torch.empty((), dtype=torch.float32, device=pixels.device)


def _launch(name: str, *inputs: Any, backward: bool) -> Launch:
    pixels, video, drop_idx, clip_idx, (t, h, w), mean, std, normalize = inputs
    channels, count, s_drop = video.shape[1], drop_idx.numel(), (*drop_idx.stride(), 0)
    per_clip = 1
    if clip_idx is None:
        per_clip, s_drop = drop_idx.shape[1], drop_idx.stride()
    s_row, copied = rows(pixels)
    scale, shift = (1.0,) * channels, (0.0,) * channels
    if video.dtype == torch.uint8:
        scale = (1 / 255,) * channels
    elif mean is not None and std is not None:
        scale, shift = tuple(std), tuple(mean)
    values, (*s_video, s_value) = t * h * w * channels, video.stride()
    channels_last = video.stride(1) == 1 and s_value == channels
    run, size = w, video.element_size()
    if channels_last:
        run, size, s_value = w * channels, min(size, pixels.element_size()), 1
    choice = choose(name, config, pixels, backward=backward, values=values, channels_last=channels_last)
    tile = choice.config
    # 16 bytes, or the greatest power of two that divides a line.
    width = min(16 // size, run & -run)
    # One chunk for each thread; more where there would be over 32 pieces, too many to compile.
    piece_rows = max(32 * max(1, tile.num_warps // tile.block_m), block(triton.cdiv(values // width, 32)))
    return Launch(
        masked_patch_loss_kernel, (triton.cdiv(count, tile.block_m),),
        (count, per_clip, video.shape[3] // h, video.shape[4] // w, (2 if backward else 1) / pixels.numel(),
         s_row, *s_drop, *s_video, s_value),
        choice, (copied, False, False, scattered(clip_idx)),
        SCALE=scale, SHIFT=shift, NORMALIZE=normalize, C=channels, T=t, H=h, W=w, CHANNELS_LAST=channels_last,
        ROWS=piece_rows, WIDTH=width,
    )  # fmt: skip


def forward(*inputs: Any) -> Run:
    """The mean squared error, for the inputs of `outputs`."""
    pixels, options = inputs[0], inputs[4:]
    if pixels.numel() == 0:
        return lambda *tensors: outputs(*tensors, *options).zero_()
    launch = _launch("masked_patch_loss_forward", *inputs, backward=False)
    (count,) = launch.grid
    choice = choose("masked_patch_loss_sum", config_sum, pixels)
    add = Launch(masked_patch_loss_sum_kernel, (1,), (count,), choice, BLOCK_N=min(choice.config.block_n, block(count)))

    loss, parts = (like(shape, torch.float32, pixels.device) for shape in ((), (count,)))

    def run(*tensors: Any) -> Tensor:
        out, part = torch.empty_like(loss), torch.empty_like(parts, memory_format=DENSE)
        launch(*tensors, None, part)
        add(part, out)
        return out

    return run


def gradients(grad, pixels, video, drop_idx, clip_idx, *options: Any) -> tuple[Tensor]:
    """Memory for the gradient of pixels."""
    return (torch.empty_like(pixels, memory_format=DENSE),)


def backward(*inputs: Any) -> Run:
    """Recomputes the target, for the inputs of `gradients`; ``grad`` is read on the device."""
    pixels, options = inputs[1], inputs[5:]
    if pixels.numel() == 0:
        return lambda *operands: gradients(*operands, *options)
    launch = _launch("masked_patch_loss_backward", *inputs[1:-1], backward=True)

    def run(grad: Tensor, *tensors: Any) -> tuple[Tensor]:
        results = gradients(grad, *tensors, *options)
        launch(*tensors, grad, *results)
        return results

    return run


masked_patch_loss = Op(
    "masked_patch_loss",
    outputs=outputs,
    forward=forward,
    gradients=gradients,
    backward=backward,
    differentiable=("pixels",),
    opaque=("backward",),
)
