"""The weight as the product with a clip takes it: TRITON_INTERPRET=1 pytest -m interpreter."""

import pytest
import torch
from op_cases import LAYOUTS, MEAN, STD, cropped, gather_operands, make_clip, strided
from torch import nn

from mar_fast import kernels
from mar_fast.kernels.gather_patch_embed import _folded
from mar_fast.kernels.jit.launch import Launch, LaunchConfig, forced
from mar_fast.kernels.jit.tubelets import UINT8_SCALE, fold_weight, layout_of, normalisation

pytestmark = pytest.mark.interpreter

HALF_AND_FULL = [torch.float32, torch.float16]
# Weights, and of how many values at a time a row is folded: all at once or not, with a remainder or not.
SHAPES = {
    (1, 3, 1, 1, 1): 16,
    (7, 3, 2, 3, 5): 64,
    (2, 1, 2, 16, 16): 2048,
    (5, 4, 1, 7, 3): 32,
    (2, 3, 2, 16, 16): 512,
    (2, 3, 4, 16, 12): 2048,
}
MEMORY = {
    "contiguous": torch.Tensor.contiguous,
    "cropped": cropped,
    "strided": strided,
    "channels-last": lambda weight: weight.contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda weight: weight.mT.contiguous().mT,
    "expanded": lambda weight: weight[:1].expand(weight.shape),
}


def statistics(channels):
    return tuple((torch.rand(channels) / 2).tolist()), tuple((torch.rand(channels) / 4 + 0.2).tolist())


def layout(channels, patch_size, channels_last, dtype=torch.uint8):
    clip = torch.zeros(1, channels, *patch_size, dtype=dtype)
    return layout_of(LAYOUTS["channels_last" if channels_last else "contiguous"](clip), patch_size)[0]


def in_order(weight, channels_last):
    return (weight.permute(0, 2, 3, 4, 1) if channels_last else weight).flatten(1)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_for_uint8_pixels(shape, memory):
    """The weight bit by bit; with centred pixels and its bias it is the product with normalised ones, in float64."""
    columns, channels, *patch_size = shape
    mean, std = statistics(channels)
    slope, _ = normalisation(mean, std, channels)
    pixels = torch.randint(256, (7, channels, *patch_size))
    for dtype in HALF_AND_FULL:
        weight, bias = MEMORY[memory](torch.randn(shape).to(dtype)), strided(torch.randn(columns).to(dtype))
        for work in HALF_AND_FULL:
            for channels_last in (False, True):
                with forced({"fold_weight": LaunchConfig(1, SHAPES[shape])}):
                    fold = fold_weight(weight, bias, layout(channels, patch_size, channels_last), work, mean, std)
                    folded, folded_bias = fold(weight, bias)
                scale = UINT8_SCALE * torch.tensor(slope)
                expected = (weight.float() * scale.view(-1, 1, 1, 1)).to(work)
                assert torch.equal(folded, in_order(expected, channels_last))
                assert (folded.dtype, folded_bias.dtype) == (work, torch.float32)
                # What the product gives, on the rounded weight.
                exact = expected.double() / scale.double().view(-1, 1, 1, 1)
                centre, spread = (torch.tensor(values).double().view(-1, 1, 1, 1) for values in (mean, std))
                normal = (pixels.double() / 255 - centre) / spread
                wanted = normal.flatten(1) @ exact.flatten(1).T + bias.double()
                centred = in_order(pixels.double() - 128, channels_last)
                got = centred @ folded.double().T / UINT8_SCALE + folded_bias.double()
                size = normal.abs().flatten(1) @ exact.abs().flatten(1).T + bias.double().abs()
                assert ((got - wanted).abs() <= 4e-7 * size + 1e-6).all()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_for_float_pixels(shape, memory):
    """Only the order and the dtype; what is right already is not made again."""
    _, channels, *patch_size = shape
    for dtype in HALF_AND_FULL:
        weight = MEMORY[memory](torch.randn(shape).to(dtype))
        for work in HALF_AND_FULL:
            for channels_last in (False, True):
                found = layout(channels, patch_size, channels_last, work)
                fold = fold_weight(weight, None, found, work)
                same = dtype == work and weight.is_contiguous() and not found.channels_last
                assert (fold is None) == same
                if fold is not None:
                    folded, _ = fold(weight)
                    assert torch.equal(folded, in_order(weight.to(work), found.channels_last))


