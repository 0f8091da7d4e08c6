"""RandAugment (arXiv 1909.13719) as timm has it, in the form whose ops grow stronger with the magnitude."""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..kernels import checks

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]  # top, left, height, width

MAX_MAGNITUDE = 10.0
PROBABILITY = 0.5  # of each op that was chosen
MOVING = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
LOCAL = ("Invert", "Posterize", "Solarize", "SolarizeAdd", "Color", "Brightness")  # a pixel depends on itself alone

# The argument of each op from its strength in [0, 1] and a sign, drawn.
ARGUMENTS: dict[str, Callable[[float, int], float]] = {
    **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), lambda strength, sign: 0.0),  # not read
    "Rotate": lambda strength, sign: sign * 30 * strength,  # degrees
    "Posterize": lambda strength, sign: 4 - int(4 * strength),  # bits that stay
    "Solarize": lambda strength, sign: 256 - int(256 * strength),  # values from here on are inverted
    "SolarizeAdd": lambda strength, sign: int(110 * strength),  # added to values below 128
    **dict.fromkeys(
        ("Color", "Contrast", "Brightness", "Sharpness"),
        lambda strength, sign: max(0.1, 1 + sign * 0.9 * strength),  # 1 changes nothing
    ),
    **dict.fromkeys(("ShearX", "ShearY"), lambda strength, sign: sign * 0.3 * strength),
    **dict.fromkeys(("TranslateX", "TranslateY"), lambda strength, sign: sign * 0.45 * strength),  # of width or height
}

_SECTION = re.compile(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)")


class RandAugment:
    """Some ops out of 15, drawn for a clip and done to all of its frames.

    Args:
        policy: timm's notation. "rand-m7-n4-mstd0.5-inc1": the magnitude is 7 of 10, drawn for each op from a normal
            distribution with standard deviation 0.5; n ops are chosen, 2 where it is not said, and one may come twice.
        fill: RGB of what comes into the picture from outside.
        interpolation: "bilinear" or "bicubic", of the geometric ops.

    Raises:
        ValueError: another notation.
    """

    def __init__(self, policy: str, fill: Sequence[int], interpolation: str) -> None:
        name, *sections = policy.split("-")
        found = [_SECTION.fullmatch(section) for section in sections]
        values = {match[1]: float(match[2]) for match in found if match is not None}
        whole = all(values.get(key, 0) % 1 == 0 for key in ("m", "n", "inc"))
        if name != "rand" or None in found or not whole or "m" not in values or values.get("inc") != 1:
            accepted = 'timm\'s notation with m, n, mstd and inc1, for example "rand-m9-mstd0.5-inc1"'
            raise checks.bad("augment.rand_augment", repr(policy), accepted)
        self.magnitude, self.std, self.ops = values["m"], values.get("mstd", 0.0), int(values.get("n", 2))
        self.fill, self.interpolation = tuple(fill), interpolation

    def draw(self, rng: np.random.Generator) -> list[tuple[str, float]]:
        """The ops to be done, in order, each with its argument."""
        drawn = []
        for name in rng.choice(list(ARGUMENTS), self.ops):
            if rng.random() < PROBABILITY:
                magnitude = min(max(rng.normal(self.magnitude, self.std), 0.0), MAX_MAGNITUDE)
                sign = 1 - 2 * int(rng.integers(2))
                drawn.append((str(name), ARGUMENTS[name](magnitude / MAX_MAGNITUDE, sign)))
        return drawn

    def __call__(self, frames: "Sequence[Image]", crop: Box, rng: np.random.Generator) -> "Sequence[Image]":
        """Do the same ops to all frames of a clip, RGB, and crop what comes out.

        The crop is made as early as the ops allow: one that moves pixels computes only those of the crop, and one that
        changes each pixel by itself comes after.
        """
        ops = self.draw(rng)
        whole = len(ops)
        while whole and ops[whole - 1][0] in LOCAL:
            whole -= 1
        moves = whole > 0 and ops[whole - 1][0] in MOVING
        for number, (name, argument) in enumerate(ops[:whole]):
            box = crop if moves and number == whole - 1 else None
            frames = [self.apply(frame, name, argument, box) for frame in frames]
        if not moves:
            frames = [frame.crop(corners(crop)) for frame in frames]
        for name, argument in ops[whole:]:
            frames = [self.apply(frame, name, argument) for frame in frames]
        return frames

    def apply(self, image: "Image", name: str, argument: float, box: Box | None = None) -> "Image":
        """One op by its name and argument in `ARGUMENTS`; of the `MOVING` ones the part of the result in ``box``."""
        from PIL import Image, ImageEnhance, ImageOps

        if name in MOVING:
            top, left, height, width = box or (0, 0, image.height, image.width)
            a, b, c, d, e, f = _affine(name, argument, image.width, image.height)
            matrix = (a, b, a * left + b * top + c, d, e, d * left + e * top + f)
            resample = Image.Resampling[self.interpolation.upper()]
            return image.transform((width, height), Image.Transform.AFFINE, matrix, resample, fillcolor=self.fill)
        match name:
            case "AutoContrast" | "Equalize" | "Invert":
                return getattr(ImageOps, name.lower())(image)
            case "Posterize":  # with no bit left the picture is black, which Pillow's own refuses
                mask = 256 - 2 ** (8 - int(argument))
                return image.point([value & mask for value in range(256)] * 3)
            case "Solarize":
                return ImageOps.solarize(image, int(argument))
            case "SolarizeAdd":
                added = [min(255, value + int(argument)) if value < 128 else value for value in range(256)]
                return image.point(added * 3)
            case _:
                return getattr(ImageEnhance, name)(image).enhance(argument)


def corners(box: Box) -> tuple[int, int, int, int]:
    """Left, top, right and bottom, as Pillow has them."""
    top, left, height, width = box
    return left, top, left + width, top + height


def _affine(name: str, argument: float, width: int, height: int) -> tuple[float, float, float, float, float, float]:
    """(a, b, c, d, e, f): the pixel at (x, y) comes from (a x + b y + c, d x + e y + f)."""
    cos, sin, x, y = math.cos(math.radians(argument)), math.sin(math.radians(argument)), width / 2, height / 2
    return {
        "ShearX": (1, argument, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, argument, 1, 0),
        "TranslateX": (1, 0, argument * width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, argument * height),
        "Rotate": (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y),  # around the centre
    }[name]
