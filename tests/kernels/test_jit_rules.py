"""What holds for every op on the Triton path besides its values, which test_ops.py proves."""

import functools

import oracle
import pytest
import torch
from op_cases import (
    LAYOUTS,
    MEAN,
    OPS,
    STD,
    call,
    cropped,
    every_dtype,
    expanded_rows,
    leaves,
    rows_apart,
    strided,
    width_first,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mar_fast import kernels
from mar_fast.kernels import device
from mar_fast.kernels.jit.launch import LaunchConfig, forced

pytestmark = pytest.mark.interpreter
every_op = pytest.mark.parametrize("name", OPS)
# The interpreter's cost follows the number of programs.
TILES = {
    **dict.fromkeys(("add_layer_norm_forward", "add_layer_norm_backward"), LaunchConfig(32)),
    **dict.fromkeys(("scatter_tokens_forward", "scatter_tokens_backward"), LaunchConfig(64, 64)),
}
PLAIN = ("layer_scale", "row_scale", "x_bias")


@pytest.fixture(autouse=True)
def _large_tiles():
    with forced(TILES):
        yield


class Seen(TorchDispatchMode):
    """All ops that are called within, by name, and the arguments of the last call of each."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls[str(op)] = op, args
        return op(*args, **(kwargs or {}))


def library_call(op, values):
    """The library op that a call with gradients is under torch.compile, and its arguments."""
    with Seen() as seen:
        op(**values)
    return seen.calls[f"mar_fast.{op.func.__name__}.default"]


@every_op
def test_a_dispatch_mode_sees_the_op(name):
    """As flop counters and selective checkpointing need it; the values are the same."""
    op, operands = call(name)
    plain, seeds, plain_gradients = oracle.outcome(op, operands)
    with Seen() as seen:
        outputs, _, gradients = oracle.outcome(op, operands, seeds)
    called = op.func.__name__
    assert {f"mar_fast.{called}.default", f"mar_fast.{called}_backward.default"} <= set(seen.calls)
    torch.testing.assert_close((outputs, gradients), (plain, plain_gradients), rtol=0, atol=0)


@every_dtype
@every_op
def test_bitwise_repeatable(name, dtype):
    op, operands = call(name, dtype)
    first, seeds, first_gradients = oracle.outcome(op, operands)
    second, _, second_gradients = oracle.outcome(op, operands, seeds)
    torch.testing.assert_close((second, second_gradients), (first, first_gradients), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [cropped, strided, rows_apart, expanded_rows])
@pytest.mark.parametrize("name", [name for name in OPS if "loss" not in name])
def test_any_strides_of_the_gradients(name, layout):
    """Those of the outputs, next to NaN where there is room between rows."""
    op, operands = call(name)
    seeds = [layout(seed) for seed in oracle.outcome(op, operands)[1]]
    _, _, gradients = oracle.outcome(op, operands, seeds)
    _, _, contiguous = oracle.outcome(op, operands, [seed.contiguous() for seed in seeds])
    torch.testing.assert_close(gradients, contiguous)


@every_op
def test_float64_is_left_to_pytorch(name, poisoned):
    """The kernels sum in float32: they cannot be forced to take it."""
    op, operands = call(name, torch.float64)
    with pytest.raises(RuntimeError, match=rf"{op.func.__name__} .*float64"):
        op(**operands)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_forced", None)
        outputs, seeds, gradients = oracle.outcome(op, operands)
    exact = functools.partial(getattr(oracle, op.func.__name__), **op.keywords)
    exact_outputs, _, exact_gradients = oracle.outcome(exact, operands, seeds)
    torch.testing.assert_close((outputs, gradients), (exact_outputs, exact_gradients))
    assert not poisoned.allocated
    poisoned.allocated = None


@pytest.mark.skipif(not device.INTERPRETING, reason="bfloat16 is right on a GPU")
@every_op
def test_bfloat16_is_refused(name, poisoned):
    op, operands = call(name)
    half = {
        key: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in operands.items()
    }
    with pytest.raises(RuntimeError, match=r"got bfloat16, expected float32 or float16 with TRITON_INTERPRET=1"):
        op(**half)
    with kernels.use_backend("eager"):
        op(**half)
    poisoned.allocated = None


@pytest.mark.skipif(not device.INTERPRETING, reason="bfloat16 is right on a GPU")
def test_autocast_to_bfloat16_is_refused(poisoned):
    qkv = torch.randn(1, 4, 3, 2, 32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="got bfloat16"):
        kernels.attention(qkv)
    poisoned.allocated = None


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("library", [False, True])
@every_op
def test_second_derivative_is_an_error(name, library, square):
    """Also where the incoming gradient is a constant, as that of a sum."""
    op, operands = call(name)
    values = leaves(operands)
    run, arguments = library_call(op, values) if library else (lambda *_: op(**values), [*values.values()])
    outputs = run(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    value = sum((out.square() if square else out).sum() for out in outputs if out.requires_grad)
    first = next(value for value in arguments if torch.is_tensor(value) and value.requires_grad)
    if name.endswith("loss"):
        first = arguments[0]
    with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula"):
        (gradient,) = torch.autograd.grad(value, first, create_graph=True)
        (value + gradient.square().sum()).backward()


@pytest.mark.compiles
@every_op
def test_fake_tensors(name, poisoned):
    """Shapes, dtypes and strides without any memory; nothing is launched."""
    op, operands = call(name)
    outputs, _, gradients = oracle.outcome(op, operands)
    poisoned.allocated = 0
    mode = FakeTensorMode()
    fakes = {key: mode.from_tensor(value) if torch.is_tensor(value) else value for key, value in operands.items()}
    with mode:
        fake_outputs, _, fake_gradients = oracle.outcome(op, fakes)
    for fake, real in zip(fake_outputs, outputs, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    for key, fake in fake_gradients.items():
        assert (fake is None) == (gradients[key] is None)
        assert fake is None or (fake.shape, fake.dtype) == (gradients[key].shape, gradients[key].dtype)
    assert not poisoned.allocated
    poisoned.allocated = None


CLIP = dict(grid=(1, 2, 2), width=7)
VIDEOS = [dict(video=torch.float32), dict(video=torch.uint8)]
NORMALISED = dict(mean=MEAN, std=STD)
# Calls: the op, what is not ordinary of its operands, options, and operands that need no gradient.
LIBRARY_CALLS = [
    *((name, {}, {}, ()) for name in OPS),
    *(
        ("gather_patch_embed", CLIP | video | case, NORMALISED, ())
        for video in VIDEOS
        for case in (*(dict(count=3, layout=layout) for layout in LAYOUTS), dict(lengths=(1, 0, 3)))
    ),
    *(
        ("masked_patch_loss", dict(dtype=torch.float16, layout="channels_last") | video | case, options, ())
        for video in VIDEOS
        for case in (dict(count=0), dict(count=3), dict(lengths=(1, 0, 3)))
        for options in ({}, NORMALISED | dict(normalize=False))
    ),
    *(
        ("scatter_tokens", dict(dtype=torch.float16) | case, {}, frozen)
        for case in ({}, dict(index=torch.int64), dict(lengths=(5, 0, 12)))
        for frozen in (("pos_embed",), ("visible", "mask_token"))
    ),
    *(("add_layer_norm", dict(dtype=torch.float16, without=names), {}, ()) for names in (PLAIN, ("residual", *PLAIN))),
    ("add_layer_norm", {}, {}, ("row_scale", "weight")),
    *((name, dict(count=0), {}, ()) for name in ("gather_patch_embed", "scatter_tokens", "add_layer_norm")),
    *(("bias_gelu", dict(dtype=torch.float16, shape=shape), {}, ()) for shape in ((17, 33), (0, 33))),
    ("attention_varlen", dict(dtype=torch.float16, lengths=(5, 0, 12), spare=3), dict(scale=0.3), ()),
]


@pytest.mark.compiles
@pytest.mark.parametrize(("name", "case", "options", "frozen"), LIBRARY_CALLS, ids=str)
def test_opcheck(name, case, options, frozen):
    op, operands = call(name, **case)
    torch.library.opcheck(*library_call(functools.partial(op, **options), leaves(operands, frozen)))


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["bias_gelu", "scatter_tokens"])
def test_opcheck_of_strides(name):
    op, operands = call(name)
    laid = {key: width_first(value) if value.ndim > 1 else strided(value) for key, value in operands.items()}
    torch.library.opcheck(*library_call(op, leaves(laid)))


COMPILED = [(name, {}, "aot_eager") for name in OPS if not name.endswith("bias_gelu")]
COMPILED += [
    ("masked_patch_loss", dict(video=torch.uint8), "aot_eager"),
    ("add_layer_norm", dict(without=PLAIN), "aot_eager"),
    ("add_layer_norm", dict(without=("residual", *PLAIN)), "aot_eager"),
    ("bias_gelu", {}, "inductor"),
    ("gather_patch_embed", dict(video=torch.uint8), "inductor"),
    ("attention_varlen", {}, "inductor"),
]


@pytest.mark.compiles
@pytest.mark.parametrize(("name", "case", "backend"), COMPILED, ids=str)
def test_compiled(name, case, backend):
    """The op is in the graph, with the surrounding code fused by inductor, and no bit is another."""
    op, operands = call(name, **case)
    first, seen, compile_graph = next(iter(operands)), [], torch._dynamo.lookup_backend(backend)

    def program(**operands):
        return op(**operands | {first: operands[first] * 2})

    def watched(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return compile_graph(graph, inputs)

    torch.compiler.reset()
    outputs, seeds, gradients = oracle.outcome(program, operands)
    compiled = torch.compile(program, fullgraph=True, backend=watched)
    compiled_outputs, _, compiled_gradients = oracle.outcome(compiled, operands, seeds)
    torch.testing.assert_close((compiled_outputs, compiled_gradients), (outputs, gradients), rtol=0, atol=0)
    assert getattr(torch.ops.mar_fast, op.func.__name__).default in seen


@every_op
def test_taken_without_being_asked_for(name, poisoned):
    """The kernel is the default where it can run, and eager is a choice."""
    op, operands = call(name)
    with kernels.use_backend("eager"):
        op(**operands)
    assert not poisoned.allocated
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.device, "_forced", None)
        op(**operands)
    assert poisoned.allocated
