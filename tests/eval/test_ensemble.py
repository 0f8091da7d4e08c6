"""Complementary masks: each token is seen equally often; the average of their scores, against the plain reference."""

import math
from dataclasses import replace

import pytest

pytest.importorskip("hypothesis")

import torch
from checkpoint_cases import small_model
from helpers import plain, relative
from hypothesis import given
from hypothesis import strategies as st

import mar_fast
from mar_fast import TokenMask, masking
from mar_fast.eval import complementary, ensemble

GRID = (8, 4, 6)
RANDOM_KINDS = ("random", "tube", "frame")


def seen(masks):
    """(B, L), in how many masks each token is visible."""
    return sum((~mask.bool_masked()).long() for mask in masks)


@pytest.mark.parametrize("kind", ["running", *RANDOM_KINDS])
@pytest.mark.parametrize(("kept", "views", "times"), [(0.5, 2, 1), (0.25, 4, 1), (0.75, 4, 3), (1.0, 1, 1)])
def test_every_token_is_seen_equally_often(kind, kept, views, times):
    masks = complementary(kind, 3, GRID, 1 - kept, generator=torch.Generator().manual_seed(4))
    assert len(masks) == views and torch.equal(seen(masks), torch.full((3, 192), times))
    assert {mask.num_visible for mask in masks} == {round(kept * 192)} and {mask.grid for mask in masks} == {GRID}


@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 6)),
    batch=st.integers(0, 3),
    share=st.fractions(0, 1, max_denominator=9).filter(bool),
    kind=st.sampled_from(RANDOM_KINDS),
)
def test_random_deals_for_any_share(grid, batch, share, kind):
    units = {"random": math.prod(grid), "tube": grid[1] * grid[2], "frame": grid[0]}[kind]
    if units % share.denominator:
        with pytest.raises(ValueError, match=rf"ratio: got .*{share.denominator} views share the {units} "):
            complementary(kind, batch, grid, float(1 - share))
        return
    masks = complementary(kind, batch, grid, float(1 - share))
    assert len(masks) == share.denominator
    assert torch.equal(seen(masks), torch.full((batch, math.prod(grid)), share.numerator))


@given(
    cell=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
    times=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    data=st.data(),
)
def test_running_phases_of_any_cell(cell, times, data):
    slots = math.prod(cell)
    visible = data.draw(st.integers(1, slots))
    grid = tuple(side * count for side, count in zip(cell, times, strict=True))
    masks = complementary("running", 2, grid, 1 - visible / slots, cell=cell)
    views = slots // math.gcd(visible, slots)
    assert len(masks) == views and torch.equal(seen(masks), torch.full((2, math.prod(grid)), views * visible // slots))


def test_running_takes_the_phases_of_the_paper_s_mask():
    """Phase 0, which is the test form, comes first; at 50 % its exact complement is phase 2."""
    half, quarter = complementary("running", 1, GRID, 0.5), complementary("running", 1, GRID, 0.75)
    for masks, phases in ((half, (0, 2)), (quarter, (0, 1, 2, 3))):
        for mask, phase in zip(masks, phases, strict=True):
            assert torch.equal(mask.keep_idx, masking.cell_running(1, GRID, mask_ratio(mask), phase=phase).keep_idx)
    assert torch.equal(half[1].keep_idx, half[0].drop_idx)
    eighths = complementary("running", 1, GRID, 5 / 8, cell=(2, 2, 2))
    assert len(eighths) == 8 and torch.equal(seen(eighths), torch.full((1, 192), 3))


def mask_ratio(mask):
    return mask.drop_idx.shape[1] / mask.num_tokens


def test_what_is_dealt_out():
    """Tubes are the same at all times, frames are whole; clips and seeds differ, one seed gives one deal."""
    tubes = complementary("tube", 2, GRID, 0.5)[0].bool_masked().view(2, *GRID)
    assert torch.equal(tubes, tubes[:, :1].expand_as(tubes)) and tubes[:, 0].any()
    frames = complementary("frame", 2, GRID, 0.5)[0].bool_masked().view(2, *GRID)
    assert torch.equal(frames, frames[:, :, :1, :1].expand_as(frames))

    def deal(seed):
        return complementary("random", 2, GRID, 0.75, generator=torch.Generator().manual_seed(seed))[1].keep_idx

    assert torch.equal(deal(1), deal(1)) and not torch.equal(deal(1), deal(2)) and not torch.equal(*deal(1))


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("content", 1, GRID, 0.5), {}, "kind: got 'content', expected one of running, random, tube, frame"),
        (("random", 1, GRID, 1.0), {}, r"ratio: got 1.0, expected a number in \[0, 1\)"),
        (("random", 1, GRID, 0.7123), {}, "ratio: got 0.7123, expected one that keeps k/n of the tokens"),
        (("running", 1, GRID, 0.3), {}, "ratio: got 0.3, expected a whole number of the 4 slots"),
        (("running", 1, (8, 3, 6), 0.5), {}, "cell: got"),
        (("tube", 1, (8, 3, 3), 0.5), {}, "2 views share the 9 positions of grid"),
        (("frame", 1, (3, 4, 4), 0.5), {}, "2 views share the 3 frames of tubelets"),
        (("random", -1, GRID, 0.5), {}, "batch: got -1"),
        (("random", 1, (8, 4), 0.5), {}, "grid: got"),
        (("tube", 1, (8, 4), 0.5), {}, "grid: got"),
        (("running", 1, GRID, 0.5), dict(cell=(1, 2)), "cell: got"),
    ],
)
def test_errors(arguments, options, said):
    with pytest.raises(ValueError, match=said):
        complementary(*arguments, **options)