def test_small_pixels_and_their_rounding():
    """The bias belongs to the rounded weight: far below 128 the exact one would be off by thousands of roundings."""
    mean, std = (0.05,) * 3, (0.02,) * 3
    weight, bias = torch.randn(8, 3, 2, 8, 8) / 20, torch.zeros(8)
    pixels = torch.randint(10, 17, (5, 3, 2, 8, 8)).double()
    folded, folded_bias = fold_weight(weight, bias, layout(3, (2, 8, 8), False), torch.float16, mean, std)(weight, bias)
    got = (pixels - 128).flatten(1) @ folded.double().T / UINT8_SCALE + folded_bias.double()
    wanted = ((pixels / 255 - 0.05) / 0.02).flatten(1) @ weight.double().flatten(1).T
    assert (got - wanted).norm() < 2e-3 * wanted.norm()


# Kept between calls, and never a stale one.


@pytest.fixture
def folds(monkeypatch):
    """How often a weight has been folded."""
    launch, seen = Launch.__call__, []

    def spy(self, *tensors):
        if self.kernel.fn.__name__ == "fold_weight_kernel":
            seen.append(self)
        launch(self, *tensors)

    monkeypatch.setattr(Launch, "__call__", spy)
    _folded.forget()
    return seen


TILES = {"gather_patch_embed_forward": LaunchConfig(32, 128, 128), "gather_tubelets": LaunchConfig(32, 2048)}
GATHERED = {"gather_patch_embed_forward": LaunchConfig(32, 64, 128, tma=True, fused=False)}


@pytest.fixture(autouse=True)
def _large_tiles():
    with forced(TILES):
        yield


class Embedding(nn.Module):
    def __init__(self, dtype=torch.float32, **shape):
        super().__init__()
        operands = gather_operands(dtype, count=5, **shape)
        self.weight, self.bias = nn.Parameter(operands["weight"]), nn.Parameter(operands["bias"])
        self.fixed = {name: operands[name] for name in ("keep_idx", "pos_embed")}

    def forward(self, video):
        normalised = dict(mean=MEAN, std=STD) if video.dtype == torch.uint8 else {}
        return kernels.gather_patch_embed(video, weight=self.weight, bias=self.bias, **self.fixed, **normalised)


def right(module, video):
    """The op against plain PyTorch with the weights as they are now."""
    got = module(video)
    with kernels.use_backend("eager"):
        torch.testing.assert_close(got, module(video), rtol=1e-3, atol=1e-2)
    return got


CLIPS = {
    "uint8": lambda: make_clip(2, torch.uint8),
    "uint8, channels-last": lambda: make_clip(2, torch.uint8, "channels_last"),
    "channels-last": lambda: make_clip(2, torch.float32, "channels_last"),
}


@pytest.mark.parametrize("clip", CLIPS)
def test_folded_once(clip, folds):
    module, video = Embedding(), CLIPS[clip]()
    with torch.no_grad():
        first = right(module, video)
        assert torch.equal(right(module, video), first)
        assert len(folds) == 1
        right(module, CLIPS[clip]()[:1].expand(2, -1, -1, -1, -1))
    with torch.inference_mode():
        assert torch.equal(right(module, video), first)
    assert len(folds) == 1


def test_a_planar_clip_of_floats_needs_none(folds):
    module, video = Embedding(), make_clip(2, torch.float32)
    with torch.no_grad():
        right(module, video)
    assert not folds


