"""The content mask against its definition, pixel by pixel in exact arithmetic."""

import math
from fractions import Fraction

import pytest

pytest.importorskip("hypothesis")

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mar_fast import masking

GRID = (2, 3, 4)


def naive(clip, grid):
    """(C, T, H, W) array of whole numbers -> the change of every tubelet, in flat order, as fractions."""
    channels, frames, height, width = clip.shape
    t, h, w = frames // grid[0], height // grid[1], width // grid[2]
    found = []
    for place in np.ndindex(grid):
        total = 0
        for frame in range(place[0] * t, (place[0] + 1) * t):
            after = max(frame, 1) if frames > 1 else 0  # the first frame counts as the second
            block = np.s_[:, place[1] * h : (place[1] + 1) * h, place[2] * w : (place[2] + 1) * w]
            one, other = clip[:, after][block], clip[:, max(after - 1, 0)][block]
            total += int(np.abs(one.astype(np.int64) - other.astype(np.int64)).sum())
        found.append(Fraction(total, channels * t * h * w))
    return found


def kept_by_budget(changes, budget):
    """Token lists for each clip: the best of each, then the largest changes of the whole batch."""
    tokens = len(changes[0])
    best = {(clip, max(range(tokens), key=lambda i: (row[i], -i))) for clip, row in enumerate(changes)}
    others = [(-row[i], i, clip) for clip, row in enumerate(changes) for i in range(tokens) if (clip, i) not in best]
    count = max(math.ceil(budget * tokens * len(changes)), len(changes))
    kept = best | {(clip, i) for _, i, clip in sorted(others)[: count - len(best)]}
    return [sorted(i for clip, i in kept if clip == number) for number in range(len(changes))]


def kept_by_threshold(changes, threshold):
    best = [max(range(len(row)), key=lambda i, row=row: (row[i], -i)) for row in changes]
    return [sorted({*(i for i, v in enumerate(row) if v >= threshold), best[b]}) for b, row in enumerate(changes)]


def kept(mask):
    return [row.tolist() for row in mask.keep_idx.split(mask.cu_seqlens.diff().tolist())]


