"""What the compile matrix is tried on: plain matrix products without masks, and a compiler that ends its process."""

import os

import triton
import triton.language as tl

from mar_fast.kernels.jit import matrix


@triton.jit
def product_of(left, right, out, size, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, size, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        b_left = tl.load(left + o_row[:, None] * stride + o_k[None, :])
        b_right = tl.load(right + o_column[None, :] * stride + o_k[:, None])
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)
    tl.store(out + o_row[:, None] * 4096 + o_column[None, :], b_sum.to(out.dtype.element_ty))


@triton.jit
def product(left, right, out, size, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    product_of(left, right, out, size, stride, BLOCK_M, BLOCK_N, BLOCK_K, "tf32")


@triton.jit
def product_ieee(left, right, out, size, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    product_of(left, right, out, size, stride, BLOCK_M, BLOCK_N, BLOCK_K, "ieee")


def end_process(found):
    """In place of `matrix.compile_found`: every launch but the first of its pass ends the process."""
    if found.place:
        os._exit(1)
    return matrix.report(found.kernel, found.target, None)