def test_gathered_and_fused_take_weights_of_their_own(folds):
    """The one in the clip's order, the other scaled for pixels as they are besides."""
    patch, grid = (2, 2, 4), (1, 2, 3)
    module, video = Embedding(patch=patch, grid=grid), make_clip(2, torch.uint8, "channels_last", patch, grid)
    with torch.no_grad():
        for _ in range(2):
            for configs in ({}, GATHERED):
                with forced(configs):
                    right(module, video)
        assert len(folds) == 2
        module.weight.mul_(-3)
        with forced(GATHERED):
            right(module, video)
    assert len(folds) == 3


def step(module, video):
    """By a fused optimizer, which counts no versions."""
    module(video).square().sum().backward()
    before = module.weight._version
    torch.optim.SGD(module.parameters(), lr=1e-3, fused=True).step()
    assert module.weight._version == before
    module.zero_grad()


def uncounted_step(module, video):
    """By something that is no optimizer of PyTorch's."""
    module(video).square().sum().backward()
    module.weight.data.mul_(-3)
    module.zero_grad()


CHANGES = {
    "weight in place": lambda module, video: module.weight.mul_(-3),
    "bias in place": lambda module, video: module.bias.add_(7),
    "load_state_dict": lambda module, video: module.load_state_dict(Embedding().state_dict()),
    "assigned": lambda module, video: module.load_state_dict(Embedding().state_dict(), assign=True),
    "other memory": lambda module, video: setattr(module.weight, "data", torch.randn_like(module.weight)),
    "channels-last weights": lambda module, video: setattr(
        module.weight, "data", torch.randn_like(module.weight).contiguous(memory_format=torch.channels_last_3d)
    ),
    "another view": lambda module, video: setattr(
        module.weight, "data", module.weight.data[:1].expand(module.weight.shape)
    ),
    "a training step": torch.enable_grad()(step),
    "an uncounted one": torch.enable_grad()(uncounted_step),
    "a training step on a clip that needs no folding": lambda module, video: torch.enable_grad()(step)(
        module, make_clip(2, torch.float32)
    ),
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(change, clip, folds):
    module, video = Embedding(), CLIPS[clip]()
    with torch.no_grad():
        for _ in range(1 if change == "another view" else 2):
            before = right(module, video)
            CHANGES[change](module, video)
            assert not torch.equal(right(module, video), before)


def test_another_dtype(folds):
    module, video = Embedding(), CLIPS["uint8"]()
    with torch.no_grad():
        for dtype in (torch.float16, torch.float32):
            module.to(dtype)
            assert right(module, video).dtype == dtype
        exact = right(module, video)
        with torch.autocast("cpu", torch.float16):
            assert not torch.equal(module(video), exact)
        assert torch.equal(module(video), exact)
    assert len(folds) == 3


def test_other_statistics(folds):
    module, video = Embedding(), CLIPS["uint8"]()
    with torch.no_grad():
        for mean in (0.1, 0.5, 0.1):
            options = dict(mean=(mean,) * 3, std=STD, weight=module.weight, bias=module.bias, **module.fixed)
            got = kernels.gather_patch_embed(video, **options)
            with kernels.use_backend("eager"):
                torch.testing.assert_close(got, kernels.gather_patch_embed(video, **options), rtol=1e-3, atol=1e-3)
    assert len(folds) == 2


def test_weights_that_come_and_go(folds):
    video = CLIPS["uint8"]()
    with torch.no_grad():
        for _ in range(5):
            right(Embedding(), video)
    assert len(folds) == 5 and len(_folded) <= 1


def test_with_gradients_it_is_folded_in_every_call(folds):
    """By one launch each, and none is kept."""
    module, video = Embedding(), CLIPS["uint8"]()
    for _ in range(3):
        right(module, video)
    assert len(folds) == 3 and not len(_folded)


def test_the_custom_op_keeps_none(folds):
    """It cannot tell whether a step will follow."""
    module, video = Embedding(), CLIPS["uint8"]()
    with torch.no_grad():
        for _ in range(2):
            torch.ops.mar_fast.gather_patch_embed(
                video, module.fixed["keep_idx"], module.weight, module.bias, module.fixed["pos_embed"], None, MEAN, STD,
                torch.float32,
            )  # fmt: skip
    assert len(folds) == 2 and not len(_folded)
