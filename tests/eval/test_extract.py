"""Extraction against window-by-window evaluation by the plain reference in float64; its files, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("av")

import clips
import numpy as np
import safetensors
import safetensors.torch
import torch
from helpers import plain, relative, small_config
from PIL import Image

import mar_fast
from mar_fast import machine
from mar_fast.data.windows import Sliding, Window
from mar_fast.eval import extract, feature_files
from mar_fast.eval.extraction import Extractor

SIZE = (64, 64)


def model(**overrides):
    torch.manual_seed(0)
    small = small_config(**{"classifier": None, "decoder_depth": 0, "depth": 3, "mask_ratio": 0.0, **overrides})
    return mar_fast.MAR(small).eval()


def reference_features(fast, images, kept):
    """Tokens after each block, (N, D) float64, of one window of T pictures; ``kept`` are the visible tokens."""
    oracle = plain(fast)
    mean, std = (
        torch.tensor(value, dtype=torch.float64).view(3, 1, 1, 1) for value in (fast.config.mean, fast.config.std)
    )
    clip = (torch.from_numpy(np.stack(images)).permute(3, 0, 1, 2).double() / 255 - mean) / std
    masked = torch.ones(1, fast.config.num_tokens, dtype=torch.bool)
    masked[0, kept] = False
    after = []
    for block in oracle.encoder.blocks:
        block.register_forward_hook(lambda block, inputs, output: after.append(output[0]))
    with torch.no_grad():
        last = oracle.encoder(clip[None], masked)[0]
    return [*after[:-1], last]


def running(config, share, phase=0):
    """Visible tokens of the test form, by the paper's formula: cells of 2 x 2, of which a run of slots moves."""
    frames, height, width = config.grid
    count = round((1 - share) * 4)
    tokens = [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]
    return [i for i, (t, y, x) in enumerate(tokens) if (2 * (y % 2) + x % 2 - t - phase) % 4 >= count]


# What is taken of each window: options, and what they mean for the tokens of the reference.
MASKS = {
    "dense": ({}, [1.0], [0]),
    "50 %": (dict(keep=0.5), [0.5], [0]),
    "75 % masked": (dict(keep=0.25), [0.25], [0]),
    "50 %, complementary": (dict(keep=0.5, complementary=True), [0.5, 0.5], [0, 2]),
    "75 % kept, complementary": (dict(keep=0.75, complementary=True), [0.75] * 4, [0, 1, 2, 3]),
}
TIMES = [0, 40, 80, 90, 100, 400, 410, 420, 900]
FILMS = {
    "long": (33, None, dict(stride=2, frame_stride=3)),
    "dropped end": (33, None, dict(stride=5, frame_stride=3, tail="drop")),
    "shorter than a window": (5, None, dict(stride=2, frame_stride=3)),
    "variable rate": (9, TIMES, dict(stride=1, frame_stride=2)),
    "variable rate, in seconds": (9, TIMES, dict(stride=3, frame_stride=2, fps=12.5)),
}


@pytest.mark.parametrize(("film", "masks"), [(film, "50 %") for film in FILMS] + [("long", masks) for masks in MASKS])
def test_window_by_window(tmp_path, film, masks):
    """All samplings and ends of films; all masks; several layers; in batches that windows do not fill."""
    total, times, sampling = FILMS[film]
    how, shares, phases = MASKS[masks]
    fast = model()
    path = clips.textured(tmp_path / "a.mkv", total, SIZE, times=times)
    images, samples = clips.every_frame(path), range(total)
    if "fps" in sampling:
        samples = clips.shown_at([Fraction(time, 1000) for time in times], sampling["fps"])
    want = clips.sliding(samples, Sliding(4, **sampling))
    seen = [running(fast.config, share, phase) for share, phase in zip(shares, phases, strict=True)]
    options = dict(batch=4, layers=(1, 3), **sampling, **how)
    pooled, every = (list(extract(fast, path, pooled=pooled, **options)) for pooled in (True, False))
    frames = [(numbers[0], numbers[-1]) for numbers in want]
    assert [w.frames for w in pooled] == [w.frames for w in every] == frames and want
    for row in {0, len(want) - 1}:
        layers = [reference_features(fast, [images[number] for number in want[row]], kept) for kept in seen]
        for layer in (1, 3):
            tokens = [after[layer - 1] for after in layers]
            at = [dict(zip(kept, part, strict=True)) for kept, part in zip(seen, tokens, strict=True)]
            by_token = [torch.stack([part[n] for part in at if n in part]).mean(0) for n in sorted(set().union(*at))]
            mean = torch.stack([part.mean(0) for part in tokens]).mean(0)
            for found, value in ((pooled[row], mean), (every[row], torch.stack(by_token))):
                got = found.layers[layer]
                assert set(found.layers) == {1, 3} and got.dtype == torch.float32 and got.shape == value.shape
                assert relative(got, value) < 1e-6


