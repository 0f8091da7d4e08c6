"""What holds for every op whatever its values: what it may read, strides, dtypes, compilation, switches."""

import functools
from types import SimpleNamespace

import oracle
import pytest
import torch
from helpers import relative
from op_cases import (
    DEVICE,
    GRID,
    MEAN,
    ON_GPU,
    OPS,
    PATCH,
    STD,
    TOKENS,
    attention_operands,
    call,
    clips_of,
    cropped,
    loss_operands,
    make_clip,
    rows_apart,
    scatter_operands,
    strided,
    varlen_operands,
)

from mar_fast import kernels
from mar_fast.kernels import checks, device

WITH_VIDEO = [name for name in OPS if name.endswith(("gather_patch_embed", "masked_patch_loss"))]


# What may be read.


def tubelets(video, index, clip_idx):
    """(B, 1, T, H, W): True on every pixel of the indexed tubelets."""
    mask = torch.zeros(len(video), TOKENS, dtype=torch.bool)
    mask[clips_of(index, clip_idx), index] = True
    mask = mask.view(-1, 1, *GRID)
    for dim, step in enumerate(PATCH, 2):
        mask = mask.repeat_interleave(step, dim)
    return mask


@pytest.mark.triton_too
@pytest.mark.parametrize("name", WITH_VIDEO)
def test_other_tubelets_have_no_influence(name):
    """NaN in every tubelet that is not indexed changes no bit of any output or gradient."""
    op, operands = call(name)
    clean, seeds, clean_gradients = oracle.outcome(op, operands)
    index = operands.get("keep_idx", operands.get("drop_idx"))
    seen = tubelets(operands["video"], index, operands.get("clip_idx"))
    operands["video"] = operands["video"].masked_fill(~seen, torch.nan)
    outputs, _, gradients = oracle.outcome(op, operands, seeds)
    assert torch.equal(outputs[0], clean[0])
    for operand, gradient in gradients.items():
        assert torch.equal(gradient, clean_gradients[operand]) if gradient is not None else operand == "video"


@pytest.mark.triton_too
def test_scatter_tokens_ignores_what_it_replaces():
    """The mask token has no influence where all tokens are visible."""
    operands = scatter_operands(torch.float32, count=TOKENS)
    operands["mask_token"].fill_(torch.nan)
    assert kernels.scatter_tokens(**operands).isfinite().all()


@pytest.mark.triton_too
@pytest.mark.parametrize("layout", [strided, cropped, rows_apart])
@pytest.mark.parametrize("name", OPS)
def test_any_strides(name, layout):
    """Operands that lie in the gaps of NaN give the same as contiguous ones, gradients too."""
    op, operands = call(name)
    clean, seeds, clean_gradients = oracle.outcome(op, operands)
    scattered = {
        key: (layout if value.ndim > 1 else strided)(value) if torch.is_tensor(value) else value
        for key, value in operands.items()
    }
    outputs, _, gradients = oracle.outcome(op, scattered, seeds)
    torch.testing.assert_close(outputs, clean)
    torch.testing.assert_close(gradients, clean_gradients)


# Dtypes.


@pytest.mark.parametrize("count", [0, 1])
def test_masked_patch_loss_in_float64(count):
    """The loss has the precision of its operands if they are finer than float32."""
    assert (
        kernels.masked_patch_loss(**loss_operands(torch.float64, count=count), patch_size=PATCH).dtype == torch.float64
    )


AUTOCAST = {
    "gather_patch_embed": [torch.float32],  # the weight's
    "attention": [torch.bfloat16],
    "attention_varlen": [torch.bfloat16],
    "attention_kvpacked": [torch.bfloat16],
    "add_layer_norm": [torch.bfloat16, torch.float32],  # the next matrix product is bfloat16, the residual stays
    "bias_gelu": [torch.float32],
    "linear_gelu": [torch.bfloat16],
    "mlp": [torch.bfloat16],
    "scatter_tokens": [torch.float32],
    "masked_patch_loss": [torch.float32],
}


