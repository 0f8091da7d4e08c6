"""Training clips from lists: which frames, the same ones every time, broken videos, batches of ranks, the loader."""

import multiprocessing
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("av")
pytest.importorskip("PIL")

import clips
import numpy as np
import torch
from PIL import Image
from torch.utils.data import dataloader

from mar_fast.data.annotations import Sample, read_annotations
from mar_fast.train.dataset import ClipDataset, Key, add_broken, collate, draw_frames
from mar_fast.train.loader import StepSampler, _start_worker, batches, make_loader
from mar_fast.train.recipe import Augment, Data, Mask, Recipe

PLAIN = Augment(flip=0, crop="center")
STRONG = Augment(rand_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", erase=0.5)
LENGTHS = {"a.mkv": 40, "b.mkv": 30, "c.mkv": 7, "pictures": 24}  # c is too short for a clip of 4 frames at stride 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three films of 32 x 32 without loss and a folder of pictures, one class each, and a list of them."""
    root = tmp_path_factory.mktemp("films")
    for shift, (name, frames) in enumerate(LENGTHS.items()):
        if name == "pictures":
            (root / name).mkdir()
            for number in range(frames):
                Image.fromarray(clips.texture(number + 50 * shift, (32, 32))).save(root / name / f"{number}.png")
        else:
            clips.write(root / name, [clips.texture(number + 50 * shift, (32, 32)) for number in range(frames)])
    lines = [f"{name} {label}\n" for label, name in enumerate(LENGTHS)]
    (root / "train.txt").write_text("".join(lines))
    (root / "broken.mkv").write_bytes((root / "a.mkv").read_bytes()[:3000])
    return root


def recipe(augment=PLAIN, classes=4, **data):
    model = dict(name="mar_vit_base", num_frames=4, image_size=(32, 32), num_classes=classes)
    return Recipe(model=model, augment=augment, data=Data(batch=4, **data), seed=3)


def dataset(folder, augment=PLAIN, training=True, **data):
    return ClipDataset(read_annotations(folder / "train.txt").samples, recipe(augment, **data), training=training)


def numbers(clip, shift):
    """The numbers of the frames of a clip, (T, H, W, C), that nothing was done to."""
    known = {clips.texture(number + 50 * shift, (32, 32)).tobytes(): number for number in range(50)}
    return [known[frame.tobytes()] for frame in clip]


@pytest.mark.parametrize("index", range(4))
def test_frames_at_stride_from_anywhere(folder, index):
    total = list(LENGTHS.values())[index]
    data, starts = dataset(folder), set()
    for epoch in range(60 if index == 2 else 90):
        item = data[Key(index, epoch)]
        assert (
            item.video.shape == (1, 4, 32, 32, 3) and (item.label, item.video_index) == (index, index) and item.counts
        )
        found = numbers(item.video[0], index)
        assert found == [min(found[0] + 4 * i, total - 1) for i in range(4)]
        starts.add(found[0])
    spare = max(total - 13, 0)
    assert {0, spare} <= starts and starts <= set(range(spare + 1)) and len(starts) > 0.7 * spare


def test_frames_of_segments(folder):
    data = dataset(folder, sampling="uniform")
    found = np.array([numbers(data[Key(0, epoch)].video[0], 0) for epoch in range(150)])
    for segment in range(4):
        counts = Counter(found[:, segment].tolist())
        assert set(counts) == set(range(10 * segment, 10 * segment + 10)) and max(counts.values()) < 35
    assert abs(np.corrcoef(found.T) - np.eye(4)).max() < 0.3  # drawn one by one
    short = numbers(data[Key(2, 0)].video[0], 2)
    assert short == sorted(short) and all(7 * i // 4 <= number <= 7 * (i + 1) / 4 for i, number in enumerate(short))


@pytest.mark.parametrize(("fps", "step"), [(0.0, 2.0), (25.0, 2.0), (50.0, 1.0), (10.0, 5.0), (20.0, 2.5)])
def test_strides_in_time(folder, fps, step):
    data = dataset(folder, fps=fps, stride=2)  # films have 25 frames a second
    for epoch in range(5):
        found = numbers(data[Key(0, epoch)].video[0], 0)
        assert found == [found[0] + int(i * step) for i in range(4)]
        pictures = numbers(data[Key(3, epoch)].video[0], 3)  # these have no times
        assert pictures == [pictures[0] + 2 * i for i in range(4)]


@pytest.mark.parametrize(("total", "expected"), [(40, [13, 17, 21, 25]), (13, [0, 4, 8, 12]), (6, [0, 4, 5, 5])])
def test_the_middle_in_validation(total, expected):
    assert draw_frames(total, 4, "stride", 4, None) == expected
    assert draw_frames(total, 4, "uniform", 4, None) == [(2 * i + 1) * total // 8 for i in range(4)]


def test_validation_has_no_draws(folder):
    data = dataset(folder, STRONG, training=False, repeats=3)
    item = data[Key(0, 5)]
    assert numbers(item.video[0], 0) == [13, 17, 21, 25] and item.video.shape[0] == 1
    assert item.boxes == [(0, 0, 0, 0)] and (data[Key(0, 6)].video == item.video).all()


@pytest.mark.parametrize("repeat", ["resample", "reaugment"])
def test_repeats(folder, repeat):
    plain = dataset(folder, repeats=3, repeat=repeat)
    starts = [[numbers(clip, 0)[0] for clip in plain[Key(0, epoch)].video] for epoch in range(8)]
    assert (max(len(set(found)) for found in starts) > 1) == (repeat == "resample")
    assert len({found[0] for found in starts}) > 3
    strong = dataset(folder, replace(STRONG, flip=0.5), repeats=3, repeat=repeat)[Key(0, 0)]
    assert strong.video.shape == (3, 4, 32, 32, 3)
    assert len({clip.tobytes() for clip in strong.video}) == 3


def test_large_films_are_resized_and_crops_are_not(tmp_path):
    frames = clips.every_frame(clips.textured(tmp_path / "large.mkv", 14, (90, 160)), (46, 82))
    data = ClipDataset([Sample("large", tmp_path / "large.mkv", 0, "")], recipe(PLAIN, 1))
    for epoch in range(4):
        got = data[Key(0, epoch)].video[0, 0].astype(int)
        begins = (Image.fromarray(frame[:, 18:64]).resize((32, 32), Image.Resampling.BILINEAR) for frame in frames[:2])
        assert min(np.abs(got - np.asarray(begin)).max() for begin in begins) <= 1


def run(data, workers, rank=0, world=1, epoch=0, start=0):
    sampler = StepSampler(4, 4, accumulate=4 // world // 2, seed=3, rank=rank, world=world)
    sampler.set_epoch(epoch, start)
    return list(batches(make_loader(data, sampler, workers=workers)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
def test_the_same_clips_whatever_reads_them(folder):
    data = dataset(folder, STRONG, repeats=2)
    state = torch.get_rng_state()
    alone = run(data, 0)
    assert torch.equal(torch.get_rng_state(), state)  # the run's own draws go on as if nothing had been read
    assert [batch.video_index.tolist() for batch in alone] == [[i, i, j, j] for i, j in np.reshape(order(0), (2, 2))]
    torch.manual_seed(99), np.random.seed(99)
    for workers in (1, 3):
        for one, other in zip(alone, run(data, workers), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:5], other[:5], strict=True))
    ranks = [run(data, 0, rank, 2) for rank in range(2)]
    joined = {int(i): batch.video[n] for batch in alone for n, i in enumerate(batch.video_index) if n % 2 == 0}
    for (batch,) in ranks:
        for n in (0, 2):
            assert torch.equal(batch.video[n], joined.pop(int(batch.video_index[n])))
    assert not joined
    later = run(data, 0, epoch=1)
    assert not any(torch.equal(one.video, other.video) for one, other in zip(alone, later, strict=True))


def order(epoch):
    return np.random.default_rng([3, epoch]).permutation(4)


def test_batches_are_channels_last_uint8(folder):
    data = dataset(folder, STRONG, repeats=2)
    batch = collate([data[Key(index)] for index in (2, 0)])
    assert batch.video.dtype == torch.uint8 and batch.video.shape == (4, 3, 4, 32, 32)
    assert batch.video.permute(0, 2, 3, 4, 1).is_contiguous()
    assert batch.labels.tolist() == batch.video_index.tolist() == [2, 2, 0, 0] and batch.counts.all()
    assert batch.boxes.shape == (4, 4) and batch.boxes.dtype == torch.int64 and batch.broken == {}


def samples_with_broken(folder, good=3, bad=1):
    files = [folder / "a.mkv", folder / "b.mkv", folder / "c.mkv"][:good] + [folder / "broken.mkv"] * bad
    return [Sample(f"{n}", file, n % 2, "") for n, file in enumerate(files)]


def test_broken_videos_are_replaced_by_others(folder):
    data = ClipDataset(samples_with_broken(folder), recipe(classes=2, repeats=2))
    found = Counter()
    for epoch in range(40):
        item = data[Key(3, epoch)]
        assert item.video_index != 3 and item.label == item.video_index % 2 and item.counts and item.video.shape[0] == 2
        ((path, error),) = item.broken.items()
        assert Path(path).name == "broken.mkv" and "cut off" in error
        again = data[Key(3, epoch)]
        assert (again.video_index, again.broken) == (item.video_index, item.broken)
        assert (again.video == item.video).all()
        found[item.video_index] += 1
    assert set(found) == {0, 1, 2}
    black = ClipDataset(samples_with_broken(folder), recipe(classes=2), training=False)[Key(3)]
    assert (black.video_index, black.label, black.counts, len(black.broken)) == (3, 1, False, 1)
    assert not black.video.any()


def test_too_many_broken_videos_end_the_run(folder, tmp_path):
    known = {}
    assert add_broken(known, {"a": "x", "b": "y"}, 100, 0.02) == known == {"a": "x", "b": "y"}
    assert add_broken(known, {"b": "z"}, 100, 0.02) == {}
    message = r"list: got 3 unreadable videos of 100.*c \(z\), expected at most 2.00% of them"
    with pytest.raises(ValueError, match=message):
        add_broken(known, {"c": "z"}, 100, 0.02)
    assert known == {"a": "x", "b": "y", "c": "z"}
    with pytest.raises(ValueError, match="got 1 unreadable videos of 10"):
        add_broken({}, {"a": "x"}, 10, 0.0)
    data = ClipDataset(samples_with_broken(folder, 0, 2), recipe(classes=2))
    with pytest.raises(ValueError, match=r"list: got 10 unreadable videos one after the other, .*broken.mkv.*cut off"):
        data[Key(0)]


def test_lists_that_do_not_fit(folder):
    samples = read_annotations(folder / "train.txt").samples
    cases = [
        ([], recipe(), "list: got no video, expected at least one"),
        (samples, recipe(classes=3), "train.txt, line 4: got label 3, expected 0 to 2, as the model has"),
        (samples[:2], recipe(), "list: got no video of 2 of 4 classes, the first 2, expected videos of every class"),
        ([replace(s, path=Path("/gone")) for s in samples], recipe(), "root: got a folder with none of the 4 videos"),
    ]
    for listed, wanted, message in cases:
        with pytest.raises(ValueError, match=message):
            ClipDataset(listed, wanted)
    ClipDataset(samples[:2], recipe(), training=False)
    model = {**recipe().model, "classifier": None, "num_classes": 1}
    pretrain = replace(recipe(), task="pretrain", model=model, mask=Mask(kind="tube", ratio=0.5))
    assert len(ClipDataset(samples[:2], pretrain)) == 2  # labels do not matter


def test_pictures_of_several_sizes(tmp_path):
    for number, side in enumerate((32, 40)):
        Image.fromarray(clips.texture(0, (side, side))).save(tmp_path / f"{number}.png")
    item = ClipDataset([Sample("x", tmp_path, 0, "")], recipe(classes=1), training=False)[Key(0)]
    assert item.counts  # resized, then cropped
    with pytest.raises(ValueError, match=r"pictures of \(32, 32, 3\) and \(40, 40, 3\)"):
        ClipDataset([Sample("x", tmp_path, 0, "")], recipe(classes=1))[Key(0)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_of_ranks(world, accumulate):
    arguments = dict(accumulate=accumulate, seed=5, world=world)
    ranks = [list(StepSampler(30, 8, rank=rank, **arguments)) for rank in range(world)]
    assert {len(batch) for mine in ranks for batch in mine} == {8 // world // accumulate}
    assert {len(mine) for mine in ranks} == {3 * accumulate}
    expected = np.random.default_rng([5, 0]).permutation(30)
    for step in range(3):
        taken = [
            [key.video_index for batch in mine[step * accumulate :][:accumulate] for key in batch] for mine in ranks
        ]
        assert [i for group in zip(*taken, strict=True) for i in group] == expected[8 * step : 8 * step + 8].tolist()
    resumed = StepSampler(30, 8, rank=world - 1, **arguments)
    resumed.set_epoch(0, start=2)
    assert list(resumed) == ranks[-1][2 * accumulate :] and len(resumed) == accumulate
    resumed.set_epoch(1)
    assert list(resumed) != ranks[-1] and {key.epoch for batch in resumed for key in batch} == {1}


@pytest.mark.parametrize("world", [1, 2])
def test_validation_counts_each_video_once(world):
    ranks = [list(StepSampler(10, 4, rank=rank, world=world, training=False)) for rank in range(world)]
    assert {len(batch) for mine in ranks for batch in mine} == {4 // world} and len(ranks[0]) == 3
    keys = [key for mine in ranks for batch in mine for key in batch]
    assert sorted(key.video_index for key in keys if key.counts) == list(range(10))
    assert [key.video_index for key in keys if not key.counts] == [9, 9]


@pytest.mark.parametrize(
    ("videos", "options", "message"),
    [
        (3, {}, r"list: got 3 videos, expected at least 4, those of a step \(--set data.batch\)"),
        (9, dict(world=3), "data.batch: got 4, expected a multiple of 3 processes x 1 batches a step"),
        (9, dict(accumulate=3), "data.batch: got 4, expected a multiple of 1 processes x 3"),
        (9, dict(rank=2, world=2), "rank: got 2, expected 0 to 1"),
        (0, dict(training=False), "list: got 0 videos"),
    ],
)
def test_steps_that_do_not_fit(videos, options, message):
    with pytest.raises(ValueError, match=message):
        StepSampler(videos, 4, **options)


def test_steps_beyond_the_epoch():
    with pytest.raises(ValueError, match="start: got 3, expected a step from 0 to 2"):
        StepSampler(8, 4).set_epoch(0, 3)


def test_workers_that_die_and_errors_in_workers(folder, monkeypatch):
    wait = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(wait, "__defaults__", (0.2,))  # seconds between looks at the workers
    sampler = StepSampler(4, 1)
    dying = make_loader(dataset(folder), sampler, workers=1)
    dying.prefetch_factor = 1  # or all batches may have been read before the first is given
    with pytest.raises(ChildProcessError, match=r"workers: got one that died \(.*, expected workers that stay"):
        for _ in batches(dying):
            # Ctrl-C goes to the trainer's whole group, and is not to end its workers.
            assert os.getpgid(dying._iterator._workers[0].pid) != os.getpgid(0)
            os.kill(dying._iterator._workers[0].pid, signal.SIGKILL)
    data = ClipDataset(samples_with_broken(folder, 0, 2), recipe(classes=2))
    failing = make_loader(data, StepSampler(2, 2), workers=1)
    with pytest.raises(ValueError, match=r"^list: got 10 unreadable videos one after the other"):
        list(batches(failing))
    for loader in (dying, failing):
        loader._iterator._shutdown_workers()  # the garbage collector would take 5 s


def test_workers_end_with_the_trainer():
    context = multiprocessing.get_context("fork")  # as with the fork server, but its start takes seconds
    ours, theirs = context.Pipe()

    def worker():
        _start_worker(0)
        theirs.send(os.getpid())
        time.sleep(60)

    def trainer():
        context.Process(target=worker).start()
        time.sleep(60)

    process = context.Process(target=trainer)
    process.start()
    theirs.close()
    assert ours.poll(20) and ours.recv() != process.pid
    process.kill()
    with pytest.raises(EOFError):  # nobody holds the other end any more
        assert ours.poll(20) and ours.recv()