def test_the_last_layer_is_what_the_model_gives():
    """With the norm, and without one, in every dtype; blocks after the last wanted one are not run."""
    windows = [Window(n, (0, 3), None, [clips.texture(4 * n + i, SIZE) for i in range(4)]) for n in range(2)]
    video = torch.from_numpy(np.stack([np.stack(window.pictures) for window in windows])).permute(0, 4, 1, 2, 3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for overrides in ({}, dict(final_norm=not small_config().final_norm), dict(mask_ratio=0.5)):
            fast = model(**overrides).to(dtype)
            found = Extractor(fast, pooled=False, batch=2)(windows)[3]
            with torch.inference_mode():
                assert torch.equal(found, fast(video).features) and found.dtype == dtype
    ran = []
    fast.encoder.blocks[1].register_forward_hook(lambda *_: ran.append(1))
    Extractor(fast, layers=[1], batch=2)(windows)
    assert not ran


# Not with interpreted kernels, whose products are numpy's: their bits depend on the position.
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("dtype", "threads", "batch"), [(torch.float32, 1, 8), (torch.float32, 2, 3), (torch.bfloat16, 1, 5)]
)
def test_neighbours_and_position_in_a_batch_do_not_matter(device, dtype, threads, batch):
    """The same bits for a window in every position, with any neighbours, of which some are padding."""
    pixels = np.random.default_rng(0).integers(256, size=(batch + 1, 4, *SIZE, 3), dtype=np.uint8)
    windows = [Window(number, (0, 3), None, list(pictures)) for number, pictures in enumerate(pixels)]
    made = model(depth=2).to(device, dtype)
    take = Extractor(made, keep=0.5, layers=(1, 2), pooled=False, batch=batch)
    with machine.threads(threads):
        alone = [take([window]) for window in windows]
        for first in range(batch + 1):
            turned = [windows[(first + n) % (batch + 1)] for n in range(batch - first % 2)]
            for layer, rows in take(turned).items():
                for row, window in zip(rows, turned, strict=True):
                    assert torch.equal(row, alone[window.number][layer][0])


def test_other_batches_within_rounding(tmp_path):
    path = clips.textured(tmp_path / "a.mkv", 40, SIZE)
    fast = model(mask_ratio=0.5)
    results = [torch.stack([w.layers[3] for w in extract(fast, path, batch=batch)]) for batch in (1, 2, 7, 16)]
    for other in results[1:]:
        assert relative(other, results[0]) < 1e-6


