"""quantize_rows and scaled_linear: every code of e4m3, every tie, scales, and products against float64."""

import sys

import pytest
import torch
from helpers import relative
from op_cases import cropped, every_dtype, rows_apart

from mar_fast import kernels
from mar_fast.kernels import QuantizedRows, device, quantize_rows, scaled_linear

E4M3 = torch.float8_e4m3fn
TABLE = torch.tensor(  # the finite values from 0 up, by the format: 4 bits of exponent with bias 7, 3 of mantissa
    [(m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1]
)


def codes(rows):
    return rows.values.view(torch.uint8)


def check(rows, x, tolerance):
    """Against float64: scales, and values to half a step, which is 1/16 of a value, and less for the smallest."""
    largest = x.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(rows.scale.double(), largest / 448, rtol=tolerance, atol=0)
    bound = x.abs() / 16 + largest / 448 * 2.0**-10 + largest * tolerance
    assert bool(((rows.values.double() * rows.scale.double() - x).abs() <= bound).all())


@pytest.mark.triton_too
@every_dtype
def test_every_code_and_tie(dtype):
    """A row whose largest value is 448 has scale 1. What lies between two codes goes to the nearer, or the even one."""
    assert torch.equal(quantize_rows(TABLE[None].to(dtype)).values.float(), TABLE[None])
    middle = ((TABLE[1:] + TABLE[:-1]) / 2).to(dtype)
    even = torch.arange(len(middle)) + torch.arange(len(middle)) % 2
    # The next value of a 16-bit dtype may be a whole step away: ties alone there.
    nudges = ((0.0, even), (1e-3, torch.arange(1, len(TABLE))), (-1e-3, torch.arange(len(middle))))
    for nudge, expected in nudges if dtype == torch.float32 else nudges[:1]:
        for sign in (1, -1):
            x = sign * torch.cat((middle * (1 + nudge), torch.tensor([448.0], dtype=dtype)))
            rows = quantize_rows(x[None])
            assert rows.scale.item() == 1
            assert torch.equal(codes(rows)[0, :-1].int() & 127, expected.int())
            assert torch.equal(rows.values.float().sign()[0], TABLE[[*expected, -1]].sign() * sign)


@pytest.mark.triton_too
@pytest.mark.parametrize("columns", [1, 33, 384, 3072])
@every_dtype
def test_rows(columns, dtype):
    """Each row by its own largest value."""
    x = torch.randn(2, 17, columns) * torch.logspace(-4, 2, 17)[:, None]
    x = x.to(dtype)
    rows = quantize_rows(x)
    assert (rows.values.dtype, rows.values.shape, rows.dtype) == (E4M3, x.shape, dtype)
    check(rows, x.double(), 2e-7)


@pytest.mark.triton_too
@pytest.mark.parametrize(("shape", "columns"), [((2, 17), 96), ((5,), 33), ((1, 3), 768), ((0, 3), 33)])
@every_dtype
def test_rows_of_a_norm(shape, columns, dtype):
    """In one pass, from the norm in float32; the new residual is add_layer_norm's."""
    x, residual = (rows_apart(torch.randn(*shape, columns).to(dtype)) for _ in range(2))
    weight, bias = torch.randn(2, columns).to(dtype)
    for stream in (residual, None):
        rows, new_residual = kernels.add_layer_norm_rows(x, stream, weight, bias, eps=1e-5)
        assert (rows.values.dtype, rows.values.shape, rows.dtype) == (E4M3, x.shape, dtype)
        assert torch.equal(new_residual, kernels.add_layer_norm(x, stream, weight, bias)[1])
        wide = new_residual.double()
        wide = wide - wide.mean(-1, keepdim=True)
        wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        check(rows, wide * weight.double() + bias.double(), 1e-5)


@pytest.mark.triton_too
@pytest.mark.parametrize(("shape", "columns"), [((2, 17), 96), ((5,), 33), ((3,), 3072), ((0, 3), 33)])
@every_dtype
def test_rows_of_gelu(shape, columns, dtype):
    x, bias = rows_apart(torch.randn(*shape, columns).to(dtype)), torch.randn(columns).to(dtype)
    rows = kernels.bias_gelu_rows(x, bias)
    assert (rows.values.dtype, rows.values.shape, rows.dtype) == (E4M3, x.shape, dtype)
    wide = x.double() + bias.double()
    check(rows, wide * (1 + torch.special.erf(wide / 2**0.5)) / 2, 1e-4)


@pytest.mark.triton_too
def test_layouts_and_nothing():
    """Rows apart, crops and rows that no stride describes; no rows at all; the same bits in plain PyTorch."""
    x = torch.randn(3, 5, 33)
    want = quantize_rows(x)
    with kernels.use_backend("eager"):
        assert torch.equal(codes(quantize_rows(x)), codes(want))
    for other in (rows_apart(x), cropped(x), x.transpose(0, 1).contiguous().transpose(0, 1)):
        got = quantize_rows(other)
        assert torch.equal(codes(got), codes(want)) and torch.equal(got.scale, want.scale)
    for shape in ((0, 33), (2, 0, 33)):
        assert quantize_rows(torch.empty(shape)).scale.shape == (*shape[:-1], 1)


@pytest.mark.triton_too
def test_extreme_rows():
    """Zeros, the least and the largest values; NaN and infinity show in the product."""
    x = torch.tensor([0.0, 1e-38, 3e38])[:, None].expand(3, 16).contiguous()
    rows = quantize_rows(x)
    torch.testing.assert_close(rows.values.float() * rows.scale, x, rtol=1e-6, atol=1e-37)
    x = torch.ones(3, 16)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    product = scaled_linear(quantize_rows(x), quantize_rows(torch.ones(16, 16)), emulate=True)
    assert product.isnan().all(1).tolist() == [True, True, False] and bool((product[2] == 16).all())


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["quantize_rows", "add_layer_norm_rows", "bias_gelu_rows"])
def test_library_ops(name):
    x, vector = rows_apart(torch.randn(3, 33)), torch.randn(33)
    operands = dict(quantize_rows=(x,), bias_gelu_rows=(x, vector), add_layer_norm_rows=(x, x, vector, vector, 1e-6))
    torch.library.opcheck(getattr(torch.ops.mar_fast, name).default, operands[name])


