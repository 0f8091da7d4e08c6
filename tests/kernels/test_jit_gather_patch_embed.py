"""gather_patch_embed's Triton kernels beyond what test_ops.py asks: TRITON_INTERPRET=1 pytest -m interpreter."""

import functools
import math

import oracle
import pytest
import torch
from op_cases import (
    MEAN,
    PATCH,
    STD,
    TOKENS,
    channels_last,
    check,
    every_dtype,
    gather_operands,
    plain_gather,
    strided,
)
from plan_cases import misaligned

from mar_fast import kernels
from mar_fast.kernels.jit import gather_patch_embed as launcher
from mar_fast.kernels.jit.gather_tubelets import gather_tubelets
from mar_fast.kernels.jit.launch import Launch, LaunchConfig, forced

pytestmark = pytest.mark.interpreter

REAL = dict(patch=(2, 16, 16), grid=(2, 2, 3), width=96, count=7)
FEW = dict(grid=(2, 2, 2), count=3)  # programs
FLAT = dict(patch=(1, 4, 16), grid=(2, 2, 2), width=32, count=3)  # the same lines, but fewer
NORMALISED = dict(mean=MEAN, std=STD)
DARK = dict(mean=(0.05, 0.05, 0.05), std=(0.02, 0.02, 0.02))  # of pixels from 10 to 16
normalised = functools.partial(kernels.gather_patch_embed, **NORMALISED)


def compare(operands, **options):
    return check("gather_patch_embed", plain_gather, operands, **(options or NORMALISED))[0]


# Tiles.

FORWARD, NAMES = "gather_patch_embed_forward", ("backward_video", "backward_position")
NAMES = (FORWARD, "gather_tubelets", *(f"gather_patch_embed_{name}" for name in NAMES))


def tiles(*sizes):
    """Launch configurations of the kernels by (block_m, block_n, block_k)."""
    return {name: LaunchConfig(*size) for name, size in zip(NAMES, sizes, strict=True)}


LARGE = tiles((32, 128, 512), (32, 2048), (32, 512, 128), (16, 128, 256))
SMALL = tiles((16, 16, 32), (4, 64), (16, 64, 16), (2, 16, 4))
FULL = tiles((16, 32, 64), (8, 64), (16, 64, 32), (4, 32, 2))


@pytest.fixture(autouse=True)
def _large_tiles():
    """What the interpreter takes goes by the number of tiles; those of the tables are in test_ops.py."""
    with forced(LARGE):
        yield


@pytest.mark.parametrize("video", [torch.float32, torch.uint8])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ragged_last_tiles(layout, video):
    """M = 18, D = 33 and K = 90, in small tiles: several each way, the last neither full nor empty."""
    with forced(SMALL):
        compare(gather_operands(torch.float32, video=video, layout=layout, grid=(2, 2, 3), count=9))


@pytest.mark.parametrize("video", [torch.float32, torch.uint8])
def test_full_last_tiles(video):
    """M = 16, D = 32 and K = 192 are multiples of the tiles: nothing is masked."""
    with forced(FULL):
        compare(gather_operands(torch.float32, video=video, **(FLAT | dict(batch=4, count=4))))


@pytest.mark.parametrize("columns", [16, 64, 128, 256])
def test_columns_of_a_tile(columns):
    """Positions are added to 64 columns at a time, so tiles of 128 and of 256 are finished in parts."""
    with forced({FORWARD: LaunchConfig(32, columns, 512)}):
        compare(gather_operands(torch.float32, **FLAT | dict(width=300)))


# Operands by TMA: the weight of the fused kernel, or both of a product of gathered tubelets.

EVEN = dict(patch=(2, 2, 4), grid=(2, 2, 3), count=9)  # lines of the weight are 192 or 96 bytes
WAYS = {"fused": LaunchConfig(16, 16, 32, tma=True, fused=True), "gathered": LaunchConfig(16, 16, 32, tma=True)}
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def described(monkeypatch):
    """Of each launch of the forward pass the kernel, and the positions of what it gets as descriptors."""
    launch, seen = Launch.__call__, []

    def spy(self, *tensors):
        if self.choice.kernel == FORWARD:
            seen.append((self.kernel.fn.__name__.split("_")[-2], sorted(self.blocks)))
        launch(self, *tensors)

    monkeypatch.setattr(Launch, "__call__", spy)
    monkeypatch.setattr(launcher, "multiprocessors", lambda operand: 4)  # for 6 tiles
    return seen


@every_way
@pytest.mark.parametrize(
    "case",
    [
        dict(dtype=torch.float32, video=torch.uint8, layout="channels_last"),
        dict(dtype=torch.float16, video=torch.uint8),
        dict(dtype=torch.float16, layout="cropped"),
        dict(dtype=torch.float32, video=torch.uint8, lengths=(7, 0, 11)),
    ],
    ids=str,
)
def test_by_tma(case, way, described):
    """M = 18, D = 33 and K = 48: several tiles each way, the last neither full nor empty."""
    with forced({FORWARD: WAYS[way]}):
        compare(gather_operands(**EVEN | case))
    assert described == [("forward", [3]) if way == "fused" else ("product", [0, 2])]