def test_streams_and_open_files(tmp_path):
    path = clips.textured(tmp_path / "a.mkv", 23, SIZE)
    fast = model()
    want = [window.layers[3] for window in extract(fast, path, batch=4)]
    with path.open("rb") as file:
        for video in (path.read_bytes(), file, str(path), iter(clips.every_frame(path))):
            found = [window.layers[3] for window in extract(fast, video, batch=4)]
            assert len(found) == len(want) and all(map(torch.equal, found, want))
    begun = extract(fast, path, batch=1)
    next(begun)
    begun.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layers=[0]), r"layers: got \[0\], expected different numbers of blocks, 1 to 3"),
        (dict(layers=[4]), "layers: got"),
        (dict(layers=[1, 1]), "layers: got"),
        (dict(layers=[]), "layers: got"),
        (dict(keep=0.3), "keep: got 0.3, a share of visible tokens that is not allowed. ratio: got 0.7"),
        (dict(keep=0), "keep: got 0, expected a share above 0"),
        (dict(complementary=True), "complementary: got True, expected False, where every token is visible"),
        (dict(batch=0), "batch: got 0"),
        (dict(stride=0), "stride: got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        extract(model(), "a.mp4", **options)


def test_bad_videos(tmp_path):
    with pytest.raises(ValueError, match="model: got one in training mode"):
        extract(model().train(), "a.mp4")
    with pytest.raises(FileNotFoundError, match=r"path: got 'a.mp4', expected an existing"):
        list(extract(model(), "a.mp4"))
    short = clips.textured(tmp_path / "a.mkv", 9, SIZE)
    with pytest.raises(ValueError, match="a video of 9 frames, expected at least 13"):
        list(extract(model(), short, tail="drop"))


# Files. The films are small; the model has random weights by seed, the same in another process.


SLIDING = Sliding(4, 3, 2)


def job(films, out, *, workers=2, batch=4, form="safetensors", settings=None, force=False, on_batch=None, **options):
    """Extract what is not finished yet: the outcome and the names that were left."""
    torch.manual_seed(0)
    extractor = Extractor(model(), batch=batch, **options)
    settings = settings or {"sliding": asdict(SLIDING)}
    planned = feature_files.plan_films(films, Path(out).parent, Path(out), form)
    left = feature_files.unfinished(planned, settings, force=force)
    more = {} if on_batch is None else {"on_batch": on_batch}
    content = {"settings": settings}
    done = feature_files.extract_films(extractor, left, SLIDING, content, workers=workers, **more)
    return done, [film.name for film in left]


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Nine films of one to 40 frames, in folders, one of them of pictures."""
    root = tmp_path_factory.mktemp("films")
    found = []
    for number, frames in enumerate((1, 40, 7, 23, 8, 2, 31, 9)):
        path = root / f"part{number % 3}" / f"film {number}.mkv"
        path.parent.mkdir(exist_ok=True)
        found.append(clips.textured(path, frames, SIZE))
    pictures = root / "v1.5"
    pictures.mkdir()
    for number in range(11):
        Image.fromarray(clips.texture(number, SIZE)).save(pictures / f"{number}.png")
    return [*found, pictures]


@pytest.mark.parametrize(("form", "pooled"), [("safetensors", True), ("safetensors", False), ("npy", True)])
def test_files(films, tmp_path, pooled, form):
    """What other readers of these formats find is what the generator gives; times and settings are beside it."""
    layers = (3,) if form == "npy" else (1, 3)
    out = films[0].parent.parent / f"out-{form}-{pooled}"
    done, _ = job(films, out, layers=layers, pooled=pooled, keep=0.5, form=form)
    assert (done.finished, done.broken, done.films) == (9, {}, 9)
    root, windows = films[0].parent.parent, 0
    for path in films:
        stem = out / path.relative_to(root)
        stem = stem if path.is_dir() else stem.with_suffix("")
        want = list(extract(model(), path, stride=3, frame_stride=2, layers=layers, pooled=pooled, keep=0.5, batch=4))
        windows += len(want)
        if form == "npy":
            found = {"layer.3": torch.from_numpy(np.load(f"{stem}.npy"))}
        else:
            found = safetensors.torch.load_file(f"{stem}.safetensors")
        assert set(found) == {f"layer.{layer}" for layer in layers}
        for layer in layers:
            assert torch.equal(found[f"layer.{layer}"], torch.stack([window.layers[layer] for window in want]))
        about = json.loads(Path(f"{stem}.json").read_text())
        assert about["video"] == path.relative_to(root).as_posix() and about["windows"] == len(want)
        assert about["frames"] == [list(window.frames) for window in want]
        assert about["seconds"] == ([] if path.is_dir() else [list(window.seconds) for window in want])
    assert done.windows == windows and 0 < done.model_seconds < done.seconds and done.bound in ("data", "compute")
    assert not [name for name in listing(out) if Path(name).name.startswith(".")] and len(listing(out)) == 18


def test_tokens_in_16_bits(films, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        out = tmp_path / str(dtype)
        extractor = Extractor(model().to(dtype), pooled=False, batch=3)
        planned = feature_files.plan_films(films[1:2], None, out, "safetensors")
        feature_files.extract_films(extractor, planned, SLIDING, {})
        found = safetensors.torch.load_file(out / "film 1.safetensors")["layer.3"]
        want = list(extract(model().to(dtype), films[1], stride=3, frame_stride=2, pooled=False, batch=3))
        assert found.dtype == dtype and torch.equal(found, torch.stack([window.layers[3] for window in want]))


def test_readers_do_not_change_bits(films, tmp_path):
    """One reader or three, in another order of films: every file is the same."""
    results = []
    for workers, order in ((1, 1), (3, 1), (3, -1)):
        out = films[0].parent.parent / f"out-{workers}{order}"
        job(films[::order], out, workers=workers, keep=0.5)
        results.append(listing(out))
    assert results[0] == results[1] == results[2]


BEGIN = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
del sys.argv[1:3]
import torch
torch.ones(8).sqrt()
torch.set_num_threads(1)
from pathlib import Path
import test_extract
from mar_fast import machine
"""


def in_a_process(code, *arguments):
    folders = [Path(__file__).parent, Path(__file__).parent.parent]
    command = [sys.executable, "-c", BEGIN + code, *map(str, (*folders, *arguments))]
    return subprocess.run(command, capture_output=True, text=True)


KILLED = """
def on_batch(so_far):
    if so_far.finished >= int(sys.argv[2]):  # two may finish in one batch
        os.kill(os.getpid(), signal.SIGKILL)

test_extract.job([*map(Path, sys.argv[3:])], sys.argv[1], workers=3, keep=0.5, on_batch=on_batch)
"""


def test_killed_and_continued(films, tmp_path):
    """SIGKILL in the middle of films: what has its name is whole, and the rest is done with the same bits."""
    root = films[0].parent.parent
    job(films, root / "whole", keep=0.5)
    want = listing(root / "whole")
    out = root / "killed"
    ended = in_a_process(KILLED, out, 3, *films)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    there = listing(out)
    finished = {name: content for name, content in there.items() if not Path(name).name.startswith(".")}
    assert len(finished) >= 6 and all(want[name] == content for name, content in finished.items())
    assert len(there) > len(finished)  # it was killed while it wrote
    done, left = job(films, out, workers=1, keep=0.5)
    assert done.finished == len(left) == 9 - len(finished) // 2
    assert listing(out) == want
    assert job(films, out, keep=0.5)[1] == []


def test_what_is_continued_and_what_is_refused(films, tmp_path):
    root = films[0].parent.parent
    out = root / "again"
    job(films[:2], out)
    before = listing(out)
    features, about = out / "part0/film 0.safetensors", out / "part0/film 0.json"
    features.unlink()  # killed between the two files
    assert job(films[:2], out)[1] == ["part0/film 0.mkv"] and listing(out) == before
    with pytest.raises(FileExistsError, match=r"0.json: got results of other settings \(sliding .*, now None; x No"):
        job(films[:2], out, settings={"x": 1})
    about.write_text("[]")
    with pytest.raises(FileExistsError, match=r"0.json: got another kind of file, expected results of mar-fast ext"):
        job(films[:2], out)
    about.unlink()
    with pytest.raises(FileExistsError, match=r"film 0.safetensors: already exists, expected a new file"):
        job(films[:2], out)
    assert job(films[:2], out, force=True)[0].finished == 2 and listing(out) == before


def test_clashes(films, tmp_path):
    other = films[0].with_suffix(".avi")
    for paths, root, message in (
        ([films[0], other], None, r"videos: got .*film 0.mkv' and .*film 0.avi', which would both be '.*film 0.npy'"),
        ([films[0], films[0]], None, "which would both be"),
        ([films[0]], films[1].parent, r"root: got '.*part1', without '.*film 0.mkv', expected a folder that all"),
    ):
        with pytest.raises(ValueError, match=message):
            feature_files.plan_films(paths, root, tmp_path, "npy")
    (tmp_path / "part0").touch()
    planned = feature_files.plan_films(films[:1], films[0].parent.parent, tmp_path, "npy")
    with pytest.raises(NotADirectoryError, match="part0 is a file, expected a folder"):
        feature_files.unfinished(planned, {})
    with pytest.raises(ValueError, match="workers: got 0"):
        feature_files.extract_films(Extractor(model()), planned, SLIDING, {}, workers=0)


def test_broken_films(tmp_path):
    """5 % of a list are broken, in three ways, some of them late: the others have the bits that they have alone."""
    count = int(os.environ.get("MAR_FAST_FILMS_LISTED", "40"))
    whole = clips.textured(tmp_path / "whole.mkv", 60, SIZE, codec="mjpeg").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) * 3 // 4 : len(whole) * 3 // 4 + 4000] = bytes(4000)
    broken = {
        number: (b"no video", whole[: len(whole) // 2], bytes(damaged))[number // 20 % 3]
        for number in range(5, count, 20)
    }
    films = [tmp_path / f"{number}.mkv" for number in range(count)]
    for number, film in enumerate(films):
        if number in broken:
            film.write_bytes(broken[number])
        else:
            clips.textured(film, 2 + number % 9, SIZE)
    done, _ = job(films, tmp_path / "out", workers=3)
    assert set(done.broken) == {f"{number}.mkv" for number in broken} and done.finished == count - len(broken)
    assert all(reason.startswith("path: got ") for reason in done.broken.values())
    good = sorted(set(range(count)) - set(broken))
    assert set(listing(tmp_path / "out")) == {f"{n}.{form}" for n in good for form in ("json", "safetensors")}
    clips.textured(films[5], 6, SIZE)  # copied again
    done, left = job(films, tmp_path / "out")
    assert left == [f"{number}.mkv" for number in broken] and done.finished == 1
    job([films[number] for number in sorted([5, *good])], tmp_path / "alone", workers=1)
    assert listing(tmp_path / "alone") == listing(tmp_path / "out")


LONG = """
class Extractor(test_extract.Extractor):  # no model, but rows so wide that those of the long film are 400 MB
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.row_shape = (int(sys.argv[1]), 1)

    def compute(self, count, pictures, shown):
        return {layer: torch.full((count, *self.row_shape), 1.5) for layer in self.layers}

test_extract.Extractor = Extractor
for film in [sys.argv[2], *sys.argv[2:4]]:
    run = lambda: test_extract.job([Path(film)], sys.argv[4], workers=1, layers=(1, 3), pooled=False, force=True)
    print(machine.peak_memory(run, torch.device("cpu")))
"""


def test_memory_does_not_grow_with_the_film(tmp_path):
    """A film of a minute, or of an hour with MAR_FAST_FILM_SECONDS=3600, of which 400 MB are written."""
    seconds = int(os.environ.get("MAR_FAST_FILM_SECONDS", "60"))
    group = [clips.texture(number, (32, 32)) for number in range(250)]
    films = [clips.write(tmp_path / f"{time}.mp4", group * (time // 10), codec="libx264") for time in (10, seconds)]
    ended = in_a_process(LONG, 400_000_000 * 3 // (seconds * 25 * 2 * 4), *films, tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    written = (tmp_path / f"out/{seconds}.safetensors").stat().st_size
    _, short, long = map(int, ended.stdout.split())
    print(f"{seconds} s of film: {written / 1e6:.0f} MB written in {long / 1e6:.0f} MB; 10 s in {short / 1e6:.0f} MB")
    assert written > 390e6 and long - short < 120e6