def operands(rows=(2, 17), inputs=96, outputs=48, dtype=torch.bfloat16):
    x, weight = torch.randn(*rows, inputs).to(dtype), torch.randn(outputs, inputs) / inputs**0.5
    return quantize_rows(x), quantize_rows(weight), torch.randn(outputs).to(dtype)


def exact(x, weight, bias):
    """In float64, from what the rows stand for."""
    wide = (x.values.double() * x.scale.double()) @ (weight.values.double() * weight.scale.double()).T
    return wide + bias.bfloat16().double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_product(dtype):
    """Rounded once, to bfloat16: half a unit of its last place."""
    x, weight, bias = operands(dtype=dtype)
    y, want = scaled_linear(x, weight, bias, emulate=True), exact(x, weight, bias)
    assert (y.dtype, y.shape) == (dtype, (2, 17, 48))
    assert bool(((y.double() - want).abs() <= want.abs() * 2.0**-8 + 1e-5).all())
    assert torch.equal(y.bfloat16().to(dtype), y)
    with torch.autocast("cpu", torch.bfloat16):  # not even within autocast are products rounded
        assert torch.equal(scaled_linear(x, weight, bias, emulate=True), y)
    assert scaled_linear(*operands(rows=(0, 3)), emulate=True).shape == (0, 3, 48)


def test_product_of_the_device(monkeypatch):
    """torch._scaled_mm, which has a CPU form too: what is emulated is what it computes."""
    x, weight, bias = operands()
    monkeypatch.setattr(sys.modules["mar_fast.kernels.scaled_linear"], "has_fp8", lambda operand: True)
    y = scaled_linear(x, weight, bias)
    assert relative(y, scaled_linear(x, weight, bias, emulate=True)) < 2e-3
    assert relative(scaled_linear(x, weight), scaled_linear(x, weight, emulate=True)) < 2e-3


@pytest.mark.parametrize(
    ("target", "runs"), [("sm_80", False), ("sm_89", True), ("sm_90", True), ("sm_120", True), ("gfx942", False)]
)
def test_devices(target, runs):
    """Which ones have products in 8 bits; of those the device op has the shapes."""
    x, weight, bias = ((v.to("meta") if torch.is_tensor(v) else QuantizedRows(*(t.to("meta") for t in v[:2]), v.dtype))
                       for v in operands())  # fmt: skip
    with device.assumed_architecture(target):
        if runs:
            y = scaled_linear(x, weight, bias)
            assert (y.shape, y.dtype) == ((2, 17, 48), torch.bfloat16)
        else:
            with pytest.raises(ValueError, match=r"x: got tensors on meta, without fp8 .* or emulate=True"):
                scaled_linear(x, weight, bias)
        if device.HAS_TRITON and not runs:
            with kernels.use_backend("triton"), pytest.raises(RuntimeError, match="sm_89"):
                quantize_rows(torch.empty(3, 33, device="meta"))


def test_errors():
    x, weight, bias = operands()
    for arguments, text in (
        ((x.values, weight), "x: got Tensor, expected QuantizedRows"),
        ((x, QuantizedRows(weight.values.float(), weight.scale, None)), r"weight\.values: got torch.float32"),
        ((QuantizedRows(x.values, x.scale[0], None), weight), r"x\.scale: got shape \(17, 1\)"),
        (operands(outputs=40), r"weight: got shape \(40, 96\), expected multiples of 16"),
        ((x, operands(inputs=112)[1]), r"x: got shape \(2, 17, 96\), expected \(\.\.\., 112\)"),
        ((x, weight, bias[:-1]), r"bias: got shape \(47,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            scaled_linear(*arguments, emulate=True)
    for bad, text in ((torch.ones(3).int(), "torch.int32"), (torch.tensor(1.0), r"shape \(\)"), (bias[:0], "D at")):
        with pytest.raises((TypeError, ValueError), match=f"x: .*{text}"):
            quantize_rows(bad)
    with pytest.raises(ValueError, match="x: got a tensor that requires a gradient"):
        quantize_rows(torch.ones(3, 4, requires_grad=True))
    ones, weight = torch.ones(4), torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="x, residual, weight, bias: got a tensor that requires a gradient"):
        kernels.add_layer_norm_rows(torch.ones(3, 4), None, weight, ones)
    with pytest.raises(ValueError, match="x, bias: got a tensor that requires a gradient"):
        kernels.bias_gelu_rows(torch.ones(3, 4), weight)
    with torch.no_grad():
        quantize_rows(torch.ones(3, 4, requires_grad=True))
