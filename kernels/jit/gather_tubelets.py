"""The visible tubelets of clips as the rows of a matrix, an operand of gather_patch_embed's products."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DENSE, Launch, LaunchConfig, block, choose, like, scattered
from .tubelets import Channels, layout_of, normalisation, of_channel, offset_in_tubelet, tubelet_start


@triton.jit
def of_value(VALUES: tl.constexpr, o_k, CHANNELS_LAST: tl.constexpr, C: tl.constexpr, AREA: tl.constexpr,
             VECTOR: tl.constexpr):  # fmt: skip
    """The number for each value's channel: looked up once for a vector's first value; its neighbours follow in turn."""
    if CHANNELS_LAST:
        first = o_k // VECTOR * VECTOR % C
        b_value = of_channel(VALUES, first, C)
        for c in tl.static_range(1, C):
            b_value = tl.where(o_k % VECTOR % C == c, of_channel(VALUES, (first + c) % C, C), b_value)
        return b_value
    return of_channel(VALUES, o_k // VECTOR // (AREA // VECTOR), C)


@triton.jit
def gather_tubelets_kernel(
    video, index, clip_idx, out, rows, per_clip, grid_rows, grid_columns, s_clip, s_channel, s_frame, s_line,
    T: tl.constexpr, H: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, K: tl.constexpr,
    SLOPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS_LAST: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    _, start = tubelet_start(
        index, clip_idx, o_row, rows, per_clip, grid_rows, grid_columns, s_clip, s_frame, s_line, T, H, RUN, VECTOR
    )
    for k in range(0, K, BLOCK_N):
        o_k = k + tl.arange(0, BLOCK_N)
        m_k = o_k < K
        p_video = (
            video + start[:, None] + offset_in_tubelet(o_k, s_channel, s_frame, s_line, T, H, RUN, VECTOR)[None, :]
        )
        # [BLOCK_M, BLOCK_N]
        b_video = tl.load(p_video) if K % BLOCK_N == 0 else tl.load(p_video, mask=m_k[None, :], other=0)
        if video.dtype.element_ty == tl.uint8:
            b_slope = of_value(SLOPE, o_k, CHANNELS_LAST, C, K // C, VECTOR)
            b_offset = of_value(OFFSET, o_k, CHANNELS_LAST, C, K // C, VECTOR)
            b_video = b_video.to(tl.float32) * b_slope[None, :] - b_offset[None, :]
        p_out = out + o_row.to(tl.int64)[:, None] * K + o_k[None, :]
        tl.store(p_out, b_video.to(out.dtype.element_ty), mask=(o_row < rows)[:, None] & m_k[None, :])


def config(arch: str, dtype: torch.dtype) -> LaunchConfig:
    """``block_m`` tubelets, ``block_n`` values at a time: 16 for each thread, at most 40 registers. Compiled clean, not
    measured: a prototype took 53 us for 25088 uint8 tubelets of 1536 values (H200, Triton 3.6, bc236cf)."""
    return LaunchConfig(4, 512)


def gather_tubelets(
    video, keep_idx, clip_idx, weight, dtype: torch.dtype, mean: Channels, std: Channels
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A function (video, keep_idx, clip_idx) -> (M, K) in ``dtype``, values in the clip's order (see `ClipLayout`).

    uint8 pixels are divided by 255 and normalised in float32; arguments are those of
    `mar_fast.kernels.gather_patch_embed`.
    """
    _, channels, t, h, w = weight.shape
    count, values = keep_idx.numel(), channels * t * h * w
    layout, copied = layout_of(video, (t, h, w))
    slope, offset = normalisation(mean, std, channels, zero=0)
    choice = choose("gather_tubelets", config, video, dtype)
    tile = choice.config
    launch = Launch(
        gather_tubelets_kernel, (triton.cdiv(count, tile.block_m),),
        (count, keep_idx.shape[-1], video.shape[3] // h, video.shape[4] // w, *layout.strides), choice,
        (False, scattered(keep_idx), scattered(clip_idx)),
        T=t, H=h, RUN=layout.run, VECTOR=layout.vector, K=values,
        SLOPE=slope, OFFSET=offset, CHANNELS_LAST=layout.channels_last, C=channels,
        BLOCK_N=min(tile.block_n, block(values)),
    )  # fmt: skip
    made = like((count, values), dtype, video.device)

    def run(video: Tensor, keep_idx: Tensor, clip_idx: Tensor | None) -> Tensor:
        patches = torch.empty_like(made, memory_format=DENSE)
        if copied:
            video = video.clone(memory_format=torch.contiguous_format)
        launch(video, keep_idx, clip_idx, patches)
        return patches

    return run
