"""Writing results: whole or not at all."""

import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path


def may_write(paths: list[Path], force: bool) -> None:
    """Check, before any work is done, that the results can be written.

    Raises:
        FileExistsError: one of the files exists and ``force`` is not set, or is a folder or a device.
        NotADirectoryError: the parent of one is a file.
    """
    for path in paths:
        if path.is_dir():
            raise FileExistsError(f"{path}: got a folder, expected a file name")
        if path.exists() and not path.is_file():  # a rename would put a file in the place of /dev/null
            raise FileExistsError(f"{path}: got a device or a pipe, expected a file name")
        if path.exists() and not force:
            raise FileExistsError(f"{path}: already exists, expected a new file (or --force to replace it)")
        ancestor = next(parent for parent in path.absolute().parents if parent.exists())
        if not ancestor.is_dir():
            raise NotADirectoryError(f"{path}: {ancestor} is a file, expected a folder")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it, so that no partial file is ever visible."""
    with whole_file(path) as temporary:
        write(temporary)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to in this context; it is then renamed, or after an error deleted."""
    temporary = _beside(path)
    try:
        yield temporary
        _like_new(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Delete what `whole_file` left beside ``path`` where its process was killed."""
    for left in path.parent.glob(f".{glob.escape(path.stem)}-????????{path.suffix}"):
        left.unlink()


def write_whole_files(paths: Sequence[Path], write: Callable[[Path], object]) -> None:
    """`write_whole` for files of one folder, of which the last one reads the others.

    ``write`` fills a temporary folder beside them with files of these names. The last file is out of the way while the
    others are replaced, so that it never reads the wrong ones. Where this process is killed just then it is missing,
    and the old files are in the temporary folder.
    """
    temporary = _beside(paths[-1])
    old = temporary / "old"
    temporary.mkdir()
    try:
        write(temporary)
        _like_new(temporary)
        old.mkdir()
        with ExitStack() as on_error:
            for path in reversed(paths):
                if path.exists():
                    path.rename(old / path.name)
                    on_error.callback((old / path.name).rename, path)
            for path in paths:
                (temporary / path.name).rename(path)
                on_error.callback(path.unlink)
            on_error.pop_all()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_whole_folder(path: Path, write: Callable[[Path], object]) -> None:
    """`write_whole` for a folder: ``write`` fills a temporary one beside ``path``, which then replaces it."""
    temporary, old = _beside(path), _beside(path)
    temporary.mkdir()
    try:
        write(temporary)
        _like_new(temporary)
        with ExitStack() as on_error:
            if path.exists():
                path.rename(old)
                on_error.callback(old.rename, path)
            temporary.rename(path)
            on_error.pop_all()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A new name beside ``path``, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")


def _like_new(path: Path) -> None:
    """Give a file, or a folder with all in it, the modes of new ones: safetensors writes files for their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for part in (path, *path.rglob("*")):
        part.chmod((0o777 if part.is_dir() else 0o666) & ~mask)
