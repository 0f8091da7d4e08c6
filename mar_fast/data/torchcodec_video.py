"""Frames of a video file by their numbers, decoded by torchcodec but numbered by PyAV.

The index of `decoding.Video` numbers the frames. The time stamp of each frame that torchcodec gives is compared with
it, since torchcodec trusts every seek.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ..kernels import checks
from .decoding import Source, Video, for_ffmpeg
from .framing import orientation

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

# Formats that both decoders convert to the same RGB if the height is even; in others they differ by up to 41 of 255.
_FORMATS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "gray", "rgb24", "bgr0")


def import_decoder() -> Any:
    """torchcodec's class VideoDecoder.

    Raises:
        ModuleNotFoundError: torchcodec is not installed, or a library that it needs is not found.
    """
    got, expected = "decoder: got 'torchcodec', which", "expected 'pyav', or: pip install 'mar-fast[torchcodec]'"
    try:
        from torchcodec.decoders import VideoDecoder

        with suppress(ValueError):
            VideoDecoder(b"")  # some versions look for FFmpeg only now
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{got} is not installed; {expected}") from error
    except (ImportError, OSError, RuntimeError) as error:
        why, needs = str(error).partition("\n")[0], "FFmpeg's shared libraries and a build for this PyTorch"
        raise ModuleNotFoundError(f"{got} does not load ({why}); {expected}, {needs}") from error
    return VideoDecoder


class TorchCodecVideo(Video):
    """`Video` with frames from torchcodec: the same numbers, RGB, upright, as stored within 2 of 255 of PyAV's pixels.

    A file is refused if its frames must be counted, if torchcodec counts more or fewer frames or gives another frame
    than was asked for, if its colours differ (`_FORMATS`), or if it must be shown mirrored, or turned by 90 degrees
    with pixels that are not square. torchcodec may give a damaged picture where PyAV raises an error.
    """

    def __init__(self, source: Source, threads: int, files: ExitStack) -> None:
        super().__init__(source, threads, files)
        if self._index.counted:
            raise self._refused("which needs time stamps that number the frames")
        codec = self._stream.codec_context
        if codec.pix_fmt not in _FORMATS or codec.height % 2:
            raise self._refused(f"which gives other colours of {codec.pix_fmt} with {codec.height} lines")
        file = for_ffmpeg(source)
        options: dict[str, Any] = dict(seek_mode="exact", dimension_order="NHWC", num_ffmpeg_threads=threads)
        options |= dict(device="cpu", stream_index=self._stream.index)
        decoder = import_decoder()
        try:
            self._decoder = decoder(file if isinstance(file, str) else file.read(), **options)
        except (RuntimeError, ValueError) as error:
            raise self._refused("which it cannot open") from error
        if len(self._decoder) != self.total:
            raise self._refused(f"which counts {len(self._decoder)} frames in it, not {self.total}")
        if self._decoder.metadata.rotation is not None:  # without a display matrix it is None
            turns, mirrored = orientation(next(super().frames([0]))[1])
            if mirrored or (turns % 2 and self.aspect != 1):
                raise self._refused("which cannot turn it so")

    def frames(self, numbers: Iterable[int]) -> Iterator[tuple[int, "VideoFrame"]]:
        """As `Video.frames`."""
        from av.video.frame import VideoFrame

        for number in numbers:
            try:
                frame = self._decoder.get_frame_at(number)
            except (RuntimeError, IndexError) as error:
                raise self._refused(f"which cannot decode frame {number}") from error
            if round(frame.pts_seconds / Fraction(self._stream.time_base or 1)) != self._index.stamps[number]:
                raise self._refused(f"which finds another frame in place of {number}")
            yield number, VideoFrame.from_ndarray(frame.data.numpy(), format="rgb24")

    def _refused(self, why: str) -> ValueError:
        return checks.bad("path", f"{self.name} for torchcodec, {why}", "a video that it reads as PyAV does")