@st.composite
def videos(draw):
    """Few grey levels and still places, so that equal changes are common."""
    batch, channels, t = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    grid = draw(st.sampled_from([(1, 2, 2), (2, 3, 4), (3, 1, 5)]))
    shape = (batch, channels, grid[0] * t, grid[1] * draw(st.integers(1, 3)), grid[2] * draw(st.integers(1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = np.array(draw(st.sampled_from([[0, 255], [3, 4, 5], range(256)])), dtype=np.uint8)
    still = rng.random(shape) < rng.random((batch, 1, 1, 1, 1))
    return np.where(still, levels[0], rng.choice(levels, shape)), grid


@given(videos(), st.integers(1, 64))
def test_budget_follows_the_definition(case, share):
    clips, grid = case
    mask = masking.content(torch.from_numpy(clips), grid, budget=share / 64)
    assert kept(mask) == kept_by_budget([naive(clip, grid) for clip in clips], Fraction(share, 64))
    assert mask.grid == grid
    assert mask.total_visible == max(math.ceil(share * len(clips) * math.prod(grid) / 64), len(clips))


@given(videos(), st.integers(0, 255))
def test_threshold_follows_the_definition(case, level):
    """A change of exactly the threshold is kept: bytes are compared without rounding."""
    clips, grid = case
    mask = masking.content(torch.from_numpy(clips), grid, threshold=level / 255)
    assert kept(mask) == kept_by_threshold([naive(clip, grid) for clip in clips], level)


@given(videos(), st.integers(1, 255), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_floats_count_in_their_own_units(case, level, dtype):
    """Whole numbers up to 255, whose sums float32 holds, and a threshold that no mean of them comes near."""
    clips, grid = case
    changes, count = [naive(clip, grid) for clip in clips], clips.size
    threshold = level + 1 / (2 * count)
    mask = masking.content(torch.from_numpy(clips).to(dtype), grid, threshold=threshold)
    assert kept(mask) == kept_by_threshold(changes, threshold)


def test_motion_gets_the_budget():
    """A still clip keeps one token, one in which a corner moves keeps that corner, noise keeps most."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.full((3, 3, 4, 48, 64), 100, dtype=torch.uint8)
    clips[1, :, :, :16, :16] = torch.randint(256, (3, 4, 16, 16), dtype=torch.uint8, generator=generator)
    clips[2] = torch.randint(256, clips[2].shape, dtype=torch.uint8, generator=generator)
    assert kept(masking.content(clips, GRID, threshold=0.1)) == [[0], [0, 12], list(range(24))]
    mask = masking.content(clips, GRID, budget=0.5)
    lengths = mask.cu_seqlens.diff().tolist()
    assert sum(lengths) == 36 and lengths[2] == 24
    # What is left goes to tubelets that do not change at all: from both clips alike.
    assert lengths[:2] == [6, 6]


def test_strides_change_nothing():
    clips = torch.randint(256, (2, 3, 4, 48, 64), dtype=torch.uint8)
    last = clips.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    crop = torch.nn.functional.pad(clips, (3, 5, 1, 2))[..., 1:-2, 3:-5]
    want = kept(masking.content(clips, GRID, budget=0.3))
    assert kept(masking.content(last, GRID, budget=0.3)) == kept(masking.content(crop, GRID, budget=0.3)) == want


@pytest.mark.parametrize("options", [{"budget": 0.5}, {"threshold": 0.1}])
def test_no_clips(options):
    mask = masking.content(torch.zeros(0, 3, 4, 48, 64, dtype=torch.uint8), GRID, **options)
    assert (mask.batch, mask.total_visible, mask.num_tokens, mask.grid) == (0, 0, 24, GRID)


@pytest.mark.gpu
def test_same_on_a_gpu():
    clips = torch.randint(4, (3, 3, 4, 48, 64), dtype=torch.uint8)
    for options in ({"budget": 0.37}, {"threshold": 0.005}):
        mask = masking.content(clips.cuda(), GRID, **options)
        assert mask.keep_idx.is_cuda and kept(mask) == kept(masking.content(clips, GRID, **options))


ZEROS = torch.zeros(2, 3, 4, 48, 64, dtype=torch.uint8)
NAN = torch.zeros(2, 3, 4, 48, 64).index_fill_(2, torch.tensor(2), torch.nan)
REFUSED = [
    ("budget and threshold", ZEROS, GRID, {}), ("budget and threshold", ZEROS, GRID, dict(budget=0.5, threshold=0.1)),
    ("budget", ZEROS, GRID, dict(budget=0)), ("budget", ZEROS, GRID, dict(budget=1.01)),
    ("budget", ZEROS, GRID, dict(budget=math.nan)), ("budget", ZEROS, GRID, dict(budget="half")),
    ("threshold", ZEROS, GRID, dict(threshold=-0.1)), ("threshold", ZEROS, GRID, dict(threshold=math.nan)),
    ("threshold", ZEROS, GRID, dict(threshold=math.inf)), ("grid", ZEROS, (3, 4), dict(budget=0.5)),
    ("grid", ZEROS, (0, 3, 4), dict(budget=0.5)), ("video", ZEROS, (2, 3, 5), dict(budget=0.5)),
    ("video", ZEROS[0], GRID, dict(budget=0.5)), ("video", ZEROS.int(), GRID, dict(budget=0.5)),
    ("video", ZEROS[:, :0], GRID, dict(budget=0.5)), ("video", ZEROS.numpy(), GRID, dict(budget=0.5)),
    ("video", NAN[:, :, 2:3], (1, 3, 4), dict(budget=0.5)),
    ("video", NAN, GRID, dict(budget=0.5)), ("video", NAN.nan_to_num(math.inf), GRID, dict(threshold=0.1)),
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSED, ids=[f"{i}-{row[0]}" for i, row in enumerate(REFUSED)])
def test_the_message_names_the_argument(row):
    named, video, grid, options = row
    with pytest.raises((TypeError, ValueError), match=f"^{named}: got .*, expected "):
        masking.content(video, grid, **options)
