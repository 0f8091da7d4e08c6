"""bias_gelu in Triton. M rows, N columns; sums in float32."""

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import quantize_rows
from .gelu import gelu, gelu_derivative
from .launch import DENSE, Choice, Launch, LaunchConfig, block, choose, rows, scattered
from .op import Op, Run
from .quantize_rows import quantized
from .sum_parts import sum_parts


@triton.jit
def bias_gelu_forward_kernel(
    x, bias, out, scale, rows, columns, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    m_tile = (o_row < rows)[:, None] & m_column[None, :]
    # [BLOCK_M, BLOCK_N]
    b_x = tl.load(x + o_row[:, None] * stride + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_x += tl.load(bias + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    b_out = gelu(b_x, out.dtype.element_ty == tl.float32 and scale is None)
    if scale is not None:  # a tile has whole rows
        b_out, b_scale = quantized(b_out)
        tl.store(scale + o_row, b_scale, mask=o_row < rows)
    tl.store(out + o_row[:, None] * columns + o_column[None, :], b_out.to(out.dtype.element_ty), mask=m_tile)


@triton.jit
def bias_gelu_backward_kernel(
    grad, x, bias, grad_x, bias_part, out, rows, columns, grad_stride, stride, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program loops over ``tiles`` row tiles of one column tile and stores their bias gradient in its own row of
    ``bias_part``; another kernel adds these rows up in a fixed order, so the result has the same bits every time.
    ``out``, unless None, gets GELU(x + bias) again."""
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
        b_grad *= gelu_derivative(b_x, grad_x.dtype.element_ty == tl.float32)
        o_out = o_row[:, None] * columns + o_column[None, :]
        tl.store(grad_x + o_out, b_grad.to(grad_x.dtype.element_ty), mask=m_tile)
        if out is not None:
            b_out = gelu(b_x, out.dtype.element_ty == tl.float32)
            tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_tile)
        if bias_part is not None:
            b_sum += tl.sum(b_grad, axis=0)
    if bias_part is not None:
        tl.store(bias_part + program * columns + o_column, b_sum, mask=m_column)


# Enough programs to fill a large GPU; each stores one row of partial sums.
ROW_PROGRAMS = 256


def config(arch: str, dtype: torch.dtype, *, backward: bool) -> LaunchConfig:
    """``block_m`` rows by ``block_n`` columns."""
    if arch == "sm_90" and backward and dtype != torch.float32:
        # H200, Triton 3.6, bc236cf, with erf: 197 us, 16 x 256 took 261; values compared at 663e046.
        return LaunchConfig(32, 64)
    return LaunchConfig(16, 256)  # 4096 values a program; compiled clean, not measured


def outputs(x: Tensor, bias: Tensor) -> Tensor:
    """(..., D) in x's dtype."""
    return torch.empty_like(x, memory_format=DENSE)


def forward(x: Tensor, bias: Tensor) -> Run:
    """GELU(x + bias)."""
    if x.numel() == 0:
        return outputs
    launch = _forward_launch(choose("bias_gelu_forward", config, x, backward=False), x, bias)

    def run(x: Tensor, bias: Tensor) -> Tensor:
        out = outputs(x, bias)
        launch(x, bias, out, None)
        return out

    return run


def _forward_launch(choice: Choice, x: Tensor, bias: Tensor) -> Launch:
    columns, tile = x.shape[-1], choice.config
    count, (stride, copied) = x.numel() // columns, rows(x)
    wide = tile.block_n or block(columns)
    grid = (triton.cdiv(count, tile.block_m), triton.cdiv(columns, wide))
    copies = (copied, scattered(bias))
    return Launch(bias_gelu_forward_kernel, grid, (count, columns, stride), choice, copies, BLOCK_N=wide)


def outputs_of_rows(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) in e4m3 and (..., 1) float32."""
    return quantize_rows.outputs(x)


def forward_of_rows(x: Tensor, bias: Tensor) -> Run:
    """GELU(x + bias) and its scales in one pass."""
    if x.numel() == 0:
        return outputs_of_rows
    launch = _forward_launch(choose("bias_gelu_rows", quantize_rows.config, x, width=x.shape[-1]), x, bias)
    write = quantize_rows.writer(x)
    return lambda x, bias: write(x, partial(launch, x, bias))


def gradients(grad: Tensor, x: Tensor, bias: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor | None]:
    """Memory for the gradients of x, which is always written, and of bias."""
    return torch.empty_like(x, memory_format=DENSE), torch.empty_like(bias, memory_format=DENSE) if needs[1] else None


def backward(grad: Tensor, x: Tensor, bias: Tensor, needs: Sequence[bool]) -> Run:
    """Both gradients in one pass over x and grad."""
    run = backward_and_output(grad, x, bias, needs, again=False)
    return lambda grad, x, bias: run(grad, x, bias)[:2]


def backward_and_output(grad: Tensor, x: Tensor, bias: Tensor, needs: Sequence[bool], *, again: bool = True) -> Run:
    """`backward` whose ``run`` also returns the op's output, computed ``again``, or None."""
    if x.numel() == 0:
        return lambda grad, x, bias: (torch.zeros_like(x), torch.zeros_like(bias), torch.empty_like(x))
    columns = x.shape[-1]
    count, (stride, copied), (grad_stride, grad_copied) = x.numel() // columns, rows(x), rows(grad)
    choice = choose("bias_gelu_backward", config, x, backward=True)
    tile = choice.config
    row_tiles = triton.cdiv(count, tile.block_m)
    tiles = triton.cdiv(row_tiles, ROW_PROGRAMS)
    programs = triton.cdiv(row_tiles, tiles)
    grid = (programs, triton.cdiv(columns, tile.block_n))
    numbers = (count, columns, grad_stride, stride, tiles)
    launch = Launch(bias_gelu_backward_kernel, grid, numbers, choice, (grad_copied, copied, scattered(bias)))
    add_parts = sum_parts(x, programs, columns)

    def run(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        grad_x, grad_bias = gradients(grad, x, bias, needs)
        part = torch.empty((1, programs, columns), dtype=torch.float32, device=x.device) if needs[1] else None
        out = torch.empty_like(grad_x) if again else None
        launch(grad, x, bias, grad_x, part, out)
        if part is not None:
            add_parts(part, grad_bias)
        return grad_x, grad_bias, out

    return run


bias_gelu = Op(
    "bias_gelu",
    outputs=outputs,
    forward=forward,
    gradients=gradients,
    backward=backward,
    differentiable=("x", "bias"),
)
bias_gelu_rows = Op("bias_gelu_rows", outputs=outputs_of_rows, forward=forward_of_rows)
