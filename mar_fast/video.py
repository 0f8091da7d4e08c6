"""Real video files to uint8 clips, by PyAV (FFmpeg). Frames are found by their time stamps, never by counting."""

import os
from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from .kernels import checks

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Image = np.ndarray[Any, np.dtype[Any]]
Sampling = Literal["stride", "uniform"]


def read_clip(
    path: str | os.PathLike[str],
    num_frames: int = 16,
    *,
    size: tuple[int, int] | None = (224, 224),
    sampling: Sampling = "stride",
    stride: int = 4,
    start: int | None = None,
) -> Tensor:
    """Read one clip from a video file.

    Args:
        path: The file.
        num_frames: T, frames of the clip.
        size: (H, W). The short side is resized to it, keeping the aspect ratio, and the centre is cropped. None keeps
            the frames as they are.
        sampling: "stride" takes every ``stride``-th frame (Kinetics), "uniform" the middle frame of each of
            ``num_frames`` equal segments of the whole video (Something-Something, TSN, arXiv 1608.00859).
        stride: Frames from one to the next; only for "stride".
        start: First frame, counted in order of presentation; only for "stride". None takes the middle of the video.

    Returns:
        (C, T, H, W) uint8, RGB; a view of channels-last memory, as decoded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, TypeError: not a video, too short, damaged, or an argument that does not fit: the message says.
    """
    _check_arguments(num_frames, size, sampling, stride, start)
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"path: got {str(file)!r}, expected an existing video file")
    import av  # only here: a machine without PyAV can run everything but this

    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise checks.bad("path", f"{str(file)!r} without a video stream", "a video file")
            stream = container.streams.video[0]
            stamps = _time_stamps(container, stream, file)
            wanted = [stamps[number] for number in choose_frames(len(stamps), num_frames, sampling, stride, start)]
            frames = _decode(container, stream, wanted, size, file)
    except av.error.FFmpegError as error:
        raise checks.bad("path", f"{str(file)!r} ({error})", "a video file that FFmpeg can decode") from error
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)


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


def _check_arguments(
    num_frames: int, size: tuple[int, int] | None, sampling: str, stride: int, start: int | None
) -> None:
    for name, value, least in (("num_frames", num_frames, 1), ("stride", stride, 1), ("start", start, 0)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise checks.bad(name, repr(value), f"a whole number, {least} or more")
    if sampling not in ("stride", "uniform"):
        raise checks.bad("sampling", repr(sampling), "'stride' or 'uniform'")
    if size is not None and (len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size)):
        raise checks.bad("size", repr(size), "(H, W), two whole numbers above 0, or None")


def _time_stamps(container: "InputContainer", stream: "VideoStream", file: Path) -> list[int]:
    """Presentation times of all frames, in order, read from the packets: nothing is decoded for it."""
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    stamps = sorted({packet.pts for packet in packets if packet.pts is not None})
    if not stamps:
        raise checks.bad("path", f"{str(file)!r} without time stamps in its video stream", "a file with frames in it")
    return stamps


def _decode(
    container: "InputContainer", stream: "VideoStream", wanted: list[int], size: tuple[int, int] | None, file: Path
) -> list[Image]:
    """The frames with these time stamps, from the key frame before the first to the last, as (H, W, C) arrays."""
    container.seek(wanted[0], stream=stream, backward=True)
    stream.thread_type = "AUTO"
    found: dict[int, Image] = {}
    needed = sorted(set(wanted))
    for frame in container.decode(stream):
        place = bisect_left(needed, frame.pts) if frame.pts is not None else len(needed)
        if place < len(needed) and needed[place] == frame.pts:
            found[frame.pts] = _to_rgb(frame, size)
        if len(found) == len(needed):
            break
    missing = [stamp for stamp in needed if stamp not in found]
    if missing:
        seconds = float(missing[0] * (stream.time_base or 0))
        got = f"{str(file)!r}, of which the frame at {seconds:.2f} s cannot be decoded"
        raise checks.bad("path", got, "a complete video file")
    return [found[stamp] for stamp in wanted]


def _to_rgb(frame: "VideoFrame", size: tuple[int, int] | None) -> Image:
    """Turn, resize and crop one frame: (H, W, C) uint8."""
    turns = round(frame.rotation / 90) % 4
    if size is None:
        return np.rot90(frame.to_ndarray(format="rgb24"), turns).copy()
    height, width = size if turns % 2 == 0 else size[::-1]  # of the frame as it is stored
    scale = max(height / frame.height, width / frame.width)
    full_height = max(height, round(frame.height * scale))
    full_width = max(width, round(frame.width * scale))
    image = frame.to_ndarray(format="rgb24", width=full_width, height=full_height, interpolation="BILINEAR")
    top, left = (full_height - height) // 2, (full_width - width) // 2
    return np.rot90(image[top : top + height, left : left + width], turns).copy()
