"""Frames of a video file by their numbers, with PyAV (FFmpeg): each needed frame is decoded once.

Frame n is the n-th one that decoding from first to last gives. Packets are read without decoding them, to learn the
time stamp of every frame and where in the file every key frame is. Between two wanted frames decoding goes on, or
starts anew at a key frame that lies between them. How it is known when that can be trusted:

- Time stamps number the frames if each packet of the codec holds one picture (`_EMPTY`) and has a time stamp of its
  own, and if times of decoding never go back, as they do where recordings were joined. AVI with B-frames has no times
  of presentation. In all other cases the film is decoded once to count its frames, and then from the start.
- Frames before the first key frame, or shown before it, may refer to pictures that are not in the file. If there are
  any, the first group of pictures is decoded to learn with which frame the film begins.
- A seek is trusted if it leads to a key frame of the index, with the same time stamp at the same position in the file,
  and if the decoder gives that frame first and calls it a key frame. Else earlier ones are tried, and then the start.
"""

import io
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, pairwise, takewhile
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from ..kernels import checks

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Source = str | os.PathLike[str] | bytes | IO[bytes]

# What a header may promise beyond what is there: frames dropped on recording, rounding of durations.
SPARE_FRAMES, SPARE_SHARE, SPARE_SECONDS = 1, 0.02, 1.0
_NEVER = -(2**63)

# Codecs of which a packet holds one picture, and which packets are exceptions: references of VP8 that are not shown,
# and the "as before" of MPEG-4, which takes up to 19 bytes.
_ALWAYS = ("h264", "hevc", "vp9", "av1", "mpeg1video", "mpeg2video", "mjpeg", "ffv1", "prores", "dnxhd", "rawvideo")
_EMPTY: dict[str, Callable[["Packet"], bool]] = {
    **dict.fromkeys(_ALWAYS, lambda packet: False),
    "vp8": lambda packet: not memoryview(packet)[0] & 16,
    "mpeg4": lambda packet: packet.size < 20,
}


@contextmanager
def open_video(source: Source, threads: int = 0, kind: "type[Video] | None" = None) -> Iterator["Video"]:
    """Open the video stream of a file, of its bytes or of an open binary file.

    Args:
        source: The file.
        threads: Of the decoder; 0 lets FFmpeg choose.
        kind: Of `Video`, by which frames are decoded; None for that class itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a video, damaged or cut off; also where frames are decoded within this context.
    """
    if isinstance(source, str | os.PathLike):
        if not Path(source).is_file():
            raise FileNotFoundError(f"path: got {os.fspath(source)!r}, expected an existing video file")
    elif isinstance(source, bytes):
        source = io.BytesIO(source)
    elif isinstance(source, io.TextIOBase) or not getattr(source, "seekable", bool)():
        raise checks.bad_type("path", type(source).__name__, "a path, bytes, or a binary file that can be sought in")
    with _errors(source), ExitStack() as files:
        yield (kind or Video)(source, threads, files)


def open_picture(path: Path) -> "VideoFrame":
    """The only frame of a picture's file.

    Raises:
        ValueError: not a picture, or damaged.
    """
    # An open file, since in a name FFmpeg takes %d for the number of a picture.
    with _errors(path), path.open("rb") as file, _opened(file) as (container, stream):
        frame = next(_decoded(_packets(container, stream)), None)
    if frame is None or frame.is_corrupt:
        raise checks.bad("path", f"{str(path)!r}, which cannot be decoded", "a complete picture")
    return frame


@contextmanager
def _errors(source: Source) -> Iterator[None]:
    import av  # only here: a machine without PyAV can run everything but this

    try:
        yield
    except av.error.FFmpegError as error:
        got = f"{name_of(source)} ({error.strerror or error})"
        raise checks.bad("path", got, "a file that FFmpeg can decode") from error


def name_of(source: Source) -> str:
    """What to call a source in messages."""
    if isinstance(source, str | os.PathLike):
        return repr(os.fspath(source))
    return repr(getattr(source, "name", "an open file"))


def for_ffmpeg(source: Source) -> str | IO[bytes]:
    """A path as FFmpeg takes it, or an open file from its start."""
    if isinstance(source, str | os.PathLike):
        return f"file:{os.fspath(source)}"  # else FFmpeg takes what is before a colon for a protocol
    file = cast("IO[bytes]", source)
    file.seek(0)
    return file


