"""Windows that slide over a film or a stream: each frame is decoded and resized once, however many windows show it.

Of a film only frames that a window shows are decoded to pictures, and memory does not depend on its length: the
pictures of one window are held, and of `read_ahead` those of the windows that are waiting.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import groupby, tee
from queue import Full, Queue
from threading import Event
from typing import Any, Literal, NamedTuple

import numpy as np

from ..kernels import checks
from .decoding import Source
from .framing import Image, pictures
from .video import Film, open_film

Tail = Literal["repeat", "drop"]
MOST_FPS = 1000


@dataclass(frozen=True)
class Sliding:
    """How windows slide: window k shows the frames k * stride + i * frame_stride, i from 0 to num_frames - 1.

    Attributes:
        num_frames: T, frames of a window.
        stride: Frames from the first one of a window to the first one of the next.
        frame_stride: Frames from one to the next within a window.
        fps: None counts the frames of the film. A number counts frames at this constant rate instead, whatever the
            film's is: frame n is the one that is shown n / fps seconds after the first.
        tail: Where frames are left after the last whole window, or there is none: "repeat" adds a window that repeats
            the last frame, "drop" leaves them out.

    Raises:
        ValueError: a value that does not fit.
    """

    num_frames: int = 16
    stride: int = 4
    frame_stride: int = 4
    fps: float | None = None
    tail: Tail = "repeat"

    def __post_init__(self) -> None:
        for name in ("num_frames", "stride", "frame_stride"):
            checks.whole(name, getattr(self, name))
        if self.fps is not None and not (isinstance(self.fps, int | float) and 0 < self.fps <= MOST_FPS):
            raise checks.bad("fps", repr(self.fps), f"frames a second, above 0, up to {MOST_FPS}, or None")
        if self.tail not in ("repeat", "drop"):
            raise checks.bad("tail", repr(self.tail), "'repeat' or 'drop'")

    @property
    def span(self) -> int:
        """Frames from the first to the last one of a window, with both."""
        return (self.num_frames - 1) * self.frame_stride + 1

    def count(self, frames: int) -> int:
        """How many windows there are of so many frames."""
        whole = (frames - self.span) // self.stride + 1 if frames >= self.span else 0
        shown = (whole - 1) * self.stride + self.span if whole else 0
        return whole + (self.tail == "repeat" and shown < frames and whole * self.stride < frames)

    def shows(self, frame: int) -> bool:
        """Whether a window shows this frame, in a film without an end."""
        starts = range(frame // self.stride * self.stride, max(frame - self.span, -1), -self.stride)
        return any((frame - start) % self.frame_stride == 0 for start in starts)


class Window(NamedTuple):
    """One window.

    Attributes:
        number: Its own, from 0.
        frames: Numbers of its first and its last frame in the film.
        seconds: When these are shown, from the first frame of the film; None where there are no times.
        pictures: T arrays (H, W, 3) uint8, RGB; neighbouring windows share them.
    """

    number: int
    frames: tuple[int, int]
    seconds: tuple[float, float] | None
    pictures: list[Image]


class _Shot(NamedTuple):
    """A frame of a film, or of a stream, before it is resized."""

    number: int
    seconds: Fraction | None
    frame: Any = None


def film_windows(film: Film, sliding: Sliding, size: tuple[int, int]) -> tuple[int, Iterator[Window]]:
    """How many windows a film has, and the windows.

    Args:
        film: An open one.
        sliding: Which windows.
        size: (H, W) of the pictures: resized by the short side, the centre cropped.

    Raises:
        ValueError: a film that is too short for one window, or fps for one without times; within the iterator, that a
            frame cannot be decoded.
    """
    order: Sequence[int] = range(film.total)
    if sliding.fps is not None:
        shots = (_Shot(number, film.time(number)) for number in range(film.total))
        order = array("q", (shot.number for _, shot in _resampled(shots, sliding.fps)))
    count = sliding.count(len(order))
    if not count:
        rate = f" at {sliding.fps} fps" if sliding.fps else ""
        accepted = f"at least {sliding.span}, as a window spans (or tail='repeat')"
        raise checks.bad("path", f"a video of {len(order)} frames{rate}", accepted)
    return count, _slide(_decoded(film, order, sliding), sliding, partial(_picture, aspect=film.aspect, size=size))


def stream_windows(frames: Iterable[Any], sliding: Sliding, size: tuple[int, int]) -> Iterator[Window]:
    """The windows of frames that come one by one, each as soon as its last frame is there.

    Args:
        frames: Each (H, W, 3) uint8 RGB, an array or a tensor, or a frame of PyAV; or (seconds, frame).
        sliding: Which windows; fps needs seconds.
        size: As in `film_windows`.

    Raises:
        ValueError, TypeError: within the iterator, that a frame or its time does not fit.
    """
    timed = (item[:2] if isinstance(item, tuple) else (None, item) for item in frames)
    shots = (_Shot(number, None if at is None else Fraction(at), frame) for number, (at, frame) in enumerate(timed))
    samples = enumerate(shots) if sliding.fps is None else _resampled(shots, sliding.fps)
    return _slide(samples, sliding, partial(_picture, aspect=Fraction(1), size=size))


def _picture(frame: Any, aspect: Fraction, size: tuple[int, int]) -> Image:
    """(H, W, 3) uint8."""
    if not hasattr(frame, "to_ndarray"):
        import av  # only here: a machine without PyAV can run everything but this

        image = np.asarray(frame)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise checks.bad("frames", f"{image.dtype} of shape {image.shape}", "frames (H, W, 3) uint8, RGB")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return pictures(frame, aspect, size)[0]


def _resampled(shots: Iterable[_Shot], fps: float) -> Iterator[tuple[int, _Shot]]:
    """What is shown at 0, 1 / fps, 2 / fps, ... seconds after the first frame, up to the time of the last one."""
    step = 1 / Fraction(fps).limit_denominator(10**6)
    before, start, sample = None, Fraction(0), 0
    for shot in shots:
        if shot.seconds is None:
            raise checks.bad("fps", fps, "None, for pictures and other films without times")
        if before is None:
            start = shot.seconds
        while before is not None and sample * step + start < shot.seconds:
            yield sample, before
            sample += 1
        before = shot
    if before is not None and sample * step + start <= (before.seconds or 0):
        yield sample, before


def _decoded(film: Film, order: Sequence[int], sliding: Sliding) -> Iterator[tuple[int, _Shot]]:
    """Of the frames in this order, those that a window shows, and the last one."""
    shown = (sample for sample in range(len(order)) if sliding.shows(sample) or sample == len(order) - 1)
    wanted, again = tee(shown)  # they advance together, so `tee` holds only a few
    frames = film.frames(number for number, _ in groupby(again, key=order.__getitem__))
    for number, samples in groupby(wanted, key=order.__getitem__):
        shot = _Shot(number, film.time(number), next(frames)[1])
        for sample in samples:
            yield sample, shot


def _slide(shots: Iterable[tuple[int, _Shot]], sliding: Sliding, picture: Callable[[Any], Image]) -> Iterator[Window]:
    """The windows of frames in ascending order; frames that no window shows may be missing, except the last one."""
    held: dict[int, _Shot] = {}  # with pictures for frames: a decoded frame may be much larger
    index, stride = 0, sliding.stride
    sample, shot, resized = -1, None, None

    def window(last: int) -> Window:
        numbers = (index * stride + i * sliding.frame_stride for i in range(sliding.num_frames))
        shown = [held[min(number, last)] for number in numbers]
        first, final = shown[0], shown[-1]
        seconds = None
        if first.seconds is not None and final.seconds is not None:
            seconds = float(first.seconds), float(final.seconds)
        return Window(index, (first.number, final.number), seconds, [one.frame for one in shown])

    for sample, next_shot in shots:
        if next_shot is not shot:  # at a constant rate a frame may be there several times
            shot, resized = next_shot, None
        if sliding.shows(sample):
            held[sample] = resized = resized or shot._replace(frame=picture(shot.frame))
        while index * stride + sliding.span - 1 <= sample:
            yield window(sample)
            index += 1
            held = {number: kept for number, kept in held.items() if number >= index * stride}
    if shot is not None and index < sliding.count(sample + 1):
        held[sample] = resized or shot._replace(frame=picture(shot.frame))
        yield window(sample)


Report = int | Window | Exception | None


def read_ahead(
    films: Sequence[Source], sliding: Sliding, size: tuple[int, int], *, workers: int, depth: int
) -> Iterator[tuple[int, Report]]:
    """The windows of many films, each with the number of its film, as they come from several readers.

    For each film there is first the number of its windows, then these in order, then None; or at any time a ValueError
    or OSError, which ends it. Windows of several films come in any order.

    Args:
        films: Videos or folders of pictures.
        sliding: Which windows.
        size: As in `film_windows`.
        workers: Films that are read at a time.
        depth: Windows that are read before they are asked for.
    """
    ready: Queue[tuple[int, Report]] = Queue(depth)
    stop = Event()  # nobody waits for the windows any more

    def read(number: int) -> None:
        for report in _reports(films[number], sliding, size):
            while not stop.is_set():
                with suppress(Full):
                    ready.put((number, report), timeout=0.1)
                    break
            else:
                return

    pool = ThreadPoolExecutor(workers)
    try:
        for number in range(len(films)):
            pool.submit(read, number)
        left = len(films)
        while left:
            number, event = ready.get()
            if isinstance(event, Exception) and not isinstance(event, ValueError | OSError):
                raise event
            yield number, event
            left -= event is None or isinstance(event, Exception)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _reports(source: Source, sliding: Sliding, size: tuple[int, int]) -> Iterator[Report]:
    """What `read_ahead` yields of one film, and any other error too."""
    try:
        with open_film(source) as film:
            count, windows = film_windows(film, sliding, size)
            yield count
            yield from windows
        yield None
    except Exception as error:
        yield error
