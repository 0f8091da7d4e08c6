"""Views against a naive definition: decode every frame, resize, slice. Files are made by the tests."""

from fractions import Fraction

import pytest

pytest.importorskip("av")

import av
import clips
import numpy as np
import torch

from mar_fast.data.video import choose_clips, read_clip, read_views


def naive(images, chosen, corners, size):
    """(views, T, H, W, 3) of upright, resized images: each clip, at each corner."""
    height, width = size
    return np.stack(
        [
            np.stack([images[n][top : top + height, left : left + width] for n in clip])
            for clip in chosen
            for top, left in corners
        ]
    )


def same(views, want):
    assert views.dtype == torch.uint8
    assert np.array_equal(views.permute(0, 2, 3, 4, 1).numpy(), want)


@pytest.mark.parametrize("codec", ["ffv1", "libx264"])
def test_five_by_three(tmp_path, codec):
    file = clips.textured(tmp_path / "a.mkv", 75, (50, 90), codec=codec, options={"g": "12"})
    views = read_views(file, 8, stride=3, size=(32, 32))
    assert views.shape == (15, 3, 8, 32, 32)
    assert views.stride()[1:] == (1, 32 * 32 * 3, 32 * 3, 3)  # channels last, as decoded
    images = clips.every_frame(file, (32, 58))  # 90 * 32 / 50 = 57.6
    starts = [0, 13, 26, 39, 53]  # 75 - 22 = 53 to spare
    chosen = [[start + 3 * i for i in range(8)] for start in starts]
    same(views, naive(images, chosen, [(0, 0), (0, 13), (0, 26)], (32, 32)))


@pytest.mark.parametrize("frames", [16, 37, 80])
def test_two_by_three_of_an_upright_film(tmp_path, frames):
    """Something-Something: one frame at the start and one at the middle of each segment; crops from top to bottom."""
    file = clips.textured(tmp_path / "a.mkv", frames, (81, 60))
    views = read_views(file, 16, clips=2, sampling="uniform", size=(40, 40))
    images = clips.every_frame(file, (54, 40))
    tick = frames / 16
    chosen = [[int(tick * i) for i in range(16)], [int(tick / 2 + tick * i) for i in range(16)]]
    same(views, naive(images, chosen, [(0, 0), (7, 0), (14, 0)], (40, 40)))


@pytest.mark.parametrize("sampling", ["stride", "uniform"])
def test_one_view_is_the_clip(tmp_path, sampling):
    file = clips.textured(tmp_path / "a.mkv", 41, (37, 53))
    view = read_views(file, 6, clips=1, crops=1, sampling=sampling, stride=3, size=(24, 28))
    assert torch.equal(view[0], read_clip(file, 6, sampling=sampling, stride=3, size=(24, 28)))


def test_clips_cover_the_video():
    for total in (61, 62, 100, 333):
        chosen = choose_clips(total, 16, 5, "stride", 4, "error")
        firsts = [clip[0] for clip in chosen]
        assert firsts[0] == 0 and chosen[-1][-1] == total - 1
        assert max(np.diff(firsts)) - min(np.diff(firsts)) <= 1
        assert all(np.diff(clip).tolist() == [4] * 15 for clip in chosen)
    thirds = choose_clips(48, 4, 3, "uniform", 1, "error")
    assert thirds == [[0, 12, 24, 36], [4, 16, 28, 40], [8, 20, 32, 44]]


