"""scatter_tokens in Triton: B clips, L positions in the grid, N of them visible, D columns; sums in float32."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DENSE, TUNED, Launch, LaunchConfig, block, choose, rows, scattered
from .op import Op, Results, Run
from .sum_parts import sum_parts


@triton.jit
def find(
    keep_row, first, o_position, count, keep_stride, SAMPLES: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr
):
    """The visible token at each of the positions ``first``, first + 1, ... of a clip: -1 for none.

    Visible positions are sorted, so those of a tile are neighbours in ``keep_row``; every STEP-th of all is loaded to
    find where. These are two dependent loads; a binary search has ten. No table from positions to tokens is needed.
    """
    o_sample = tl.arange(0, SAMPLES) * STEP
    b_sample = tl.load(keep_row + o_sample.to(tl.int64) * keep_stride, mask=o_sample < count, other=0).to(tl.int32)
    b_passed = tl.sum(((o_sample < count) & (b_sample < first)).to(tl.int32), axis=0)
    # The window begins at the last sample below the tile, or at the first token if there is none.
    o_token = tl.maximum(b_passed - 1, 0) * STEP + tl.arange(0, WINDOW)
    b_position = tl.load(keep_row + o_token.to(tl.int64) * keep_stride, mask=o_token < count, other=-1).to(tl.int32)
    # [BLOCK_M, WINDOW]
    return tl.max(tl.where(o_position[:, None] == b_position[None, :], o_token[None, :], -1), axis=1)


@triton.jit
def tokens_of(clip, keep_idx, cu_seqlens, batch, count, keep_stride_b, keep_stride_n):
    """Where a clip's part of ``keep_idx`` begins, its first visible token, and how many it has."""
    if cu_seqlens is None:
        first = clip * count
        row = keep_idx + clip * keep_stride_b
    else:
        first = tl.load(cu_seqlens + clip, mask=clip < batch, other=0).to(tl.int64)
        row = keep_idx + first * keep_stride_n
        count = tl.load(cu_seqlens + clip + 1, mask=clip < batch, other=0).to(tl.int32) - first.to(tl.int32)
    return row, first, count


