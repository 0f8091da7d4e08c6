"""torchcodec in place of PyAV: the same frames by number, pixels within 2 of 255, or the film is refused by name."""

import random
import sys
import types

import pytest

pytest.importorskip("av")
pytest.importorskip("PIL")

import clips
import numpy as np
import torch
from test_films import B_FRAMES, HEVC, OPEN, REALTIME, drawn, dropped

from mar_fast.data import torchcodec_video
from mar_fast.data.annotations import Sample
from mar_fast.data.framing import picture
from mar_fast.data.torchcodec_video import import_decoder
from mar_fast.data.video import open_film
from mar_fast.train.dataset import ClipDataset, Key
from mar_fast.train.recipe import Data, Recipe, read_recipe

try:
    import_decoder()
    WHY_NOT = ""
except ModuleNotFoundError as missing:
    WHY_NOT = str(missing)
needs_torchcodec = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def read(source, numbers, decoder="torchcodec"):
    """Pixels of these frames as they are stored, but upright."""
    with open_film(source, 1, decoder) as film:
        return [frame.to_ndarray(format="rgb24") for _, frame in film.frames(numbers)]


def worst(source, want, numbers):
    """The largest difference of a pixel, from the frames of plain decoding."""
    got = read(source, numbers)
    assert len(got) == len(numbers)
    return max(int(np.abs(one.astype(int) - want[number]).max()) for number, one in zip(numbers, got, strict=True))


