"""masked_patch_loss' Triton kernel beyond test_ops.py's cases: TRITON_INTERPRET=1 pytest -m interpreter."""

import functools
import math

import oracle
import pytest
import torch
from op_cases import (
    GRID,
    LAYOUTS,
    MEAN,
    PATCH,
    STD,
    channels_last,
    cropped,
    every_dtype,
    loss_operands,
    make_clip,
    make_index,
    plain_loss,
    rows_apart,
    tokens_first,
)

from mar_fast import kernels
from mar_fast.kernels.jit.launch import LaunchConfig, forced

pytestmark = pytest.mark.interpreter

REAL = dict(patch=(2, 16, 16), grid=(2, 2, 3))


def operands_of(video, patch, grid, count=5, dtype=torch.float32, index=torch.int32):
    """For a clip in its layout; other tubelets are dropped in each clip."""
    batch, channels = video.shape[:2]
    tokens = grid[0] * grid[1] * grid[2]
    values = patch[0] * patch[1] * patch[2] * channels
    pixels = torch.randn(batch, count, values).to(dtype)
    return dict(pixels=pixels, video=video, drop_idx=make_index(batch, count, index, tokens))


def plain(video, mean=None, std=None, **rest):
    if video.dtype != torch.uint8 and mean is not None:
        video = video * torch.tensor(std).view(-1, 1, 1, 1) + torch.tensor(mean).view(-1, 1, 1, 1)
    return plain_loss(video=video, **rest)


# The interpreter adds 512 values of a channel of a planar clip one after the other, where a GPU and PyTorch halve them.
IN_A_ROW = 8


def check(operands, floor=0.5, **options):
    functions = (kernels.masked_patch_loss, oracle.masked_patch_loss, plain)
    ours, naive, other = (functools.partial(function, **options) for function in functions)
    return oracle.compare(ours, naive, other, operands, no_gradient=("video",), floor=floor)[0]


