"""add_layer_norm in Triton. A program holds whole rows of D columns; statistics and sums are in float32."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import quantize_rows
from .launch import DENSE, TUNED, Launch, LaunchConfig, block, choose, like, rows, scattered
from .op import Op, Results, Run
from .quantize_rows import quantized
from .sum_parts import sum_parts


@triton.jit
def add_layer_norm_forward_kernel(
    x, residual, weight, bias, layer_scale, row_scale, x_bias, normed, new_residual, statistics, scale,
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
        if x_bias is not None:
            b_x += tl.load(x_bias + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
        if layer_scale is not None:
            b_x *= tl.load(layer_scale + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
        if row_scale is not None:
            b_x *= tl.load(row_scale + o_row // count, mask=m_row, other=0.0).to(tl.float32)[:, None]
        p_residual = residual + o_row[:, None] * residual_stride + o_column[None, :]
        b_residual = tl.load(p_residual, mask=m_tile, other=0.0).to(tl.float32)
        # Normalise the rounded sum, which is what the next layer sees.
        b_sum = (b_residual + b_x).to(new_residual.dtype.element_ty)
        tl.store(new_residual + o_out, b_sum, mask=m_tile)
        b_x = b_sum.to(tl.float32)
    b_mean = tl.sum(b_x, axis=1) / columns
    b_centred = tl.where(m_column[None, :], b_x - b_mean[:, None], 0.0)
    # inductor passes floats as float64
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_centred * b_centred, axis=1) / columns + tl.cast(eps, tl.float32))
    if statistics is not None:
        tl.store(statistics + o_row, b_mean, mask=m_row)
        tl.store(statistics + rows + o_row, b_rstd, mask=m_row)
    b_weight = tl.load(weight + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_normed = b_centred * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    if scale is not None:
        b_normed, b_scale = quantized(b_normed)
        tl.store(scale + o_row, b_scale, mask=m_row)
    tl.store(normed + o_out, b_normed.to(normed.dtype.element_ty), mask=m_tile)


@triton.jit
def add_layer_norm_backward_kernel(
    residual, statistics, weight, x, layer_scale, row_scale, x_bias, grad_normed, grad_residual,
    grad_x, grad_old_residual, part, row_part,
    rows, columns, count, residual_stride, x_stride, grad_normed_stride, grad_residual_stride, tiles,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, LAYER_SCALE: tl.constexpr, X_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``residual`` is what was normalised. A program loops over ``tiles`` row tiles and stores its sums over them in
    its own row of ``part``, one part for each of WEIGHT, BIAS, LAYER_SCALE and X_BIAS that is wanted; another kernel
    adds these up in a fixed order. A result that is not wanted is None, and so is the gradient of an output that was
    not used."""
    program = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, BLOCK_N)
    m_column = o_column < columns
    b_weight_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_bias_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_layer_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_x_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if grad_normed is not None:
        b_weight = tl.load(weight + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    if layer_scale is not None:
        b_layer = tl.load(layer_scale + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    if x is not None and x_bias is not None:
        b_x_bias = tl.load(x_bias + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    for tile in tl.range(tiles, num_stages=STAGES):
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
            # Not zero beyond the last column, but the gradients that it is multiplied by are.
            b_unit = (b_residual - b_mean) * b_rstd
            if WEIGHT:
                b_weight_sum += tl.sum(b_normed * b_unit, axis=0)
            if BIAS:
                b_bias_sum += tl.sum(b_normed, axis=0)
            b_normed *= b_weight
            # In one reduction: two would wait twice for all warps.
            b_along, b_shift = tl.split(tl.sum(tl.join(b_normed * b_unit, b_normed), axis=1) / columns)
            b_grad += (b_normed - b_unit * b_along[:, None] - b_shift[:, None]) * b_rstd
        if grad_old_residual is not None:
            tl.store(grad_old_residual + o_out, b_grad.to(grad_old_residual.dtype.element_ty), mask=m_tile)
        if x is not None:
            p_x = x + o_row[:, None] * x_stride + o_column[None, :]
            b_scaled = tl.load(p_x, mask=m_tile, other=0.0).to(tl.float32)
            b_product = b_grad * (b_scaled + b_x_bias if x_bias is not None else b_scaled)
        if row_scale is not None:
            b_row = tl.load(row_scale + o_row // count, mask=m_row, other=0.0).to(tl.float32)[:, None]
            b_grad *= b_row
        if LAYER_SCALE:
            b_layer_sum += tl.sum(b_product * b_row if row_scale is not None else b_product, axis=0)
        if row_part is not None:
            b_row_sum = tl.sum(b_product * b_layer if layer_scale is not None else b_product, axis=1)
            tl.store(row_part + o_row, b_row_sum, mask=m_row)
        if layer_scale is not None:
            b_grad *= b_layer
        if X_BIAS:
            b_x_sum += tl.sum(b_grad, axis=0)
        if grad_x is not None:
            tl.store(grad_x + o_out, b_grad.to(grad_x.dtype.element_ty), mask=m_tile)
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
            p_part += between
        if X_BIAS:
            tl.store(p_part, b_x_sum, mask=m_column)


# Enough programs of four warps to fill a large GPU, and more of fewer warps; each stores one row of partial sums.
ROW_PROGRAMS = 512


def config_forward(arch: str, dtype: torch.dtype, *, width: int) -> LaunchConfig:
    """``block_m`` rows; beyond 2048 columns a cautious start.

    H200, Triton 3.6, bc236cf: at 768 columns of bfloat16 1 to 8 rows by 4 warps took 41.4 to 42.6 us, 36 is what a copy
    takes. The 38 calls of a training step, a quarter of their bytes at 384 columns, took 1972 us, and 1861 is what a
    copy of these bytes takes. The rest is compiled clean by Triton 3.6 and 3.9, not measured.
    """
    if width > 2048:
        return LaunchConfig(1, num_warps=16)
    if arch not in TUNED:
        return LaunchConfig(2)
    if width <= 512:
        return LaunchConfig(8)
    # Other numbers of rows have 8 or 16 bytes of stack with some dtypes, by one version of Triton or the other.
    if arch == "sm_90":
        return LaunchConfig(4 if width <= 768 else 2 if width <= 1024 else 1)
    return LaunchConfig(2 if arch == "sm_80" else 1)


def config_backward(arch: str, dtype: torch.dtype, *, width: int) -> LaunchConfig:
    """``block_m`` rows, loaded ``num_stages`` - 1 tiles ahead.

    H200, Triton 3.6, bc236cf, 768 columns of bfloat16: 76 us, 45 is what a copy takes. One or four rows took 91 and 85,
    half as many warps the same 76: the programs waited for loads, and registers hold no more of these. A stage in
    shared memory (12 KB) makes them overlap with the sums: compiled clean, not measured. A float32 residual takes 126
    registers as it is, and up to 226 with a stage; in a training step its time was 1.25 times a copy's.
    """
    if width > 2048:
        return LaunchConfig(1, num_warps=16)
    if arch not in TUNED:
        return LaunchConfig(1, num_warps=4 if width <= 1024 else 8)
    stages = 1 if dtype == torch.float32 else 2
    return LaunchConfig(2 if width <= 1024 else 1, num_warps=2 if width <= 512 else 4, num_stages=stages)


def outputs(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    x_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """normed in ``dtype``, the new residual (None if it is x), and for backward (2, tokens) mean and 1 / deviation."""
    normed = torch.empty_like(x, dtype=dtype, memory_format=DENSE)
    new_residual = None if residual is None else torch.empty_like(residual, memory_format=DENSE)
    if not save:
        return normed, new_residual, None  # type: ignore[return-value]
    statistics = torch.empty((2, math.prod(x.shape[:-1])), dtype=torch.float32, device=x.device)
    return normed, new_residual, statistics  # type: ignore[return-value]


def forward(*inputs: Any) -> Run:
    """Sum and norm in one pass; the inputs are those of `outputs`."""
    tensors, options = inputs[:7], inputs[7:]
    if tensors[0].numel() == 0:
        return lambda *tensors: outputs(*tensors, *options)
    launch = _forward_launch("add_layer_norm_forward", *tensors, eps=options[0])

    def run(*tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        results = outputs(*tensors, *options)
        launch(*tensors, *results, None)
        return results

    return run


def _forward_launch(name: str, x: Tensor, residual: Tensor | None, *vectors: Tensor | None, eps: float) -> Launch:
    *leading, columns = x.shape
    (x_stride, x_copied), (residual_stride, residual_copied) = rows(x), rows(residual)
    choice = choose(name, config_forward, x if residual is None else residual, width=columns)
    grid = (triton.cdiv(math.prod(leading), choice.config.block_m),)
    numbers = (math.prod(leading), columns, math.prod(leading[1:]), x_stride, residual_stride, eps)
    copies = (x_copied, residual_copied, *map(scattered, vectors))
    return Launch(add_layer_norm_forward_kernel, grid, numbers, choice, copies, BLOCK_N=block(columns))


def outputs_of_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm in e4m3, a scale for each row, and the new residual (None if it is x)."""
    new_residual = None if residual is None else torch.empty_like(residual, memory_format=DENSE)
    return *quantize_rows.outputs(x), new_residual  # type: ignore[return-value]


def forward_of_rows(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Run:
    """Sum, norm and scales in one pass."""
    if x.numel() == 0:
        return lambda *tensors: outputs_of_rows(*tensors, eps)
    launch = _forward_launch("add_layer_norm_rows", x, residual, weight, bias, None, None, None, eps=eps)
    write = quantize_rows.writer(x)

    def run(x, residual, *vectors: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        new_residual = None if residual is None else torch.empty_like(residual, memory_format=DENSE)
        operands = (x, residual, *vectors, None, None, None)
        values, scale = write(x, lambda values, scale: launch(*operands, values, new_residual, None, scale))
        return values, scale, new_residual

    return run


def _saves(tensors: Sequence[Tensor | None], results: Results) -> Results:
    """x is only needed for the gradients of layer_scale and row_scale."""
    x, residual, weight, bias, layer_scale, row_scale, x_bias = tensors
    saves_x = layer_scale is not None and layer_scale.requires_grad
    saves_x = saves_x or (row_scale is not None and row_scale.requires_grad)
    normalised = x if residual is None else results[1]
    return normalised, results[2], weight, bias, x if saves_x else None, layer_scale, row_scale, x_bias


def _written(grad_normed, residual, layer_scale, row_scale, x_dtype: torch.dtype, needs: Sequence[bool]) -> list[bool]:
    """Which gradients the kernel writes. That of an unscaled x is the residual's, which `_finish` returns twice."""
    shared = layer_scale is None and row_scale is None and x_dtype == residual.dtype
    of_x, of_residual, of_weight, of_bias, *of_factors = needs
    normed = grad_normed is not None
    return [
        of_x and not shared,
        of_residual or (of_x and shared),
        of_weight and normed,
        of_bias and normed,
        *of_factors,
    ]


def gradients(
    grad_normed, grad_residual, residual, statistics, weight, bias, x, layer_scale, row_scale, x_bias, *options: Any
) -> list[Tensor | None]:
    """Memory for the gradients of all seven tensors of `outputs`. ``residual`` is what was normalised."""
    *_, x_dtype, _, needs = options
    written = _written(grad_normed, residual, layer_scale, row_scale, x_dtype, needs)
    return _allocate(written, residual, x_dtype, weight, bias, layer_scale, row_scale, x_bias)


def _allocate(written: Sequence[bool], residual: Tensor, x_dtype: torch.dtype, *vectors: Any) -> list[Tensor | None]:
    return [
        torch.empty_like(residual, dtype=x_dtype, memory_format=DENSE) if written[0] else None,
        torch.empty_like(residual, memory_format=DENSE) if written[1] else None,
        torch.empty_like(vectors[0]) if written[2] else None,
        torch.empty_like(vectors[1]) if written[3] else None,
        torch.empty_like(vectors[2]) if written[4] else None,
        torch.empty_like(vectors[3]) if written[5] else None,
        torch.empty_like(vectors[4]) if written[6] else None,
    ]


def backward(*inputs: Any) -> Run:
    """All gradients in one pass; the inputs are those of `gradients`."""
    grad_normed, grad_residual, residual, statistics, weight, _, x, layer_scale, row_scale, x_bias, *options = inputs
    *_, x_dtype, _, needs = options
    *leading, columns = residual.shape
    total_rows, count = math.prod(leading), math.prod(leading[1:])  # rows of one row_scale, 1 if packed
    written = _written(grad_normed, residual, layer_scale, row_scale, x_dtype, needs)
    if residual.numel() == 0:
        return lambda *operands: [None if value is None else value.zero_() for value in gradients(*operands, *options)]
    (stride, copied), (x_stride, x_copied) = rows(residual), rows(x)
    (normed_stride, normed_copied), (grad_stride, grad_copied) = rows(grad_normed), rows(grad_residual)
    choice = choose("add_layer_norm_backward", config_backward, residual, width=columns)
    row_tiles = triton.cdiv(total_rows, choice.config.block_m)
    tiles = triton.cdiv(row_tiles, ROW_PROGRAMS * max(1, 4 // choice.config.num_warps))
    programs = triton.cdiv(row_tiles, tiles)
    copies = list(map(scattered, (statistics, weight, layer_scale, row_scale, x_bias)))
    launch = Launch(
        add_layer_norm_backward_kernel,
        (programs,),
        (total_rows, columns, count, stride, x_stride, normed_stride, grad_stride, tiles),
        choice,
        (copied, *copies[:2], x_copied, *copies[2:], normed_copied, grad_copied),
        WEIGHT=written[2],
        BIAS=written[3],
        LAYER_SCALE=written[4],
        X_BIAS=written[6],
        BLOCK_N=block(columns),
        STAGES=choice.config.num_stages,
    )
    summed = [position for position in (2, 3, 4, 6) if written[position]]
    add_parts = sum_parts(residual, programs, columns, len(summed)) if summed else None
    parts = like((len(summed), programs, columns), torch.float32, residual.device)

    def run(*operands: Any) -> list[Tensor | None]:
        grad_normed, grad_residual, residual, statistics, weight, bias, x, layer_scale, row_scale, x_bias = operands
        results = _allocate(written, residual, x_dtype, weight, bias, layer_scale, row_scale, x_bias)
        part = None if add_parts is None else torch.empty_like(parts, memory_format=DENSE)
        row_part = torch.empty((leading[0], count), dtype=torch.float32, device=residual.device) if written[5] else None
        launch(
            residual, statistics, weight, x, layer_scale, row_scale, x_bias, grad_normed, grad_residual,
            results[0], results[1], part, row_part,
        )  # fmt: skip
        if add_parts is not None:
            add_parts(part, *map(results.__getitem__, summed))
        if row_part is not None:
            results[5] = row_part.sum(1).to(row_scale.dtype)
        return results

    return run


def _finish(results: list[Tensor | None]) -> list[Tensor | None]:
    if results[0] is None:
        results[0] = results[1]
    return results


add_layer_norm = Op(
    "add_layer_norm",
    outputs=outputs,
    forward=forward,
    gradients=gradients,
    backward=backward,
    saves=_saves,
    differentiable=("x", "residual", "weight", "bias", "layer_scale", "row_scale", "x_bias"),
    public=2,
    finish=_finish,
)
add_layer_norm_rows = Op("add_layer_norm_rows", outputs=outputs_of_rows, forward=forward_of_rows)
