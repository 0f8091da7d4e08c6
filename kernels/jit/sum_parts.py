"""The last step of several backward passes, whose programs have each stored a row of float32 partial sums.

One launch adds these rows up, in a fixed order, for up to four results with the same number of columns.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, LaunchConfig, choose


@triton.jit
def store_sum(out, b_sum, o_column, m_column):
    if out is not None:
        tl.store(out + o_column, b_sum.to(out.dtype.element_ty), mask=m_column)


@triton.jit
def sum_parts_kernel(part, first, second, third, fourth, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """part (results, rows, columns); axis 1 of the grid is the result."""
    which = tl.program_id(1)
    o_column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, rows, BLOCK_M):
        o_row = start + tl.arange(0, BLOCK_M)
        # [BLOCK_M, BLOCK_N]
        p_part = part + (which.to(tl.int64) * rows + o_row)[:, None] * columns + o_column[None, :]
        b_sum += tl.load(p_part, mask=(o_row < rows)[:, None] & m_column[None, :], other=0.0)
    b_total = tl.sum(b_sum, axis=0)
    if which == 0:
        store_sum(first, b_total, o_column, m_column)
    elif which == 1:
        store_sum(second, b_total, o_column, m_column)
    elif which == 2:
        store_sum(third, b_total, o_column, m_column)
    else:
        store_sum(fourth, b_total, o_column, m_column)


def config(arch: str, dtype: torch.dtype, *, rows: int) -> LaunchConfig:
    """``block_m`` rows by ``block_n`` columns. Compiled clean, not measured."""
    # The interpreter's NumPy adds up the rows of a tile one after the other.
    if arch == "interpreter" or rows <= 16:
        return LaunchConfig(16, 256)
    return LaunchConfig(256, 16, num_warps=8)  # few columns, so that there are enough programs


def sum_parts(operand: Tensor, rows: int, columns: int, results: int = 1) -> Callable[..., None]:
    """A function of ``part`` (results, rows, columns) float32 and of the results to write: (columns,), any dtype.

    Args:
        operand: A tensor on the device.
        rows: How many rows are added up.
        columns: How many values a result has.
        results: How many results there are, at most 4.
    """
    choice = choose("sum_parts", config, operand, torch.float32, rows=rows)
    grid = (triton.cdiv(columns, choice.config.block_n), results)
    launch = Launch(sum_parts_kernel, grid, (rows, columns), choice)
    missing = (None,) * (4 - results)

    def run(part: Tensor, *out: Tensor | None) -> None:
        launch(part, *out, *missing)

    return run
