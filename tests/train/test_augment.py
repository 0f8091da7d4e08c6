"""Augmentation in workers: RandAugment against formulas, the statistics of crops, flips and boxes, same over frames."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from mar_fast.train.augment import POSITIONS, ClipAugment, multi_scale_crop, random_resized_crop
from mar_fast.train.rand_augment import ARGUMENTS, RandAugment, corners
from mar_fast.train.recipe import Augment

GRAY = (128, 128, 128)
MEAN = (0.485, 0.456, 0.406)
SIGNED = {"Rotate": 30, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 0.45, "TranslateY": 0.45}
ENHANCED = ("Color", "Contrast", "Brightness", "Sharpness")
KEPT = Augment(flip=0, crop="center")  # changes nothing but the size


def rng(seed=0):
    return np.random.default_rng(seed)


def noise(height, width, seed=0):
    return rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("magnitude", [0, 3, 7, 9, 10])
def test_arguments_of_every_op(magnitude):
    augment, drawn = RandAugment(f"rand-m{magnitude}-n4-inc1", GRAY, "bicubic"), {}
    source = rng()
    for _ in range(600):
        for name, argument in augment.draw(source):
            drawn.setdefault(name, set()).add(round(argument, 9))
    share = magnitude / 10
    expected = {name: {round(sign * top * share, 9) for sign in (-1, 1)} for name, top in SIGNED.items()}
    expected |= {name: {round(max(0.1, 1 + sign * 0.9 * share), 9) for sign in (-1, 1)} for name in ENHANCED}
    expected |= {name: {0.0} for name in ("AutoContrast", "Equalize", "Invert")}
    expected["Posterize"] = {4 - math.floor(4 * magnitude / 10)}
    expected["Solarize"] = {256 - math.floor(256 * magnitude / 10)}
    expected["SolarizeAdd"] = {math.floor(110 * magnitude / 10)}
    assert drawn == expected and len(expected) == 15


@pytest.mark.parametrize(("policy", "ops"), [("rand-m7-n4-mstd0.5-inc1", 4), ("rand-m7-mstd0.5-inc1", 2)])
def test_how_often_and_how_strong(policy, ops):
    augment, source, draws = RandAugment(policy, GRAY, "bicubic"), rng(), 6000
    drawn = [augment.draw(source) for _ in range(draws)]
    lengths = Counter(map(len, drawn))
    for length in range(ops + 1):  # each with probability 1/2
        share = math.comb(ops, length) / 2**ops
        assert abs(lengths[length] / draws - share) < 5 * math.sqrt(share * (1 - share) / draws)
    names = Counter(name for clip in drawn for name, _ in clip)
    total = sum(names.values())
    assert set(names) == set(ARGUMENTS)
    assert all(abs(count / total - 1 / 15) < 5 * math.sqrt(1 / 15 / total) for count in names.values())
    degrees = np.array([argument for clip in drawn for name, argument in clip if name == "Rotate"])
    assert abs(np.abs(degrees).mean() - 21) < 0.3 and abs(np.abs(degrees).std() - 1.5) < 0.2
    assert abs((degrees > 0).mean() - 0.5) < 0.1


def luma(image):
    return image @ np.array([299, 587, 114]) / 1000


def stretched(image):
    low, high = image.min((0, 1)).astype(float), image.max((0, 1)).astype(float)
    return (image - low) * 255 / (high - low)


IMAGE = noise(40, 60) // 2 + 30
BY_HAND = [
    ("Invert", 0, 255 - IMAGE.astype(int)),
    ("Posterize", 2, IMAGE // 64 * 64),
    ("Posterize", 0, IMAGE * 0),
    ("Solarize", 90, np.where(IMAGE < 90, IMAGE, 255 - IMAGE.astype(int))),
    ("SolarizeAdd", 77, np.where(IMAGE < 128, np.minimum(IMAGE.astype(int) + 77, 255), IMAGE)),
    ("Brightness", 1.3, IMAGE * 1.3),
    ("Color", 0.3, luma(IMAGE)[..., None] + 0.3 * (IMAGE - luma(IMAGE)[..., None])),
    ("Contrast", 0.4, luma(IMAGE).mean() + 0.4 * (IMAGE - luma(IMAGE).mean())),
    ("AutoContrast", 0, stretched(IMAGE)),
    ("TranslateX", 0.25, np.concatenate([IMAGE[:, 15:], np.full((40, 15, 3), 128)], 1)),
    ("TranslateY", -0.1, np.concatenate([np.full((4, 60, 3), 128), IMAGE[:-4]])),
]


@pytest.mark.parametrize(("name", "argument", "expected"), BY_HAND, ids=[f"{row[0]}-{row[1]}" for row in BY_HAND])
def test_ops_by_hand(name, argument, expected):
    got = np.asarray(RandAugment("rand-m9-inc1", GRAY, "bilinear").apply(Image.fromarray(IMAGE), name, argument))
    assert np.abs(got - np.clip(expected, 0, 255)).max() <= (1.5 if name in (*ENHANCED, "AutoContrast") else 0)


def test_ops_that_turn_and_shear_and_those_of_histograms():
    augment = RandAugment("rand-m9-inc1", (124, 116, 104), "bilinear")
    turned = augment.apply(Image.fromarray(IMAGE), "Rotate", 27.0)
    expected = Image.fromarray(IMAGE).rotate(27.0, Image.Resampling.BILINEAR, fillcolor=(124, 116, 104))
    assert np.array_equal(np.asarray(turned), np.asarray(expected))
    y, x = np.mgrid[:40, :60]
    for name, ramp, moved in (
        ("ShearX", 4 * x, 4 * (x + 0.27 * (y + 0.5))),
        ("ShearY", 4 * y, 4 * (y + 0.27 * (x + 0.5))),
    ):
        picture = np.repeat(ramp[..., None], 3, 2).astype(np.uint8)
        got = np.asarray(augment.apply(Image.fromarray(picture), name, 0.27))
        inside = moved < ramp.max()
        assert np.abs(got[inside] - moved[inside][:, None]).max() < 1  # rounded down
        assert np.array_equal(got[moved > ramp.max() + 4][0], (124, 116, 104))
    skewed = (255 * rng().random((64, 64, 3)) ** 3).astype(np.uint8)
    even = np.sort(np.asarray(augment.apply(Image.fromarray(skewed), "Equalize", 0))[..., 0].ravel())
    assert (
        np.abs(even - np.linspace(0, 255, even.size)).mean() < 8 < np.abs(np.sort(skewed[..., 0].ravel()) - even).mean()
    )
    flat = np.full((8, 8, 3), 50, np.uint8)
    assert np.array_equal(np.asarray(augment.apply(Image.fromarray(flat), "Sharpness", 1.9)), flat)
    sharp = np.asarray(augment.apply(Image.fromarray(IMAGE), "Sharpness", 1.9)).astype(float)
    assert sharp[1:-1, 1:-1].std() > IMAGE[1:-1, 1:-1].std()


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m7-n4-mstd0.5-inc1"])
def test_an_early_crop_is_a_late_one(policy):
    augment, frames, box = RandAugment(policy, (124, 116, 104), "bicubic"), [Image.fromarray(IMAGE)], (5, 11, 24, 31)
    for seed in range(60):
        late = frames[0]
        for name, argument in augment.draw(rng(seed)):
            late = augment.apply(late, name, argument)
        (early,) = augment(frames, box, rng(seed))
        # Coordinates are summed up from another corner, so a value may round the other way.
        difference = np.abs(np.asarray(early).astype(int) - np.asarray(late.crop(corners(box))))
        assert early.size == (31, 24) and (difference > 0).mean() < 0.002


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m7-n4-mstd0.5-inc1", ""])
@pytest.mark.parametrize(
    ("crop", "scale"), [("random_resized", (0.08, 1.0)), ("multi_scale", (1.0, 0.875, 0.75, 0.66))]
)
def test_same_parameters_over_frames(policy, crop, scale):
    augment = ClipAugment(Augment(rand_augment=policy, crop=crop, scale=scale, erase=0.5), (24, 32), MEAN)
    frame, other = noise(48, 64), noise(48, 64, 1)
    clips = {}
    for seed in range(12):
        clip, box = augment([frame] * 4, rng(seed))
        assert clip.shape == (4, 24, 32, 3) and clip.dtype == np.uint8 and clip.flags.c_contiguous
        assert (clip == clip[0]).all()
        changed, same_box = augment([frame, frame, other, frame], rng(seed))  # a frame does not depend on others
        assert box == same_box and (changed[[0, 1, 3]] == clip[0]).all()
        clips[seed] = clip[0].tobytes(), changed[2].tobytes()
    assert len({both for pair in clips.values() for both in pair}) > 20  # some are black


def test_area_and_aspect_of_random_resized_crops():
    source = rng()
    crops = np.array([random_resized_crop(300, 400, (0.08, 0.4), (0.75, 4 / 3), source) for _ in range(4000)])
    top, left, height, width = crops.T
    assert crops.min() >= 0 and (top + height <= 300).all() and (left + width <= 400).all()
    area = height * width / (300 * 400)
    assert 0.078 < area.min() < 0.085 and 0.395 < area.max() < 0.402  # all of these fit in the picture
    assert abs(area.mean() - 0.24) < 0.006 and abs(area.std() - 0.32 / math.sqrt(12)) < 0.004
    logs = np.log(width / height)
    assert abs(logs).max() < math.log(4 / 3) + 0.02 and abs(logs.mean()) < 0.012
    assert abs(logs.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.006
    share = left / (400 - width)
    assert share.min() < 0.01 and share.max() > 0.99 and abs(share.mean() - 0.5) < 0.02


@pytest.mark.parametrize(("picture", "expected"), [((20, 400), (0, 186, 20, 27)), ((400, 20), (186, 0, 27, 20))])
def test_pictures_that_no_crop_fits(picture, expected):
    assert random_resized_crop(*picture, (0.9, 1.0), (0.75, 4 / 3), rng()) == expected


def test_multi_scale_crops():
    found = {
        multi_scale_crop(100, 140, (66, 74), (1, 0.875, 0.75, 0.66), source) for source in [rng()] for _ in range(4000)
    }
    rows, columns = (100, 87, 75, 66), (100, 87, 74, 66)  # 75 is as good as 74
    expected = set()
    for (i, height), (j, width) in product(enumerate(rows), enumerate(columns)):
        if abs(i - j) <= 1:
            down, right = (100 - height) // 4, (140 - width) // 4
            steps = [*product((0, 2, 4), (0, 2, 4)), *product((1, 3), (1, 3))]
            expected |= {(down * y, right * x, height, width) for y, x in steps}
    assert found == expected and len(POSITIONS) == 13


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_flips(flip):
    frame = noise(32, 32)
    augment, source = ClipAugment(Augment(flip=flip, crop="center"), (32, 32), MEAN), rng()
    flipped = 0
    for _ in range(200):
        clip, _ = augment([frame], source)
        flipped += (clip[0] == frame[:, ::-1]).all()
        assert (clip[0] == frame).all() or (clip[0] == frame[:, ::-1]).all()
    assert abs(flipped / 200 - flip) < 0.18 and (flip == 0.5 or flipped == 200 * flip)


def test_centre_crops_keep_the_shape_of_things():
    frame = noise(20, 60)
    clip, box = ClipAugment(KEPT, (20, 30), MEAN)([frame], rng())
    assert (clip[0] == frame[:, 15:45]).all() and box == (0, 0, 0, 0)


def test_boxes_to_erase():
    augment, source = (
        ClipAugment(Augment(erase=0.25, erase_area=(0.02, 0.33), erase_aspect=0.3), (100, 120), MEAN),
        rng(),
    )
    boxes = np.array([augment.erase(source) for _ in range(8000)])
    assert abs((boxes[:, 2] > 0).mean() - 0.25) < 0.025
    top, left, height, width = boxes[boxes[:, 2] > 0].T
    assert (top + height <= 100).all() and (left + width <= 120).all()
    area, logs = height * width / 12000, np.log(height / width)
    assert area.min() > 0.018 and area.max() < 0.335 and abs(logs).max() < -math.log(0.3) + 0.1
    narrow = area < 0.1  # of these hardly any is too long for the picture
    assert abs(area[narrow].mean() - 0.06) < 0.004
    assert abs(logs[narrow].std() + 2 * math.log(0.3) / math.sqrt(12)) < 0.05
    assert {augment.erase(rng(seed)) for seed in (3, 3, 3)} == {augment.erase(rng(3))}


@pytest.mark.parametrize(
    "policy", ["rand", "m9-inc1", "rand-m9", "rand-m9-inc0", "rand-m9.5-inc1", "rand-m9-w0-inc1", "rand-m9-n-inc1"]
)
def test_other_policies(policy):
    with pytest.raises(ValueError, match=r"augment.rand_augment: got '.*', expected timm's notation with m, n, mstd"):
        ClipAugment(Augment(rand_augment=policy), (32, 32), MEAN)
