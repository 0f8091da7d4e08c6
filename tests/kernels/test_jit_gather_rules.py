"""gather_patch_embed in Triton: dtypes; tiles and clips are in test_jit_gather_patch_embed.py."""

import functools

import oracle
import pytest
import torch
from op_cases import gather_operands, make_clip, plain_gather
from test_jit_gather_patch_embed import (
    DARK,
    EVEN,
    FEW,
    FORWARD,
    LARGE,
    NORMALISED,
    REAL,
    WAYS,
    compare,
    normalised,
)

from mar_fast import kernels
from mar_fast.kernels import device
from mar_fast.kernels.jit.launch import forced

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _large_tiles():
    with forced(LARGE):
        yield


def test_positions_in_half():
    operands = gather_operands(torch.float32)
    operands["pos_embed"] = operands["pos_embed"].half()
    assert compare(operands).dtype == torch.float32


def test_positions_in_float64():
    """They count as float32, and get their gradient in float64."""
    operands = gather_operands(torch.float32, **FEW)
    (out,), seeds, gradients = oracle.outcome(normalised, operands)
    operands["pos_embed"] = operands["pos_embed"].double()
    (same,), _, others = oracle.outcome(normalised, operands, seeds)
    assert torch.equal(same, out)
    assert others["pos_embed"].dtype == torch.float64
    assert torch.equal(others["pos_embed"].float(), gradients["pos_embed"])


@pytest.mark.parametrize(("video", "weights"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_clip_of_another_dtype(video, weights):
    compare(gather_operands(weights, video=video, **REAL))


@pytest.mark.parametrize(
    ("video", "dark", "forward"),
    [
        (torch.float32, False, {}),
        (torch.float16, False, {}),
        (torch.uint8, False, {}),
        (torch.uint8, True, {}),
        (torch.uint8, True, {FORWARD: WAYS["gathered"]}),
    ],
    ids=str,
)
def test_autocast(video, dark, forward):
    """The product in float16; weights, output and gradients in float32."""
    operands = gather_operands(torch.float32, video=video, **EVEN)
    if dark:
        operands["video"] = operands["video"] % 7 + 10
    options = DARK if dark else NORMALISED

    def in_half(function, **operands):
        with torch.autocast("cpu", torch.float16):
            return function(**operands, **options)

    naive = functools.partial(oracle.gather_patch_embed, **options)
    ours, plain = (functools.partial(in_half, function) for function in (kernels.gather_patch_embed, plain_gather))
    with forced(forward):
        outputs, cotangents, gradients = oracle.outcome(ours, operands)
    others, _, other_gradients = oracle.outcome(plain, operands, cotangents)
    exact, _, exact_gradients = oracle.outcome(
        naive,
        {name: value.double() if value.is_floating_point() else value for name, value in operands.items()},
        [seed.double() for seed in cotangents],
    )
    assert outputs[0].dtype == torch.float32
    eps = torch.finfo(torch.float16).eps
    assert (outputs[0] - exact[0]).detach().norm() > 1e-5 * exact[0].detach().norm()  # it was float16
    oracle.assert_as_good("output", outputs[0], others[0], exact[0], coarsest=eps)
    for name, gradient in gradients.items():
        oracle.assert_as_good(name, gradient, other_gradients[name], exact_gradients[name], coarsest=eps)
        assert gradient.dtype == operands[name].dtype


def test_small_weights_of_uint8_pixels():
    """In float16, weights of 1e-4 divided by 255 would lose most of their digits."""
    operands = gather_operands(torch.float16, video=torch.uint8, **REAL)
    operands["weight"] *= 1e-3
    operands["bias"] *= 0
    operands["pos_embed"] *= 0
    compare(operands)


def test_dark_clip():
    """Far below 128, where all that the mean takes off must be rounded as the product is: forward and backward."""
    operands = gather_operands(torch.float16, video=torch.uint8)
    operands["video"] = operands["video"] % 7 + 10
    compare(operands, **DARK)


def test_float64_is_left_to_pytorch(poisoned):
    operands = gather_operands(torch.float64)
    for changes in ({}, dict(video=operands["video"].float()), dict(video=make_clip(2, torch.uint8))):
        with pytest.raises(RuntimeError, match=r"gather_patch_embed.*float64"):
            kernels.gather_patch_embed(**operands | changes)
    half = gather_operands(torch.float16, video=torch.float64)
    with pytest.raises(RuntimeError, match=r"gather_patch_embed.*float64"):
        kernels.gather_patch_embed(**half)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_forced", None)
        compare(operands)
        kernels.gather_patch_embed(**half)
    assert not poisoned.allocated
    poisoned.allocated = None
