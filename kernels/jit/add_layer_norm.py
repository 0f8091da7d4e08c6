"""add_layer_norm in Triton: rows of D columns, a row whole in one program; statistics and sums in float32."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DENSE, TUNED, Launch, LaunchConfig, block, choose, like, rows, scattered
from .op import Op, Results, Run
from .sum_parts import sum_parts


@triton.jit
def add_layer_norm_forward_kernel(
    x, residual, weight, bias, layer_scale, row_scale, normed, new_residual, statistics,
    rows, columns, count, x_stride, residual_stride, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_N)
    m_row = o_row < rows
    m_column = o_column < columns
    m_tile = m_row[:, None] & m_column[None, :]
    o_out = o_row[:, None] * columns + o_column[None, :]
    # [BLOCK_M, BLOCK_N]
    b_x = tl.load(x + o_row[:, None] * x_stride + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
    if residual is not None:
        if layer_scale is not None:
            b_x *= tl.load(layer_scale + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
        if row_scale is not None:
            b_x *= tl.load(row_scale + o_row // count, mask=m_row, other=0.0).to(tl.float32)[:, None]
        p_residual = residual + o_row[:, None] * residual_stride + o_column[None, :]
        b_residual = tl.load(p_residual, mask=m_tile, other=0.0).to(tl.float32)
        # The norm is that of the sum as the next layer sees it, rounded.
        b_sum = (b_residual + b_x).to(new_residual.dtype.element_ty)
        tl.store(new_residual + o_out, b_sum, mask=m_tile)
        b_x = b_sum.to(tl.float32)
    b_mean = tl.sum(b_x, axis=1) / columns
    b_centred = tl.where(m_column[None, :], b_x - b_mean[:, None], 0.0)
    # inductor hands floats over as float64
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_centred * b_centred, axis=1) / columns + tl.cast(eps, tl.float32))
    if statistics is not None:
        tl.store(statistics + o_row, b_mean, mask=m_row)
        tl.store(statistics + rows + o_row, b_rstd, mask=m_row)
    b_weight = tl.load(weight + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_normed = b_centred * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(normed + o_out, b_normed.to(normed.dtype.element_ty), mask=m_tile)


@triton.jit
def add_layer_norm_backward_kernel(
    residual, statistics, weight, x, layer_scale, row_scale, grad_normed, grad_residual,
    grad_x, grad_old_residual, part, row_part,
    rows, columns, count, residual_stride, x_stride, grad_normed_stride, grad_residual_stride, tiles,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, LAYER_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``residual`` is what was normalised. One program walks ``tiles`` row tiles. What it sums over them goes to its
    own row of ``part``, once for each of WEIGHT, BIAS and LAYER_SCALE that is wanted, and these are summed in a fixed
    order afterwards. A result that nobody wants is None, and so is a gradient that never came."""
    program = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    b_weight_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_bias_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_layer_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if grad_normed is not None:
        b_weight = tl.load(weight + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    if layer_scale is not None:
        b_layer = tl.load(layer_scale + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    for tile in range(tiles):
        o_row = (program * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_row = o_row < rows
        m_tile = m_row[:, None] & m_column[None, :]
        o_out = o_row[:, None] * columns + o_column[None, :]
        # [BLOCK_M, BLOCK_N]
        b_grad = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if grad_residual is not None:
            p_grad = grad_residual + o_row[:, None] * grad_residual_stride + o_column[None, :]
            b_grad = tl.load(p_grad, mask=m_tile, other=0.0).to(tl.float32)
        if grad_normed is not None:
            p_normed = grad_normed + o_row[:, None] * grad_normed_stride + o_column[None, :]
            b_normed = tl.load(p_normed, mask=m_tile, other=0.0).to(tl.float32)
            p_residual = residual + o_row[:, None] * residual_stride + o_column[None, :]
            b_residual = tl.load(p_residual, mask=m_tile, other=0.0).to(tl.float32)
            b_mean = tl.load(statistics + o_row, mask=m_row, other=0.0)[:, None]
            b_rstd = tl.load(statistics + rows + o_row, mask=m_row, other=0.0)[:, None]
            # Not zero beyond the last column, but there it only meets gradients that are.
            b_unit = (b_residual - b_mean) * b_rstd
            if WEIGHT:
                b_weight_sum += tl.sum(b_normed * b_unit, axis=0)
            if BIAS:
                b_bias_sum += tl.sum(b_normed, axis=0)
            b_normed *= b_weight
            b_along = tl.sum(b_normed * b_unit, axis=1)[:, None] / columns
            b_shift = tl.sum(b_normed, axis=1)[:, None] / columns
            b_grad += (b_normed - b_unit * b_along - b_shift) * b_rstd
        if grad_old_residual is not None:
            tl.store(grad_old_residual + o_out, b_grad.to(grad_old_residual.dtype.element_ty), mask=m_tile)
        if x is not None:
            p_x = x + o_row[:, None] * x_stride + o_column[None, :]
            b_product = b_grad * tl.load(p_x, mask=m_tile, other=0.0).to(tl.float32)
        if row_scale is not None:
            b_row = tl.load(row_scale + o_row // count, mask=m_row, other=0.0).to(tl.float32)[:, None]
            b_grad *= b_row
        if LAYER_SCALE:
            b_layer_sum += tl.sum(b_product * b_row if row_scale is not None else b_product, axis=0)
        if row_part is not None:
            b_row_sum = tl.sum(b_product * b_layer if layer_scale is not None else b_product, axis=1)
            tl.store(row_part + o_row, b_row_sum, mask=m_row)
        if grad_x is not None:
            b_x = b_grad * b_layer if layer_scale is not None else b_grad
            tl.store(grad_x + o_out, b_x.to(grad_x.dtype.element_ty), mask=m_tile)
    if part is not None:
        p_part = part + program * columns + o_column
        between = tl.num_programs(0).to(tl.int64) * columns
        if WEIGHT:
            tl.store(p_part, b_weight_sum, mask=m_column)
            p_part += between
        if BIAS:
            tl.store(p_part, b_bias_sum, mask=m_column)
            p_part += between
        if LAYER_SCALE:
            tl.store(p_part, b_layer_sum, mask=m_column)


# Enough programs to fill a large GPU; each leaves one row of partial sums.
ROW_PROGRAMS = 512


def config_forward(arch: str, dtype: torch.dtype, *, width: int) -> LaunchConfig:
    """``block_m`` rows. Compiled clean by Triton 3.6 and 3.9, not measured; beyond 2048 columns a cautious start."""
    if width > 2048:
        return LaunchConfig(1, num_warps=16)
    if arch not in TUNED:
        return LaunchConfig(2)
    # More rows have 8 bytes of stack with some dtypes, by one version of Triton or the other.
    four = width <= 768 and arch != "sm_80"
    return LaunchConfig(8 if width <= 512 else 4 if four else 2 if width <= 1024 else 1)


def config_backward(arch: str, dtype: torch.dtype, *, width: int) -> LaunchConfig:
    """The same for the backward pass."""
    if width > 2048:
        return LaunchConfig(1, num_warps=16)
    if arch not in TUNED:
        return LaunchConfig(1, num_warps=4 if width <= 1024 else 8)
    return LaunchConfig(2 if width <= 1024 else 1, num_warps=2 if width <= 512 else 4)


def outputs(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """normed in ``dtype``, the new residual (None where it is x), and (2, B * N) mean and 1 / deviation to be saved."""
    normed = torch.empty_like(x, dtype=dtype, memory_format=DENSE)
    new_residual = None if residual is None else torch.empty_like(residual, memory_format=DENSE)
    if not save:
        return normed, new_residual, None  # type: ignore[return-value]
    statistics = torch.empty((2, x.shape[0] * x.shape[1]), dtype=torch.float32, device=x.device)
    return normed, new_residual, statistics  # type: ignore[return-value]


def forward(*inputs: Any) -> Run:
    """Sum and norm in one pass, for the inputs of `outputs`."""
    (x, residual, weight, bias, layer_scale, row_scale), options = inputs[:6], inputs[6:]
    (batch, count, columns), eps = x.shape, options[0]
    if x.numel() == 0:
        return lambda *tensors: outputs(*tensors, *options)
    x_stride, x_copied = rows(x)
    residual_stride, residual_copied = (0, False) if residual is None else rows(residual)
    choice = choose("add_layer_norm_forward", config_forward, x if residual is None else residual, width=columns)
    launch = Launch(
        add_layer_norm_forward_kernel, (triton.cdiv(batch * count, choice.config.block_m),),
        (batch * count, columns, count, x_stride, residual_stride, eps), choice,
        (x_copied, residual_copied, *map(scattered, (weight, bias, layer_scale, row_scale))),
        BLOCK_M=choice.config.block_m, BLOCK_N=block(columns),
    )  # fmt: skip

    def run(*tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        results = outputs(*tensors, *options)
        launch(*tensors, *results)
        return results

    return run


def _saves(tensors: Sequence[Tensor | None], results: Results) -> Results:
    """x is needed for the gradients of what scales it only."""
    x, residual, weight, bias, layer_scale, row_scale = tensors[:6]
    scaled = (layer_scale is not None and layer_scale.requires_grad) or (
        row_scale is not None and row_scale.requires_grad
    )
    normalised = x if residual is None else results[1]
    return normalised, results[2], weight, bias, x if scaled else None, layer_scale, row_scale


def _wanted(
    grad_normed: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    x_dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[bool]:
    """Which gradients backward writes. That of an unscaled x is that of the residual: `_finish` hands it out twice."""
    shared = layer_scale is None and row_scale is None and x_dtype == residual.dtype
    of_x, of_residual, of_weight, of_bias, of_layer_scale, of_row_scale = needs
    normed = grad_normed is not None
    return [
        of_x and not shared, of_residual or (of_x and shared), of_weight and normed, of_bias and normed,
        of_layer_scale, of_row_scale,
    ]  # fmt: skip


def gradients(
    grad_normed: Tensor | None,
    grad_residual: Tensor | None,
    residual: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    save: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Of x, residual, weight, bias, layer_scale and row_scale."""
    wanted = _wanted(grad_normed, residual, layer_scale, row_scale, x_dtype, needs)
    return _memory(wanted, residual, x_dtype, (weight, bias, layer_scale, row_scale))


def _memory(
    wanted: Sequence[bool], residual: Tensor, x_dtype: torch.dtype, vectors: Sequence[Any]
) -> list[Tensor | None]:
    weight, bias, layer_scale, row_scale = vectors
    return [
        torch.empty_like(residual, dtype=x_dtype, memory_format=DENSE) if wanted[0] else None,
        torch.empty_like(residual, memory_format=DENSE) if wanted[1] else None,
        torch.empty_like(weight) if wanted[2] else None,
        torch.empty_like(bias) if wanted[3] else None,
        torch.empty_like(layer_scale) if wanted[4] else None,
        torch.empty_like(row_scale) if wanted[5] else None,
    ]


def backward(*inputs: Any) -> Run:
    """All gradients in one pass, for the inputs of `gradients`."""
    (grad_normed, grad_residual, residual, statistics, weight, _, x, layer_scale, row_scale), options = (
        inputs[:9], inputs[9:],
    )  # fmt: skip
    batch, count, columns = residual.shape
    wanted, x_dtype = _wanted(grad_normed, residual, layer_scale, row_scale, options[2], options[4]), options[2]
    if residual.numel() == 0:
        return lambda *operands: [None if value is None else value.zero_() for value in gradients(*operands, *options)]
    laid = [(0, False) if value is None else rows(value) for value in (residual, x, grad_normed, grad_residual)]
    (stride, copied), (x_stride, x_copied), (normed_stride, normed_copied), (grad_stride, grad_copied) = laid
    choice = choose("add_layer_norm_backward", config_backward, residual, width=columns)
    row_tiles = triton.cdiv(batch * count, choice.config.block_m)
    tiles = triton.cdiv(row_tiles, ROW_PROGRAMS)
    programs = triton.cdiv(row_tiles, tiles)
    launch = Launch(
        add_layer_norm_backward_kernel, (programs,),
        (batch * count, columns, count, stride, x_stride, normed_stride, grad_stride, tiles), choice,
        (
            copied, scattered(statistics), scattered(weight), x_copied, scattered(layer_scale), scattered(row_scale),
            normed_copied, grad_copied,
        ),
        WEIGHT=wanted[2], BIAS=wanted[3], LAYER_SCALE=wanted[4],
        BLOCK_M=choice.config.block_m, BLOCK_N=block(columns),
    )  # fmt: skip
    results = sum(wanted[2:5])
    total = sum_parts(residual, programs, columns, results) if results else None
    parts = like((results, programs, columns), torch.float32, residual.device)

    def run(*operands: Any) -> list[Tensor | None]:
        grad_normed, grad_residual, residual, statistics, weight, bias, x, layer_scale, row_scale = operands
        written = _memory(wanted, residual, x_dtype, (weight, bias, layer_scale, row_scale))
        of_x, of_residual, of_weight, of_bias, of_layer_scale, _ = written
        part = None if total is None else torch.empty_like(parts, memory_format=DENSE)
        row_part = torch.empty((batch, count), dtype=torch.float32, device=residual.device) if wanted[5] else None
        launch(
            residual, statistics, weight, x, layer_scale, row_scale, grad_normed, grad_residual,
            of_x, of_residual, part, row_part,
        )  # fmt: skip
        if total is not None:
            if of_layer_scale is None and results == 2:
                total(part, of_weight, of_bias)
            else:
                total(part, *[value for value in written[2:5] if value is not None])
        if row_part is not None:
            written[5] = row_part.sum(1).to(row_scale.dtype)
        return written

    return run


def _finish(results: list[Tensor | None]) -> list[Tensor | None]:
    of_x, of_residual, *of_vectors = results
    return [of_residual if of_x is None else of_x, of_residual, *of_vectors]


add_layer_norm = Op(
    "add_layer_norm",
    outputs=outputs,
    forward=forward,
    gradients=gradients,
    backward=backward,
    saves=_saves,
    differentiable=("x", "residual", "weight", "bias", "layer_scale", "row_scale"),
    public=2,
    finish=_finish,
)