@every_way
@pytest.mark.parametrize("what", ["lines of 360 bytes", "an address"])
def test_what_tma_cannot_read(what, way, described):
    operands = gather_operands(torch.float32, **({} if what.startswith("lines") else EVEN))
    if what == "an address":
        operands["weight"] = misaligned(operands["weight"])
    with forced({FORWARD: WAYS[way]}):
        compare(operands)
    assert described == [("forward", [])]


@pytest.mark.parametrize("patch", [(2, 3, 5), (1, 4, 16)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gathered_tubelets(channels, patch):
    """All 256 values of a pixel in every channel, normalised with no more error than float32 has, then rounded."""
    shape = (2, channels, *(2 * step for step in patch))
    clip, index = torch.arange(math.prod(shape)).view(shape).byte(), torch.tensor([[7, 0, 3], [5, 1, 2]])
    mean, std = (torch.rand(channels).double() / 8 + start for start in (0.4, 0.05))
    cells = [oracle._tubelet(clip, one, int(at), patch) for one in (0, 1) for at in index[one]]
    scale, centre = (255 * std).view(-1, 1, 1, 1), (mean / std).view(-1, 1, 1, 1)
    exact, size = torch.stack(cells) / scale - centre, torch.stack(cells) / scale + centre
    weight = torch.empty(1, channels, *patch)
    for video, order in ((clip, (0, 1, 2, 3, 4)), (channels_last(clip), (0, 2, 3, 4, 1))):
        if channels == 1:
            order = (0, 1, 2, 3, 4)
        for dtype in (torch.float32, torch.float16):
            run = gather_tubelets(video, index, None, weight, dtype, mean.tolist(), std.tolist())
            error = (run(video, index, None).double() - exact.permute(order).flatten(1)).abs()
            limit = 1.5 * 2**-23 * size + (dtype == torch.float16) * 2**-11 * exact.abs()
            assert (error <= limit.permute(order).flatten(1)).all()


# Clips.


@every_dtype
@pytest.mark.parametrize("video", [None, torch.uint8], ids=["float", "uint8"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_real_patch(layout, video, dtype):
    compare(gather_operands(dtype, video=video, layout=layout, **REAL))


def clips_copied(monkeypatch):
    """Counts the clips that a launcher copies."""
    copies = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **how: (copies.append(self.shape), clone(self, **how))[1])
    return copies


def within(clip, before, after, order=(0, 1, 2, 3, 4)):
    """The clip inside a buffer full of NaN, or of 255, whose dimensions lie in memory in this order."""
    shape = [low + extent + high for low, extent, high in zip(before, clip.shape, after, strict=True)]
    poison = torch.nan if clip.is_floating_point() else 255
    buffer = torch.full([shape[place] for place in order], poison, dtype=clip.dtype)
    buffer = buffer.permute([order.index(place) for place in range(5)])
    view = buffer[tuple(slice(low, low + extent) for low, extent in zip(before, clip.shape, strict=True))]
    return view.copy_(clip)


PLANAR, LAST, FRAMES_FIRST = (0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (0, 2, 1, 3, 4)
CROPS = {
    # Pixels before and after in (B, C, T, H, W), order in memory, copied (once forward, once backward)?
    "y": ((0, 0, 0, 3, 0), (0, 0, 0, 5, 0), PLANAR, False),
    "y and t, frames before channels": ((0, 0, 1, 3, 0), (0, 0, 2, 5, 0), FRAMES_FIRST, False),
    "every way, by 16": ((1, 1, 1, 1, 16), (1, 1, 1, 1, 16), PLANAR, False),
    "x": ((0, 0, 0, 0, 1), (0, 0, 0, 0, 2), PLANAR, True),
    "x, whole lines apart": ((0, 0, 0, 0, 5), (0, 0, 0, 0, 11), PLANAR, True),  # only the first pixel is misaligned
    "beyond x": ((0, 0, 0, 0, 0), (0, 0, 0, 0, 3), PLANAR, True),  # only the other lines are misaligned
    "channels-last, y": ((0, 0, 0, 3, 0), (0, 0, 0, 5, 0), LAST, False),
    "channels-last, x by 16": ((0, 0, 0, 1, 16), (0, 0, 0, 1, 32), LAST, False),
    "channels-last, x": ((0, 0, 0, 0, 1), (0, 0, 0, 0, 2), LAST, True),
    "channels-last, c": ((0, 0, 0, 0, 0), (0, 1, 0, 0, 0), LAST, True),  # RGB of RGBA
    "another order": ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (0, 1, 2, 4, 3), True),
}


@pytest.mark.parametrize("video", [torch.float32, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("crop", CROPS)
def test_crops(crop, video, monkeypatch):
    """A crop gives what a clip on its own gives, bit by bit; where it is aligned it is not copied."""
    before, after, order, copied = CROPS[crop]
    operands = gather_operands(torch.float32, video=video, **FLAT)
    if order == LAST:  # sums in the same order
        operands["video"] = channels_last(operands["video"])
    clean, seeds, clean_gradients = oracle.outcome(normalised, operands)
    copies = clips_copied(monkeypatch)
    operands["video"] = within(operands["video"], before, after, order)
    outputs, _, gradients = oracle.outcome(normalised, operands, seeds)
    assert copies == [operands["video"].shape] * (2 if copied else 0)
    torch.testing.assert_close(outputs, clean, rtol=1e-5 if copied else 0, atol=1e-5 if copied else 0)
    for name, gradient in gradients.items():
        exact = name != "weight" or not copied
        torch.testing.assert_close(
            gradient, clean_gradients[name], rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5
        )


@pytest.mark.parametrize("case", [dict(batch=1), dict(lengths=(3,))], ids=str)
def test_a_lone_clip_is_not_copied(case, monkeypatch):
    """The stride of an extent of 1 may be any number."""
    operands = gather_operands(torch.float32, **FLAT, **case)
    video = operands["video"]
    operands["video"] = video.as_strided(video.shape, (7, *video.stride()[1:]))
    copies = clips_copied(monkeypatch)
    compare(operands)
    assert not copies


@pytest.mark.parametrize("lengths", [None, (5, 0, 12)], ids=str)
def test_odd_patches_are_never_copied(lengths, monkeypatch):
    """Lines of 5 values cannot be loaded several at a time anyway."""
    operands = gather_operands(torch.float32, layout="cropped", lengths=lengths)
    copies = clips_copied(monkeypatch)
    oracle.outcome(kernels.gather_patch_embed, operands)
    assert not copies


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 4, 1), (2, 2, 6)])
def test_other_patches_and_channels(patch, channels):
    clip = torch.randn(2, channels, *(2 * step for step in patch))
    operands = gather_operands(torch.float32, count=5, patch=patch, grid=(2, 2, 2), width=7)
    operands["weight"] = torch.randn(7, channels, *patch)
    for video in (clip, channels_last(clip)):
        check("gather_patch_embed", plain_gather, operands | dict(video=video))


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 1, 3), (3, 1, 1), (1, 3, 1)])
def test_thin_grids(grid):
    """Where an extent is 1, or a patch is the whole of it, strides say little."""
    for layout in ("contiguous", "channels_last"):
        compare(gather_operands(torch.float32, count=1, grid=grid, layout=layout))