class Video:
    """An open video stream and the index of its frames; ``files`` closes it.

    Attributes:
        total: How many frames there are.
        aspect: Width of a pixel over its height.
        rate: Frames a second on average; None where the file does not say.
    """

    def __init__(self, source: Source, threads: int, files: ExitStack) -> None:
        self.name = name_of(source)
        self._source, self._threads, self._files = source, threads, files
        self._open()
        self.aspect = Fraction(self._stream.sample_aspect_ratio or 1)
        self.rate = self._stream.average_rate
        self._index = _index(self.name, self._container, self._stream)
        if self._index.late:
            self._index.begin(frame.pts for frame in self._from_start())
        counted = self._index.counted
        self.total = sum(1 for _ in self._from_start()) if counted else len(self._index.stamps)

    def _open(self) -> None:
        """Open the file, again if it is open."""
        self._files.close()
        self._container, self._stream = self._files.enter_context(_opened(self._source, self._threads))

    def _from_start(self) -> Iterator["VideoFrame"]:
        self._open()
        return _decoded(_packets(self._container, self._stream))

    def time(self, number: int) -> Fraction | None:
        """Seconds from the first frame to this one; None if the file does not say.

        By time stamps where these number the frames, else by the average rate.
        """
        if not self._index.counted:
            return (self._index.stamps[number] - self._index.stamps[0]) * Fraction(self._stream.time_base or 0)
        return number / self.rate if self.rate else None

    def frames(self, numbers: Iterable[int]) -> Iterator[tuple[int, "VideoFrame"]]:
        """Decode these frames; numbers ascend, and count in order of presentation.

        Each number is taken only when its frame is asked for, so that there may be any number of them.

        Raises:
            ValueError: one of them cannot be decoded.
        """
        source: Iterator[tuple[int, VideoFrame]] | None = None
        reached = -1
        for wanted in numbers:
            keys = self._index.keys
            if source is None or keys[bisect_right(keys, wanted) - 1] > reached + 1:
                source = self._start(wanted)
            found = next((numbered for numbered in source if numbered[0] >= wanted), None)
            if found is None or found[0] != wanted or found[1].is_corrupt:
                time = "" if self._index.counted else f", {float(self.time(wanted) or 0):.2f} s from the start,"
                got = f"{self.name}, of which frame {wanted}{time} cannot be decoded"
                raise checks.bad("path", got, "a complete video file")
            reached = wanted
            yield found

    def _start(self, wanted: int) -> Iterator[tuple[int, "VideoFrame"]]:
        """Decode from a key frame from which ``wanted`` is reached, or from the start.

        Where a container seeks by time of decoding, it can land on the key frame after the right one; so earlier ones
        are tried, twice as far back each time. If none of several is trusted, no other seek will be tried either.
        """
        index, back = self._index, 1
        before = bisect_right(index.keys, wanted)
        while back <= before and not index.counted:
            source = self._sought(index.keys[before - back], wanted)
            if source is not None:
                return source
            back *= 2
        if before > 1:  # an mp4 that an editor trimmed may have no key frame at its beginning
            index.keys = array("q", [0])
        frames = self._from_start()
        return enumerate(frames) if index.counted else self._numbered(frames)

    def _sought(self, key: int, wanted: int) -> Iterator[tuple[int, "VideoFrame"]] | None:
        """Seek to a key frame and decode from there; None if the seek is not to be trusted."""
        import av

        index = self._index
        try:
            self._container.seek(index.stamps[key], stream=self._stream, backward=True)
        except (av.error.FFmpegError, OSError):
            return None
        packets = _packets(self._container, self._stream)
        first = next((packet for packet in packets if index.is_key(packet)), None)
        if first is None or index.number(first.pts) > wanted:
            return None
        landed = index.number(first.pts)
        frames = (found for found in self._numbered(_decoded(chain([first], packets))) if found[0] >= landed)
        head = next(frames, None)
        return chain([head], frames) if head is not None and head[0] == landed and head[1].key_frame else None

    def _numbered(self, frames: Iterable["VideoFrame"]) -> Iterator[tuple[int, "VideoFrame"]]:
        """Each frame with its number; one with an unknown time stamp is left out."""
        numbered = ((self._index.number(frame.pts), frame) for frame in frames)
        return (found for found in numbered if found[0] >= 0)


@contextmanager
def _opened(source: Source, threads: int = 0) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """The file and its main video stream, and not a picture beside it."""
    import av

    name = name_of(source)
    with av.open(for_ffmpeg(source), metadata_errors="ignore") as container:
        stream = cast("VideoStream | None", container.streams.best("video"))
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise checks.bad("path", f"{name} without a video stream", "a video file")
        if stream.codec_context is None:
            raise checks.bad("path", f"{name} in a codec that FFmpeg does not know", "a video file that it can decode")
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        try:
            yield container, stream
        finally:
            # PyAV frees a decoder while it holds the GIL. A thread that is still decoding then and has something to log
            # waits for the GIL, if av.logging is on, and both wait for ever. This waits for the threads without it.
            stream.codec_context.flush_buffers()


def _packets(container: "InputContainer", *streams: "VideoStream") -> Iterator["Packet"]:
    """All packets of the file or of these streams."""
    with suppress(IndexError):  # PyAV at the end, if a stream began in the middle of the file
        yield from container.demux(*streams)


def _decoded(packets: Iterable["Packet"]) -> Iterator["VideoFrame"]:
    for packet in packets:
        yield from packet.decode()


