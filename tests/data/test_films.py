"""Which frames a film has, in every container and codec: those of decoding from first to last, without a seek."""

import contextlib
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("av")

import av
import clips
import numpy as np
from PIL import Image

from mar_fast.data import read_clip, read_views
from mar_fast.data.decoding import open_video

TIMES = int(os.environ.get("MAR_FAST_FILMS", "1"))  # how much more of what is drawn or repeated
CONTAINERS = {
    "libx264": "mp4 mov mkv ts flv nut avi h264 3gp",
    "libx265": "mp4 mkv ts hevc",
    "mpeg2video": "ts mpg vob mkv mxf avi nut m2v",
    "mpeg1video": "mpg ts mkv avi",
    "mpeg4": "avi mp4 mkv asf nut ts",
    "libvpx": "webm mkv avi ivf",
    "libvpx-vp9": "webm mp4 ivf",
    "mjpeg": "avi mov mkv mjpeg",
    "ffv1": "mkv avi nut",
    "wmv2": "wmv avi",
    "flv": "flv avi",
    "prores_ks": "mov mkv mxf",
    "huffyuv": "avi",
    "cinepak": "avi mov",
    "png": "mov avi",
    "qtrle": "mov",
    "gif": "gif",
}
OPEN = {"g": "12", "x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3"}
HEVC = {"x265-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:log-level=none"}
REALTIME = {"deadline": "realtime", "cpu-used": "8"}
B_FRAMES = {"g": "12", "bf": "2"}


def agrees(file, runs, total=None):
    """Check how many frames a film has, and (start, stride) of clips of up to 4 frames or of all of them."""
    want = clips.every_frame(file)
    assert total in (None, len(want))
    with open_video(file) as film:
        assert film.total == len(want)
    for start, stride in runs:
        start %= len(want)
        chosen = want[start::stride][:4] if stride > 1 else want[start:]
        got = read_clip(file, len(chosen), stride=stride, start=start, size=None)
        assert np.array_equal(got.permute(1, 2, 3, 0).numpy(), np.stack(chosen)), (file.name, start, stride)


