"""Plans beside what else looks at calls, changes their gradients, or ends: TRITON_INTERPRET=1."""

import gc
import os

import oracle
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from op_cases import cropped, strided
from plan_cases import (
    CALLS,
    assert_same,
    every_op,
    floating,
    misaligned,
    outcome,
    small_call,
    tensors,
    unplanned,
)
from torch.fx.experimental.proxy_tensor import make_fx

from mar_fast import kernels
from mar_fast.kernels import checks, plan
from mar_fast.kernels.plan import Plans

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("few_tiles")]


# Something else looks on.


@every_op
def test_traced_after_a_planned_call(name):
    """A trace has the op, not what it did, and no fake result is kept for a real call."""
    op, operands = small_call(name)
    want = tensors(op(**operands))
    with checks.unread():  # which no trace takes
        graph = make_fx(lambda inputs: op(**inputs))(operands)
    assert [node for node in graph.graph.nodes if str(node.target) == f"mar_fast.{name}.default"]
    assert_same(tensors(graph(operands)), want)
    assert_same(tensors(op(**operands)), want)


class Labelled(torch.Tensor):
    """A tensor of another kind."""


@every_op
def test_another_kind_of_tensor_after_a_planned_call(name, poisoned):
    op, operands = small_call(name)
    want = tensors(op(**operands))
    for key in floating(operands):
        got = tensors(op(**operands | {key: operands[key].as_subclass(Labelled)}))
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x),
}


@every_op
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(name, transform, poisoned):
    """A clear error, before and after a planned call; never a wrong or missing derivative."""
    op, operands = small_call(name)
    key = "pixels" if name == "masked_patch_loss" else floating(operands)[0]

    def of_one(x):
        return tensors(op(**operands | {key: x}))[0]

    for _ in range(2):
        expected = rf"^{name}: got a call under torch.func .* expected autograd, or use_backend\('eager'\)"
        with checks.unread(), pytest.raises(RuntimeError, match=expected):
            TRANSFORMS[transform](of_one, operands[key])
        op(**operands)
    with kernels.use_backend("eager"):
        if transform in ("grad", "vjp"):
            TRANSFORMS[transform](of_one, operands[key])


@every_op
def test_forward_mode(name):
    """A dual tensor is an error on this path, for each operand, and no tangent is lost in silence."""
    op, operands = small_call(name)
    for key in floating(operands):
        for _ in range(2):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(operands[key], torch.ones_like(operands[key]))
                with pytest.raises(RuntimeError, match=rf"^{name}: .*forward-mode"):
                    op(**operands | {key: dual})
            op(**operands)


@pytest.mark.compiles
@every_op
def test_tangents_of_the_library_op(name, poisoned):
    """As it is in graphs: PyTorch leaves tangents out there without a word, so it is an error here."""
    op, operands = small_call(name)
    key = "pixels" if name == "masked_patch_loss" else floating(operands)[0]
    x = operands[key]

    def tangent(x):
        return torch.func.jvp(lambda x: tensors(op(**operands | {key: x}))[0], (x,), (torch.ones_like(x),))[1]

    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=rf"{name}: got a call under torch.func"):
        torch.compile(tangent, backend="aot_eager")(x)
    poisoned.allocated = None


def test_tangents_of_the_library_op_itself():
    _, operands = small_call("bias_gelu")
    kernels.bias_gelu(**operands)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"^bias_gelu: .*forward-mode"):
        torch.ops.mar_fast.bias_gelu(forward_ad.make_dual(operands["x"], operands["x"]), operands["bias"])


@every_op
def test_batched_gradients(name):
    """vmap over the backward pass of a planned call."""
    op, operands = small_call(name)
    leaves = {key: value.requires_grad_() if key in floating(operands) else value for key, value in operands.items()}
    wanted = [leaves[key] for key in floating(operands) if (name, key) != ("masked_patch_loss", "video")]
    for _ in range(2):
        out = tensors(op(**leaves))[0]
        with pytest.raises(RuntimeError, match=rf"^{name}: .*vmap"):
            torch.autograd.grad(out, wanted, torch.ones(2, *out.shape, dtype=out.dtype), is_grads_batched=True)
        torch.autograd.grad(tensors(op(**leaves))[0].sum(), wanted)


# What comes back from autograd.


def packed(layout):
    return torch.autograd.graph.saved_tensors_hooks(layout, lambda kept: kept)


