"""bias_gelu's Triton kernel beyond what test_ops.py asks of every path: TRITON_INTERPRET=1 pytest -m interpreter."""

import oracle
import pytest
import torch
from op_cases import (
    cropped,
    every_dtype,
    expanded,
    expanded_rows,
    gelu_operands,
    plain_gelu,
    rows_apart,
    strided,
    width_first,
)

from mar_fast import kernels
from mar_fast.kernels.jit.launch import LaunchConfig, choose, forced

pytestmark = pytest.mark.interpreter


def check(operands):
    return oracle.compare(kernels.bias_gelu, oracle.bias_gelu, plain_gelu, operands)[0]


DTYPES_OF_SUMS = (torch.float32, torch.float16, torch.float64, torch.float32)


@pytest.mark.parametrize("programs", [1, 2, 4])
def test_backward_walks_several_tiles(programs, monkeypatch):
    """130 rows are 9 tiles of 16: 9, 5 and 3 a program, the last program's not all full."""
    from mar_fast.kernels.jit import bias_gelu as launcher

    monkeypatch.setattr(launcher, "ROW_PROGRAMS", programs)
    check(gelu_operands(torch.float32, (130, 257)))


def test_backward_of_many_rows():
    """More tiles than programs as they are configured: two for each, but for the last."""
    from mar_fast.kernels.jit import bias_gelu as launcher

    choice = choose("bias_gelu_backward", launcher.config, torch.empty(0), backward=True)
    rows = choice.config.block_m * launcher.ROW_PROGRAMS + 1
    check(gelu_operands(torch.float32, (rows, 3)))


@pytest.mark.parametrize("results", [1, 2, 4])
@pytest.mark.parametrize("tile", [(256, 16), (16, 256), (4, 8)])  # the first is a GPU's
def test_sums_of_parts(tile, results, poisoned):
    """Whole numbers, which no order of sums rounds; 130 rows and 33 columns are no whole number of tiles."""
    from mar_fast.kernels.jit.sum_parts import sum_parts

    part = torch.randint(-8, 9, (results, 130, 33)).float()
    out = [torch.full((33,), torch.nan, dtype=dtype) for dtype in DTYPES_OF_SUMS[:results]]
    with forced({"sum_parts": LaunchConfig(*tile)}):
        sum_parts(part, 130, 33, results)(part, *out)
    assert all(torch.equal(got, want.to(got.dtype)) for got, want in zip(out, part.sum(1), strict=True))
    poisoned.allocated = None


def test_bias_of_another_dtype():
    """float32 master weights beside half activations.

    The bias's gradient is a float32 sum of what a polynomial for 16 bits gives: 2e-5 of each gradient, 64 eps and more.
    """
    x, bias = gelu_operands(torch.float16).values()
    operands = dict(x=x, bias=bias.float())
    (out,), seeds, found = oracle.outcome(kernels.bias_gelu, operands)
    (plain,), _, plain_gradients = oracle.outcome(plain_gelu, operands, seeds)
    wide = {name: value.double() for name, value in operands.items()}
    (exact,), _, gradients = oracle.outcome(oracle.bias_gelu, wide, [seed.double() for seed in seeds])
    assert out.dtype == torch.float16 and found["bias"].dtype == torch.float32
    coarsest = torch.finfo(torch.float16).eps
    oracle.assert_as_good("output", out, plain, exact)
    for name, floor in (("x", 0.5), ("bias", 64)):
        three = found[name], plain_gradients[name], gradients[name]
        oracle.assert_as_good(f"gradient of {name}", *three, coarsest=coarsest, floor=floor)


def expanded_columns(value):
    return value[:, :1].expand(value.shape)


LAYOUTS = [cropped, strided, width_first, rows_apart, expanded, expanded_rows, expanded_columns]


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_x(layout, dtype):
    x, bias = gelu_operands(dtype, (17, 257)).values()
    x = layout(x.abs())  # expanded from one negative number, 1 + erf would have few digits left, in PyTorch too
    assert not x.is_contiguous()
    check(dict(x=x, bias=strided(bias)))


def test_rows_that_do_not_merge():
    """(17, 2, 33) in the memory of (2, 17, 33): no single row stride describes it."""
    x, bias = gelu_operands(torch.float32).values()
    check(dict(x=x.transpose(0, 1), bias=bias))
