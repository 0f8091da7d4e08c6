"""add_layer_norm's Triton kernels beyond test_ops.py's cases: TRITON_INTERPRET=1 pytest -m interpreter."""

import functools

import oracle
import pytest
import torch
from op_cases import cropped, norm_operands, plain_norm, strided

from mar_fast import kernels
from mar_fast.kernels import device
from mar_fast.kernels.launch_config import LaunchConfig, forced

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
PLAIN = ("gamma", "drop_scale")
NAMES = ("x", "branch", "weight", "bias", "gamma", "drop_scale")


@pytest.fixture(autouse=True)
def _large_tiles():
    """The interpreter's cost follows the number of programs."""
    with tiles(32):
        yield


def tiles(rows):
    config = LaunchConfig(block_m=rows)
    return forced({"add_layer_norm.forward": config, "add_layer_norm.backward": config})


def check(operands):
    return oracle.compare(kernels.add_layer_norm, oracle.add_layer_norm, plain_norm, operands)


def leaves(operands, frozen=()):
    """The operands as leaves, in the order of the op's arguments."""
    return {
        name: None if operands[name] is None else operands[name].detach().requires_grad_(name not in frozen)
        for name in NAMES
    }


@every_dtype
@pytest.mark.parametrize("width", [1, 96, 384, 1408])
def test_widths(width, dtype):
    operands = norm_operands(dtype, 2, 5, width)
    if width == 1:  # the norm of a lone value is its bias, and the gradients that vanish have no digits
        normed = kernels.add_layer_norm(**operands)[1]
        assert torch.equal(normed, operands["bias"].expand_as(normed))
        return
    check(operands)


@pytest.mark.parametrize("without", [(), PLAIN, ("branch", *PLAIN)], ids=str)
@pytest.mark.parametrize(("rows", "programs"), [(1, 512), (2, 512), (4, 1), (4, 3), (16, 2), (64, 512)])
def test_tiles(rows, programs, without, monkeypatch):
    """51 rows, of which no size of tile but 1 takes a whole number; one program walks several, the last not all."""
    from mar_fast.kernels.jit import add_layer_norm as launcher

    monkeypatch.setattr(launcher, "ROW_PROGRAMS", programs)
    with tiles(rows):
        check(norm_operands(torch.float32, 3, 17 if rows > 2 else 3, 33, without))


MIXED = {
    "float16 branch of a float32 stream": dict(branch=torch.float16),
    "float16 branch, float32 scales": dict(branch=torch.float16, x=torch.float32),
    "float16 stream, float32 weights": dict(x=torch.float16, branch=torch.float16),
    "float32 branch of a float16 stream": dict(x=torch.float16),
}


@pytest.mark.parametrize("without", [(), PLAIN], ids=str)
@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_dtypes_side_by_side(dtypes, without):
    operands = norm_operands(torch.float32, without=without)
    operands |= {name: operands[name].to(dtype) for name, dtype in dtypes.items()}

    def plain(x, branch, weight, bias, gamma=None, drop_scale=None):
        """In float32 but for what is rounded by its dtype."""
        total, _ = plain_norm(x, branch, weight, bias, gamma=gamma, drop_scale=drop_scale)
        total = total.to(x.dtype)
        return total, plain_norm(total.float(), None, weight, bias)[1].to(x.dtype)

    outputs = oracle.compare(kernels.add_layer_norm, oracle.add_layer_norm, plain, operands)
    assert [out.dtype for out in outputs] == [operands["x"].dtype] * 2


def test_the_norm_is_that_of_the_rounded_sum():
    """As the next layer will see it: a branch far below the stream's precision leaves no trace in the norm."""
    operands = norm_operands(torch.float16, without=PLAIN)
    operands["x"] = torch.where(operands["x"] > 2, 1536, -1536).half()
    total, normed = kernels.add_layer_norm(**operands | dict(branch=operands["branch"].clamp(-0.4, 0.4)))
    assert torch.equal(total, operands["x"])
    assert torch.equal(normed, kernels.add_layer_norm(**operands | dict(branch=None))[1])


def test_the_norm_takes_autocasts_dtype():
    """A float32 stream stays, its norm is made for the next product. One rounding more, and no other difference."""
    operands = norm_operands(torch.float32)
    total, normed = kernels.add_layer_norm(**operands)
    with torch.autocast("cpu", torch.float16):
        cast_total, cast_normed = kernels.add_layer_norm(**operands)
    assert torch.equal(cast_total, total)
    assert torch.equal(cast_normed, normed.half())


