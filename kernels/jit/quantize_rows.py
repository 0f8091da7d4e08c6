"""quantize_rows in Triton. A program holds whole rows of D columns."""

import math
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import INTERPRETING
from .launch import DENSE, Launch, LaunchConfig, block, choose, like, rows
from .op import Op, Run

E4M3 = torch.float8_e4m3fn


@triton.jit
def quantized(b_x):
    """b_x scaled into e4m3's range, [M, N] float32, and the rows' scales [M]; the caller casts to e4m3."""
    b_largest = tl.maximum(tl.max(tl.abs(b_x), axis=1), 7.888609052210118e-31)  # 2 ** -100
    return b_x * tl.div_rn(448.0, b_largest)[:, None], b_largest * (1.0 / 448.0)


@triton.jit
def quantize_rows_kernel(x, values, scale, rows, columns, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_N)
    m_row = o_row < rows
    m_tile = m_row[:, None] & (o_column < columns)[None, :]
    # [BLOCK_M, BLOCK_N]
    b_x = tl.load(x + o_row[:, None] * stride + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_values, b_scale = quantized(b_x)
    tl.store(values + o_row[:, None] * columns + o_column[None, :], b_values.to(values.dtype.element_ty), mask=m_tile)
    tl.store(scale + o_row, b_scale, mask=m_row)


def config(arch: str, dtype: torch.dtype, *, width: int) -> LaunchConfig:
    """``block_m`` rows, about 2048 values a program; longer rows get up to 16 warps. Compiled clean, not measured."""
    values = block(width)
    return LaunchConfig(max(1, 2048 // values), num_warps=max(4, min(16, values // 512)))


def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) in e4m3 and (..., 1) float32."""
    values = torch.empty_like(x, dtype=E4M3, memory_format=DENSE)
    return values, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def writer(x: Tensor) -> Callable[[Tensor, Callable[..., None]], tuple[Tensor, Tensor]]:
    """``write(x, launch)`` for tensors of x's shape: allocates `outputs`, has ``launch(values, scale)`` fill them."""
    scale_like = like((*x.shape[:-1], 1), torch.float32, x.device)

    def write(x: Tensor, launch: Callable[..., None]) -> tuple[Tensor, Tensor]:
        values = torch.empty_like(x, dtype=E4M3, memory_format=DENSE)
        scale = torch.empty_like(scale_like, memory_format=DENSE)
        if INTERPRETING and not values.is_meta:  # the interpreter's cast to e4m3 is wrong: PyTorch rounds
            wide = torch.empty_like(values, dtype=torch.float32)
            launch(wide, scale)
            values.copy_(wide)
        else:
            launch(values, scale)
        return values, scale

    return write


def forward(x: Tensor) -> Run:
    """Scales and rows in one pass."""
    if x.numel() == 0:
        return outputs
    columns = x.shape[-1]
    count, (stride, copied) = math.prod(x.shape[:-1]), rows(x)
    choice = choose("quantize_rows", config, x, width=columns)
    grid = (triton.cdiv(count, choice.config.block_m),)
    launch = Launch(quantize_rows_kernel, grid, (count, columns, stride), choice, (copied,), BLOCK_N=block(columns))
    write = writer(x)
    return lambda x: write(x, partial(launch, x))


quantize_rows = Op("quantize_rows", outputs=outputs, forward=forward)
