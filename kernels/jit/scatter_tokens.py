"""scatter_tokens in Triton: B clips, L places in the grid, N of them visible, D columns; sums in float32."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_config import LaunchConfig, launch_config
from .launch import as_rows, block, launch


@triton.jit
def find(keep_row, first, o_place, count, keep_stride, SAMPLES: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr):
    """Which token of a clip each of the places ``first``, first + 1, ... holds: -1 where none is visible.

    The visible places are sorted, so those of a tile lie side by side, and every STEP-th of them tells where: two
    loads one after the other, where a binary search has ten, and no table from places to tokens to be written first.
    """
    o_sample = tl.arange(0, SAMPLES) * STEP
    b_sample = tl.load(keep_row + o_sample.to(tl.int64) * keep_stride, mask=o_sample < count, other=0).to(tl.int32)
    b_passed = tl.sum(((o_sample < count) & (b_sample < first)).to(tl.int32), axis=0)
    # The first sample not below the tile, or the STEP before it, is where the window begins.
    o_token = tl.maximum(b_passed - 1, 0) * STEP + tl.arange(0, WINDOW)
    b_place = tl.load(keep_row + o_token.to(tl.int64) * keep_stride, mask=o_token < count, other=-1).to(tl.int32)
    # [BLOCK_M, WINDOW]
    return tl.max(tl.where(o_place[:, None] == b_place[None, :], o_token[None, :], -1), axis=1)


@triton.jit
def forward_kernel(
    visible, keep_idx, mask_token, pos_embed, out,
    places, count, columns, place_tiles, visible_stride, keep_stride_b, keep_stride_n, pos_stride,
    SAMPLES: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    clip = (tl.program_id(0) // place_tiles).to(tl.int64)
    first = tl.program_id(0) % place_tiles * BLOCK_M
    o_place = first + tl.arange(0, BLOCK_M)
    o_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_place = o_place < places
    m_column = o_column < columns
    m_tile = m_place[:, None] & m_column[None, :]
    o_token = find(keep_idx + clip * keep_stride_b, first, o_place, count, keep_stride_n, SAMPLES, STEP, WINDOW)
    m_visible = o_token >= 0
    p_visible = visible + (clip * count + o_token)[:, None] * visible_stride + o_column[None, :]
    # [BLOCK_M, BLOCK_N]
    b_visible = tl.load(p_visible, mask=m_visible[:, None] & m_tile, other=0.0).to(tl.float32)
    b_mask_token = tl.load(mask_token + o_column, mask=m_column, other=0.0).to(tl.float32)
    p_pos = pos_embed + o_place.to(tl.int64)[:, None] * pos_stride + o_column[None, :]
    b_out = tl.load(p_pos, mask=m_tile, other=0.0).to(tl.float32)
    b_out += tl.where(m_visible[:, None], b_visible, b_mask_token[None, :])
    p_out = out + (clip * places + o_place)[:, None] * columns + o_column[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_tile)


@triton.jit
def backward_kernel(
    grad, keep_idx, grad_visible, mask_part, pos_part,
    batch, places, count, columns, clips, grad_stride, keep_stride_b, keep_stride_n,
    SAMPLES: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program walks over ``clips`` clips with one tile of places. What it sums over them goes to rows of its own
    in the parts, and these are summed in a fixed order afterwards. A result that nobody wants is None."""
    group = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_M
    o_place = first + tl.arange(0, BLOCK_M)
    o_column = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    b_mask_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_pos_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(clips):
        clip = group * clips + step
        # Beyond the last clip there are no places and nothing is looked up.
        m_clip = (o_place < tl.where(clip < batch, places, 0))[:, None] & m_column[None, :]
        here = tl.where(clip < batch, count, 0)
        o_token = find(keep_idx + clip * keep_stride_b, first, o_place, here, keep_stride_n, SAMPLES, STEP, WINDOW)
        m_visible = o_token >= 0
        if mask_part is None and pos_part is None:
            m_clip = m_clip & m_visible[:, None]
        p_grad = grad + (clip * places + o_place)[:, None] * grad_stride + o_column[None, :]
        # [BLOCK_M, BLOCK_N]
        b_grad = tl.load(p_grad, mask=m_clip, other=0.0)
        if grad_visible is not None:
            p_visible = grad_visible + (clip * count + o_token)[:, None] * columns + o_column[None, :]
            tl.store(p_visible, b_grad.to(grad_visible.dtype.element_ty), mask=m_clip & m_visible[:, None])
        b_wide = b_grad.to(tl.float32)
        if mask_part is not None:
            b_mask_sum += tl.sum(tl.where(m_visible[:, None], 0.0, b_wide), axis=0)
        if pos_part is not None:
            b_pos_sum += b_wide
    if mask_part is not None:
        o_part = group * tl.num_programs(1) + tl.program_id(1)
        tl.store(mask_part + o_part * columns + o_column, b_mask_sum, mask=m_column)
    if pos_part is not None:
        p_pos = pos_part + (group * places + o_place)[:, None] * columns + o_column[None, :]
        tl.store(p_pos, b_pos_sum, mask=(o_place < places)[:, None] & m_column[None, :])