@pytest.mark.parametrize("frames", [1, 5, 21])
def test_short_videos(tmp_path, frames):
    file = clips.textured(tmp_path / "a.mkv", frames, (40, 40))
    with pytest.raises(
        ValueError, match=f"a video of {frames} frames, expected at least 22, 8 frames at stride 3 .or sh"
    ):
        read_views(file, 8, stride=3, size=(40, 40))
    views = read_views(file, 8, clips=2, crops=1, stride=3, size=(40, 40), short="repeat")
    images = clips.every_frame(file)
    same(views, naive(images, [[min(3 * i, frames - 1) for i in range(8)]] * 2, [(0, 0)], (40, 40)))
    if frames < 8:
        with pytest.raises(ValueError, match=f"a video of {frames} frames, expected at least 8, one for each segment"):
            read_views(file, 8, sampling="uniform", size=(40, 40))
    views = read_views(file, 8, clips=2, crops=1, sampling="uniform", size=(40, 40), short="repeat")
    chosen = [[int(frames / 8 * (i + part)) for i in range(8)] for part in (0, 0.5)]
    same(views, naive(images, chosen, [(0, 0)], (40, 40)))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_turned_and_mirrored(tmp_path, degrees, mirrored):
    """A phone's film: the file says how to turn it, and then whether to mirror it."""
    file = clips.textured(tmp_path / "phone.mp4", 20, (46, 70), codec="libx264", turn=(degrees, mirrored))
    turned = [np.rot90(image, degrees // 90) for image in clips.every_frame(file)]
    images = [image[:, ::-1] if mirrored else image for image in turned]
    height, width = images[0].shape[:2]
    same(read_clip(file, 4, size=None, start=2)[None], naive(images, [[2, 6, 10, 14]], [(0, 0)], (height, width)))
    # At its own short side nothing is resized, so that the crops are pixels of the file.
    views = read_views(file, 4, clips=2, size=(46, 46))
    corners = [(0, 0), (12, 0), (24, 0)] if height > width else [(0, 0), (0, 12), (0, 24)]
    same(views, naive(images, [[0, 4, 8, 12], [7, 11, 15, 19]], corners, (46, 46)))


def test_pixels_that_are_not_square(tmp_path):
    """Pixels 4/3 as wide as high: 60 x 60 of them are shown as 60 x 80, and 40 x 53 fill the short side of 40."""
    file = clips.textured(tmp_path / "a.mp4", 20, (60, 60), codec="libx264", aspect=Fraction(4, 3))
    views = read_views(file, 4, clips=1, size=(40, 40))
    same(views, naive(clips.every_frame(file, (40, 53)), [[3, 7, 11, 15]], [(0, 0), (0, 6), (0, 13)], (40, 40)))
    assert read_clip(file, 4, size=None).shape == (3, 4, 60, 60)  # as stored
    upright = clips.textured(tmp_path / "b.mp4", 20, (60, 60), codec="libx264", aspect=Fraction(4, 3), turn=(90,))
    views = read_views(upright, 4, clips=1, size=(40, 40))
    images = [np.rot90(image) for image in clips.every_frame(upright, (40, 53))]
    same(views, naive(images, [[3, 7, 11, 15]], [(0, 0), (6, 0), (13, 0)], (40, 40)))


@pytest.mark.real_clip
def test_real_clip_with_pixels_that_are_not_square():
    """176 x 144 pixels of 128/117 are shown as 192.5 x 144: at a short side of 112, 149.76 wide."""
    file = clips.real_clip("carphone_pristine.mp4")
    views = read_views(file, 8, clips=3, stride=4, size=(112, 112))
    images = clips.every_frame(file, (112, 150))
    chosen = [list(range(first, first + 29, 4)) for first in (0, 45, 91)]
    same(views, naive(images, chosen, [(0, 0), (0, 19), (0, 38)], (112, 112)))


def test_frame_rate_that_varies(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(7, 300, 60)).tolist()
    file = clips.textured(tmp_path / "a.mkv", 60, codec="libx264", times=times, options={"g": "9"})
    views = read_views(file, 5, clips=4, crops=1, stride=7, size=(48, 64))
    chosen = [[first + 7 * i for i in range(5)] for first in (0, 10, 20, 31)]
    same(views, naive(clips.every_frame(file), chosen, [(0, 0)], (48, 64)))


def test_a_frame_is_decoded_once(tmp_path, monkeypatch):
    """Three clips of 9 frames with gaps between them, in groups of 10: from the key frame before each to its end."""
    file = clips.textured(tmp_path / "a.mp4", 100, codec="libx264", options={"g": "10", "sc_threshold": "0"})
    taken = clips.count_decoded(monkeypatch)
    read_views(file, 3, clips=3, crops=3, stride=4, size=(24, 24))
    # First frames 0, 45, 91: decoded are 0 to 8, 40 to 53, 90 to 99.
    assert len(taken) == 9 + 14 + 10 and len(set(taken)) == len(taken)


def test_clips_that_overlap_share_frames(tmp_path, monkeypatch):
    file = clips.textured(tmp_path / "a.mkv", 40, codec="libx264", options={"g": "250"})
    taken = clips.count_decoded(monkeypatch)
    read_views(file, 8, clips=5, crops=3, stride=4, size=(24, 24))
    assert len(taken) == 40


def test_only_wanted_frames_of_independent_ones(tmp_path, monkeypatch):
    file = clips.textured(tmp_path / "a.mkv", 60, options={"g": "1"})
    taken = clips.count_decoded(monkeypatch)
    read_views(file, 4, clips=2, crops=3, stride=5, size=(24, 24))
    assert len(taken) == 8


def test_metadata_that_are_no_text(tmp_path):
    """Old files have titles in other encodings than UTF-8."""
    file = clips.textured(tmp_path / "a.avi", 10, codec="mpeg4", title="XXXX")
    content = file.read_bytes()
    assert content.count(b"XXXX") == 1
    file.write_bytes(content.replace(b"XXXX", b"caf\xe9"))
    assert read_clip(file, 2, size=(48, 48)).shape == (3, 2, 48, 48)


def test_picture_before_the_film(tmp_path):
    """A file whose first video stream is a single picture: the film is read."""
    with av.open(str(tmp_path / "a.asf"), "w") as file:
        picture, film = file.add_stream("mjpeg", rate=25), file.add_stream("mpeg4", rate=25)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
        film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        for stream, frames in ((picture, 1), (film, 20)):
            for number in range(frames):
                image = clips.texture(number, (stream.height, stream.width))
                file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            file.mux(stream.encode())
    with av.open(str(tmp_path / "a.asf")) as file:
        assert [stream.codec.name for stream in file.streams.video] == ["mjpeg", "mpeg4"]
    assert read_clip(tmp_path / "a.asf", 5, size=None).shape == (3, 5, 48, 64)


def test_unknown_codec(tmp_path):
    file = clips.textured(tmp_path / "a.mp4", 10, codec="libx264")
    file.write_bytes(file.read_bytes().replace(b"avc1", b"qqqq").replace(b"avcC", b"qqqC"))
    with pytest.raises(ValueError, match=r"path: got .*a.mp4. .*expected a video file"):
        read_clip(file, 2, size=(48, 48))


def cut(file, share):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    return file


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.mp4", dict(codec="libx264", container={"movflags": "faststart"}), "cut off: .* of 100 frames"),
        ("a.mkv", dict(codec="libx264"), "cut off: .* of 4.0 s"),
        ("a.webm", dict(codec="libvpx-vp9"), "cut off: .* of 4.0 s"),
        ("a.avi", dict(codec="mpeg4"), "cut off: .* of 100 frames"),
    ],
)
def test_cut_off(tmp_path, name, options, message):
    """What is left would do for the views: it is an error, not a shorter video."""
    images = [np.random.default_rng(n).integers(0, 256, (48, 64, 3), np.uint8) for n in range(100)]
    file = clips.write(tmp_path / name, images, **options)
    assert read_views(file, 4, clips=1, size=(48, 48)).shape == (3, 3, 4, 48, 48)
    with pytest.raises(ValueError, match=f"path: got .*{name}., {message}, expected a complete video file"):
        read_views(cut(file, 0.6), 4, clips=1, size=(48, 48))