@every_op
@pytest.mark.parametrize("layout", [strided, misaligned, cropped])
def test_saved_tensors_in_another_layout(name, layout):
    """As hooks that offload or compress them may give them back: all of them, inputs and outputs."""
    op, operands = small_call(name)
    want, seeds = outcome(op, operands)

    def saved_elsewhere(**rest):
        with packed(lambda value: layout(value) if value.numel() else value):
            return op(**rest)

    for _ in range(2):
        got, _ = outcome(saved_elsewhere, operands, seeds)
        assert_same(got, want)
        assert_same(outcome(op, operands, seeds)[0], want)


@every_op
def test_gradients_in_another_layout(name):
    """Those of one planned call: contiguous, strided, expanded, of no memory of their own."""
    op, operands = small_call(name)
    outputs, seeds, _ = oracle.outcome(op, operands)
    ones = [torch.ones_like(out) for out in outputs]
    with unplanned():
        want, _ = outcome(op, operands, seeds)
    for layout in (torch.clone, strided, misaligned, cropped, torch.clone):
        laid = [layout(seed) if seed.ndim else seed for seed in seeds]
        assert_same(outcome(op, operands, laid)[0], want)
    expanded = [torch.ones((), dtype=out.dtype).expand(out.shape) for out in outputs]
    assert_same(outcome(op, operands, expanded)[0], outcome(op, operands, ones)[0])


def test_outputs_used_one_at_a_time():
    """An unused output has no gradient: this is another backward pass of the same plan."""
    calls = {
        "add_layer_norm": small_call("add_layer_norm"),
        "attention": (lambda qkv: kernels.attention(qkv, return_lse=True), small_call("attention")[1]),
    }
    for name, (op, operands) in calls.items():
        for used in (slice(0, 1), slice(1, 2), slice(0, 2), slice(1, 2), slice(0, 1)):

            def some(op=op, used=used, **rest):
                return op(**rest)[used]

            with unplanned():
                want, seeds = outcome(some, operands)
            assert_same(outcome(some, operands, seeds)[0], want, f"{name}, {used}")


# Memory.


@every_op
def test_their_number_is_bounded(name, monkeypatch):
    """Under shapes that change with every call, and under layouts of gradients that do."""
    assert 16 <= plan.LIMIT <= 4096
    monkeypatch.setattr(plan, "LIMIT", 3)
    for count in range(1, 9):
        op, operands = small_call(name, count=count)
        with unplanned():
            want, seeds = outcome(op, operands)
        assert_same(outcome(op, operands, seeds)[0], want)
        assert all(len(plans) <= 3 for plans in Plans.every)
    op, operands = small_call("bias_gelu")
    x = operands["x"].requires_grad_()
    for step in range(8):
        seed = torch.ones(*x.shape[:-1], x.shape[-1] + step)[..., : x.shape[-1]]
        out = op(**operands)
        out.backward(seed)
        assert len(out.grad_fn.planned.backward) == min(step + 1, 3) or step >= 3
        assert len(out.grad_fn.planned.backward) <= 3


@pytest.mark.usefixtures("bfloat16_too")
@every_op
def test_a_plan_keeps_no_tensor(name):
    """Neither operands nor results nor gradients are held by what is kept."""
    op, operands = small_call(name)
    for mode in (torch.float16, torch.bfloat16):  # with casts, and everything that is imported by the way
        with torch.autocast("cpu", mode):
            outcome(op, operands)
    del op, operands

    def alive():
        gc.collect()
        # `like` keeps one value, whose shape is that of an output.
        tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
        return sum(tensor.untyped_storage().nbytes() > tensor.element_size() for tensor in tensors)

    plan.forget()
    before = alive()
    for change in (torch.clone, strided):
        op, operands = small_call(name)
        operands = {key: change(value) if torch.is_tensor(value) else value for key, value in operands.items()}
        outcome(op, operands)
        with torch.autocast("cpu", torch.float16):
            outcome(op, operands)
        op(**operands)
        del op, operands
    assert any(len(plans) for plans in Plans.every)
    assert alive() <= before


def test_forgotten_everywhere():
    for name in CALLS:
        op, operands = small_call(name)
        op(**operands)
    assert sum(len(plans) > 0 for plans in Plans.every) >= len(CALLS)
    plan.forget()
    assert not any(len(plans) for plans in Plans.every)


# Processes.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@every_op
def test_fork(name):
    """A child begins without plans, and its calls give the same; the parent's go on."""
    op, operands = small_call(name)
    want, seeds = outcome(op, operands)
    child = os.fork()
    if not child:
        code = 1
        try:
            begun = not any(len(plans) for plans in Plans.every)
            assert_same(outcome(op, operands, seeds)[0], want)
            assert_same(outcome(op, operands, seeds)[0], want)
            code = 0 if begun else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert any(len(plans) for plans in Plans.every)
    assert_same(outcome(op, operands, seeds)[0], want)
