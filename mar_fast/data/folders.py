"""A film as a folder of numbered pictures."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from ..kernels import checks
from .decoding import open_picture

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

PICTURES = (".jpg", ".jpeg", ".png")


class FrameFolder:
    """The pictures of a folder, in the natural order of their names: 2 before 10.

    Attributes:
        total, aspect, rate: As in `Video`.

    Raises:
        FileNotFoundError: there is no picture.
        ValueError: there are several series of pictures, such as the parts of an optical flow.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.name, self.aspect, self.rate = repr(os.fspath(folder)), Fraction(1), None
        found = [file for file in Path(folder).iterdir() if file.suffix.lower() in PICTURES and file.name[0] != "."]
        if not found:
            got = f"{self.name}, a folder without pictures ({', '.join(PICTURES)})"
            raise FileNotFoundError(f"path: got {got}, expected an existing video file or a folder of pictures")
        series = Counter(re.sub(r"\d+", "*", file.name) for file in found if re.search(r"\d", file.name))
        if len(several := [name for name, times in series.items() if times > 1]) > 1:
            got = f"{self.name} with several series of pictures, {', '.join(sorted(several))}"
            raise checks.bad("path", got, "a folder of one")
        self._files = sorted(found, key=_natural)
        self.total = len(found)

    def time(self, number: int) -> None:
        """Pictures have no times."""

    def frames(self, numbers: Iterable[int]) -> Iterator[tuple[int, "VideoFrame"]]:
        """Decode these pictures, each when it is asked for; numbers ascend.

        Raises:
            ValueError: one of them cannot be decoded.
        """
        for number in numbers:
            yield number, open_picture(self._files[number])


def is_folder(source: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether this is the path of a folder."""
    return isinstance(source, str | os.PathLike) and Path(source).is_dir()


def _natural(file: Path) -> list[int | str]:
    """Text and numbers in turn."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]
