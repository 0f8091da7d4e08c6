"""Mixup, cutmix, erasing and soft targets against formulas; the masks of a batch; what comes from which generator."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import small_config

from mar_fast import masking
from mar_fast.train.masks import draw_mask
from mar_fast.train.mixing import cut_box, mix_batch, soft_targets
from mar_fast.train.recipe import Augment, Mask

CONFIG = small_config()  # 11 classes
LABELS = torch.tensor([3, 0, 7, 10, 5, 1])
BOTH = Augment(mixup=0.8, cutmix=1.0, smoothing=0.1)
NO_BOXES = torch.zeros(6, 4, dtype=torch.int64)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def clips(batch=6, size=(12, 20), seed=0):
    """A view of channels-last memory, as the loader gives them."""
    video = torch.randint(256, (batch, 4, *size, 3), dtype=torch.uint8, generator=source(seed))
    return video.permute(0, 4, 1, 2, 3)


def normalised(video):
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (CONFIG.mean, CONFIG.std))
    return ((video.float() / 255 - mean) / std).numpy()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_soft_targets(share, smoothing):
    got = soft_targets(LABELS, 11, share, smoothing).numpy()
    for row, (label, partner) in enumerate(zip([3, 0, 7, 10, 5, 1], [1, 5, 10, 7, 0, 3], strict=True)):
        for number in range(11):
            hot = share * (number == label) + (1 - share) * (number == partner)
            assert got[row, number] == pytest.approx((1 - smoothing) * hot + smoothing / 11, abs=1e-6)
    assert np.allclose(got.sum(1), 1)


def share_of(targets):
    """What is left of the first clip, from the target of its label."""
    return (targets[0, 3].item() - 0.1 / 11) / 0.9


def test_mixed_clips_and_their_targets():
    mixing, video = partial(mix_batch, BOTH, CONFIG), clips()
    before, plain = video.clone(), normalised(video)
    kinds = []
    for seed in range(200):
        mixed, targets = mixing(video, LABELS, NO_BOXES, source(seed))
        assert mixed.dtype == targets.dtype == torch.float32
        share = share_of(targets)
        assert np.allclose(targets, soft_targets(LABELS, 11, share, 0.1), atol=1e-6)
        blended = share * plain + (1 - share) * plain[::-1]
        is_blended = np.allclose(mixed, blended, atol=2e-6)  # share was read off float32
        kinds.append(is_blended)
        if not is_blended:
            changed = (mixed.numpy() != plain).any((0, 1, 2))
            rows, columns = np.nonzero(changed.any(1))[0], np.nonzero(changed.any(0))[0]
            inside = np.s_[..., rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert changed[inside].all() and np.array_equal(mixed.numpy()[inside], plain[::-1][inside])
            assert share == pytest.approx(1 - changed.sum() / changed.size, abs=1e-6)
    assert 70 < sum(kinds) < 130 and torch.equal(video, before)


@pytest.mark.parametrize(
    ("augment", "mixup", "cutmix"),
    [
        (replace(BOTH, mix=0.5), 0.25, 0.25),
        (replace(BOTH, switch=0.8), 0.2, 0.8),
        (replace(BOTH, cutmix=0.0), 1.0, 0.0),
        (replace(BOTH, mixup=0.0), 0.0, 1.0),
        (replace(BOTH, mixup=0.0, cutmix=0.0), 0.0, 0.0),
    ],
)
def test_how_often_each_is_done(augment, mixup, cutmix):
    mixing = partial(mix_batch, augment, replace(CONFIG, mean=(1.0,), std=(1.0,), channels=1))
    video = clips(size=(64, 64))[:, :1, :1]
    found, generator = [0, 0], source()
    for _ in range(400):
        mixed, targets = mixing(video, LABELS, NO_BOXES, generator)
        plain = video.float() / 255 - 1 if mixed.is_floating_point() else video
        if share_of(targets) < 0.999:
            found[int((mixed == plain).float().mean() > 0.02)] += 1
    # A clip that is mixed by next to nothing, or in next to no pixel, is not counted.
    assert abs(found[0] / 400 - mixup) < 0.1 and abs(found[1] / 400 - cutmix) < 0.1


def test_shares_have_the_beta_distribution():
    mixing, video = partial(mix_batch, replace(BOTH, cutmix=0.0), CONFIG), clips(size=(2, 2))
    generator = source()
    shares = np.array([share_of(mixing(video, LABELS, NO_BOXES, generator)[1]) for _ in range(3000)])
    assert abs(shares.mean() - 0.5) < 0.03 and abs(shares.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.006


def test_boxes_of_cutmix():
    rng = np.random.default_rng(0)
    boxes = np.array([cut_box(100, 60, 0.75, rng) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert height.max() == 50 and width.max() == 30  # half of each side, a quarter of the area
    assert top.min() == 0 and (top + height).max() == 100 and (left + width).max() == 60
    whole = (height == 50) & (width == 30)
    assert abs(whole.mean() - 0.5 * 0.5) < 0.05  # where the centre is as far from the border as that
    assert cut_box(100, 60, 1.0, rng)[2:] == (0, 0)


def test_erased_boxes_hold_noise():
    augment, video = Augment(erase=0.25, smoothing=0.1), clips(4, (64, 80))
    boxes = torch.tensor([[0, 0, 0, 0], [10, 20, 30, 40], [0, 0, 64, 79], [0, 0, 0, 0]])
    got, targets = mix_batch(augment, CONFIG, video, LABELS[:4], boxes, source())
    plain = normalised(video)
    assert got.stride() == video.stride() and np.allclose(targets, soft_targets(LABELS[:4], 11, 1.0, 0.1))
    for clip, expected, (top, left, height, width) in zip(got.numpy(), plain, boxes.tolist(), strict=True):
        box = np.zeros((64, 80), bool)
        box[top : top + height, left : left + width] = True
        assert np.allclose(clip[..., ~box], expected[..., ~box], atol=1e-6)
        if height:
            noise = clip[..., box]  # (C, T, pixels)
            assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05 and abs((noise**4).mean() - 3) < 0.4
            flat = noise.reshape(12, -1)
            assert np.abs(np.corrcoef(flat) - np.eye(12)).max() < 0.15  # of its own in every channel and frame


@pytest.mark.parametrize(
    ("augment", "dtype"),
    [
        (Augment(), torch.uint8),
        (Augment(cutmix=1.0), torch.uint8),  # pixels move, and stay what they are
        (Augment(mixup=0.8, mix=0.0), torch.uint8),
        (Augment(mixup=0.8), torch.float32),
        (Augment(mixup=0.8, mix=0.01), torch.float32),
        (Augment(erase=0.1), torch.float32),
    ],
)
def test_dtypes_follow_from_the_recipe(augment, dtype):
    mixing, video = partial(mix_batch, augment, CONFIG), clips()
    for seed in range(6):
        got, targets = mixing(video, None, NO_BOXES, source(seed))
        assert got.dtype == dtype and targets is None and got.data_ptr() != video.data_ptr()
        if not augment.cutmix and dtype == torch.uint8:
            assert torch.equal(got, video)
    floats = torch.randn(6, 3, 4, 12, 20, dtype=torch.float64)
    got, _ = mixing(floats, None, NO_BOXES, source())
    assert got.dtype == torch.float64 and (augment.cutmix > 0 or augment.mixup > 0 or torch.equal(got, floats))


def test_all_draws_come_from_the_generator():
    augment, video, boxes = replace(BOTH, erase=0.25), clips(), NO_BOXES.clone()
    boxes[2] = torch.tensor([1, 2, 5, 6])
    mixing, generator = partial(mix_batch, augment, CONFIG), source(7)
    mixing(video, LABELS, boxes, generator)
    kept = generator.get_state()
    run = [mixing(video, LABELS, boxes, generator) for _ in range(4)]
    torch.manual_seed(99), np.random.seed(99)
    generator.set_state(kept)
    again = [mixing(video, LABELS, boxes, generator) for _ in range(4)]
    assert all(torch.equal(a, b) for one, two in zip(run, again, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(run[0][0], run[1][0])
    # Any recipe draws as much, so what comes after does not depend on it.
    generator.set_state(kept), mix_batch(Augment(), CONFIG, video, LABELS, boxes, generator)
    after = generator.get_state()
    generator.set_state(kept), mixing(video, LABELS, boxes, generator)
    assert torch.equal(after, generator.get_state())


@pytest.mark.parametrize(
    ("video", "labels", "boxes", "message"),
    [
        (clips()[0], LABELS, NO_BOXES, r"video: got shape \(3, 4, 12, 20\), expected shape \(B, C, T, H, W\)"),
        (clips().int(), LABELS, NO_BOXES, "video: got torch.int32, expected uint8 or"),
        (clips(), LABELS + 4, NO_BOXES, "labels: got "),
        (clips(), LABELS, NO_BOXES[:3], r"boxes: got shape \(3, 4\), expected \(6, 4\)"),
    ],
)
def test_arguments_that_do_not_fit(video, labels, boxes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mix_batch(BOTH, CONFIG, video, labels, boxes, source())


RUNNING = dict(kind="cell_running", ratio=0.75)
GRID = CONFIG.grid  # (2, 4, 4)


@pytest.mark.parametrize(
    ("mask", "expected", "decoded"),
    [
        (Mask(), None, None),
        (Mask(kind="random", ratio=0.75), partial(masking.random, 5, GRID, 0.75), None),
        (Mask(kind="tube", ratio=0.9), partial(masking.tube, 5, GRID, 0.9), None),
        (Mask(kind="frame", ratio=0.5), partial(masking.frame, 5, GRID, 0.5), None),
        (Mask(**RUNNING), partial(masking.cell_running, 5, GRID, 0.75, temporal_shuffle=True), None),
        (Mask(**RUNNING, temporal_shuffle=False, spatial_repeat=False),
         partial(masking.cell_running, 5, GRID, 0.75, spatial_repeat=False), None),
        (Mask(kind="tube", ratio=0.9, decoder="cell_running", decoder_ratio=0.25),
         partial(masking.tube, 5, GRID, 0.9), partial(masking.cell_running, 5, GRID, 0.25, direction=-1)),
    ],
)  # fmt: skip
def test_masks_of_each_kind(mask, expected, decoded):
    """What they look like is tested with `masking`; here, which one is drawn, the encoder's first."""
    ours, theirs = source(3), source(3)
    for _ in range(2):
        for got, draw in zip(draw_mask(mask, 5, CONFIG, ours), (expected, decoded), strict=True):
            want = draw and draw(generator=theirs)
            assert (got is None) == (want is None)
            assert got is None or torch.equal(got.keep_idx, want.keep_idx)
