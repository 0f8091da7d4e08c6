"""What holds for every op on the Triton path besides its values, which test_ops.py proves."""

import oracle
import pytest
import torch
from op_cases import OPS, call
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mar_fast import kernels
from mar_fast.kernels import device

pytestmark = pytest.mark.interpreter
every_op = pytest.mark.parametrize("name", OPS)


class Seen(TorchDispatchMode):
    """The names of all ops that are called within."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(str(op))
        return op(*args, **(kwargs or {}))


@every_op
def test_a_dispatch_mode_sees_the_op(name):
    """As flop counters and selective checkpointing need it; the values are the same."""
    op, operands = call(name)
    plain, seeds, plain_gradients = oracle.outcome(op, operands)
    with Seen() as seen:
        outputs, _, gradients = oracle.outcome(op, operands, seeds)
    called = op.func.__name__
    assert {f"mar_fast.{called}.default", f"mar_fast.{called}_backward.default"} <= seen.names
    assert all(torch.equal(*pair) for pair in zip(outputs, plain, strict=True))
    for key, gradient in gradients.items():
        assert gradient is None or torch.equal(gradient, plain_gradients[key])


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
