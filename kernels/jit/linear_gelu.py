"""linear_gelu in Triton. M rows of x, D output columns, K summed; sums in float32.

Forward is one persistent kernel for 16-bit operands on GPUs with TMA. Elsewhere, and where inductor traces it, it is a
product by cuBLAS and then bias_gelu's kernel. In training it also writes the product without the bias: backward is then
bias_gelu's, which sums the bias gradient too, and two products by cuBLAS.

What was considered, for ViT-B, 32 clips, 50 % (25088 x 768 x 3072) on an H200:
- Keeping GELU' in 8 bits (a step of 1.26 / 255, error 0.0014) in place of the product in 16: 77 MB less a layer, 1.1 GB
  for 14 layers. It exceeds the tolerance: 2.3 times it in float16; in bfloat16 0.4 times for inputs about 0, but 1.02
  and 1.8 for inputs about -2 and -3 (deviation 1), where GELU' itself is small.
- GELU' in the prologue of the product for x: the separate pass over grad and product moves 3 x 154 MB, 108 us. A
  prologue would save one read of its result, 36 us, but compute the polynomial in each of 3 column tiles, 44 us each.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import flops
from ..device import architecture
from . import bias_gelu as activation
from .gelu import gelu
from .launch import DENSE, Block, Launch, LaunchConfig, choose, like, multiprocessors, rows, scattered, takes_tma
from .op import Op, Results, Run


@triton.jit
def finish(b_sum, row, column, bias, row_scale, column_scale, out, product, rows, columns):
    """Store GELU(sums + bias) of sums [BLOCK_M, BLOCK_N / 2] at (row, column)."""
    o_column = column + tl.arange(0, b_sum.shape[1])
    m_column = o_column < columns
    if row_scale is not None:
        o_row = row + tl.arange(0, b_sum.shape[0])
        b_sum *= tl.load(row_scale + o_row, mask=o_row < rows, other=0.0)[:, None]
    if column_scale is not None:
        b_sum *= tl.load(column_scale + o_column, mask=m_column, other=0.0)[None, :]
    if product is not None:
        product.store([row, column], b_sum.to(product.dtype))
    b_sum += tl.load(bias + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    out.store([row, column], gelu(b_sum, EXACT=False).to(out.dtype))


@triton.jit
def linear_gelu_forward_kernel(
    x, weight, bias, row_scale, column_scale, out, product, rows, columns, summed, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """TMA descriptors of x (M, K), weight (D, K), out and product (M, D); both scales and product may be None.

    Tiles go along the columns first: the weight stays in the L2 cache, and x is read from memory once.
    """
    column_tiles = tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * column_tiles, programs, flatten=True):
        row, column = tile // column_tiles * BLOCK_M, tile % column_tiles * BLOCK_N
        b_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, summed, BLOCK_K):
            b_sum = tl.dot(x.load([row, k]), weight.load([column, k]).T, b_sum)
        # In halves: a whole tile and its GELU do not fit into the registers together.
        halves = tl.permute(tl.reshape(b_sum, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        b_left, b_right = tl.split(halves)  # [BLOCK_M, BLOCK_N / 2]
        finish(b_left, row, column, bias, row_scale, column_scale, out, product, rows, columns)
        finish(b_right, row, column + BLOCK_N // 2, bias, row_scale, column_scale, out, product, rows, columns)


def programs_at_once(operand: Tensor, tile: LaunchConfig) -> int:
    """How many programs the device runs at a time.

    A multiprocessor has room for several tiles smaller than 128 x 256: one computes products while another stores.
    """
    if architecture(operand) == "interpreter":
        return 3  # so that each walks several tiles
    return multiprocessors(operand) * max(1, 128 * 256 // (tile.block_m * tile.block_n))


def config(arch: str, dtype: torch.dtype, *, rows: int, columns: int, summed: int) -> LaunchConfig:
    """``block_m`` rows by ``block_n`` columns, ``block_k`` at a time; unless ``fused``, cuBLAS and then bias_gelu."""
    if arch == "interpreter":
        return LaunchConfig(32, 64, 16, tma=True, fused=True)
    # Prototype, H200, Triton 3.6, bc236cf: 221 us for 25088 x 768 x 3072, cuBLAS and bias_gelu took 302; with operands
    # and output in 8 bits 149. On sm_100 compiled clean, not measured. Fewer than 64 tiles leave half of the
    # multiprocessors idle: cuBLAS takes smaller ones and splits the sum; not measured.
    fused = arch in ("sm_90", "sm_100") and rows * columns >= 64 * 128 * 256
    return LaunchConfig(128, 256, 128 // dtype.itemsize, num_warps=8, num_stages=4, tma=True, fused=fused)


def outputs(x: Tensor, weight: Tensor, bias: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """(..., D) in x's dtype: the output, and the product without the bias, for backward."""
    shape = (*x.shape[:-1], weight.shape[0])
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    return out, torch.empty_like(out) if save else None  # type: ignore[return-value]


