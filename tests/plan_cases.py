"""Small calls of each op, made with and without plans, and how two of them are compared."""

import functools
from contextlib import contextmanager

import oracle
import pytest
import torch
from op_cases import (
    attention_operands,
    gather_operands,
    gelu_operands,
    linear_operands,
    loss_operands,
    norm_operands,
    scatter_operands,
    varlen_operands,
)

from mar_fast import kernels
from mar_fast.kernels.jit.launch import LaunchConfig
from mar_fast.kernels.plan import Plans

# Twelve tubelets of (2, 3, 5), of which three are visible or dropped.
GRID, PATCH = (1, 3, 4), (2, 3, 5)


def _few(operands, index, count):
    """The same with indices below the smaller number of tubelets."""
    rows = [torch.randperm(count)[: operands[index].shape[1]].sort().values for _ in operands[index]]
    return operands | {index: torch.stack(rows).to(operands[index].dtype)}


def floating(operands):
    """The names of the operands that can have a gradient."""
    return [key for key, value in operands.items() if torch.is_tensor(value) and value.is_floating_point()]


def scatter(dtype, count=3):
    operands = _few(scatter_operands(dtype, 2, count, 9), "keep_idx", 12)
    return operands | dict(pos_embed=operands["pos_embed"][:12].clone())


def loss(dtype, count=3, video=None):
    operands = _few(loss_operands(dtype, 2, count), "drop_idx", 12)
    clip = gather_operands(dtype, 2, 3, video, patch=PATCH, grid=GRID, width=4)["video"]
    return operands | dict(video=clip)


# For each op: operands by dtype and by a number that gives other shapes; its options.
CALLS = {
    "gather_patch_embed": (
        lambda dtype, count=3, video=None: gather_operands(dtype, 2, count, video, patch=PATCH, grid=GRID, width=9),
        dict(mean=(0.4, 0.5, 0.3), std=(0.2, 0.25, 0.3)),
    ),
    "attention": (lambda dtype, count=5: attention_operands(dtype, 2, count, 2, 16), {}),
    "attention_varlen": (lambda dtype, count=5: varlen_operands(dtype, (count, 0, 7), 5, 2, 16), {}),
    "add_layer_norm": (lambda dtype, count=5: norm_operands(dtype, 3, count, 9), {}),
    "bias_gelu": (lambda dtype, count=5: gelu_operands(dtype, (2, count, 9)), {}),
    "linear_gelu": (lambda dtype, count=5: linear_operands(dtype, (2, count, 16), 8), {}),
    "scatter_tokens": (scatter, {}),
    "masked_patch_loss": (loss, dict(patch_size=PATCH)),
}
# The interpreter's time goes by the number of tiles; one is enough for each call here. bias_gelu is as it comes.
TILES = {
    **dict.fromkeys(("attention_forward", "attention_backward_query", "attention_backward_key_value"), (16, 16, 16)),
    **dict.fromkeys(("add_layer_norm_forward", "add_layer_norm_backward"), (64, 0, 0)),
    **dict.fromkeys(("scatter_tokens_forward", "scatter_tokens_backward"), (16, 16, 0)),
    "gather_patch_embed_forward": (32, 16, 128),
    "gather_tubelets": (16, 128, 0),
    "gather_patch_embed_backward_video": (32, 128, 16),
    "gather_patch_embed_backward_position": (16, 16, 16),
}
CONFIGS = {name: LaunchConfig(*blocks) for name, blocks in TILES.items()}
every_op = pytest.mark.parametrize("name", CALLS)


def small_call(name, dtype=torch.float32, **changes):
    """The op with its options, and the operands for it."""
    make, options = CALLS[name]
    return functools.partial(getattr(kernels, name), **options), make(dtype, **changes)


@contextmanager
def unplanned():
    """Within this context no call finds a plan, and none is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plans, "find", lambda self, *values: (None, None))
        yield


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


def same(one, other):
    """Bits, dtype, strides, and what autograd knows of them."""
    if one is None or other is None:
        return one is other
    kinds = ((t.dtype, t.shape, t.stride(), t.requires_grad, t.is_inference(), t.is_leaf) for t in (one, other))
    return len(set(kinds)) == 1 and bool(torch.equal(bits(one), bits(other)))


def bits(value):
    """As integers, since NaN is not equal to itself."""
    value = value.detach().contiguous()
    return value.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])


def outcome(op, operands, seeds=None):
    """Outputs and gradients, all in one list."""
    outputs, seeds, gradients = oracle.outcome(op, operands, seeds)
    return [*outputs, *gradients.values()], seeds


def assert_same(got, want, label=""):
    assert len(got) == len(want)
    for place, pair in enumerate(zip(got, want, strict=True)):
        assert same(*pair), f"{label} result {place}: {pair}"


def assert_planned_as_unplanned(name, sequence, repeat=2):
    """Calls one after the other, over and over, with plans: each gives what it gives without.

    Args:
        name: The op.
        sequence: (function, operands) for each call.
        repeat: How often.
    """
    want = []
    with unplanned():
        for op, operands in sequence:
            want.append(outcome(op, operands))
    for _ in range(repeat):
        for place, ((op, operands), (results, seeds)) in enumerate(zip(sequence, want, strict=True)):
            assert_same(outcome(op, operands, seeds)[0], results, f"{name}, call {place}")


def misaligned(value):
    """Contiguous, but one element behind an aligned address."""
    return torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
