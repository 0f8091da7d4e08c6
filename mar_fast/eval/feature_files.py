"""Features of many films to files, as they come: whole or not at all, and a second run goes on where one ended.

Each film has a file of features and one of JSON beside it, which says what the rows are and by which settings they were
made. The JSON comes first, so that a file of features is always one that has been finished.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..data.windows import Sliding, Window, read_ahead
from ..files import may_write, remove_leftovers, whole_file, write_whole
from ..kernels import checks
from .accuracy import ahead, check_settings
from .extraction import Extractor

Form = Literal["safetensors", "npy"]
Item = tuple[int, Window]  # a window and the number of its film
Batch = tuple[list[Item], tuple[Tensor, Tensor]]  # windows, and what `Extractor.gather` makes of them
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # safetensors' names of dtypes


@dataclass(frozen=True)
class Film:
    """A film to extract features from: its name, its file or folder of pictures, and the file for its features."""

    name: str
    path: Path
    out: Path

    @property
    def about(self) -> Path:
        """The JSON file beside its features."""
        return self.out.with_name(self.out.name.removesuffix(self.out.suffix) + ".json")


def plan_films(paths: Sequence[Path], root: Path | None, out: Path, form: Form) -> list[Film]:
    """Where the features of each film go: below ``out`` as the film is below ``root``.

    Args:
        paths: Files or folders of pictures.
        root: A folder that they are all in; None is that of each.
        out: The folder for the features.
        form: The ending of their files.

    Raises:
        ValueError: a film is not below the root, or two would have the same file of features.
    """
    films: dict[Path, Film] = {}
    for path in paths:
        name = path.name if root is None else os.path.relpath(path, root)
        if Path(name).parts[:1] in ((), ("..",)):
            raise checks.bad("root", f"{str(root)!r}, without {str(path)!r}", "a folder that all videos are in")
        stem = Path(name) if path.is_dir() else Path(name).with_suffix("")
        film = Film(Path(name).as_posix(), path, out / stem.with_name(f"{stem.name}.{form}"))
        if film.out in films:
            both = f"{str(films[film.out].path)!r} and {str(path)!r}, which would both be {str(film.out)!r}"
            raise checks.bad("videos", both, "one video for each file (or a root above both)")
        films[film.out] = film
    return list(films.values())


def unfinished(films: Sequence[Film], settings: Mapping[str, Any], *, force: bool = False) -> list[Film]:
    """The films without features yet; leftovers of a process that was killed are removed.

    Raises:
        FileExistsError: a file is there that is not features of these settings, and ``force`` is not set.
        NotADirectoryError: a file is where a folder must be.
    """
    may_write([path for film in films for path in (film.out, film.about)], force=True)
    left = []
    for film in films:
        if force or not film.about.exists():
            may_write([film.out], force)
        else:
            check_settings(film.about, _settings(film.about), settings)
        if force or not film.out.exists():
            left.append(film)
        for path in (film.out, film.about):
            remove_leftovers(path)
    return left


def _settings(about: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(about.read_text())["settings"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise FileExistsError(f"{about}: got another kind of file, expected results of mar-fast extract, or --force")
    return found


class _Writer:
    """The two files of a film, to which rows are written as they come."""

    def __init__(self, film: Film, count: int, extractor: Extractor) -> None:
        self.film, self.count, self.done = film, count, 0
        self._row_bytes = int(np.prod(extractor.row_shape)) * extractor.dtype.itemsize
        self._frames, self._seconds = list[tuple[int, int]](), list[tuple[float, float]]()
        with ExitStack() as files:
            temporary = files.enter_context(whole_file(film.out))
            self._file: IO[bytes] = files.enter_context(temporary.open("wb"))
            self._header(extractor.layers, (count, *extractor.row_shape), extractor.dtype)
            first, size = self._file.tell(), count * self._row_bytes
            self._offsets = {layer: first + i * size for i, layer in enumerate(extractor.layers)}
            self._files = files.pop_all()

    def _header(self, layers: Sequence[int], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if self.film.out.suffix == ".npy":
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._file, header)
            return
        size = self.count * self._row_bytes
        tensors = {
            f"layer.{layer}": {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (i * size, (i + 1) * size)}
            for i, layer in enumerate(layers)
        }
        text = json.dumps(tensors).encode()
        text += b" " * (-len(text) % 8)  # so that what follows is aligned
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, window: Window, layers: Mapping[int, Tensor]) -> None:
        """Write the next row of each layer, the features of this window."""
        for number, row in layers.items():
            self._file.seek(self._offsets[number] + self.done * self._row_bytes)
            self._file.write(row.contiguous().view(torch.uint8).numpy().data)
        self._frames.append(window.frames)
        if window.seconds is not None:
            self._seconds.append(window.seconds)
        self.done += 1

    @property
    def seconds(self) -> float:
        """Of the film, up to the last window so far."""
        return self._seconds[-1][1] if self._seconds else 0.0

    def finish(self, content: Mapping[str, Any]) -> None:
        """Give both files their names."""
        about = {"video": self.film.name, **content, "windows": self.count}
        about |= {"frames": self._frames, "seconds": self._seconds}
        with self._files:
            write_whole(self.film.about, lambda temporary: temporary.write_text(json.dumps(about) + "\n"))

    def abandon(self) -> None:
        """Delete what was written."""
        self._files.__exit__(InterruptedError, InterruptedError(), None)


@dataclass
class Extraction:
    """What became of a list of films.

    Attributes:
        films: How many were to be done.
        finished: How many have their files.
        broken: Why films could not be read, by name.
        windows: How many were computed.
        video_seconds: Length of the films that were finished.
        seconds: That all of it took.
        model_seconds: In which the model ran.
    """

    films: int
    finished: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    windows: int = 0
    video_seconds: float = 0.0
    seconds: float = 0.0
    model_seconds: float = 0.0

    @property
    def bound(self) -> str:
        """Whether reading films or the model limits the pace: "data" if the model waits half of the time."""
        return "compute" if self.model_seconds > self.seconds / 2 else "data"


def extract_films(
    extractor: Extractor,
    films: Sequence[Film],
    sliding: Sliding,
    content: Mapping[str, Any],
    *,
    workers: int = 2,
    on_batch: Callable[[Extraction], None] = lambda so_far: None,
) -> Extraction:
    """Write the features of films, with windows of several of them in a batch.

    Args:
        extractor: The model and what is taken from it.
        films: From `unfinished`.
        sliding: Which windows.
        content: What each JSON file says beside the windows, "settings" among it.
        workers: Films that are read at a time, while the model runs.
        on_batch: Told how far it is, after each batch.

    Raises:
        ValueError: an argument does not fit.
    """
    checks.whole("workers", workers)
    begin, done, writers = time.perf_counter(), Extraction(len(films)), dict[int, _Writer]()
    size, depth = extractor.model.config.image_size, 2 * extractor.batch
    reports = read_ahead([film.path for film in films], sliding, size, workers=workers, depth=depth)

    def windows() -> Iterator[Item]:
        """Those of all films, as they come; meanwhile films begin and break."""
        for number, report in reports:
            if isinstance(report, int):
                writers[number] = _Writer(films[number], report, extractor)
            elif isinstance(report, Exception):
                done.broken[films[number].name] = str(report)
                if number in writers:
                    writers.pop(number).abandon()
            elif report is not None:
                yield number, report

    def batches() -> Iterator[Batch]:
        coming = windows()
        while items := list(islice(coming, extractor.batch)):
            yield items, extractor.gather([window for _, window in items])

    def compute(batch: Batch) -> dict[int, Tensor]:
        start = time.perf_counter()
        found = extractor.compute(len(batch[0]), *batch[1])
        done.model_seconds += time.perf_counter() - start
        return found

    try:
        # The model has a thread of its own: meanwhile the next batch is gathered, and the last one is written.
        for (items, _), computed in ahead(compute, batches(), workers=1):
            layers = computed.result()
            for row, (number, window) in enumerate(items):
                if number not in writers:  # its film broke
                    continue
                writer = writers[number]
                writer.add(window, {layer: features[row] for layer, features in layers.items()})
                if writer.done == writer.count:
                    writers.pop(number).finish(content)
                    done.finished += 1
                    done.video_seconds += writer.seconds
            done.windows += len(items)
            done.seconds = time.perf_counter() - begin
            on_batch(done)
    finally:
        for writer in writers.values():
            writer.abandon()
    done.seconds = time.perf_counter() - begin
    return done
