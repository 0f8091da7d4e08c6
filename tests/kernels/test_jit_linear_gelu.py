"""GELU for 16-bit results, and linear_gelu's kernel in float16: TRITON_INTERPRET=1 pytest -m interpreter."""

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from op_cases import (
    check,
    cropped,
    linear_operands,
    plain_linear_gelu,
    rows_apart,
    strided,
    tokens_first,
    width_first,
)
from plan_cases import misaligned

from mar_fast import kernels
from mar_fast.kernels.jit import linear_gelu as jit
from mar_fast.kernels.jit.gelu import gelu, gelu_derivative
from mar_fast.kernels.jit.launch import LaunchConfig, forced, recording

pytestmark = pytest.mark.interpreter

HALF = torch.float16


# GELU.


@triton.jit
def gelu_kernel(x, out, derivative, size: tl.constexpr, EXACT: tl.constexpr):
    o = tl.arange(0, size)
    b_x = tl.load(x + o)
    tl.store(out + o, gelu(b_x, EXACT))
    tl.store(derivative + o, gelu_derivative(b_x, EXACT))


def exact_gelu(x):
    """GELU and its derivative in float64; x beyond 40 as 40, where both are linear to the last bit."""
    near = x.double().clamp(-40, 40)
    cdf, density = 0.5 * torch.erfc(-near / math.sqrt(2)), (-near * near / 2).exp() / math.sqrt(2 * math.pi)
    return torch.where(x < 0, near, x.double()) * cdf, cdf + near * density


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", [HALF, torch.bfloat16], ids=str)
def test_gelu_of_every_16_bit_value(kind, exact, poisoned):
    """To 2e-5 for 16-bit results, to some rounding errors of float32 with erf (1 + erf is off by an eps of 1)."""
    poisoned.allocated = None
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(kind).float()
    out, derivative = torch.full_like(x, 7.0), torch.full_like(x, 7.0)
    gelu_kernel[(1,)](x, out, derivative, size=2**16, EXACT=exact)
    finite, bound = x.isfinite(), 3e-7 if exact else 2e-5
    for got, want in zip((out, derivative), exact_gelu(x), strict=True):
        error = (got.double() - want)[finite].abs()
        assert float((error - 2e-7 * want[finite].abs()).max()) <= bound
        assert got[x.isnan()].isnan().all()
    if not exact:
        assert out[x.isinf()].tolist() == [torch.inf, 0] and derivative[x.isinf()].tolist() == [1, 0]
        assert torch.equal(out[x >= 4.5], x[x >= 4.5]) and not out[x <= -4.5].any()