def test_trimmed_by_an_editor(tmp_path):
    """An mp4 whose edit list shows the first half only: it is complete, and so long."""
    file = clips.textured(tmp_path / "a.mp4", 60, codec="libx264", options={"g": "10", "bf": "0"})
    content = bytearray(file.read_bytes())
    duration = content.index(b"elst") + 12
    whole = int.from_bytes(content[duration : duration + 4], "big")
    content[duration : duration + 4] = (whole // 2).to_bytes(4, "big")
    file.write_bytes(content)
    images = clips.every_frame(file)
    assert len(images) == 30
    views = read_views(file, 3, clips=2, crops=1, stride=4, size=(48, 64))
    same(views, naive(images, [[0, 4, 8], [21, 25, 29]], [(0, 0)], (48, 64)))


def test_damaged_in_the_middle(tmp_path):
    """Bytes of one frame are lost; those of another group of frames can be read."""
    images = [np.random.default_rng(n).integers(0, 256, (48, 64, 3), np.uint8) for n in range(40)]
    file = clips.write(tmp_path / "a.mp4", images, codec="libx264", options={"g": "10", "bf": "0", "sc_threshold": "0"})
    whole = bytearray(file.read_bytes())
    middle = len(whole) * 5 // 8  # frame 24 or so
    whole[middle : middle + 2000] = bytes(2000)
    file.write_bytes(whole)
    assert read_clip(file, 2, size=(48, 48), start=2).shape == (3, 2, 48, 48)
    with pytest.raises(ValueError, match=r"path: got .*a.mp4.*expected a "):
        read_clip(file, 8, stride=1, size=(48, 48), start=20)
