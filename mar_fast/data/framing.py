"""One decoded frame to pictures in RGB: upright, with square pixels, resized by the short side, cropped."""

import math
import struct
import threading
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels import checks

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Image = np.ndarray[Any, np.dtype[Any]]

_THREAD = threading.local()


def pictures(frame: "VideoFrame", aspect: Fraction, size: tuple[int, int] | None, crops: int = 1) -> list[Image]:
    """Crops of one frame.

    Args:
        frame: As decoded.
        aspect: Width of a stored pixel over its height; the picture is resized to square ones.
        size: (H, W). The frame is resized, keeping its shape, until it just covers this. None keeps the pixels as
            they are stored.
        crops: How many, spread evenly along the side that is longer: 1 is the centre, 3 are left, centre and right,
            or top, centre and bottom.

    Returns:
        (H, W, 3) uint8 for each crop.

    Raises:
        ValueError: the frame is to be shown turned by other than quarter turns.
    """
    if size is None:
        return [_upright(frame, frame.height, frame.width)] * crops
    turns, _ = orientation(frame)
    height, width = size if turns % 2 == 0 else size[::-1]  # of the frame as it is stored
    shown_width = frame.width * float(aspect)  # in heights of a pixel
    scale = max(height / frame.height, width / shown_width)
    full_height = max(height, round(frame.height * scale))
    full_width = max(width, round(shown_width * scale))
    image = _upright(frame, full_height, full_width)
    spare_height, spare_width = image.shape[0] - size[0], image.shape[1] - size[1]
    shares = [(k, crops - 1) for k in range(crops)] if crops > 1 else [(1, 2)]
    corners = [(spare_height * k // steps, spare_width * k // steps) for k, steps in shares]
    return [image[top : top + size[0], left : left + size[1]].copy() for top, left in corners]


def picture(frame: "VideoFrame", aspect: Fraction, short_side: int) -> Image:
    """(H, W, 3) uint8 of the whole frame, whose short side is resized to ``short_side`` if it is longer.

    Raises:
        ValueError: the frame is to be shown turned by other than quarter turns.
    """
    shown_width = frame.width * float(aspect)
    scale = min(1.0, short_side / min(frame.height, shown_width))
    return _upright(frame, round(frame.height * scale), round(shown_width * scale))


def orientation(frame: "VideoFrame") -> tuple[int, bool]:
    """Quarter turns counter-clockwise, and whether to mirror left and right after them, to show a frame upright.

    Both are in the display matrix of the frame's side data, as phones write it.
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    a, b, _, c, d = struct.unpack_from("=5i", matrix)  # a pixel at (x, y) is shown at (ax + cy, bx + dy)
    mirrored = a * d - b * c < 0
    degrees = math.degrees(math.atan2(-b, -a if mirrored else a))
    if abs(degrees - 90 * round(degrees / 90)) > 1:
        raise checks.bad("path", f"a video to be shown turned by {degrees:.0f} degrees", "a multiple of 90")
    return round(degrees / 90) % 4, mirrored


def _upright(frame: "VideoFrame", height: int, width: int) -> Image:
    """The frame resized to (H, W, 3) as it is stored, then turned upright: (W, H, 3) after a quarter turn."""
    from av.video.reformatter import VideoReformatter

    turns, mirrored = orientation(frame)
    if not hasattr(_THREAD, "converter"):  # to make one costs more than to convert most frames
        _THREAD.converter = VideoReformatter()
    converted = _THREAD.converter.reformat(frame, width, height, "rgb24", interpolation="BILINEAR", threads=1)
    image = np.rot90(converted.to_ndarray(), turns)
    return np.ascontiguousarray(image[:, ::-1] if mirrored else image)