@triton.jit
def scatter_tokens_forward_kernel(
    visible, keep_idx, mask_token, pos_embed, cu_seqlens, out,
    length, count, columns, tiles, visible_stride, keep_stride_b, keep_stride_n, pos_stride,
    SAMPLES: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_M
    o_position = first + tl.arange(0, BLOCK_M)
    o_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_position = o_position < length
    m_column = o_column < columns
    m_tile = m_position[:, None] & m_column[None, :]
    batch = tl.num_programs(0) // tiles
    row, token, here = tokens_of(clip, keep_idx, cu_seqlens, batch, count, keep_stride_b, keep_stride_n)
    o_token = find(row, first, o_position, here, keep_stride_n, SAMPLES, STEP, WINDOW)
    m_visible = o_token >= 0
    p_visible = visible + (token + o_token)[:, None] * visible_stride + o_column[None, :]
    # [BLOCK_M, BLOCK_N]
    b_visible = tl.load(p_visible, mask=m_visible[:, None] & m_tile, other=0.0).to(tl.float32)
    b_mask_token = tl.load(mask_token + o_column, mask=m_column, other=0.0).to(tl.float32)
    p_pos = pos_embed + o_position.to(tl.int64)[:, None] * pos_stride + o_column[None, :]
    b_out = tl.load(p_pos, mask=m_tile, other=0.0).to(tl.float32)
    b_out += tl.where(m_visible[:, None], b_visible, b_mask_token[None, :])
    p_out = out + (clip * length + o_position)[:, None] * columns + o_column[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_tile)


@triton.jit
def scatter_tokens_backward_kernel(
    grad, keep_idx, cu_seqlens, grad_visible, mask_part, pos_part,
    batch, length, count, columns, clips, grad_stride, keep_stride_b, keep_stride_n,
    SAMPLES: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes one tile of positions through ``clips`` clips. Its sums go to rows of its own in the parts, which
    are added up in a fixed order afterwards. A result that is not wanted is None."""
    group = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_M
    o_position = first + tl.arange(0, BLOCK_M)
    o_column = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    b_mask_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_pos_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(clips):
        clip = group * clips + step
        # Beyond the last clip nothing is loaded.
        m_clip = (o_position < tl.where(clip < batch, length, 0))[:, None] & m_column[None, :]
        row, token, here = tokens_of(clip, keep_idx, cu_seqlens, batch, count, keep_stride_b, keep_stride_n)
        here = tl.where(clip < batch, here, 0)
        o_token = find(row, first, o_position, here, keep_stride_n, SAMPLES, STEP, WINDOW)
        m_visible = o_token >= 0
        if mask_part is None and pos_part is None:
            m_clip = m_clip & m_visible[:, None]
        p_grad = grad + (clip * length + o_position)[:, None] * grad_stride + o_column[None, :]
        # [BLOCK_M, BLOCK_N]
        b_grad = tl.load(p_grad, mask=m_clip, other=0.0)
        if grad_visible is not None:
            p_visible = grad_visible + (token + o_token)[:, None] * columns + o_column[None, :]
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
        p_pos = pos_part + (group * length + o_position)[:, None] * columns + o_column[None, :]
        tl.store(
            p_pos, b_pos_sum.to(pos_part.dtype.element_ty), mask=(o_position < length)[:, None] & m_column[None, :]
        )


# Clips that one program of backward goes through: few keep a GPU busy, more leave fewer partial sums of positions.
CLIPS = 2
CLIPS_WITH_POSITIONS = 8
# `find` looks at every STEP-th visible token of a clip.
STEP = 32


def config_forward(arch: str, dtype: torch.dtype, *, columns: int) -> LaunchConfig:
    """``block_m`` positions by ``block_n`` columns. Compiled clean by Triton 3.6 and 3.9, not measured."""
    wide = arch in TUNED and 256 < columns <= 1024  # at most 80 registers, else 64
    return LaunchConfig(8, 512) if wide else LaunchConfig(16, 128)


def config_backward(arch: str, dtype: torch.dtype, *, columns: int, positions: bool) -> LaunchConfig:
    """As `config_forward`; ``positions``: their gradient is summed too, which takes a tile of registers."""
    if arch in TUNED and 256 < columns <= 1024:
        return LaunchConfig(8 if positions else 16, 512, num_warps=8)  # at most 118 registers, 107
    return LaunchConfig(16, 128)  # at most 94 registers


def _search(most: int, tile: LaunchConfig) -> dict[str, Any]:
    """Constants of `find`, for clips of at most ``most`` visible tokens."""
    return dict(SAMPLES=block(triton.cdiv(most, STEP)), STEP=STEP, WINDOW=block(STEP + tile.block_m))


def _visible(keep_idx: Tensor, cu_seqlens: Tensor | None, length: int) -> tuple[int, tuple[int, ...], int]:
    """Visible tokens of each clip, strides of keep_idx by clip and token, and the most that a clip may have."""
    if cu_seqlens is None:
        return keep_idx.shape[1], keep_idx.stride(), keep_idx.shape[1]
    return 0, (0, *keep_idx.stride()), length


def outputs(
    visible: Tensor, keep_idx: Tensor, mask_token: Tensor, pos_embed: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """(B, L, D) in visible's dtype."""
    batch = visible.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty((batch, *pos_embed.shape), dtype=visible.dtype, device=visible.device)


def forward(visible, keep_idx, mask_token, pos_embed, cu_seqlens) -> Run:
    """The whole sequence."""
    length, columns = pos_embed.shape
    batch = visible.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    count, keep_strides, most = _visible(keep_idx, cu_seqlens, length)
    if batch * length * columns == 0:
        return outputs
    (stride, copied), (pos_stride, pos_copied) = rows(visible), rows(pos_embed)
    choice = choose("scatter_tokens_forward", config_forward, visible, columns=columns)
    tile = choice.config
    tiles = triton.cdiv(length, tile.block_m)
    grid = (batch * tiles, triton.cdiv(columns, tile.block_n))
    numbers = (length, count, columns, tiles, stride, *keep_strides, pos_stride)
    copies = (copied, False, scattered(mask_token), pos_copied, scattered(cu_seqlens))
    launch = Launch(scatter_tokens_forward_kernel, grid, numbers, choice, copies, **_search(most, tile))

    def run(*tensors: Any) -> Tensor:
        out = outputs(*tensors)
        launch(*tensors, out)
        return out

    return run


def gradients(grad, keep_idx, mask_token, pos_embed, cu_seqlens, needs) -> Results:
    """Memory for the gradients of visible, mask_token and pos_embed."""
    device = grad.device
    return (
        torch.empty((*keep_idx.shape, grad.shape[2]), dtype=grad.dtype, device=device) if needs[0] else None,
        torch.empty_like(mask_token, memory_format=DENSE) if needs[1] else None,
        torch.empty_like(pos_embed, memory_format=DENSE) if needs[2] else None,
    )


def backward(grad, keep_idx, mask_token, pos_embed, cu_seqlens, needs) -> Run:
    """All gradients in one pass over grad."""
    batch, length, columns = grad.shape
    count, keep_strides, most = _visible(keep_idx, cu_seqlens, length)
    if grad.numel() == 0:
        return lambda *operands: [value if value is None else value.zero_() for value in gradients(*operands, needs)]
    stride, copied = rows(grad)
    choice = choose("scatter_tokens_backward", config_backward, grad, columns=columns, positions=needs[2])
    tile = choice.config
    clips = min(batch, CLIPS_WITH_POSITIONS if needs[2] else CLIPS)
    groups, tiles = triton.cdiv(batch, clips), triton.cdiv(length, tile.block_m)
    grid = (groups, tiles, triton.cdiv(columns, tile.block_n))
    numbers = (batch, length, count, columns, clips, stride, *keep_strides)
    copies = (copied, False, scattered(cu_seqlens))
    launch = Launch(scatter_tokens_backward_kernel, grid, numbers, choice, copies, **_search(most, tile))
    add_mask = sum_parts(grad, groups * tiles, columns) if needs[1] else None
    # A single group writes its sums into the gradient itself.
    add_pos = sum_parts(grad, groups, length * columns) if needs[2] and groups > 1 else None

    def run(grad, keep_idx, *rest: Any) -> Results:
        results = gradients(grad, keep_idx, *rest, needs)
        grad_visible, grad_mask, grad_pos = results
        device, mask_part, pos_part = grad.device, None, grad_pos
        if add_mask is not None:
            mask_part = torch.empty((groups * tiles, columns), dtype=torch.float32, device=device)
        if add_pos is not None:
            pos_part = torch.empty((groups, length, columns), dtype=torch.float32, device=device)
        launch(grad, keep_idx, rest[-1], grad_visible, mask_part, pos_part)
        if add_mask is not None:
            add_mask(mask_part, grad_mask)
        if add_pos is not None:
            add_pos(pos_part, grad_pos)
        return results

    return run


scatter_tokens = Op(
    "scatter_tokens",
    outputs=outputs,
    forward=forward,
    gradients=gradients,
    backward=backward,
    saves=lambda tensors, outputs: tensors[1:],
    differentiable=("visible", "mask_token", "pos_embed"),
    opaque=("backward",),
)