@pytest.mark.triton_too
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPS)
def test_autocast(name, dtype):
    op, operands = call(name)
    clean, seeds, clean_gradients = oracle.outcome(op, operands)
    with torch.autocast(DEVICE, dtype):
        outputs, _, gradients = oracle.outcome(op, operands, seeds)
    assert [out.dtype for out in outputs] == [
        dtype if half == torch.bfloat16 else half for half in AUTOCAST[op.func.__name__]
    ]
    finest = 1e-4 if dtype == torch.bfloat16 else 1e-5
    for got, want in zip(outputs, clean, strict=True):
        in_half = name.endswith("gather_patch_embed") or got.dtype == dtype
        assert finest < relative(got, want) < 1e-2 if in_half else relative(got, want) < 1e-6
    for key, gradient in gradients.items():
        if gradient is not None:  # master weights: float32, computed in 16 bits
            assert gradient.dtype == torch.float32
            assert relative(gradient, clean_gradients[key]) < 1e-2


NO_TOKENS = {
    "attention": lambda: kernels.attention(**attention_operands(torch.float32, count=0)),
    "attention_varlen": lambda: kernels.attention_varlen(**varlen_operands(torch.float32, (0,))),
}


@pytest.mark.triton_too
@pytest.mark.parametrize("name", NO_TOKENS)
def test_autocast_of_no_tokens(name):
    """The dtype does not depend on how many tokens there are."""
    with torch.autocast(DEVICE, torch.bfloat16):
        assert NO_TOKENS[name]().dtype == torch.bfloat16


# Compilation.

COMPILED = [(name, False) for name in OPS] + [(name, True) for name in WITH_VIDEO]


@pytest.mark.compiles
@pytest.mark.parametrize(("name", "uint8"), COMPILED)
def test_compiles_without_a_break(name, uint8):
    op, operands = call(name)
    if uint8:
        operands["video"] = make_clip(len(operands["video"]), torch.uint8)
    if name in WITH_VIDEO:
        op = functools.partial(op, mean=MEAN, std=STD)
    torch.compiler.reset()
    clean, seeds, clean_gradients = oracle.outcome(op, operands)
    outputs, _, gradients = oracle.outcome(torch.compile(op, fullgraph=True, backend="aot_eager"), operands, seeds)
    torch.testing.assert_close(outputs, clean)
    torch.testing.assert_close(gradients, clean_gradients)


# Switches.


def test_debug_checks():
    """They let index values on a GPU be read; the switch goes back, after an error too."""
    index = SimpleNamespace(numel=lambda: 3, device=torch.device("cuda"))
    assert not checks.may_read(index)
    with pytest.raises(KeyError), kernels.debug_checks():
        assert checks.may_read(index)
        with kernels.debug_checks(False):
            assert not checks.may_read(index)
        assert checks.may_read(index)
        raise KeyError
    assert not checks.may_read(index)


def test_use_backend_goes_back():
    with pytest.raises(KeyError), kernels.use_backend("eager"):
        with kernels.use_backend("eager"):
            pass
        assert device._forced == "eager"
        raise KeyError
    assert device._forced is None


def test_use_backend_knows_its_names():
    with (
        pytest.raises(ValueError, match=r"^name: got 'cudnn', expected one of triton, eager"),
        kernels.use_backend("cudnn"),
    ):
        pass
    assert device._forced is None


@pytest.mark.skipif(ON_GPU, reason="kernels are taken there")
@pytest.mark.parametrize("name", OPS)
def test_use_backend_eager(name):
    """Naming what is taken anyway on a CPU changes no bit."""
    op, operands = call(name)
    with kernels.use_backend("eager"):
        forced = op(**operands)
    torch.testing.assert_close(forced, op(**operands), rtol=0, atol=0)


@pytest.mark.skipif(not device.HAS_TRITON, reason="needs the package triton")
@pytest.mark.skipif(device.INTERPRETING or ON_GPU, reason="all of them run")
@pytest.mark.parametrize("name", OPS)
def test_use_backend_triton_that_cannot_run(name):
    op, operands = call(name)
    with (
        kernels.use_backend("triton"),
        pytest.raises(RuntimeError, match=f"runs {name.split()[-1]} on CUDA tensors.*, got .*cpu"),
    ):
        op(**operands)


def test_use_backend_triton_without_triton(monkeypatch):
    monkeypatch.setattr(device, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match=r"package triton is not installed"), kernels.use_backend("triton"):
        pass