def test_every_float16_through_bias_gelu():
    """Half an ulp for the rounding, at least half of the smallest number."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(HALF).view(256, 256).requires_grad_()
    out = kernels.bias_gelu(x, x.new_zeros(256))
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    x, finite = x.detach(), x.isfinite()
    for got, want in zip((out.detach(), grad), exact_gelu(x), strict=True):
        error = (got.double() - want)[finite].abs()
        assert float((error - want[finite].abs() * 2**-11).max()) <= 2e-5 + 2**-25
    assert out[x == -torch.inf].item() == 0 and out[x == torch.inf].item() == torch.inf
    assert out[x.isnan()].isnan().all() and grad[x.isnan()].isnan().all()


# The op. Operands and results end within tiles, and a program walks several tiles.


def fused(run):
    """The launches of the kernel in what runs."""
    with recording() as launches:
        run()
    return [launch for launch, _ in launches if launch.kernel is jit.linear_gelu_forward_kernel]


TILES = [LaunchConfig(32, 64, 16, tma=True, fused=True), LaunchConfig(16, 32, 64, tma=True, fused=True)]
TILES.append(LaunchConfig(16))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("shape", "width"), [((8,), 8), ((2, 33, 24), 136), ((3, 1, 40), 72)])
def test_linear_gelu(shape, width, tile):
    """Against float64, output and gradients; the last choice is the product and bias_gelu."""
    operands = linear_operands(HALF, shape, width)
    with forced({"linear_gelu_forward": tile}):
        assert len(fused(lambda: kernels.linear_gelu(**operands))) == tile.fused
        check("linear_gelu", plain_linear_gelu, operands)
        with torch.no_grad():
            check_output(operands)


def check_output(operands):
    exact = oracle.linear_gelu(*(value.double() for value in operands.values()))
    plain = plain_linear_gelu(**operands)
    oracle.assert_as_good("output", kernels.linear_gelu(**operands), plain, exact)


def apart(value):
    """Rows 8 values further apart than they are long: a TMA stride."""
    return F.pad(value, (0, 8), value=torch.nan)[..., :-8]


TAKEN = [("x", apart), ("x", tokens_first), ("weight", apart), ("weight", width_first), ("bias", strided)]
REFUSED = [("x", cropped), ("x", misaligned), ("weight", rows_apart), ("weight", misaligned)]


@pytest.mark.parametrize(("name", "layout"), [*TAKEN, *REFUSED, ("gradient", tokens_first)])
def test_layouts(name, layout):
    """As contiguous operands, to the rounding of another order of sums; by way of bias_gelu where TMA cannot read."""
    operands, seed = linear_operands(HALF), torch.randn(2, 17, 40).to(HALF)
    _, _, gradients = oracle.outcome(kernels.linear_gelu, operands, [seed])
    if name == "gradient":
        seed = layout(seed)
    else:
        operands[name] = layout(operands[name])
    assert len(fused(lambda: kernels.linear_gelu(**operands))) == ((name, layout) not in REFUSED)
    _, _, found = oracle.outcome(kernels.linear_gelu, operands, [seed])
    torch.testing.assert_close(found, gradients, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("changes", [dict(shape=(2, 17, 20)), dict(width=36), dict(shape=(0, 24)), dict(shape=(3, 0))])
def test_what_tma_does_not_take(changes):
    """Rows of other than a multiple of 16 bytes, and nothing at all."""
    operands = linear_operands(HALF, **changes)
    assert not fused(lambda: kernels.linear_gelu(**operands))
    check("linear_gelu", plain_linear_gelu, operands)


def test_float32_master_weights():
    """Under autocast: 16-bit products, gradients in float32."""
    operands = linear_operands(torch.float32)
    with torch.autocast("cpu", HALF):
        assert fused(lambda: kernels.linear_gelu(**operands))
        (out,), seeds, gradients = oracle.outcome(kernels.linear_gelu, operands)
    exact, _, exact_gradients = oracle.outcome(
        oracle.linear_gelu, {name: value.double() for name, value in operands.items()}, [seeds[0].double()]
    )
    with torch.autocast("cpu", HALF):
        (plain,), _, plain_gradients = oracle.outcome(plain_linear_gelu, operands, seeds)
    assert out.dtype == HALF
    oracle.assert_as_good("output", out, plain, exact[0])
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        limits = dict(coarsest=torch.finfo(HALF).eps)
        oracle.assert_as_good(name, gradient, plain_gradients[name], exact_gradients[name], **limits)


def test_scales_of_rows_and_columns(poisoned):
    """As 8-bit products need them; with 16-bit operands, which the interpreter knows."""
    x, weight, bias = linear_operands(HALF, (33, 24), 72).values()
    row_scale, column_scale, out = (
        torch.rand(33) + 0.5,
        torch.rand(72) + 0.5,
        torch.full((33, 72), torch.nan, dtype=HALF),
    )
    jit.forward_launch(x, weight, bias, False)(x, weight, bias, row_scale, column_scale, out, None)
    want = oracle.bias_gelu((x.double() * row_scale[:, None]) @ (weight.double() * column_scale[:, None]).T, bias)
    torch.testing.assert_close(out.double(), want, rtol=2**-11, atol=3e-5)
    poisoned.allocated = None
