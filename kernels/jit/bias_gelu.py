"""bias_gelu in Triton. M rows, N columns; statistics and sums in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_config import launch_config
from .launch import as_rows, launch


@triton.jit
def gelu_parts(x):
    """Cdf and density of the standard normal distribution at x: GELU is x * cdf, its derivative cdf + x * density."""
    cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return cdf, density


@triton.jit
def forward_kernel(x, bias, out, rows, columns, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    m_tile = (o_row < rows)[:, None] & m_column[None, :]
    # [BLOCK_M, BLOCK_N]
    b_x = tl.load(x + o_row[:, None] * stride + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_x += tl.load(bias + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    cdf, _ = gelu_parts(b_x)
    tl.store(out + o_row[:, None] * columns + o_column[None, :], (b_x * cdf).to(out.dtype.element_ty), mask=m_tile)


@triton.jit
def backward_kernel(
    grad, x, bias, grad_x, bias_part, rows, columns, grad_stride, stride, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program walks ``tiles`` row tiles of one column tile and leaves their bias gradient in its row of
    ``bias_part``: the parts are summed in a fixed order afterwards, so the result is the same every time."""
    program = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    b_bias = tl.load(bias + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for tile in range(tiles):
        o_row = (program * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_tile = (o_row < rows)[:, None] & m_column[None, :]
        # [BLOCK_M, BLOCK_N]
        b_x = tl.load(x + o_row[:, None] * stride + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32) + b_bias
        b_grad = tl.load(grad + o_row[:, None] * grad_stride + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
        cdf, density = gelu_parts(b_x)
        b_grad = b_grad * (cdf + b_x * density)
        tl.store(grad_x + o_row[:, None] * columns + o_column[None, :], b_grad.to(grad_x.dtype.element_ty), mask=m_tile)
        b_sum += tl.sum(b_grad, axis=0)
    tl.store(bias_part + program * columns + o_column, b_sum, mask=m_column)


# Enough programs to fill a large GPU; each leaves one row of partial sums.
ROW_PROGRAMS = 256


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias); shapes as in `mar_fast.kernels.bias_gelu`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = as_rows(x)
    rows, columns = x.shape
    config = launch_config("bias_gelu.forward", x)
    grid = (triton.cdiv(rows, config.block_m), triton.cdiv(columns, config.block_n))
    arguments = (x, bias.contiguous(), out, rows, columns, x.stride(0))
    launch("bias_gelu.forward", forward_kernel, grid, arguments, config, BLOCK_M=config.block_m, BLOCK_N=config.block_n)
    return out


def backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of bias, in one pass over x and grad."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if grad_x.numel() == 0:
        return grad_x, torch.zeros_like(bias)
    x, grad = as_rows(x), as_rows(grad)
    rows, columns = x.shape
    config = launch_config("bias_gelu.backward", x)
    row_tiles = triton.cdiv(rows, config.block_m)
    tiles = triton.cdiv(row_tiles, ROW_PROGRAMS)
    programs = triton.cdiv(row_tiles, tiles)
    bias_part = torch.empty((programs, columns), dtype=torch.float32, device=x.device)
    launch(
        "bias_gelu.backward", backward_kernel, (programs, triton.cdiv(columns, config.block_n)),
        (grad, x, bias.contiguous(), grad_x, bias_part, rows, columns, grad.stride(0), x.stride(0), tiles),
        config, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
    )  # fmt: skip
    return grad_x, bias_part.sum(0).to(bias.dtype)
