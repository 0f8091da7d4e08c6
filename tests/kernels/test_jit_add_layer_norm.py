"""add_layer_norm's Triton kernels beyond test_ops.py's cases: TRITON_INTERPRET=1 pytest -m interpreter."""

import functools

import oracle
import pytest
import torch
from op_cases import every_dtype, leaves, norm_operands, plain_norm

from mar_fast import kernels
from mar_fast.kernels.jit.launch import Launch, LaunchConfig, forced

pytestmark = pytest.mark.interpreter

SCALES = ("layer_scale", "row_scale")
PLAIN = (*SCALES, "x_bias")
NAMES = ("x", "residual", "weight", "bias", *PLAIN)


@pytest.fixture(autouse=True)
def _large_tiles():
    """The interpreter's cost follows the number of programs."""
    with tiles(32):
        yield


def tiles(rows):
    config = LaunchConfig(block_m=rows)
    return forced({"add_layer_norm_forward": config, "add_layer_norm_backward": config})


def check(operands):
    return oracle.compare(kernels.add_layer_norm, oracle.add_layer_norm, plain_norm, operands)


@every_dtype
@pytest.mark.parametrize("width", [1, 96, 384, 1408])
def test_widths(width, dtype):
    operands = norm_operands(dtype, 2, 5, width)
    if width == 1:  # the norm of a lone value is its bias, and the gradients that vanish have no digits
        normed = kernels.add_layer_norm(**operands)[0]
        assert torch.equal(normed, operands["bias"].expand_as(normed))
        return
    check(operands)


@pytest.mark.parametrize("without", [(), SCALES, ("residual", *PLAIN)], ids=str)
@pytest.mark.parametrize(("rows", "programs"), [(1, 512), (2, 512), (4, 1), (4, 3), (16, 2), (64, 512)])
def test_tiles(rows, programs, without, monkeypatch):
    """51 rows, of which no size of tile but 1 takes a whole number; one program walks several, the last not all."""
    from mar_fast.kernels.jit import add_layer_norm as launcher

    monkeypatch.setattr(launcher, "ROW_PROGRAMS", programs)
    with tiles(rows):
        check(norm_operands(torch.float32, 3, 17 if rows > 2 else 3, 33, without))


MIXED = {
    "float16 x, float32 residual": dict(x=torch.float16),
    "float16 x and scales, float32 residual": dict.fromkeys(("x", *PLAIN), torch.float16),
    "float16 x and residual, float32 weights": dict(x=torch.float16, residual=torch.float16),
    "float32 x, float16 residual": dict(residual=torch.float16),
}


@pytest.mark.parametrize("without", [(), SCALES], ids=str)
@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_dtypes_side_by_side(dtypes, without):
    operands = norm_operands(torch.float32, without=without)
    operands |= {name: operands[name].to(dtype) for name, dtype in dtypes.items() if name not in without}

    def plain(x, residual, weight, bias, **factors):
        """In float32 but for what is rounded by its dtype."""
        dtype = residual.dtype
        x, residual = x.float(), residual.float()
        _, total = plain_norm(x, residual, weight, bias, **factors)
        total = total.to(dtype)
        return plain_norm(total.float(), None, weight, bias)[0].to(dtype), total

    outputs = oracle.compare(kernels.add_layer_norm, oracle.add_layer_norm, plain, operands)
    assert [out.dtype for out in outputs] == [operands["residual"].dtype] * 2


def test_the_norm_is_that_of_the_rounded_sum():
    """As the next layer will see it: an x far below the residual's precision leaves no trace in the norm."""
    operands = norm_operands(torch.float16, without=PLAIN)
    stream = torch.where(operands["residual"] > 2, 1536, -1536).half()
    small = operands["x"].clamp(-0.4, 0.4)
    normed, residual = kernels.add_layer_norm(**operands | dict(x=small, residual=stream))
    assert torch.equal(residual, stream)
    assert torch.equal(normed, kernels.add_layer_norm(**operands | dict(x=stream, residual=None))[0])


def test_the_norm_takes_autocasts_dtype():
    """A float32 residual stays, its norm is made for the next product. One rounding more, and no other difference."""
    operands = norm_operands(torch.float32)
    normed, residual = kernels.add_layer_norm(**operands)
    with torch.autocast("cpu", torch.float16):
        cast_normed, cast_residual = kernels.add_layer_norm(**operands)
    assert torch.equal(cast_residual, residual)
    assert torch.equal(cast_normed, normed.half())


def test_a_large_mean():
    """Where E[x^2] - E[x]^2 would have no digits left. The mean itself has steps of 1/32, of a deviation of 64."""
    operands = norm_operands(torch.float32, without=PLAIN)
    operands["residual"] = (64 * torch.randn(3, 17, 33)).round() + 2.0**18
    operands["x"] = torch.zeros(3, 17, 33)
    normed, _ = kernels.add_layer_norm(**operands)
    exact = oracle.add_layer_norm(*(operands[name].double() for name in NAMES[:4]))[0]
    torch.testing.assert_close(normed, exact.float(), rtol=0, atol=1e-3)


