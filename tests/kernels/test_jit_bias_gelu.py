"""bias_gelu's Triton kernel beyond what test_ops.py asks of every path: TRITON_INTERPRET=1 pytest -m interpreter."""

import oracle
import pytest
import torch
from op_cases import cropped, expanded, gelu_operands, plain_gelu, rows_apart, strided, width_first

from mar_fast import kernels
from mar_fast.kernels import device
from mar_fast.kernels.jit.launch import LaunchConfig, choose, forced

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def check(operands):
    return oracle.compare(kernels.bias_gelu, oracle.bias_gelu, plain_gelu, operands)[0]


@every_dtype
@pytest.mark.parametrize("columns", [1, 96, 257, 3072])
@pytest.mark.parametrize("rows", [1, 17, 130])
def test_bias_gelu(rows, columns, dtype):
    out = check(gelu_operands(dtype, (rows, columns)))
    assert out.dtype == dtype


@every_dtype
@pytest.mark.parametrize("shape", [(33,), (2, 17, 33), (2, 3, 5, 33)])
def test_any_number_of_dimensions(shape, dtype):
    assert check(gelu_operands(dtype, shape)).shape == shape


@every_dtype
@pytest.mark.parametrize("shape", [(0, 33), (0, 17, 33), (2, 0, 33), (17, 0)])
def test_nothing(shape, dtype):
    assert check(gelu_operands(dtype, shape)).shape == shape


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


def test_float64_is_left_to_pytorch(poisoned):
    """The kernel sums in float32, too coarse for gradcheck: float64 takes the eager path, and cannot be forced."""
    operands = gelu_operands(torch.float64)
    with pytest.raises(RuntimeError, match=r"bias_gelu.*float64"):
        kernels.bias_gelu(**operands)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_forced", None)
        check(operands)
    assert not poisoned.allocated
    poisoned.allocated = None


def expanded_rows(value):
    """All rows one row, as the gradient of a mean over tokens."""
    return value[:1].expand(value.shape)


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


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_the_gradient(layout, dtype):
    operands = gelu_operands(dtype, (17, 257))
    seed = layout(torch.randn(17, 257).to(dtype))
    assert not seed.is_contiguous()
    _, _, gradients = oracle.outcome(kernels.bias_gelu, operands, [seed])
    _, _, contiguous = oracle.outcome(kernels.bias_gelu, operands, [seed.contiguous()])
    for name, gradient in gradients.items():
        assert torch.equal(gradient, contiguous[name])


def test_rows_that_do_not_merge():
    """(17, 2, 33) in the memory of (2, 17, 33): no single row stride describes it."""
    x, bias = gelu_operands(torch.float32).values()
    check(dict(x=x.transpose(0, 1), bias=bias))


@every_dtype
def test_bitwise_repeatable(dtype):
    operands = gelu_operands(dtype, (130, 257))
    (first,), seeds, first_gradients = oracle.outcome(kernels.bias_gelu, operands)
    (second,), _, second_gradients = oracle.outcome(kernels.bias_gelu, operands, seeds)
    assert torch.equal(first, second)
    assert all(torch.equal(first_gradients[name], second_gradients[name]) for name in operands)


# The custom op, which torch.compile sees.


@pytest.mark.compiles
@every_dtype
@pytest.mark.parametrize("shape", [(17, 33), (2, 17, 33), (0, 33)])
def test_opcheck(shape, dtype):
    operands = [value.requires_grad_() for value in gelu_operands(dtype, shape).values()]
    torch.library.opcheck(torch.ops.mar_fast.bias_gelu.default, operands)


@pytest.mark.compiles
def test_opcheck_of_strides():
    x, bias = gelu_operands(torch.float32, (17, 33)).values()
    torch.library.opcheck(torch.ops.mar_fast.bias_gelu.default, (width_first(x).requires_grad_(), strided(bias)))


@pytest.mark.compiles
@every_dtype
def test_compiled(dtype):
    """Inductor calls the kernel through the custom op, with the surrounding code fused, and changes no bit of it."""
    from torch._inductor.compile_fx import compile_fx

    seen = []

    def inductor(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return compile_fx(graph, inputs)

    def program(x, bias):
        return kernels.bias_gelu(x * 2, bias)

    torch.compiler.reset()
    operands = gelu_operands(dtype)
    (out,), seeds, gradients = oracle.outcome(program, operands)
    compiled = torch.compile(program, fullgraph=True, backend=inductor)
    (compiled_out,), _, compiled_gradients = oracle.outcome(compiled, operands, seeds)
    assert torch.equal(compiled_out, out)
    assert all(torch.equal(compiled_gradients[name], gradients[name]) for name in operands)
    assert torch.ops.mar_fast.bias_gelu.default in seen


# Once differentiable.

RUNS = {"function": kernels.bias_gelu, "custom op": lambda x, bias: torch.ops.mar_fast.bias_gelu(x, bias)}


def gradient_of(loss, run):
    operands = {name: value.requires_grad_() for name, value in gelu_operands(torch.float32).items()}
    value = loss(RUNS[run](**operands))
    (gradient,) = torch.autograd.grad(value, operands["x"], create_graph=True)
    return value, gradient


@pytest.mark.parametrize("run", RUNS)
def test_second_derivative_is_an_error(run):
    with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula"):
        value, gradient = gradient_of(lambda out: out.square().sum(), run)
        (value + gradient.square().sum()).backward()


@pytest.mark.parametrize("run", RUNS)
def test_second_derivative_of_a_sum_is_an_error(run):
    """Here the incoming gradient is a constant, and the penalty could silently count as one too."""
    with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula"):
        value, gradient = gradient_of(torch.sum, run)
        (value + gradient.square().sum()).backward()
