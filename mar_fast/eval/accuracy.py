"""Accuracy over a list of videos: read ahead, classify, and keep one JSON line for each finished video."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import MAR
from ..data.annotations import Sample
from ..files import may_write, write_whole
from ..kernels import checks
from .scores import classify

Item = TypeVar("Item")
Found = TypeVar("Found")
Result = dict[str, Any]  # the line of a video: its name, its label, and the classes found or an error
TOP = 5


@dataclass(frozen=True)
class Accuracy:
    """Shares of the readable videos whose class comes first, or is among the first five; None if there are none."""

    videos: int
    finished: int
    broken: int
    top1: float | None
    top5: float | None

    @classmethod
    def of(cls, rows: Mapping[str, Result], videos: int) -> "Accuracy":
        """Of the rows of a `Journal`, for a list of ``videos`` videos."""
        read = [row for row in rows.values() if "error" not in row]
        shares = [
            sum(row["label"] in row["classes"][:best] for row in read) / len(read) if read else None
            for best in (1, TOP)
        ]
        return cls(videos, len(rows), len(rows) - len(read), *shares)


class Journal:
    """A file of JSON lines: first the settings of an evaluation, then a row for each video as soon as it is done.

    Args:
        path: The file. An existing one is continued if its settings are the same.
        settings: What the results depend on.
        force: Start anew, whatever the file holds.

    Raises:
        FileExistsError: the file holds something else, or results of other settings.
        ValueError: a line of the file is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, force: bool = False) -> None:
        may_write([path], force=True)
        self.path = path
        self.rows: dict[str, Result] = {}
        if force or not path.exists() or path.stat().st_size == 0:
            write_whole(path, lambda temporary: temporary.write_text(json.dumps({"settings": settings}) + "\n"))
        else:
            self._resume(settings)

    def _resume(self, settings: Mapping[str, Any]) -> None:
        with self.path.open("r+b") as file:
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            before, *lines = [_parse(self.path, *line) for line in enumerate(whole.splitlines(), 1)] or [{}]
            if set(before) != {"settings"}:
                raise FileExistsError(f"{self.path}: got a file without settings, expected results of mar-fast eval")
            check_settings(self.path, before["settings"], settings)
            for number, row in enumerate(lines, 2):
                if not {"video", "label"} <= set(row) or not ("error" in row or "classes" in row):
                    raise ValueError(f"{self.path}, line {number}: got {str(row)[:60]}, expected the result of a video")
                self.rows[row["video"]] = row
            file.truncate(len(whole))  # the rest is of an interrupted write: that video is done again

    def finished(self, name: str) -> bool:
        """Whether this video was read and classified; one that could not be read is tried again."""
        return name in self.rows and "error" not in self.rows[name]

    @property
    def done(self) -> int:
        """How many videos are finished."""
        return sum(map(self.finished, self.rows))

    def add(self, row: Result) -> None:
        """Append a row; it replaces an earlier one of the same video."""
        self.rows[row["video"]] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def check_settings(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Check that results which a second run continues are of the same settings.

    Raises:
        FileExistsError: they are not; the message names what differs.
    """
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if changed:
        other = "; ".join(f"{key} {old.get(key)!r}, now {new.get(key)!r}" for key in changed)
        expected = "expected the same, another file, or --force to start anew"
        raise FileExistsError(f"{path}: got results of other settings ({other}), {expected}")


def _parse(path: Path, number: int, line: bytes) -> Result:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: got {line[:60]!r}, expected JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: got {line[:60]!r}, expected a JSON object")
    return row


def fingerprint(model: MAR) -> str:
    """A hash of weights and config, whatever file they came from."""
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def list_fingerprint(samples: Sequence[Sample]) -> str:
    """A hash of the names and labels in a list."""
    return hashlib.sha256(json.dumps([[s.name, s.label] for s in samples]).encode()).hexdigest()[:16]


def evaluate(
    model: MAR,
    samples: Sequence[Sample],
    read: Callable[[Path], Tensor],
    journal: Journal,
    *,
    batch: int = 8,
    workers: int = 2,
    on_video: Callable[[Accuracy], None] = lambda so_far: None,
) -> Accuracy:
    """Classify all videos that the journal does not have yet.

    Args:
        model: In eval mode.
        samples: The videos and their classes.
        read: From a path to views (V, C, T, H, W). ValueError and OSError count the video as broken.
        journal: Where each result goes as soon as it is there.
        batch: The most views in a forward pass.
        workers: Videos that are read at a time, while the model runs.
        on_video: Told the accuracy so far, at the start and after each video.

    Raises:
        ValueError: an argument does not fit.
    """
    checks.whole("workers", workers)
    on_video(Accuracy.of(journal.rows, len(samples)))
    left = [sample for sample in samples if not journal.finished(sample.name)]
    for sample, found in ahead(lambda sample: read(sample.path), left, workers=workers):
        row: Result = {"video": sample.name, "label": sample.label}
        try:
            views = found.result()
        except (ValueError, OSError) as error:
            row["error"] = str(error)
        else:
            best = (classify(model, views, batch=batch) / len(views)).topk(min(TOP, model.config.num_classes))
            row |= {"classes": best.indices.tolist(), "probabilities": best.values.tolist()}
        journal.add(row)
        on_video(Accuracy.of(journal.rows, len(samples)))
    return Accuracy.of(journal.rows, len(samples))


def ahead(run: Callable[[Item], Found], items: Iterable[Item], *, workers: int) -> Iterator[tuple[Item, Future[Found]]]:
    """Each item in turn with the future of ``run(item)``; meanwhile ``workers`` threads run that many of the next."""
    waiting: deque[tuple[Item, Future[Found]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append((item, pool.submit(run, item)))
            if len(waiting) > workers:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)