FILMS = {
    **{f"H.264, {end}": (f"a.{end}", "libx264", B_FRAMES, {}) for end in ("mp4", "mov", "mkv", "flv", "3gp")},
    "H.264, open groups": ("a.mkv", "libx264", OPEN, {}),
    "H.264, 50 x 90": ("a.mp4", "libx264", {}, dict(size=(50, 90))),
    "HEVC, open groups": ("a.mp4", "libx265", HEVC, {}),
    "VP8, references that are not shown": ("a.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "10"}, {}),
    "VP8, variable frame rate": ("a.webm", "libvpx", REALTIME, dict(times=[n * n for n in range(40)])),
    "VP9": ("a.webm", "libvpx-vp9", {}, {}),
    "MPEG-4, AVI with dropped frames": ("a.avi", "mpeg4", {"g": "12"}, dict(times=dropped(40, 5))),
    "MPEG-4, variable frame rate": ("a.mp4", "mpeg4", B_FRAMES, dict(times=[n * n for n in range(40)])),
    "MPEG-2": ("a.mkv", "mpeg2video", B_FRAMES, {}),
    "MJPEG, 36 x 53": ("a.mkv", "mjpeg", {}, dict(size=(36, 53))),
    "FFV1, 80 x 61": ("a.mkv", "ffv1", {}, dict(size=(80, 61))),
}


@needs_torchcodec
@pytest.mark.parametrize("name", FILMS)
def test_same_frames(tmp_path, name):
    file, codec, options, more = FILMS[name]
    file = clips.textured(tmp_path / file, codec=codec, options=options, **more)
    want = clips.every_frame(file)
    for numbers in (range(40), [39], [7, 8, 30], [0, 13, 26, 39]):
        assert worst(file, want, numbers) <= 2
    with open_film(file) as one, open_film(file, 0, "torchcodec") as other:
        told = [(film.total, film.rate, film.aspect, film.time(30)) for film in (one, other)]
    assert told[0] == told[1]


@needs_torchcodec
@pytest.mark.real_clip
@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"])
def test_real_clips(name):
    file = clips.real_clip(name)
    numbers = [0, 1, 50, 99]
    assert worst(file, dict(zip(numbers, read(file, numbers, "pyav"), strict=True)), numbers) <= 2


@needs_torchcodec
@pytest.mark.parametrize("seed", range(30))
def test_any_film_is_the_same_or_refused(tmp_path, seed):
    """Also joined recordings and copies from the middle of a group on, in all containers and codecs."""
    draw = random.Random(seed)
    file = next(file for _ in range(50) if (file := drawn(draw, tmp_path)))
    want, numbers = clips.every_frame(file), sorted(draw.sample(range(60), 6))
    numbers = [number for number in numbers if number < len(want)]
    try:
        assert not numbers or worst(file, want, numbers) <= 2
    except ValueError as error:
        assert f"path: got '{file}' for torchcodec, which " in str(error)


@needs_torchcodec
def test_bytes_open_files_and_names(tmp_path):
    file = clips.textured(tmp_path / "file:a%03d.mp4", codec="libx264")
    want = read(file, [3, 20])
    with file.open("rb") as opened:
        opened.read(100)  # wherever it stands
        assert np.array_equal(read(opened, [3, 20]), want)
    assert np.array_equal(read(file.read_bytes(), [3, 20]), want)


@needs_torchcodec
@pytest.mark.parametrize(
    ("ending", "codec", "size", "told"),
    [("mkv", "mjpeg", (37, 53), "yuvj420p with 37 lines"), ("mov", "prores_ks", (48, 64), "yuv422p10le with 48 lines")],
)
def test_other_colours(tmp_path, ending, codec, size, told):
    file = clips.textured(tmp_path / f"a.{ending}", 10, size, codec=codec)
    with pytest.raises(ValueError, match=f"for torchcodec, which gives other colours of {told}, expected a video"):
        read(file, [5])


@needs_torchcodec
@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_turned(tmp_path, degrees):
    file = clips.textured(tmp_path / "a.mp4", 10, (48, 64), codec="libx264", turn=(degrees,))
    shown = []
    for decoder in ("pyav", "torchcodec"):
        with open_film(file, 1, decoder) as film:
            shown.append([picture(frame, film.aspect, 100) for _, frame in film.frames([0, 9])])
    for one, other in zip(*shown, strict=True):
        assert one.shape == other.shape and np.abs(one.astype(int) - other).max() <= 2


@needs_torchcodec
@pytest.mark.parametrize(
    "how",
    [
        dict(turn=(0, True, False)),
        dict(turn=(0, False, True)),
        dict(turn=(90, True, False)),
        dict(turn=(90,), aspect=2),
    ],
)
def test_mirrored_or_turned_with_oblong_pixels(tmp_path, how):
    file = clips.textured(tmp_path / "a.mp4", 10, codec="libx264", **how)
    assert len(read(file, [5], "pyav")) == 1
    with pytest.raises(ValueError, match=r"a.mp4' for torchcodec, which cannot turn it so, expected a video that it"):
        read(file, [5])


@needs_torchcodec
def test_training_clips(tmp_path):
    """The same ones; in validation they are PyAV's, and a video that is refused is told as a broken one."""
    film = clips.textured(tmp_path / "a.mp4", 40, (40, 64), codec="libx264")  # so small that it is not resized
    joined = clips.textured(tmp_path / "b.ts", 40, codec="libx264")
    joined.write_bytes(2 * joined.read_bytes())
    samples = [Sample(path.name, path, label, "") for label, path in enumerate((film, joined))]
    one, other = (ClipDataset(samples, training_recipe(decoder)) for decoder in ("pyav", "torchcodec"))
    for epoch in range(5):
        video = other[Key(0, epoch)].video.astype(int)
        assert video.shape == (2, 4, 32, 32, 3) and np.abs(one[Key(0, epoch)].video - video).max() <= 2
    assert not one[Key(1)].broken
    broken = other[Key(1)].broken[0]
    assert broken.path == str(joined) and "for torchcodec, which needs time stamps" in broken.error
    assert not ClipDataset(samples, training_recipe("torchcodec"), training=False)[Key(1)].broken


def training_recipe(decoder):
    model = dict(name="mar_vit_base", num_frames=4, image_size=(32, 32), num_classes=2)
    return Recipe(model=model, data=Data(repeats=2, decoder=decoder))


NOT_FOUND_LATE = """
class VideoDecoder:
    def __init__(self, source):
        raise RuntimeError("no z.so\\nmore")
"""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("raise ModuleNotFoundError('none')", "which is not installed; expected 'pyav', or: pip"),
        ("raise OSError('no x.so\\nmore')", r"which does not load \(no x.so\); expected 'pyav', or: pip .*, FFmpeg"),
        (NOT_FOUND_LATE, r"which does not load \(no z.so\); expected"),
    ],
)
def test_missing_package(tmp_path, monkeypatch, content, told):
    """It is found out before the start: a worker would take every video for a broken one."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    sys.modules["torchcodec"].__path__ = [str(tmp_path)]
    (tmp_path / "decoders.py").write_text(content)
    film = clips.textured(tmp_path / "a.mp4", 10, codec="libx264")
    with pytest.raises(ModuleNotFoundError, match=f"decoder: got 'torchcodec', {told}"):
        ClipDataset([Sample(film.name, film, label, "") for label in (0, 1)], training_recipe("torchcodec"))
    monkeypatch.delitem(sys.modules, "torchcodec.decoders", raising=False)


class Stub:
    """A decoder of black frames, numbered as PyAV's are but for what a test changes."""

    rotation = None
    metadata = property(lambda self: self)
    total, late = 10, 0.0

    def __init__(self, source, **options):
        pass

    def __len__(self):
        return self.total

    def get_frame_at(self, number):
        if number == 9:
            raise RuntimeError("no frame")
        black = torch.zeros(48, 64, 3, dtype=torch.uint8)
        return types.SimpleNamespace(data=black, pts_seconds=number / 25 + self.late)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(total=11), "which counts 11 frames in it, not 10"),
        (dict(late=0.04), "which finds another frame in place of 4"),
        ({}, "which cannot decode frame 9"),
    ],
)
def test_what_torchcodec_gives_is_checked(tmp_path, monkeypatch, changes, told):
    monkeypatch.setattr(torchcodec_video, "import_decoder", lambda: type("Changed", (Stub,), changes))
    file = clips.textured(tmp_path / "a.mp4", 10, codec="libx264")
    with pytest.raises(ValueError, match=f"path: got '{file}' for torchcodec, {told}, expected a video that it reads"):
        read(file, [4, 9])


def test_by_a_recipe():
    assert read_recipe("mar_k400_base", ["data.decoder=torchcodec"]).data.decoder == "torchcodec"
    with pytest.raises(ValueError, match=r"data.decoder: got 'decord', expected one of 'pyav', 'torchcodec'"):
        read_recipe("mar_k400_base", ["data.decoder=decord"])