# What is not wanted is not made.


@pytest.mark.parametrize("used", [0, 1], ids=["normed", "residual"])
@pytest.mark.parametrize("without", [(), SCALES], ids=str)
def test_one_output_used(used, without):
    """The other's gradient is None. Without the norm its weight and bias have no gradient, as in plain PyTorch."""

    def only(function, **operands):
        return function(**operands)[used]

    operands = norm_operands(torch.float32, without=without)
    functions = (functools.partial(only, f) for f in (kernels.add_layer_norm, oracle.add_layer_norm, plain_norm))
    oracle.compare(*functions, operands, no_gradient=("weight", "bias") if used else ())


def test_without_a_residual():
    """It is x itself, and x gets the gradients of both."""
    operands = leaves(norm_operands(torch.float32, without=("residual", *PLAIN)))
    assert kernels.add_layer_norm(**operands)[1] is operands["x"]
    check({name: operands[name] for name in NAMES})


class Launches:
    """What is handed to kernels, by their names for it."""

    def __init__(self, monkeypatch):
        self.seen, launch = {}, Launch.__call__

        def spy(made, *tensors):
            arguments = zip(made.kernel.arg_names, (*tensors, *made.numbers), strict=False)
            self.seen[made.choice.kernel] = dict(arguments) | made.constants
            launch(made, *tensors)

        monkeypatch.setattr(Launch, "__call__", spy)

    def absent(self):
        """What backward does not read or write."""
        arguments = self.seen["add_layer_norm_backward"]
        return {name for name, value in arguments.items() if value is None or value is False}


@pytest.mark.parametrize("frozen", NAMES)
def test_frozen(frozen, monkeypatch):
    """What needs no gradient gets none, nothing is computed for it, and the others stay as they are."""
    launches = Launches(monkeypatch)
    operands = norm_operands(torch.float32)
    seeds = [torch.randn(3, 17, 33) for _ in range(2)]
    _, _, every = oracle.outcome(kernels.add_layer_norm, operands, seeds)
    assert launches.absent() == set()
    values = leaves(operands, (frozen,))
    torch.autograd.backward(kernels.add_layer_norm(**values), seeds)
    for name, value in values.items():
        assert value.grad is None if name == frozen else torch.equal(value.grad, every[name])
    written = {"x": "grad_x", "residual": "grad_old_residual", "row_scale": "row_part"}
    assert launches.absent() == {written.get(frozen, frozen.upper())}


def kept(normed):
    """Addresses of what is saved for backward."""
    return {value.data_ptr() for value in normed.grad_fn.saved_tensors if value is not None}


def test_an_unscaled_x_costs_nothing(monkeypatch):
    """Its gradient is that of the residual: the same memory. It is not kept for backward, and not read there."""
    launches = Launches(monkeypatch)
    values = leaves(norm_operands(torch.float32, without=SCALES))
    normed, residual = kernels.add_layer_norm(**values)
    assert values["x"].data_ptr() not in kept(normed)
    of_x, of_residual = torch.autograd.grad(residual.sum() + normed.square().sum(), (values["x"], values["residual"]))
    assert of_x.data_ptr() == of_residual.data_ptr()
    assert launches.absent() == {"x", "layer_scale", "row_scale", "grad_x", "LAYER_SCALE", "row_part"}


def test_a_scaled_x_is_kept_only_for_the_scales():
    values = leaves(norm_operands(torch.float32), frozen=SCALES)
    normed, _ = kernels.add_layer_norm(**values)
    assert values["x"].data_ptr() not in kept(normed)
    normed, _ = kernels.add_layer_norm(**leaves(norm_operands(torch.float32)))
    assert normed.grad_fn.saved_tensors[4] is not None


def test_without_gradients_nothing_is_written_for_them(monkeypatch):
    """No mean and no deviation; with them both. A scale of rows only where they are in fp8."""
    launches = Launches(monkeypatch)
    operands = norm_operands(torch.float32)
    kernels.add_layer_norm(**operands)
    seen = launches.seen["add_layer_norm_forward"]
    assert {name for name, value in seen.items() if value is None} == {"statistics", "scale"}
    kernels.add_layer_norm(**leaves(operands))
    seen = launches.seen["add_layer_norm_forward"]
    assert [name for name, value in seen.items() if value is None] == ["scale"]


def test_only_x_wants_a_gradient():
    """The residual is frozen, x is not, and they would share one."""
    operands = norm_operands(torch.float32, without=PLAIN)
    _, seeds, every = oracle.outcome(kernels.add_layer_norm, operands)
    values = leaves(operands, ("residual", "weight", "bias"))
    torch.autograd.backward(kernels.add_layer_norm(**values), seeds)
    assert torch.equal(values["x"].grad, every["x"])
    assert values["residual"].grad is None and values["weight"].grad is None