@dataclass
class _Index:
    """Positions and times, a few bytes for each frame.

    Attributes:
        stamps: Presentation time of every frame, ascending, in the stream's time base.
        keys: Numbers of frames from which decoding can start, ascending; the first is 0.
        positions: From the time stamp of a key frame to its position in the file.
        counted: Whether frames must be counted, because time stamps do not number them.
        late: Whether the first frames may refer to others that are not in the file.
    """

    stamps: Sequence[int]
    positions: dict[int, int]
    counted: bool
    late: bool
    keys: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        numbers = [] if self.counted else sorted(self.number(stamp) for stamp in self.positions)
        self.keys = array("q", [0, *(number for number in numbers if number > 0)])

    def number(self, stamp: int | None) -> int:
        """The number of the frame with this time stamp, or -1."""
        at = -1 if stamp is None else bisect_left(self.stamps, stamp)
        return at if 0 <= at < len(self.stamps) and self.stamps[at] == stamp else -1

    def is_key(self, packet: "Packet") -> bool:
        """Whether this is a key frame of the index."""
        return packet.pts in self.positions and self.positions[packet.pts] == packet.pos and packet.size > 0

    def begin(self, decoded: Iterator[int | None]) -> None:
        """Begin with the first frame that decodes, if those of the first group follow in order; else count."""
        first = next(decoded, None)
        start = self.number(first)
        second = next((key for key in self.keys if key > start), len(self.stamps))
        numbers = map(self.number, decoded)
        got = list(takewhile(lambda number: number < second, numbers))
        self.counted = start < 0 or got != list(range(start + 1, second))
        self.stamps = self.stamps[max(start, 0) :]
        self.__post_init__()


def _index(name: str, container: "InputContainer", stream: "VideoStream") -> _Index:
    """Find all frames and key frames from the packets of the file, of which none is kept."""
    formats = container.format.name.split(",")
    empty = _EMPTY.get(stream.codec_context.codec.canonical_name, lambda packet: True)
    counted = "avi" in formats and bool(stream.codec_context.has_b_frames)
    times = array("q")
    positions: dict[int, int] = {}
    first: Packet | None = None
    found, latest, decode_time, step, corrupt = 0, _NEVER, _NEVER, 1, False
    end = 0.0  # of the last packet of any stream, in seconds
    for packet in _packets(container):
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index or not packet.size:
            continue
        first, found, corrupt = first or packet, found + 1, packet.is_corrupt
        counted = counted or packet.pts is None or empty(packet)
        if packet.dts is not None:
            counted = counted or packet.dts < decode_time
            step = max(step, packet.dts - decode_time) if decode_time != _NEVER else step
            decode_time = max(decode_time, packet.dts)
        if packet.pts is not None and not packet.is_discard:
            times.append(packet.pts)
            # Frames that are shown after a key frame but stored before it are not reached from it. Of several pictures
            # in one packet of MPEG-PS only the first has a position.
            if packet.is_keyframe and packet.pts > latest and packet.pos is not None:
                positions[packet.pts] = packet.pos
            latest = max(latest, packet.pts)
    # In AVI the time of decoding is the number of the chunk; empty ones, "as before", give no packets. The last picture
    # may last as long as any other.
    chunks = decode_time + step if "avi" in formats else 0
    _check_complete(name, container, stream, max(found, chunks), corrupt, end)
    if not times and not (counted and found):
        raise checks.bad("path", f"{name} without a frame in its video stream", "a file with frames in it")
    stamps = array("q", sorted(times))
    counted = counted or any(later == earlier for earlier, later in pairwise(stamps))
    late = not counted and first is not None and (not first.is_keyframe or stamps[0] < (first.pts or 0))
    return _Index(stamps, positions, counted, late)


def _check_complete(
    name: str, container: "InputContainer", stream: "VideoStream", found: int, corrupt: bool, end: float
) -> None:
    """A file that was cut off would pass for a shorter video, so compare it with its header."""
    formats = container.format.name.split(",")
    # Of an mp4 that an editor trimmed, the index has what is to be shown, and the header still counts all.
    said, expected = len(stream.index_entries) if "mp4" in formats else stream.frames, "a complete video file"
    if corrupt or said - found > SPARE_FRAMES + SPARE_SHARE * said:
        raise checks.bad("path", f"{name}, cut off: {found} of {said or 'an unknown number of'} frames", expected)
    # Of other formats than Matroska FFmpeg estimates the duration where they do not state it. A piece of a recording
    # begins late, and its duration counts from 0.
    start, whole = (container.start_time or 0) / 1e6, (container.duration or 0) / 1e6
    length = whole - start if whole > start else whole
    if "matroska" in formats and start + length - end > SPARE_SECONDS + SPARE_SHARE * length:
        raise checks.bad("path", f"{name}, cut off: {end - start:.1f} of {length:.1f} s", expected)