# Clips that one program of backward walks over: few keep a GPU full, more leave fewer partial sums of positions.
CLIPS = 2
CLIPS_WITH_POSITIONS = 8
# Of how many visible places one is looked at to find a tile's.
STEP = 32


def _search(count: int, config: LaunchConfig) -> dict[str, int]:
    return dict(SAMPLES=block(triton.cdiv(count, STEP)), STEP=STEP, WINDOW=block(STEP + config.block_m))


def forward(visible: Tensor, keep_idx: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    """The whole sequence; shapes as in `mar_fast.kernels.scatter_tokens`."""
    batch, count, columns = visible.shape
    places = pos_embed.shape[0]
    out = torch.empty((batch, places, columns), dtype=visible.dtype, device=visible.device)
    if out.numel() == 0:
        return out
    visible, pos_embed = as_rows(visible), as_rows(pos_embed)
    config = launch_config("scatter_tokens.forward", visible, width=columns)
    place_tiles = triton.cdiv(places, config.block_m)
    launch(
        "scatter_tokens.forward", forward_kernel, (batch * place_tiles, triton.cdiv(columns, config.block_n)),
        (visible, keep_idx, mask_token.contiguous(), pos_embed, out, places, count, columns, place_tiles,
         visible.stride(0), *keep_idx.stride(), pos_embed.stride(0)),
        config, **_search(count, config), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    keep_idx: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of visible, mask_token and pos_embed, in one pass over grad; an empty vector for what is not needed."""
    (batch, count), (_, places, columns), device = keep_idx.shape, grad.shape, grad.device
    shapes = ((batch, count, columns), (columns,), (places, columns))
    if grad.numel() == 0 or not any(needs):
        results = (
            torch.zeros(shape if need else (0,), dtype=dtype, device=device)
            for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
        )
        of_visible, of_mask_token, of_pos_embed = results
        return of_visible, of_mask_token, of_pos_embed
    grad = as_rows(grad)
    config = launch_config("scatter_tokens.backward", grad, width=columns, positions=int(needs[2]))
    clips = min(batch, CLIPS_WITH_POSITIONS if needs[2] else CLIPS)
    groups, place_tiles = triton.cdiv(batch, clips), triton.cdiv(places, config.block_m)
    part_shapes = (shapes[0], (groups * place_tiles, columns), (groups, places, columns))
    part_dtypes = (dtypes[0], torch.float32, torch.float32)
    parts = [
        torch.empty(shape, dtype=dtype, device=device) if need else None
        for shape, dtype, need in zip(part_shapes, part_dtypes, needs, strict=True)
    ]
    launch(
        "scatter_tokens.backward", backward_kernel,
        (groups, place_tiles, triton.cdiv(columns, config.block_n)),
        (grad, keep_idx, *parts, batch, places, count, columns, clips, grad.stride(0), *keep_idx.stride()),
        config, **_search(count, config), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
    )  # fmt: skip
    of_visible, of_mask_token, of_pos_embed = (
        torch.empty((0,), dtype=dtype, device=device) if part is None else part
        for part, dtype in zip(parts, dtypes, strict=True)
    )
    if needs[1]:
        of_mask_token = of_mask_token.sum(0).to(dtypes[1])
    if needs[2]:
        of_pos_embed = of_pos_embed.sum(0).to(dtypes[2])
    return of_visible, of_mask_token, of_pos_embed