@pytest.fixture(scope="module")
def model():
    return small_model(decoder_depth=0).double()


@pytest.mark.parametrize("kind", ["running", *RANDOM_KINDS[:2]])
def test_average_by_hand(model, kind):
    """The average of the softmax scores that the plain reference gives, one clip and one mask at a time."""
    masks = complementary(kind, 2, model.config.grid, 0.5, generator=torch.Generator().manual_seed(0))
    video = torch.randn(2, 3, 6, 32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    oracle, want = plain(model), torch.zeros(2, 11, dtype=torch.float64)
    for mask in masks:
        for clip in range(2):
            one = TokenMask(mask.keep_idx[clip, None], mask.drop_idx[clip, None], mask.grid)
            want[clip] += oracle(video[clip, None], one).logits[0].softmax(0) / len(masks)
    got = ensemble.log_probabilities(model, video, masks)
    assert got.dtype == torch.float64 and relative(got.exp(), want) < 1e-12
    assert relative(got.exp(), model(video, masks[0]).logits.softmax(-1)) > 1e-3


def test_average_of_other_masks(model):
    """The model's own mask, ragged ones, gradients, scores below the smallest float."""
    video = torch.rand(2, 3, 6, 32, 64, dtype=torch.float64)
    own = ensemble.log_probabilities(model, video, [None])
    assert relative(own, model(video).logits.log_softmax(-1)) < 1e-12
    content = masking.content(video, model.config.grid, budget=0.5)
    got = ensemble.log_probabilities(model, video, [None, content])
    want = (model(video).logits.softmax(-1) + model(video, content).logits.softmax(-1)) / 2
    assert relative(got.exp(), want) < 1e-12
    got[:, 0].sum().backward()
    assert model.classifier.head.weight.grad.norm() > 0
    far = small_model(decoder_depth=0).double()
    with torch.no_grad():
        far.classifier.head.weight.mul_(1e4)
    assert ensemble.log_probabilities(far, video, [None, content]).isfinite().all()


def test_average_errors(model):
    video = torch.rand(1, 3, 6, 32, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="masks: got none, expected at least one"):
        ensemble.log_probabilities(model, video, [])
    headless = mar_fast.MAR(replace(model.config, classifier=None))
    with pytest.raises(ValueError, match="model: got one without a classifier"):
        ensemble.log_probabilities(headless, video, [None])
