"""Augmentation of a clip in a worker: RandAugment, crop, flip, and the box that will be erased on the device.

All draws are made once for a clip and hold for all of its frames. RandAugment comes before the crop, so that what it
moves into the picture is mostly cut off again.
"""

import math
from collections.abc import Sequence

import numpy as np

from ..data.framing import Image
from .rand_augment import Box, RandAugment, corners
from .recipe import Augment

GRAY = (128, 128, 128)
NO_BOX: Box = (0, 0, 0, 0)
CROP_TRIES, ERASE_TRIES = 10, 100
NEAR = 3  # a side of a multi-scale crop that is as near as this to the clip's takes its size: nothing to resize


class ClipAugment:
    """From the frames of a film to a training clip.

    Args:
        augment: What is done, and how often.
        size: (H, W) of the clip.
        mean: Mean colour in [0, 1], for ``augment.fill = "mean"``.

    Raises:
        ValueError: RandAugment's policy is in another notation.
    """

    def __init__(self, augment: Augment, size: tuple[int, int], mean: Sequence[float]) -> None:
        self.augment, self.size = augment, size
        fill = GRAY if augment.fill == "gray" else [round(255 * value) for value in mean]
        policy = augment.rand_augment
        self.rand_augment = RandAugment(policy, fill, augment.interpolation) if policy else None

    def __call__(self, frames: Sequence[Image], rng: np.random.Generator) -> tuple[Image, Box]:
        """Augment one clip.

        Args:
            frames: (H', W', 3) uint8 each, all of one size.
            rng: Source of all draws.

        Returns:
            (T, H, W, 3) uint8, and the box of it to be erased, of height 0 for none.
        """
        from PIL import Image as Pillow

        images: Sequence[Pillow.Image] = [Pillow.fromarray(frame) for frame in frames]
        crop = self.crop(images[0].height, images[0].width, rng)
        if self.rand_augment is not None:
            images = self.rand_augment(images, crop, rng)
        else:
            images = [image.crop(corners(crop)) for image in images]
        target = self.size[::-1]
        clip = np.stack([np.asarray(image.resize(target, Pillow.Resampling.BILINEAR)) for image in images])
        if rng.random() < self.augment.flip:
            clip = clip[:, :, ::-1]
        return np.ascontiguousarray(clip), self.erase(rng)

    def crop(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """The part of a picture of this size that becomes the clip."""
        augment = self.augment
        if augment.crop == "random_resized":
            return random_resized_crop(height, width, augment.scale, augment.aspect, rng)
        if augment.crop == "multi_scale":
            return multi_scale_crop(height, width, self.size, augment.scale, rng)
        scale = min(height / self.size[0], width / self.size[1])
        return _centre(height, width, round(self.size[0] * scale), round(self.size[1] * scale))

    def erase(self, rng: np.random.Generator) -> Box:
        """The box that is erased in all frames of a clip (arXiv 1708.04896), of height 0 for none."""
        augment, (height, width) = self.augment, self.size
        if rng.random() < augment.erase:
            log_aspect = abs(math.log(augment.erase_aspect))
            for _ in range(ERASE_TRIES):
                area = rng.uniform(augment.erase_area[0], augment.erase_area[1]) * height * width
                aspect = math.exp(rng.uniform(-log_aspect, log_aspect))  # height / width
                rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if rows < height and columns < width:
                    return _anywhere(height, width, rows, columns, rng)
        return NO_BOX


def random_resized_crop(
    height: int, width: int, scale: Sequence[float], aspect: Sequence[float], rng: np.random.Generator
) -> Box:
    """A crop of random area and aspect, anywhere in a picture (Inception, arXiv 1409.4842).

    ``scale`` has the least and the greatest share of the area, ``aspect`` the least and the greatest width / height,
    even on a logarithmic scale. Where none of 10 crops fits, it is the largest in the middle with an aspect allowed.
    """
    for _ in range(CROP_TRIES):
        area = rng.uniform(scale[0], scale[1]) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            return _anywhere(height, width, rows, columns, rng)
    ratio = min(max(width / height, aspect[0]), aspect[1])
    return _centre(height, width, min(height, round(width / ratio)), min(width, round(height * ratio)))


def multi_scale_crop(
    height: int, width: int, size: tuple[int, int], scales: Sequence[float], rng: np.random.Generator
) -> Box:
    """A crop whose sides are shares of a picture's short side, at one of 13 positions (TSN, arXiv 1608.00859).

    ``size`` is (H, W) of the clip. Of ``scales``, in order, height and width take the same or neighbouring ones.
    """
    short = min(height, width)
    sides = [max(1, int(short * scale)) for scale in scales]
    rows, columns = (
        [target if abs(side - target) < NEAR and target <= short else side for side in sides] for target in size
    )
    pairs = [(i, j) for i in range(len(sides)) for j in range(len(sides)) if abs(i - j) <= 1]
    i, j = pairs[rng.integers(len(pairs))]
    y, x = POSITIONS[rng.integers(len(POSITIONS))]
    return y * ((height - rows[i]) // 4), x * ((width - columns[j]) // 4), rows[i], columns[j]


# (y, x) in quarters of what the crop leaves free: corners, middles of the sides and centre, and four between.
POSITIONS = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)] + [(y, x) for y in (1, 3) for x in (1, 3)]


def _anywhere(height: int, width: int, rows: int, columns: int, rng: np.random.Generator) -> Box:
    return int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1)), rows, columns


def _centre(height: int, width: int, rows: int, columns: int) -> Box:
    return (height - rows) // 2, (width - columns) // 2, rows, columns