def test_a_large_mean():
    """Where E[x^2] - E[x]^2 would have no digits left. The mean itself has steps of 1/32, of a deviation of 64."""
    operands = norm_operands(torch.float32, without=PLAIN)
    operands["x"] = (64 * torch.randn(3, 17, 33)).round() + 2.0**18
    operands["branch"] = torch.zeros(3, 17, 33)
    _, normed = kernels.add_layer_norm(**operands)
    exact = oracle.add_layer_norm(*(operands[name].double() for name in NAMES[:4]))[1]
    torch.testing.assert_close(normed, exact.float(), rtol=0, atol=1e-3)


# Strides.


def rows_apart(value):
    """Rows 3 elements further apart than they are long, after an odd offset."""
    buffer = torch.full((*value.shape[:-1], value.shape[-1] + 3), torch.nan, dtype=value.dtype)
    return buffer[..., 1:-2].copy_(value)


def tokens_first(value):
    """(B, N, D) in the memory of (N, B, D): no single row stride describes it."""
    return value.transpose(0, 1).contiguous().transpose(0, 1)


def width_first(value):
    return value.mT.contiguous().mT


def expanded(value):
    """As the gradient of a sum."""
    return value[:1, :1, :1].expand(value.shape)


def expanded_rows(value):
    """As the gradient of a mean over tokens and clips."""
    return value[:1, :1].expand(value.shape)


LAYOUTS = [cropped, strided, rows_apart, tokens_first, width_first]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    operands = norm_operands(torch.float32)
    for name in ("x", "branch"):
        operands[name] = layout(operands[name])
    for name in ("weight", "bias", "gamma", "drop_scale"):
        operands[name] = strided(operands[name])
    check(operands)


@pytest.mark.parametrize("layout", [*LAYOUTS, expanded, expanded_rows])
def test_any_strides_of_the_gradients(layout):
    operands = norm_operands(torch.float32)
    seeds = [layout(torch.randn(3, 17, 33)) for _ in range(2)]
    _, _, gradients = oracle.outcome(kernels.add_layer_norm, operands, seeds)
    _, _, contiguous = oracle.outcome(kernels.add_layer_norm, operands, [seed.contiguous() for seed in seeds])
    assert all(torch.equal(gradients[name], contiguous[name]) for name in NAMES)


def test_nothing_is_read_around_the_rows():
    """Beyond the last column lies NaN, in every operand that is not copied."""
    operands = norm_operands(torch.float32)
    seeds = [rows_apart(torch.randn(3, 17, 33)) for _ in range(2)]
    apart = operands | {name: rows_apart(operands[name]) for name in ("x", "branch")}
    outputs, _, gradients = oracle.outcome(kernels.add_layer_norm, apart, seeds)
    clean, _, clean_gradients = oracle.outcome(kernels.add_layer_norm, operands, seeds)
    assert all(torch.equal(out, want) for out, want in zip(outputs, clean, strict=True))
    assert all(torch.equal(gradients[name], clean_gradients[name]) for name in NAMES)


# What is not wanted is not made.


@pytest.mark.parametrize("used", [0, 1], ids=["sum", "normed"])
@pytest.mark.parametrize("without", [(), PLAIN], ids=str)
def test_one_output_used(used, without):
    """The other's gradient is None. Without the norm its weight and bias have no gradient, as in plain PyTorch."""

    def only(function, **operands):
        return function(**operands)[used]

    operands = norm_operands(torch.float32, without=without)
    functions = (functools.partial(only, f) for f in (kernels.add_layer_norm, oracle.add_layer_norm, plain_norm))
    oracle.compare(*functions, operands, no_gradient=() if used else ("weight", "bias"))


def test_without_a_branch():
    """sum is x itself, and x gets the gradients of both."""
    operands = leaves(norm_operands(torch.float32, without=("branch", *PLAIN)))
    assert kernels.add_layer_norm(**operands)[0] is operands["x"]
    check({name: operands[name] for name in NAMES})


class Launches:
    """What the launcher hands to its kernel, by the kernel's names."""

    def __init__(self, monkeypatch):
        from mar_fast.kernels.jit import add_layer_norm as launcher

        self.seen, launch = {}, launcher.launch

        def spy(name, kernel, grid, arguments, config, **constexprs):
            self.seen[name] = dict(zip(kernel.arg_names, arguments, strict=False))
            launch(name, kernel, grid, arguments, config, **constexprs)

        monkeypatch.setattr(launcher, "launch", spy)

    def absent(self):
        return {name for name, value in self.seen["add_layer_norm.backward"].items() if value is None}


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
    place = {"x": "grad_x", "branch": "grad_branch", "drop_scale": "drop_part"}.get(frozen, f"{frozen}_part")
    assert launches.absent() == {place}