def test_one_clip_for_all():
    """A clip expanded over the batch is not copied, and its gradient is dense."""
    operands = gather_operands(torch.float32)
    operands["video"] = operands["video"][:1].expand(2, -1, -1, -1, -1)
    compare(operands)


LAYOUTS = {"contiguous": PLANAR, "channels-last": LAST, "frames first": FRAMES_FIRST, "another": (0, 1, 2, 4, 3)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_the_clips_gradient(layout):
    """Dense, in the clip's own order where that has lines to store; zero outside the visible tubelets."""
    operands = gather_operands(torch.float32)
    operands["video"] = within(operands["video"], [0] * 5, [0] * 5, LAYOUTS[layout])
    gradient = oracle.outcome(kernels.gather_patch_embed, operands)[2]["video"]
    expected = torch.empty_like(operands["video"]) if layout != "another" else torch.empty(operands["video"].shape)
    assert gradient.stride() == expected.stride()
    per_tubelet = 3 * PATCH[0] * PATCH[1] * PATCH[2]
    assert int((gradient != 0).sum()) == operands["keep_idx"].numel() * per_tubelet


# Indices.


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_unsorted_index(index):
    operands = gather_operands(torch.float32, index=index)
    operands["keep_idx"] = torch.stack([row[torch.randperm(17)] for row in operands["keep_idx"]])
    compare(operands)


def test_strided_index():
    operands = gather_operands(torch.float32, **FEW)
    compare(operands | dict(keep_idx=strided(operands["keep_idx"])))
    compare(operands | dict(keep_idx=operands["keep_idx"].T.contiguous().T))
    compare(operands | dict(keep_idx=operands["keep_idx"][:1].expand(2, -1)))


def test_positions():
    """Position 0 has no row, 1 has one, 2 as many as clips; in tiles of 2."""
    operands = gather_operands(torch.float32, batch=5, count=3, grid=(2, 2, 2), width=7)
    operands["keep_idx"] = torch.tensor([[1, 2, 3], [7, 4, 2], [2, 5, 4], [3, 2, 6], [6, 3, 2]])
    with forced(SMALL):
        compare(operands)
        gradient = oracle.outcome(kernels.gather_patch_embed, operands)[2]["pos_embed"]
    assert torch.equal(gradient[0], torch.zeros(7))


def test_repeated_index_beyond_the_check(monkeypatch):
    """On a GPU nobody looks: all but the clip's gradient is right even then."""
    monkeypatch.setattr("mar_fast.kernels.checks.may_read", lambda value: False)
    operands = gather_operands(torch.float32, count=9, video=torch.uint8)
    operands["keep_idx"] = torch.randint(TOKENS, (2, 9), dtype=torch.int32)
    operands["keep_idx"][:, :3] = 5
    compare(operands)
