"""Clips from files that the tests make: every frame is a grey of its own, so a wrong frame shows."""

import inspect

import pytest

pytest.importorskip("av")

import av
import clips
import numpy as np
import torch

from mar_fast.data.video import choose_frames, read_clip, read_views


def write(path, frames=50, codec="libx264", **options):
    """Frame n has the grey 16 + 4 * n."""
    images = [np.full((48, 64, 3), 16 + 4 * number, np.uint8) for number in range(frames)]
    return clips.write(path, images, codec=codec, **options)


def numbers(clip):
    """Which frames of the file a clip holds."""
    return ((clip.float().mean(dim=(0, 2, 3)) - 16) / 4).round().int().tolist()


@pytest.mark.parametrize("codec", ["libx264", "ffv1"])  # with and without frames stored out of order
@pytest.mark.parametrize(("stride", "start", "expected"), [(1, 0, 0), (3, 2, 2), (4, 30, 30), (3, None, 20)])
def test_stride(tmp_path, codec, stride, start, expected):
    clip = read_clip(write(tmp_path / "a.mkv", codec=codec), 4, size=(32, 32), stride=stride, start=start)
    assert clip.shape == (3, 4, 32, 32) and clip.dtype == torch.uint8
    assert clip.stride() == (1, 32 * 32 * 3, 32 * 3, 3)  # channels last, as decoded
    assert numbers(clip) == list(range(expected, expected + 4 * stride, stride))


def test_uniform_takes_the_middle_of_each_segment(tmp_path):
    assert numbers(read_clip(write(tmp_path / "a.mp4"), 5, sampling="uniform")) == [5, 15, 25, 35, 45]
    assert choose_frames(8, 8, "uniform", 1, None) == list(range(8))
    assert choose_frames(9, 8, "uniform", 1, None) == [0, 1, 2, 3, 5, 6, 7, 8]


def test_short_side_and_centre_crop(tmp_path):
    """A wide film with a bright middle third: the square crop holds the middle."""
    image = np.zeros((60, 180, 3), np.uint8)
    image[:, 60:120] = 200
    file = clips.write(tmp_path / "wide.mkv", [image])
    clip = read_clip(file, 1, size=(30, 30), stride=1)
    assert clip.float().mean() > 190
    assert read_clip(file, 1, size=None, stride=1).shape == (3, 1, 60, 180)
    assert read_clip(file, 1, size=(20, 60), stride=1)[0, 0, 10].float()[[0, 30, 59]].round().tolist() == [0, 200, 0]


def damaged(tmp_path, kind):
    file = tmp_path / "clip.mp4"
    if kind in ("missing", "folder"):
        return tmp_path / "nowhere.mp4" if kind == "missing" else tmp_path
    if kind in ("empty", "text"):
        file.write_text("not a video " * 100 if kind == "text" else "")
    if kind == "no header":
        whole = write(tmp_path / "whole.mp4").read_bytes()  # an mp4 keeps its index at the end
        file.write_bytes(whole[: len(whole) // 2])
    if kind == "audio only":
        file = tmp_path / "sound.wav"
        with av.open(str(file), "w") as container:
            container.mux(clips.silence(container.add_stream("pcm_s16le", rate=44100)))
    if kind == "too short":
        write(file, frames=10)
    return file


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", FileNotFoundError, "path: got .*nowhere.mp4"),
        ("folder", FileNotFoundError, "path: got .* expected an existing video file"),
        ("empty", ValueError, "path: got .*clip.mp4.*FFmpeg can decode"),
        ("text", ValueError, "path: got .*clip.mp4.*FFmpeg can decode"),
        ("no header", ValueError, "path: got .*clip.mp4.*FFmpeg can decode"),
        ("audio only", ValueError, "path: got .*sound.wav' without a video stream"),
        ("too short", ValueError, "path: got a video of 10 frames, expected at least 61: 16 frames at stride 4"),
    ],
)
def test_bad_files(tmp_path, kind, error, message):
    with pytest.raises(error, match=message):
        read_clip(damaged(tmp_path, kind))


@pytest.mark.parametrize("read", [read_clip, read_views])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_frames=0), "num_frames: got 0, expected a whole number, 1 or more"),
        (dict(num_frames=True), "num_frames: got True, expected a whole number"),
        (dict(stride=0), "stride: got 0"),
        (dict(stride=1.5), "stride: got 1.5"),
        (dict(stride=np.True_), "stride: got np.True_"),
        (dict(start=-1), "start: got -1, expected a whole number, 0 or more"),
        (dict(clips=torch.tensor(True)), r"clips: got tensor\(True\), expected a whole number, 1 or more"),
        (dict(crops=1.0), "crops: got 1.0, expected a whole number, 1 or more"),
        (dict(sampling="dense"), "sampling: got 'dense', expected 'stride' or 'uniform'"),
        (dict(short="loop"), "short: got 'loop', expected 'error' or 'repeat'"),
        (dict(size=(224,)), "size: got .*expected .H, W."),
        (dict(size=(0, 224)), "size: got .*expected .H, W., two whole numbers above 0"),
    ],
)
def test_bad_arguments(tmp_path, read, options, message):
    if options.keys() <= inspect.signature(read).parameters.keys():
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "any.mp4", **options)


def test_a_view_needs_a_size(tmp_path):
    with pytest.raises(ValueError, match=r"size: got None, expected .H, W., two whole numbers above 0"):
        read_views(tmp_path / "any.mp4", size=None)


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_integers_of_other_libraries(tmp_path, kind):
    file = write(tmp_path / "a.mkv")
    clip = read_clip(file, kind(4), stride=kind(3), start=kind(2), size=(kind(24), kind(32)))
    assert clip.equal(read_clip(file, 4, stride=3, start=2, size=(24, 32)))
    assert len(read_views(file, kind(4), clips=kind(2), crops=kind(3), size=(24, 24))) == 6