def test_an_unscaled_branch_costs_nothing(monkeypatch):
    """Its gradient is that of x: the same memory. It is not kept for backward, and no part of it is read there."""
    launches = Launches(monkeypatch)
    values = leaves(norm_operands(torch.float32, without=PLAIN))
    total, normed = kernels.add_layer_norm(**values)
    saved = [value for value in normed.grad_fn.saved_tensors if value is not None]
    assert not [value for value in saved if value.data_ptr() == values["branch"].data_ptr()]
    of_x, of_branch = torch.autograd.grad((total.sum() + normed.square().sum()), (values["x"], values["branch"]))
    assert of_x.data_ptr() == of_branch.data_ptr()
    assert {"branch", "grad_branch", "gamma_part", "drop_part"} <= launches.absent()


def test_a_scaled_branch_is_kept_only_for_the_scales():
    values = leaves(norm_operands(torch.float32), frozen=("gamma", "drop_scale"))
    _, normed = kernels.add_layer_norm(**values)
    assert values["branch"].data_ptr() not in [v.data_ptr() for v in normed.grad_fn.saved_tensors if v is not None]


def test_only_the_branch_wants_a_gradient():
    """The stream is frozen, the branch is not, and they would share one."""
    operands = norm_operands(torch.float32, without=PLAIN)
    _, seeds, every = oracle.outcome(kernels.add_layer_norm, operands)
    values = leaves(operands, ("x", "weight", "bias"))
    torch.autograd.backward(kernels.add_layer_norm(**values), seeds)
    assert torch.equal(values["branch"].grad, every["branch"])
    assert values["x"].grad is None and values["weight"].grad is None


@every_dtype
def test_bitwise_repeatable(dtype):
    operands = norm_operands(dtype, 2, 17, 96)
    with tiles(4):
        first, seeds, first_gradients = oracle.outcome(kernels.add_layer_norm, operands)
        second, _, second_gradients = oracle.outcome(kernels.add_layer_norm, operands, seeds)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(first_gradients[name], second_gradients[name]) for name in NAMES)


def test_float64_is_left_to_pytorch(poisoned):
    operands = norm_operands(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_forced", None)
        check(operands)
    assert not poisoned.allocated
    poisoned.allocated = None


# The custom op, which torch.compile sees.


@pytest.mark.compiles
@pytest.mark.parametrize(
    "case", [dict(), dict(without=PLAIN), dict(without=("branch", *PLAIN)), dict(count=0)], ids=str
)
def test_opcheck(case):
    values = leaves(norm_operands(torch.float16, **case))
    arguments = [values[name] for name in NAMES]
    arguments.insert(4, 1e-6)
    custom = torch.ops.mar_fast.add_layer_norm.default
    torch.library.opcheck(custom, (*arguments, torch.float32, torch.float16))


@pytest.mark.compiles
@every_dtype
@pytest.mark.parametrize("without", [(), PLAIN, ("branch", *PLAIN)], ids=str)
def test_compiled(without, dtype):
    def program(x, branch, weight, bias, gamma=None, drop_scale=None):
        return kernels.add_layer_norm(x * 2, branch, weight, bias, gamma=gamma, drop_scale=drop_scale)

    torch.compiler.reset()
    operands = norm_operands(dtype, without=without)
    outputs, seeds, gradients = oracle.outcome(program, operands)
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    compiled_outputs, _, compiled_gradients = oracle.outcome(compiled, operands, seeds)
    assert all(torch.equal(one, other) for one, other in zip(outputs, compiled_outputs, strict=True))
    assert all(torch.equal(gradients[name], compiled_gradients[name]) for name in gradients)


@pytest.mark.compiles
def test_compiled_with_a_frozen_scale():
    """What backward gets then depends on what needs a gradient, in the traced graph too."""
    torch.compiler.reset()
    operands, results = norm_operands(torch.float32), []
    for run in (kernels.add_layer_norm, torch.compile(kernels.add_layer_norm, fullgraph=True, backend="aot_eager")):
        values = leaves(operands, ("drop_scale", "weight"))
        total, normed = run(**values)
        (total.square().sum() + normed.square().sum()).backward()
        results.append([value.grad for value in values.values()])
    for one, other in zip(*results, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def run_custom(x, branch, weight, bias, gamma, drop_scale):
    arguments = (x, branch, weight, bias, 1e-6, gamma, drop_scale, x.dtype, branch.dtype)
    return torch.ops.mar_fast.add_layer_norm(*arguments)


@pytest.mark.parametrize("run", [kernels.add_layer_norm, run_custom], ids=["function", "custom op"])
@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["sum", "square"])
def test_second_derivative_is_an_error(loss, run):
    values = leaves(norm_operands(torch.float32))
    value = loss(run(**values)[0]) + loss(run(**values)[1])
    with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula"):
        (gradient,) = torch.autograd.grad(value, values["x"], create_graph=True)
        (value + gradient.square().sum()).backward()