def dropped(frames, every):
    """Times in milliseconds at 25 frames a second, of which one is missing now and then."""
    return [40 * (number + number // every) for number in range(frames)]


def drawn(draw, folder):
    """A film that is whole, joined, or copied from a later key frame or from the middle of a group on; None if FFmpeg
    cannot write it so, or finds nothing in it."""
    codec = draw.choice(list(CONTAINERS))
    ending = draw.choice(CONTAINERS[codec].split())
    frames, options = draw.choice([5, 30, 60]), {"g": draw.choice(["1", "3", "12", "250"])}
    if codec in ("libx264", "mpeg2video", "mpeg4"):
        options["bf"] = draw.choice("0023")
    options |= {"libx265": HEVC, "libx264": draw.choice([{}, OPEN, {"intra-refresh": "1"}])}.get(codec, {})
    if codec == "libvpx":
        options |= REALTIME | draw.choice([{}, {"auto-alt-ref": "1", "lag-in-frames": "10"}])
    times = draw.choice([None, None, dropped(frames, 10)]) if ending in ("mkv", "avi", "mp4", "webm") else None
    kind, part = draw.choice(["whole", "whole", "joined", "key", "middle"]), draw.randrange(1, 9)
    copy = folder / f"c.{draw.choice(['mkv', 'ts', 'mp4', ending])}"
    try:
        file = clips.textured(folder / f"a.{ending}", frames, codec=codec, options=options, times=times)
        if kind == "joined":
            other = clips.textured(folder / f"b.{ending}", frames + 7, codec=codec, options=options)
            file.write_bytes(file.read_bytes() + other.read_bytes())
        elif kind != "whole":
            file = clips.copied(file, copy, *((1, 0) if kind == "key" else (0, part)))
        return file if clips.every_frame(file) else None
    except (av.error.FFmpegError, ValueError, IndexError):
        return None


@pytest.mark.parametrize("seed", range(50 * TIMES))
def test_containers_codecs_starts_and_strides(tmp_path, seed):
    draw = random.Random(seed)
    file = next(file for _ in range(50) if (file := drawn(draw, tmp_path)))
    agrees(file, [(0, 1), *((draw.randrange(60), draw.choice([1, 2, 7])) for _ in range(6))])


FILMS = {
    "joined, H.264, ts": ("a.ts", "libx264", B_FRAMES, "joined", 60),
    "joined, H.264 without B-frames, ts": ("a.ts", "libx264", {"g": "12", "bf": "0"}, "joined", 60),
    "joined, MPEG-2, ts": ("a.ts", "mpeg2video", B_FRAMES, "joined", 60),
    "joined, MPEG-2, mpg": ("a.mpg", "mpeg2video", B_FRAMES, "joined", 60),
    "HEVC, open groups, mkv": ("a.mp4", "libx265", HEVC, ("b.mkv", 1, 0), 18),
    "HEVC, open groups, ts": ("a.mp4", "libx265", HEVC, ("b.ts", 1, 0), 18),
    "H.264, open groups, mkv": ("a.mkv", "libx264", OPEN, ("b.mkv", 1, 0), 18),
    "MPEG-2, open groups, ts": ("a.ts", "mpeg2video", B_FRAMES, ("b.ts", 1, 0), 18),
    "MPEG-2, open groups, mkv": ("a.ts", "mpeg2video", B_FRAMES, ("b.mkv", 1, 0), 18),
    "from the middle, ts": ("a.ts", "libx264", {"g": "12"}, ("b.ts", 0, 5), None),
    "from the middle, mkv": ("a.ts", "libx264", {"g": "12"}, ("b.mkv", 0, 5), None),
    "from the middle, mp4": ("a.ts", "libx264", {"g": "12"}, ("b.mp4", 0, 5), None),
    "AVI, one of ten dropped": ("a.avi", "mpeg4", {"g": "12"}, 10, 30),
    "AVI, every second dropped": ("a.avi", "mpeg4", {"g": "12"}, 1, 30),
    "AVI, MJPEG, two of twelve dropped": ("a.avi", "mjpeg", {}, 5, 30),
    "AVI, B-frames, one of ten dropped": ("a.avi", "mpeg4", B_FRAMES, 10, 30),
    "references that are not shown": ("a.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "10"}, None, 30),
    "a bare stream": ("a.h264", "libx264", B_FRAMES, None, 30),
    "AVI without times of presentation": ("a.avi", "libx264", B_FRAMES, None, 30),
}


@pytest.mark.parametrize("name", FILMS)
def test_films_that_are_whole(tmp_path, name):
    """From users' reports; joined recordings, cuts without encoding anew, and dropped frames."""
    first, codec, options, how, total = FILMS[name]
    times = dropped(30, how) if isinstance(how, int) else None
    if isinstance(how, tuple):
        options = {"sc_threshold": "0", **options} if codec == "libx264" else options
    file = clips.textured(tmp_path / first, 30, codec=codec, options=options, times=times)
    if how == "joined":
        file.write_bytes(2 * file.read_bytes())
    if isinstance(how, tuple):
        file = clips.copied(file, tmp_path / how[0], *how[1:])
    agrees(file, [(0, 1), (7, 1), (15, 4), (-1, 1)], total)


def test_two_frames_with_one_time_stamp(tmp_path):
    source = clips.textured(tmp_path / "a.mkv", 30, codec="mjpeg")
    agrees(clips.copied(source, tmp_path / "b.mkv", time=lambda pts: min(pts, 400)), [(0, 1), (12, 4)], 30)


@pytest.mark.parametrize("ending", ["mkv", "webm"])
def test_pieces_of_a_recording(tmp_path, ending):
    """Their time goes on from piece to piece. The header's duration counts from 0, or by other programs from their
    beginning. Half a piece is cut off."""
    codec, options = {"mkv": ("libx264", {"bf": "0"}), "webm": ("libvpx", REALTIME)}[ending]
    with av.open(f"{tmp_path}/%03d.{ending}", "w", format="segment", container_options={"segment_time": "4"}) as file:
        stream = file.add_stream(codec, rate=25, options={"g": "25"} | options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in range(250):
            frame = av.VideoFrame.from_ndarray(clips.texture(number, (48, 64)), format="rgb24")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    pieces = sorted(tmp_path.glob(f"*.{ending}"))
    assert len(pieces) == 3
    for piece in pieces:
        agrees(piece, [(0, 1), (20, 7)])
    whole, said = pieces[1].read_bytes(), pieces[1].read_bytes().index(b"\x44\x89\x88") + 3
    for milliseconds in (8000, 4000):
        whole = whole[:said] + struct.pack(">d", milliseconds) + whole[said + 8 :]
        pieces[1].write_bytes(whole)
        agrees(pieces[1], [(0, 1)])
        pieces[1].write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"cut off: .* of [34].. s, expected a complete video file"):
            read_clip(pieces[1], 16, stride=1, start=0)


def test_joined_recordings_whose_times_lie_between_each_other(tmp_path):
    """None is there twice, so that only times of decoding tell it."""
    one, other = (
        clips.textured(tmp_path / f"{late}.ts", 30, codec="libx264", options={"g": "12", "bf": "0"}, times=times)
        for late in (0, 20)
        for times in [[late + 40 * number for number in range(30)]]
    )
    one.write_bytes(one.read_bytes() + other.read_bytes())
    agrees(one, [(0, 1), (7, 1), (40, 4)], 60)


def test_an_index_that_lacks_a_picture(tmp_path):
    """After a seek the pictures of AVI are numbered by the file's index, so that their positions tell what is wrong."""
    file = clips.textured(tmp_path / "a.avi", 30, codec="mjpeg")
    data = bytearray(file.read_bytes())
    at = data.index(b"idx1") + 8
    assert data[at - 4 : at] == struct.pack("<I", 30 * 16) and at + 30 * 16 == len(data)
    data[at - 4 : at] = struct.pack("<I", 29 * 16)
    del data[at + 10 * 16 : at + 11 * 16]
    file.write_bytes(data)
    agrees(file, [(0, 1), (15, 1), (5, 7)], 30)


def test_pictures_without_a_position(tmp_path):
    """Of several pictures in a packet of MPEG-PS only the first has one, and after a seek times are guessed."""
    source = clips.textured(tmp_path / "a.mpg", 30, codec="mpeg1video", options={"g": "1"})
    file = clips.copied(source, tmp_path / "b.mpg", 0, 2)
    data = file.read_bytes()
    file.write_bytes(data[:2435] + data[1070:])  # a part is there twice: its times fit only when read from the start
    right, want = 0, clips.every_frame(file)
    for number, picture in enumerate(want):
        with contextlib.suppress(ValueError):
            assert np.array_equal(read_clip(file, 1, stride=1, start=number, size=None)[:, 0].permute(1, 2, 0), picture)
            right += 1
    assert right > 24


def test_sound_that_begins_in_the_middle(tmp_path):
    """Far enough from the end and late enough that FFmpeg finds it only on its way; PyAV ends then with IndexError."""
    film = clips.textured(tmp_path / "a.ts", 30, codec="libx264", options={"bf": "0"})
    want = np.stack(3 * clips.every_frame(film))
    loud, filler = tmp_path / "b.ts", 1500 * (b"\x47\x1f\xff\x10" + bytes(184))
    with av.open(str(film)) as old, av.open(str(loud), "w") as new:
        target, sound = new.add_stream_from_template(old.streams.video[0]), new.add_stream("mp2", rate=44100)
        for packet in (packet for packet in old.demux(video=0) if packet.size):
            packet.stream = target
            new.mux(packet)
        new.mux(clips.silence(sound))
    film.write_bytes(film.read_bytes() + loud.read_bytes() + filler + film.read_bytes())
    with pytest.raises(IndexError):
        clips.every_frame(film)
    assert np.array_equal(read_clip(film, 90, stride=1, start=0, size=None).permute(1, 2, 3, 0).numpy(), want)


def test_packets_that_hold_no_picture(tmp_path):
    """MPEG-4's "as before": 01 P-VOP, 0, 1, time 01010, 1, 0 not coded."""
    source = clips.textured(tmp_path / "a.mkv", 30, codec="mpeg4", options={"g": "12", "bf": "0"})
    with av.open(str(source)) as old, av.open(str(tmp_path / "b.mkv"), "w") as new:
        target = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            if number == 10:
                empty = av.Packet(b"\0\0\1\xb6\x55\x4f")
                empty.stream, empty.time_base = target, packet.time_base
                empty.pts = empty.dts = packet.pts - 20
                new.mux(empty)
            packet.stream = target
            new.mux(packet)
    agrees(tmp_path / "b.mkv", [(0, 1), (9, 1), (20, 4)], 30)


READ = """
import contextlib, sys, av, av.logging
av.logging.set_level(av.logging.ERROR)
from mar_fast import data
for k in range(60):
    with contextlib.suppress(ValueError):
        data.read_clip(sys.argv[1], 1, stride=1, start=k % 8)
"""


def test_every_read_ends_with_logging(tmp_path):
    """A decoder that is freed while its threads log waits for ever; this film leaves them at work in every read."""
    film = clips.textured(tmp_path / "a.mkv", 5, codec="libx265", options=HEVC)
    other = clips.textured(tmp_path / "b.mkv", 30, codec="ffv1")
    film.write_bytes(film.read_bytes() + other.read_bytes())  # no pictures of HEVC: each packet is an error
    arguments = [sys.executable, "-c", READ, str(film)]
    subprocess.run(arguments, check=True, timeout=30, stderr=subprocess.DEVNULL)


MEMORY = """
import resource, sys
from mar_fast import data
peaks = []
for file in sys.argv[1:]:
    data.read_clip(file, 16, stride=1, start=0)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""


def test_memory_does_not_grow_with_the_film(tmp_path):
    image = clips.texture(0, (240, 320))
    files = [clips.write(tmp_path / f"{n}.mkv", [image] * n, codec="rawvideo") for n in (50, 500)]
    done = subprocess.run([sys.executable, "-c", MEMORY, *files], capture_output=True, text=True, check=True)
    assert files[1].stat().st_size > 50e6 and int(done.stdout) * 1024 < 10e6


def test_names_that_look_like_something_else(tmp_path, monkeypatch):
    """FFmpeg takes what is before a colon for a protocol."""
    monkeypatch.chdir(tmp_path)
    one, other = (clips.textured(tmp_path / f"{n}.mp4", n, codec="libx264").read_bytes() for n in (5, 20))
    Path("one.mp4").write_bytes(one)  # what file:one.mp4 must not be taken for
    names = ["12:30:05", "clip:1", "http:x", "data:1", "concat:a|b", "file:one", "2024-05-01T10:00/clip", "-x", "кот"]
    for name in (f"{name}.mp4" for name in [*names, "plain name", "100%", "%03d"]):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(other)
        for written in (name, f"./{name}", Path(name)):
            with open_video(written) as film:
                assert film.total == 20


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.h264", "a.avi"])
def test_bytes_and_open_files(tmp_path, name):
    file = clips.textured(tmp_path / name, 30, codec="libx264", options=B_FRAMES)
    want = read_clip(file, 4, start=9, size=None)
    with file.open("rb") as opened:
        opened.read(100)  # wherever it stands
        assert read_clip(opened, 4, start=9, size=None).equal(want)
        assert not opened.closed
    assert read_clip(file.read_bytes(), 4, start=9, size=None).equal(want)
    with pytest.raises(ValueError, match=r"path: got 'an open file' .*expected a file that FFmpeg can decode"):
        read_clip(b"not a video")
    for wrong in (7, file.open(encoding="latin1")):
        with pytest.raises(TypeError, match=r"path: got .*expected a path, bytes, or a binary file"):
            read_clip(wrong)


def test_folders_of_pictures(tmp_path):
    """In the natural order of their names, as many as there are, jpg and png."""
    images = [clips.texture(number, (48, 64)) for number in range(12)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"img_{number}.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    got = read_clip(tmp_path, 12, stride=1, size=None).permute(1, 2, 3, 0).numpy()
    assert np.array_equal(got, np.stack(images))
    assert read_views(str(tmp_path), 4, clips=2, crops=3, stride=3, size=(32, 32)).shape == (6, 3, 4, 32, 32)
    with pytest.raises(ValueError, match="path: got a video of 12 frames, expected at least 61"):
        read_clip(tmp_path)
    whole = (tmp_path / "img_3.PNG").read_bytes()
    for content in (b"", b"no picture", whole[:70]):
        (tmp_path / "img_3.PNG").write_bytes(content)
        with pytest.raises(ValueError, match=r"path: got .*img_3.PNG.*expected a "):
            read_clip(tmp_path, 12, stride=1)
    for name in ("flow_1.jpg", "flow_2.jpg"):
        Image.fromarray(images[0]).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"several series of pictures, flow_\*.jpg, img_\*.PNG, expected a folder"):
        read_clip(tmp_path)


def test_a_cover_is_no_film(tmp_path):
    """A picture in a file of sound is another thing than a film of one frame."""
    with av.open(str(tmp_path / "song.mp3"), "w") as file:
        sound, cover = file.add_stream("libmp3lame", rate=44100), file.add_stream("mjpeg", rate=25)
        cover.height, cover.width, cover.pix_fmt = 48, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        file.mux(cover.encode(av.VideoFrame.from_ndarray(clips.texture(0, (48, 64)), format="rgb24")))
        file.mux(clips.silence(sound))
    with pytest.raises(ValueError, match=r"path: got .*song.mp3' without a video stream, expected a video file"):
        read_clip(tmp_path / "song.mp3", 1)


def test_pictures_that_change_their_size(tmp_path):
    small, large = (clips.textured(tmp_path / f"{h}.ts", 30, (h, 64), codec="mpeg2video") for h in (48, 64))
    small.write_bytes(small.read_bytes() + large.read_bytes())
    assert read_clip(small, 58, stride=1, start=0, size=(32, 32)).shape == (3, 58, 32, 32)
    with pytest.raises(ValueError, match=r"path: got .*48.ts' with pictures of .48, 64. and .64, 64. pixels, expected"):
        read_clip(small, 58, stride=1, start=0, size=None)
