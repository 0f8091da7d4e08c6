"""add_layer_norm in Triton: rows of D columns, a row whole in one program; statistics and sums in float32."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_config import launch_config
from .launch import as_rows, block, launch


@triton.jit
def forward_kernel(
    x, branch, weight, bias, gamma, drop_scale, total, normed, mean, rstd,
    rows, columns, count, x_stride, branch_stride, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_N)
    m_row = o_row < rows
    m_column = o_column < columns
    m_tile = m_row[:, None] & m_column[None, :]
    o_out = o_row[:, None] * columns + o_column[None, :]
    # [BLOCK_M, BLOCK_N]
    b_x = tl.load(x + o_row[:, None] * x_stride + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
    if branch is not None:
        p_branch = branch + o_row[:, None] * branch_stride + o_column[None, :]
        b_branch = tl.load(p_branch, mask=m_tile, other=0.0).to(tl.float32)
        if gamma is not None:
            b_branch *= tl.load(gamma + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
        if drop_scale is not None:
            b_branch *= tl.load(drop_scale + o_row // count, mask=m_row, other=0.0).to(tl.float32)[:, None]
        # The norm is that of the sum as the next layer sees it, rounded.
        b_total = (b_x + b_branch).to(total.dtype.element_ty)
        tl.store(total + o_out, b_total, mask=m_tile)
        b_x = b_total.to(tl.float32)
    b_mean = tl.sum(b_x, axis=1) / columns
    b_centred = tl.where(m_column[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_centred * b_centred, axis=1) / columns + eps)
    tl.store(mean + o_row, b_mean, mask=m_row)
    tl.store(rstd + o_row, b_rstd, mask=m_row)
    b_weight = tl.load(weight + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_normed = b_centred * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(normed + o_out, b_normed.to(normed.dtype.element_ty), mask=m_tile)


@triton.jit
def backward_kernel(
    total, mean, rstd, weight, branch, gamma, drop_scale, grad_total, grad_normed,
    grad_x, grad_branch, weight_part, bias_part, gamma_part, drop_part,
    rows, columns, count, total_stride, branch_stride, grad_total_stride, grad_normed_stride, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program walks ``tiles`` row tiles. What it sums over them goes to its own row of the parts, and these are
    summed in a fixed order afterwards. A result that nobody wants is None, and so is a gradient that never came."""
    program = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    b_weight_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_bias_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_gamma_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if grad_normed is not None:
        b_weight = tl.load(weight + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    if gamma is not None:
        b_gamma = tl.load(gamma + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    for tile in range(tiles):
        o_row = (program * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_row = o_row < rows
        m_tile = m_row[:, None] & m_column[None, :]
        o_out = o_row[:, None] * columns + o_column[None, :]
        # [BLOCK_M, BLOCK_N]
        b_grad = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if grad_total is not None:
            p_grad = grad_total + o_row[:, None] * grad_total_stride + o_column[None, :]
            b_grad = tl.load(p_grad, mask=m_tile, other=0.0).to(tl.float32)
        if grad_normed is not None:
            p_normed = grad_normed + o_row[:, None] * grad_normed_stride + o_column[None, :]
            b_normed = tl.load(p_normed, mask=m_tile, other=0.0).to(tl.float32)
            p_total = total + o_row[:, None] * total_stride + o_column[None, :]
            b_total = tl.load(p_total, mask=m_tile, other=0.0).to(tl.float32)
            b_mean = tl.load(mean + o_row, mask=m_row, other=0.0)[:, None]
            b_rstd = tl.load(rstd + o_row, mask=m_row, other=0.0)[:, None]
            # Not zero beyond the last column, but there it only meets gradients that are.
            b_unit = (b_total - b_mean) * b_rstd
            if weight_part is not None:
                b_weight_sum += tl.sum(b_normed * b_unit, axis=0)
            if bias_part is not None:
                b_bias_sum += tl.sum(b_normed, axis=0)
            b_normed *= b_weight
            b_along = tl.sum(b_normed * b_unit, axis=1)[:, None] / columns
            b_shift = tl.sum(b_normed, axis=1)[:, None] / columns
            b_grad += (b_normed - b_unit * b_along - b_shift) * b_rstd
        if grad_x is not None:
            tl.store(grad_x + o_out, b_grad.to(grad_x.dtype.element_ty), mask=m_tile)
        if branch is not None:
            p_branch = branch + o_row[:, None] * branch_stride + o_column[None, :]
            b_product = b_grad * tl.load(p_branch, mask=m_tile, other=0.0).to(tl.float32)
        if drop_scale is not None:
            b_scale = tl.load(drop_scale + o_row // count, mask=m_row, other=0.0).to(tl.float32)[:, None]
            b_grad *= b_scale
        if gamma_part is not None:
            b_gamma_sum += tl.sum(b_product * b_scale if drop_scale is not None else b_product, axis=0)
        if drop_part is not None:
            b_drop = tl.sum(b_product * b_gamma if gamma is not None else b_product, axis=1)
            tl.store(drop_part + o_row, b_drop, mask=m_row)
        if grad_branch is not None:
            b_branch = b_grad * b_gamma if gamma is not None else b_grad
            tl.store(grad_branch + o_out, b_branch.to(grad_branch.dtype.element_ty), mask=m_tile)
    if weight_part is not None:
        tl.store(weight_part + program * columns + o_column, b_weight_sum, mask=m_column)
    if bias_part is not None:
        tl.store(bias_part + program * columns + o_column, b_bias_sum, mask=m_column)
    if gamma_part is not None:
        tl.store(gamma_part + program * columns + o_column, b_gamma_sum, mask=m_column)


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _row_stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


# Enough programs to fill a large GPU; each leaves one row of partial sums.
ROW_PROGRAMS = 512


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum (an empty tensor without a branch, since it is x), norm in ``dtype``, and (B * N,) mean and 1 / deviation."""
    batch, count, columns = x.shape
    rows = batch * count
    total = torch.empty(x.shape if branch is not None else (0,), dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean = torch.empty((rows,), dtype=torch.float32, device=x.device)
    rstd = torch.empty((rows,), dtype=torch.float32, device=x.device)
    if normed.numel() == 0:
        return total, normed, mean, rstd
    x = as_rows(x)
    branch = None if branch is None else as_rows(branch)
    config = launch_config("add_layer_norm.forward", x, width=columns)
    launch(
        "add_layer_norm.forward", forward_kernel, (triton.cdiv(rows, config.block_m),),
        (x, branch, weight.contiguous(), bias.contiguous(), _dense(gamma), _dense(drop_scale),
         None if branch is None else total, normed, mean, rstd, rows, columns, count, x.stride(0), _row_stride(branch),
         eps),
        config, BLOCK_M=config.block_m, BLOCK_N=block(columns),
    )  # fmt: skip
    return total, normed, mean, rstd


def backward(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    branch_dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, branch, weight, bias, gamma and drop_scale; an empty vector for what is not wanted.

    ``total`` is what was normalised. ``branch`` is needed for the gradients of gamma and drop_scale only.
    """
    device = total.device
    batch, count, columns = total.shape
    rows = batch * count
    shapes = (total.shape, total.shape, (columns,), (columns,), (columns,), (batch,))
    vectors = [torch.float32 if vector is None else vector.dtype for vector in (weight, bias, gamma, drop_scale)]
    dtypes = (total.dtype, branch_dtype, *vectors)
    if rows * columns == 0:
        wanted_shapes = [shape if want else (0,) for want, shape in zip(wanted, shapes, strict=True)]
        return tuple(torch.zeros(shape, dtype=t, device=device) for shape, t in zip(wanted_shapes, dtypes, strict=True))
    total = as_rows(total)
    grad_total, grad_normed, branch = (
        None if value is None else as_rows(value) for value in (grad_total, grad_normed, branch)
    )
    config = launch_config("add_layer_norm.backward", total, width=columns)
    row_tiles = triton.cdiv(rows, config.block_m)
    tiles = triton.cdiv(row_tiles, ROW_PROGRAMS)
    programs = triton.cdiv(row_tiles, tiles)
    part_shapes = (*shapes[:2], *((programs, columns),) * 3, (rows,))
    part_dtypes = (*dtypes[:2], *(torch.float32,) * 4)
    parts = [
        torch.empty(shape, dtype=dtype, device=device) if want else None
        for want, shape, dtype in zip(wanted, part_shapes, part_dtypes, strict=True)
    ]
    launch(
        "add_layer_norm.backward", backward_kernel, (programs,),
        (total, mean, rstd, weight.contiguous(), branch if wanted[4] or wanted[5] else None, _dense(gamma),
         _dense(drop_scale), grad_total, grad_normed, *parts, rows, columns, count, total.stride(0),
         _row_stride(branch), _row_stride(grad_total), _row_stride(grad_normed), tiles),
        config, BLOCK_M=config.block_m, BLOCK_N=block(columns),
    )  # fmt: skip
    results = []
    for place, (part, dtype) in enumerate(zip(parts, dtypes, strict=True)):
        if part is None:
            results.append(torch.empty((0,), dtype=dtype, device=device))
        elif place < 2:
            results.append(part)
        else:
            results.append((part.view(batch, count).sum(1) if place == 5 else part.sum(0)).to(dtype))
    return tuple(results)
