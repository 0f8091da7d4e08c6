"""Frames of a video file by their numbers, with PyAV (FFmpeg): each needed frame is decoded once.

Frames are found by their time stamps, which are read from the packets without decoding. Between two wanted frames
decoding goes on, or starts anew at a key frame that lies between them.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..kernels import checks

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# What a header may promise beyond what is there: frames dropped on recording, rounding of durations.
SPARE_FRAMES, SPARE_SHARE, SPARE_SECONDS = 1, 0.02, 1.0


@contextmanager
def open_video(path: Path) -> Iterator["Video"]:
    """Open the video stream of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a video, damaged or cut off; also where frames are decoded within this context.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path: got {str(path)!r}, expected an existing video file")
    import av  # only here: a machine without PyAV can run everything but this

    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            video = _index(path, container, _stream(path, container))
            if not video.counted:
                yield video
                return
        # Bare streams cannot be sought in: to count from the start, open the file anew.
        with av.open(str(path), metadata_errors="ignore") as container:
            yield replace(video, container=container, stream=_stream(path, container))
    except av.error.FFmpegError as error:
        raise checks.bad("path", f"{str(path)!r} ({error})", "a video file that FFmpeg can decode") from error


@dataclass(frozen=True)
class Video:
    """An open video stream and the index of its frames.

    Attributes:
        stamps: Presentation time of every frame, in order, in the stream's time base.
        keys: Numbers of frames from which decoding can start, ascending; the first is 0.
        counted: Whether frames must be counted from the start, because time stamps do not tell them apart.
        aspect: Width of a pixel over its height.
    """

    path: Path
    container: "InputContainer"
    stream: "VideoStream"
    stamps: list[int]
    keys: list[int]
    counted: bool
    aspect: Fraction

    def frames(self, numbers: Iterable[int]) -> Iterator[tuple[int, "VideoFrame"]]:
        """Decode these frames, ascending, each once; numbers count in order of presentation.

        Raises:
            ValueError: one of them cannot be decoded.
        """
        self.stream.thread_type = "AUTO"
        source: Iterator[tuple[int, VideoFrame]] | None = None
        reached = -1
        for wanted in sorted(set(numbers)):
            if source is None or self._key_before(wanted) > reached + 1:
                source = self._start(wanted)
            found = next((numbered for numbered in source if numbered[0] >= wanted), None)
            if found is None or found[0] != wanted or found[1].is_corrupt:
                raise self._missing(wanted)
            reached = wanted
            yield found

    def _key_before(self, wanted: int) -> int:
        return self.keys[bisect_right(self.keys, wanted) - 1]

    def _start(self, wanted: int) -> Iterator[tuple[int, "VideoFrame"]]:
        """Decode from the last key frame from which ``wanted`` is reached.

        Where a container seeks by time of decoding, it can land on the key frame after the right one; so an earlier
        one is tried then, and at last a time before the first.
        """
        if self.counted:
            return enumerate(self.container.decode(self.stream))
        times = [self.stamps[key] for key in reversed(self.keys[: bisect_right(self.keys, wanted)])]
        before = self.stamps[0] - round(1 / (self.stream.time_base or 1))  # by a second
        for time in (*times, before):
            self.container.seek(time, stream=self.stream, backward=True)
            source = self._numbered()
            first = next(source, None)
            if first is not None and first[0] <= wanted:
                return chain([first], source)
        raise self._missing(wanted)

    def _numbered(self) -> Iterator[tuple[int, "VideoFrame"]]:
        """Each frame from here on with its number; one with an unknown time stamp is left out."""
        numbers = {stamp: number for number, stamp in enumerate(self.stamps)}
        for frame in self.container.decode(self.stream):
            if frame.pts in numbers:
                yield numbers[frame.pts], frame

    def _missing(self, number: int) -> ValueError:
        seconds = float((self.stamps[number] - self.stamps[0]) * (self.stream.time_base or 0))
        got = f"{str(self.path)!r}, of which frame {number}, {seconds:.2f} s from the start, cannot be decoded"
        return checks.bad("path", got, "a complete video file")


def _stream(path: Path, container: "InputContainer") -> "VideoStream":
    """The main video stream, and not a picture beside it."""
    stream = container.streams.best("video")
    if stream is None:
        raise checks.bad("path", f"{str(path)!r} without a video stream", "a video file")
    return cast("VideoStream", stream)


def _index(path: Path, container: "InputContainer", stream: "VideoStream") -> Video:
    """Find all frames and key frames from the packets of the file."""
    packets: list[Packet] = []
    end = 0.0  # of the last packet of any stream, in seconds
    for packet in container.demux():
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index and packet.size:
            packets.append(packet)
    _check_complete(path, container, stream, packets, end)
    shown = [packet for packet in packets if not packet.is_discard]
    if not shown:
        raise checks.bad("path", f"{str(path)!r} without a frame in its video stream", "a file with frames in it")
    times = [packet.pts for packet in shown if packet.pts is not None]
    counted = len(times) < len(shown) or _stamped_as_stored(container, stream, times)
    if counted:
        stamps, keys = list(range(len(shown))), [0]
    else:
        stamps = sorted(set(times))
        numbers = {stamp: number for number, stamp in enumerate(stamps)}
        keys = sorted({0, *(numbers[packet.pts] for packet in shown if packet.is_keyframe and packet.pts in numbers)})
    return Video(path, container, stream, stamps, keys, counted, Fraction(stream.sample_aspect_ratio or 1))


def _stamped_as_stored(container: "InputContainer", stream: "VideoStream", times: list[int]) -> bool:
    """Whether frames are stored in another order than they are shown, and stamped in the order of storage.

    AVI has no presentation times: what FFmpeg gives for its packets are those of decoding.
    """
    ascending = all(later > earlier for earlier, later in pairwise(times))
    return "avi" in container.format.name.split(",") and bool(stream.codec_context.has_b_frames) and ascending


def _check_complete(
    path: Path, container: "InputContainer", stream: "VideoStream", packets: list["Packet"], end: float
) -> None:
    """A file that was cut off would pass for a shorter video, so compare it with its header."""
    formats = container.format.name.split(",")
    # Of an mp4 that an editor trimmed, the index has what is to be shown, and the header still counts all.
    said = len(stream.index_entries) if "mp4" in formats else stream.frames
    found, expected = len(packets), "a complete video file"
    if (packets and packets[-1].is_corrupt) or said - found > SPARE_FRAMES + SPARE_SHARE * said:
        got = f"{str(path)!r}, cut off: {found} of {said or 'an unknown number of'} frames"
        raise checks.bad("path", got, expected)
    start = (container.start_time or 0) / 1e6
    whole = (container.duration or 0) / 1e6
    # Of other formats FFmpeg estimates the duration where they do not state it.
    if "matroska" in formats and whole + start - end > SPARE_SECONDS + SPARE_SHARE * whole:
        raise checks.bad("path", f"{str(path)!r}, cut off: {end - start:.1f} of {whole:.1f} s", expected)