@every_dtype
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("video", [torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_real_patch(layout, video, normalize, dtype):
    """In all layouts: those of the two paths through the kernel, aligned, and those that only strides describe."""
    operands = operands_of(make_clip(2, video, layout, **REAL), **REAL, dtype=dtype)
    options = dict(mean=MEAN, std=STD) if video == torch.float32 else {}
    floor = IN_A_ROW if dtype == torch.float32 and layout != "channels_last" else 0.5
    check(operands, floor, patch_size=REAL["patch"], normalize=normalize, **options)


OTHERS = [(1, 1, 2), (2, 1, 1), (3, 1, 1), (1, 8, 8), (2, 3, 5), (1, 1, 33), (4, 8, 16)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("patch", OTHERS, ids=str)
def test_patches(patch, layout):
    grid = (2, 3, 2)
    check(
        operands_of(make_clip(1, torch.float32, layout, patch, grid), patch, grid, count=3),
        IN_A_ROW if patch == (4, 8, 16) else 0.5,
        patch_size=patch,
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last, cropped])
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_channels(channels, layout, normalize):
    """Each has its own statistics, mean and std; a lone one is planar and side by side at once."""
    mean, std = tuple(torch.rand(channels).tolist()), tuple((torch.rand(channels) + 0.5).tolist())
    patch, grid = (2, 3, 5), (1, 2, 3)
    video = layout(torch.randn(2, channels, 2, 6, 15) * (1 + torch.arange(channels).view(-1, 1, 1, 1)))
    check(operands_of(video, patch, grid, count=2), patch_size=patch, normalize=normalize, mean=mean, std=std)


@pytest.mark.parametrize("part", [slice(3), slice(1, 2)], ids=str)
def test_some_channels_of_a_wider_clip(part):
    """RGB of RGBA: channels side by side, but not the pixels."""
    video = channels_last(torch.randn(2, 4, 4, 21, 55))[:, part]
    check(operands_of(video, PATCH, GRID, count=3), patch_size=PATCH)


def test_single_value_patches():
    """Without normalisation a patch may be one value."""
    patch, grid = (1, 1, 1), (2, 3, 2)
    check(
        operands_of(make_clip(1, torch.float32, "contiguous", patch, grid), patch, grid),
        patch_size=patch,
        normalize=False,
    )


# What may be read.


def inside(video, offset, fill):
    """The clip in a larger one that is ``fill`` all around it, in the same memory format."""
    last = video.stride(1) == 1
    extents = [extent + 2 * step for extent, step in zip(video.shape[2:], offset, strict=True)]
    buffer = torch.full((*video.shape[:2], *extents), fill, dtype=video.dtype)
    buffer = channels_last(buffer) if last else buffer
    places = tuple(slice(step, step + extent) for step, extent in zip(offset, video.shape[2:], strict=True))
    return buffer[(slice(None), slice(None), *places)].copy_(video)


@pytest.mark.parametrize("offset", [(1, 1, 1), (2, 16, 16), (2, 16, 3)], ids=["misaligned", "aligned", "half"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("video", [torch.float32, torch.uint8])
def test_crops(video, layout, offset):
    """Of a clip that is NaN, or 255, around the crop: the same bits as of the crop alone."""
    clip = make_clip(1, video, layout, **REAL)
    operands = operands_of(clip, **REAL, count=6)
    options = dict(patch_size=REAL["patch"])
    run = functools.partial(kernels.masked_patch_loss, **options)
    (clean,), seeds, gradients = oracle.outcome(run, operands)
    operands["video"] = inside(clip, offset, 255 if video == torch.uint8 else torch.nan)
    assert not operands["video"].is_contiguous()
    (loss,), _, crop_gradients = oracle.outcome(run, operands, seeds)
    assert torch.equal(loss, clean)
    assert torch.equal(crop_gradients["pixels"], gradients["pixels"])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_only_dropped_tubelets_are_read(layout):
    """Each clip has others: NaN in one clip's visible tubelets, dropped in its neighbour, leaves no trace."""
    patch, grid = (1, 2, 2), (1, 2, 3)
    video = make_clip(2, torch.float32, layout, patch, grid)
    operands = operands_of(video, patch, grid, count=2)
    operands["drop_idx"] = torch.tensor([[0, 4], [1, 5]])
    loss = kernels.masked_patch_loss(**operands, patch_size=patch)
    visible = torch.ones(2, 6, dtype=torch.bool).scatter(1, operands["drop_idx"], False).view(2, 1, 1, 2, 3)
    visible = visible.repeat_interleave(2, 3).repeat_interleave(2, 4)
    operands["video"] = LAYOUTS[layout](video.masked_fill(visible, torch.nan))
    assert torch.equal(kernels.masked_patch_loss(**operands, patch_size=patch), loss)


def test_one_row_of_indices_for_all_clips():
    """As the fixed masks of a test: expanded, and not copied."""
    operands = loss_operands(torch.float32, 3, 5)
    operands["drop_idx"] = operands["drop_idx"][:1].expand(3, -1)
    check(operands, patch_size=PATCH)


@pytest.mark.parametrize("layout", [rows_apart, tokens_first, lambda value: value[:, :1].expand(value.shape)])
@pytest.mark.parametrize("video", ["contiguous", "channels_last"])
def test_any_strides_of_pixels(video, layout):
    operands = loss_operands(torch.float32, layout=video, count=5)
    operands["pixels"] = layout(operands["pixels"])
    check(operands, patch_size=PATCH)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [0.1, 0.3, 77.7, -1e-3])
def test_a_flat_patch_has_a_target_of_exactly_zero(value, layout):
    """Also where the mean of so many equal values would be rounded."""
    operands = loss_operands(torch.float32, layout=layout, count=5)
    operands["video"] = torch.full_like(operands["video"], value)
    operands["pixels"] = torch.zeros_like(operands["pixels"])
    assert kernels.masked_patch_loss(**operands, patch_size=PATCH) == 0
    assert kernels.masked_patch_loss(**operands, patch_size=PATCH, mean=MEAN, std=STD) == 0


# (batch, channels, tubelets, values of a tubelet's channel), of uint8 or float32, for a noise of 0 and 1.
HARD_CLIPS = {
    "far from zero": lambda noise: noise.float() * 0.37 + 1000,
    "so far that few digits are left": lambda noise: (
        (noise.float() + torch.rand(noise.shape)).mul(32).round() + 2.0**18
    ),
    "one grey level": lambda noise: noise + 200,
    # Squares about that pixel alone would cancel: its distance is all of them.
    "first pixel black": lambda noise: (noise + 254).index_fill(-1, torch.tensor([0]), 0),
    "first pixel far away": lambda noise: (noise.float() * 1e-3 + 7).index_fill(-1, torch.tensor([0]), -1000),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("patch", [PATCH, REAL["patch"]], ids=str)  # of uint8, the second's mean is exact in any case
@pytest.mark.parametrize("clip", HARD_CLIPS)
def test_small_deviations_from_a_large_mean(clip, patch, layout):
    """Where E[v^2] - E[v]^2 would have no digits left: what remains of the clip in float32 is exact."""
    values, (t, h, w) = math.prod(patch), patch
    video = HARD_CLIPS[clip](torch.randint(2, (1, 3, 2, values), dtype=torch.uint8))
    video = video.view(1, 3, 2, t, h, w).permute(0, 1, 3, 4, 2, 5).reshape(1, 3, t, h, 2 * w)
    operands = operands_of(LAYOUTS[layout](video), patch, (1, 1, 2), count=2)
    exact = operands | {"pixels": operands["pixels"].double()}
    if video.is_floating_point():
        exact["video"] = operands["video"].double()
    operands["pixels"].requires_grad_()
    loss = kernels.masked_patch_loss(**operands, patch_size=patch)
    loss.backward()
    # Not twice PyTorch's error, which for some of these is no bound.
    truth = exact["pixels"].requires_grad_()
    expected = oracle.masked_patch_loss(**exact, patch_size=patch)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    error = (operands["pixels"].grad - truth.grad).norm() / truth.grad.norm()
    assert error < 16 * (IN_A_ROW if layout == "contiguous" else 1) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("tile", [LaunchConfig(1, num_warps=1), LaunchConfig(2, num_warps=4)], ids=str)
@pytest.mark.parametrize(("layout", "video"), [("contiguous", torch.float32), ("channels_last", torch.uint8)])
def test_tiles(layout, video, tile):
    """A tubelet a program or several, the last program's not all there, by one warp or by two."""
    operands = operands_of(make_clip(1, video, layout, **REAL), **REAL, count=3)
    with forced(dict.fromkeys(("masked_patch_loss_forward", "masked_patch_loss_backward"), tile)):
        check(operands, IN_A_ROW, patch_size=REAL["patch"])


# Gradients.


@every_dtype
def test_the_gradient_takes_a_scale(dtype):
    """A loss scale is a tensor on the device. Here it keeps float16 above its smallest numbers."""
    operands = loss_operands(dtype, count=5)
    values = {name: value.clone() for name, value in operands.items()}
    values["pixels"].requires_grad_()
    (1024 * kernels.masked_patch_loss(**values, patch_size=PATCH)).backward()
    exact = operands | {name: operands[name].double() for name in ("pixels", "video")}
    exact["pixels"].requires_grad_()
    (1024 * oracle.masked_patch_loss(**exact, patch_size=PATCH)).backward()
    error = values["pixels"].grad.double() - exact["pixels"].grad
    assert error.norm() < 4 * torch.finfo(dtype).eps * exact["pixels"].grad.norm()


def test_the_clip_never_gets_a_gradient():
    operands = loss_operands(torch.float32)
    operands["video"].requires_grad_()
    assert not kernels.masked_patch_loss(**operands, patch_size=PATCH).requires_grad
    operands["pixels"].requires_grad_()
    kernels.masked_patch_loss(**operands, patch_size=PATCH).backward()
    assert operands["pixels"].grad is not None and operands["video"].grad is None


def test_nothing_of_the_size_of_a_target_is_made(monkeypatch):
    """Forward leaves at most one number a tubelet and the loss; backward the gradient, and nothing else."""
    from mar_fast.kernels.jit import masked_patch_loss as launcher

    torch_, sizes, parts = launcher.torch, [], 10
    choice = dict(masked_patch_loss_forward=LaunchConfig(1))

    class Sizes:
        def __getattr__(self, name):
            return getattr(torch_, name)

        def empty(self, shape, **options):
            sizes.append(torch.Size(shape).numel())
            return torch_.empty(shape, **options)

        def empty_like(self, tensor, **options):
            sizes.append(tensor.numel())
            return torch_.empty_like(tensor, **options)

    monkeypatch.setattr(launcher, "torch", Sizes())
    operands = operands_of(make_clip(2, torch.uint8, **REAL), **REAL)
    operands["pixels"].requires_grad_()
    with SizesOfAll() as all_sizes, forced(choice):
        loss = kernels.masked_patch_loss(**operands, patch_size=REAL["patch"])
    assert sizes == [1, parts] and max(all_sizes.seen) <= 10
    *saved, clip_idx = loss.grad_fn.saved_tensors
    assert [value.data_ptr() for value in saved] == [v.data_ptr() for v in operands.values()] and clip_idx is None
    loss.backward()
    assert sizes == [1, parts, 2 * 5 * 1536]


class SizesOfAll(torch.utils._python_dispatch.TorchDispatchMode):
    """Sizes of the fresh results of all of PyTorch's own calls."""

    def __init__(self):
        super().__init__()
        self.seen, self.known = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {value.data_ptr() for value in args if torch.is_tensor(value)}
        if torch.is_tensor(result) and result.data_ptr() not in given:
            self.seen.append(result.numel())
        return result


def test_a_float64_clip():
    """Beside float32 pixels it is taken as float32, as in plain PyTorch."""
    operands = loss_operands(torch.float32, count=5, video=torch.float64)
    loss = kernels.masked_patch_loss(**operands, patch_size=PATCH)
    with kernels.use_backend("eager"):
        torch.testing.assert_close(loss, kernels.masked_patch_loss(**operands, patch_size=PATCH))