def forward_launch(x: Tensor, weight: Tensor, bias: Tensor, save: bool) -> Launch | None:
    """The launch of the fused kernel; None if cuBLAS is chosen, or if TMA cannot take the tensors."""
    (columns, summed), (stride, copied), (weight_stride, weight_copied) = weight.shape, rows(x), rows(weight)
    count = math.prod(x.shape[:-1])
    choice = choose("linear_gelu_forward", config, x, rows=count, columns=columns, summed=summed)
    tile = choice.config
    described = takes_tma(x, stride) and takes_tma(weight, weight_stride) and takes_tma(x, columns)  # the last: out
    if not (tile.fused and tile.tma and described and x.itemsize < 4 and count and columns and summed):
        return None
    written = Block((count, columns), (columns, 1), (tile.block_m, tile.block_n // 2))
    blocks = {
        0: Block((count, summed), (stride, 1), (tile.block_m, tile.block_k)),
        1: Block((columns, summed), (weight_stride, 1), (tile.block_n, tile.block_k)),
        **dict.fromkeys((5, 6) if save else (5,), written),
    }
    tiles = triton.cdiv(count, tile.block_m) * triton.cdiv(columns, tile.block_n)
    programs = min(tiles, programs_at_once(x, tile))
    numbers, copies = (count, columns, summed, programs), (copied, weight_copied, scattered(bias))
    return Launch(linear_gelu_forward_kernel, (programs,), numbers, choice, copies, blocks)


def forward(x: Tensor, weight: Tensor, bias: Tensor, save: bool) -> Run:
    """GELU(x @ weight.T + bias)."""
    launch = forward_launch(x, weight, bias, save)
    if launch is not None:
        template = like((*x.shape[:-1], weight.shape[0]), x.dtype, x.device)

        def run(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
            out = torch.empty_like(template, memory_format=DENSE)
            product = torch.empty_like(template, memory_format=DENSE) if save else None
            launch(x, weight, bias, None, None, out, product)
            return out, product

        return run

    activate = activation.forward(outputs(x, weight, bias, False)[0], bias)

    def run_rival(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        product = F.linear(x, weight)
        return activate(product, bias), product if save else None

    return run_rival


def gradients(grad, x, weight, bias, product, save, needs) -> Results:
    """Memory for the gradients of x, weight and bias."""
    return [
        torch.empty(one.shape, dtype=one.dtype, device=one.device) if needed else None
        for one, needed in zip((x, weight, bias), needs, strict=True)
    ]


def backward(grad, x, weight, bias, product, save, needs) -> Run:
    """The gradients of product and bias by bias_gelu; from these, by cuBLAS, those of x and weight."""
    through_gelu = activation.backward(grad, product, bias, (True, needs[2]))
    count, (columns, summed) = math.prod(x.shape[:-1]), weight.shape

    def run(grad, x, weight, bias, product) -> Results:
        grad_x, grad_weight, _ = gradients(grad, x, weight, bias, product, save, (*needs[:2], False))
        grad_product, grad_bias = through_gelu(grad, product, bias)
        grad_product = grad_product.view(count, columns)
        if grad_x is not None:
            torch.mm(grad_product, weight, out=grad_x.view(count, summed))
        if grad_weight is not None:
            torch.mm(grad_product.T, x.reshape(count, summed), out=grad_weight)
        return grad_x, grad_weight, grad_bias if needs[2] else None

    return run


linear_gelu = Op(
    "linear_gelu",
    outputs=outputs,
    forward=forward,
    gradients=gradients,
    backward=backward,
    saves=lambda tensors, outputs: (*tensors, outputs[1]),
    differentiable=("x", "weight", "bias"),
    flops=(flops.linear_gelu, flops.linear_gelu_backward),
)
