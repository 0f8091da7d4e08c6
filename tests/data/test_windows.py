"""Sliding windows against their definition: decode every frame, take the times, slice. Films are made by the tests."""

import gc
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("av")

import av
import clips
import numpy as np
import torch

from mar_fast.data.video import open_film
from mar_fast.data.windows import Sliding, film_windows, read_ahead, stream_windows

SIZE = (24, 32)


def agrees(windows, images, samples, times, sliding):
    want = clips.sliding(samples, sliding)
    windows = list(windows)
    assert [window.number for window in windows] == list(range(len(want)))
    for window, numbers in zip(windows, want, strict=True):
        assert np.array_equal(np.stack(window.pictures), np.stack([images[number] for number in numbers]))
        assert window.frames == (numbers[0], numbers[-1])
        expected = None if times is None else (float(times[numbers[0]]), float(times[numbers[-1]]))
        assert window.seconds == expected


def read(path, sliding):
    with open_film(path) as film:
        count, windows = film_windows(film, sliding, SIZE)
        found = list(windows)
    assert len(found) == count
    return found


SHAPES = [(4, 4, 4), (4, 1, 3), (4, 3, 2), (1, 1, 1), (3, 10, 2), (2, 25, 9), (5, 7, 1), (4, 40, 1)]


@pytest.mark.parametrize("tail", ["repeat", "drop"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ends_of_films(tmp_path, shape, tail):
    """Lengths around one window and around two, and films shorter than one."""
    sliding = Sliding(*shape, tail=tail)
    spans = {1, 2, sliding.span - 1, *range(sliding.span, sliding.span + 3), 33, sliding.span + 2 * sliding.stride}
    for total in sorted(spans - {0}):
        assert sliding.count(total) == len(clips.sliding(range(total), sliding)), total
    path = clips.textured(tmp_path / "a.mkv", 33, SIZE)
    images, times = clips.every_frame(path), [Fraction(n, 25) for n in range(33)]
    agrees(read(path, sliding), images, list(range(33)), times, sliding)
    agrees(stream_windows(images, sliding, SIZE), images, list(range(33)), None, sliding)


@pytest.mark.parametrize("total", [1, 2, 6, 7])
def test_films_shorter_than_a_window(tmp_path, total):
    path = clips.textured(tmp_path / "a.mkv", total, SIZE)
    sliding = Sliding(4, 2, 2)
    times = [Fraction(n, 25) for n in range(total)]
    agrees(read(path, sliding), clips.every_frame(path), list(range(total)), times, sliding)
    if total < 7:
        with pytest.raises(ValueError, match=f"path: got a video of {total} frames, expected at least 7, as a window"):
            read(path, Sliding(4, 2, 2, tail="drop"))


TIMES = {
    "constant": [40 * n for n in range(30)],
    "variable": [0, 40, 80, 90, 100, 400, 410, 420, 900, 940, 980, 1020, 1500, 1501, 1502, 1990, 2000],
    "one frame": [0],
    "late": [500, 540, 620, 660, 700, 1200],
}


@pytest.mark.parametrize("fps", [3, 12.5, 25, 29.97, 80])
@pytest.mark.parametrize("kind", TIMES)
def test_a_constant_rate(tmp_path, kind, fps):
    """Frames that are shown at the ticks of a clock, of films with any times; also as a stream with times."""
    times = [Fraction(time - TIMES[kind][0], 1000) for time in TIMES[kind]]
    path = clips.textured(tmp_path / "a.mkv", len(times), SIZE, times=TIMES[kind])
    images, sliding = clips.every_frame(path), Sliding(4, 3, 2, fps=fps)
    samples = clips.shown_at(times, str(fps))
    agrees(read(path, sliding), images, samples, times, sliding)
    timed = [(Fraction(time, 1000), image) for time, image in zip(TIMES[kind], images, strict=True)]
    items = [(*one, "what else a camera tells") for one in timed]
    agrees(stream_windows(items, sliding, SIZE), images, samples, [time for time, _ in timed], sliding)


def test_variable_rate_by_frames(tmp_path):
    path = clips.textured(tmp_path / "a.mkv", 17, SIZE, times=TIMES["variable"])
    times = [Fraction(time, 1000) for time in TIMES["variable"]]
    agrees(read(path, Sliding(4, 1, 2)), clips.every_frame(path), list(range(17)), times, Sliding(4, 1, 2))


def test_each_frame_is_decoded_and_resized_once(tmp_path, monkeypatch):
    path = clips.textured(tmp_path / "a.mp4", 120, (48, 64), codec="libx264", options={"g": "20"})
    resized = []
    original = av.VideoFrame.to_ndarray
    taken = clips.count_decoded(monkeypatch)
    monkeypatch.setattr(
        "mar_fast.data.windows.pictures",
        lambda frame, *a: resized.append(frame.pts) or [original(frame, format="rgb24")],
    )
    windows = read(path, Sliding(4, 1, 3))
    assert len(windows) == 111 and len(taken) == 120 and len(resized) == len(set(resized)) == 120
    assert len({id(picture) for window in windows for picture in window.pictures}) == 120
    resized.clear()
    taken.clear()
    read(path, Sliding(2, 60, 2, tail="drop"))  # of frames 0, 2, 60, 62; and the last, to see that it is there
    assert len(resized) == 4 and len(taken) < 60


def test_frames_of_a_stream(tmp_path):
    """Arrays, tensors and PyAV's frames of any size; each window as soon as its last frame is there."""
    images = [clips.texture(number, (48, 80)) for number in range(12)]
    path = clips.write(tmp_path / "a.mkv", images)
    want = read(path, Sliding(2, 2, 3))
    asked = []

    def camera():
        for number, image in enumerate(images):
            asked.append(number)
            kind = number % 3
            frame = av.VideoFrame.from_ndarray(image, format="rgb24") if kind == 2 else image
            yield torch.from_numpy(image) if kind == 1 else frame

    windows = stream_windows(camera(), Sliding(2, 2, 3), SIZE)
    for window, expected in zip(windows, want, strict=True):
        close = np.stack(window.pictures).astype(int) - np.stack(expected.pictures)
        assert window.frames == expected.frames and abs(close).max() <= 2  # ffv1 holds bgr0, scaled on its own path
        assert window.number >= 4 or asked[-1] == window.number * 2 + 3
    assert list(stream_windows([], Sliding(2), SIZE)) == []
    assert list(stream_windows(images[:3], Sliding(2, tail="drop"), SIZE)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stride=0), "stride: got 0, expected a whole number, 1 or more"),
        (dict(frame_stride=1.5), "frame_stride: got 1.5"),
        (dict(num_frames=True), "num_frames: got True"),
        (dict(fps=0), "fps: got 0, expected frames a second, above 0, up to 1000"),
        (dict(fps=float("nan")), "fps: got nan"),
        (dict(tail="error"), "tail: got 'error', expected 'repeat' or 'drop'"),
        (dict(num_frames=1, frames=np.zeros((4, 4), np.uint8)), "frames: got uint8 of shape"),
        (dict(num_frames=1, frames=np.zeros((4, 4, 3))), "frames: got float64 of shape"),
        (dict(fps=2, frames=np.zeros((4, 4, 3), np.uint8)), "fps: got 2, expected None, for pictures and other films"),
    ],
)
def test_bad_arguments(options, message):
    frames = [options.pop("frames", None)]
    with pytest.raises(ValueError, match=message):
        list(stream_windows(frames, Sliding(**options), SIZE))


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_ahead(tmp_path, workers):
    """All windows of all films in order, broken ones with their error; no more is read than there is room for."""
    films = [clips.textured(tmp_path / f"{n}.mkv", 10 + n, SIZE) for n in range(5)]
    films[1].write_bytes(b"no video")
    films.append(tmp_path / "none.mkv")
    found = {number: [] for number in range(6)}
    for number, report in read_ahead(films, Sliding(2, 3, 1), SIZE, workers=workers, depth=2):
        found[number].append(report)
    for number in (0, 2, 3, 4):
        count, *windows, end = found[number]
        assert count == len(windows) and end is None
        images, sliding = clips.every_frame(films[number]), Sliding(2, 3, 1)
        agrees(windows, images, list(range(10 + number)), [Fraction(n, 25) for n in range(99)], sliding)
    assert [type(found[number][-1]) for number in (1, 5)] == [ValueError, FileNotFoundError]
    reports = read_ahead(films[2:5], Sliding(1, 1, 1), SIZE, workers=workers, depth=2)
    next(reports)
    reports.close()  # and the readers end, or this would hang


def test_an_unexpected_error_is_not_swallowed(tmp_path, monkeypatch):
    film = clips.textured(tmp_path / "a.mkv", 5, SIZE)

    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("mar_fast.data.windows.pictures", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(read_ahead([film], Sliding(2), SIZE, workers=1, depth=2))


def test_threads_do_not_pile_up(tmp_path):
    """A scaler of each frame's own would leave some behind until Python collects garbage."""
    path = clips.textured(tmp_path / "a.mkv", 60, (48, 64))
    before = len(list(Path("/proc/self/task").iterdir()))
    gc.disable()
    try:
        read(path, Sliding(4, 1, 1))
        assert len(list(Path("/proc/self/task").iterdir())) < before + 40
    finally:
        gc.enable()
