"""The demo's camera motions are what they are called, and the demo runs its whole way."""

import json

import pytest

pytest.importorskip("av")

import numpy as np
import torch

from mar_fast.train import demo
from mar_fast.train.dataset import Key
from mar_fast.train.demo import MOTIONS, Motions

pytestmark = pytest.mark.real_clip


@pytest.fixture(scope="module")
def clips():
    return Motions("train", 44)


def shift(first, second):
    """(down, right) in pixels from one picture to the next, by phase correlation."""
    window = np.outer(np.hanning(first.shape[0]), np.hanning(first.shape[1]))
    a, b = (np.fft.fft2((picture.mean(-1) - picture.mean()) * window) for picture in (first, second))
    cross = np.fft.ifft2(b * a.conj() / (np.abs(b * a.conj()) + 1e-9)).real
    peak = np.unravel_index(cross.argmax(), cross.shape)
    return [value - side if value > side / 2 else value for value, side in zip(peak, cross.shape, strict=True)]


def test_motions(clips):
    """A camera that goes right moves what it sees to the left."""
    for number, (name, (right, down, growth, turn)) in enumerate(MOTIONS.items()):
        for index in range(number, 44, len(MOTIONS)):
            item = clips[Key(index, 3)]
            video = item.video[0]
            assert (item.label, video.shape, video.dtype) == (number, (16, 128, 128, 3), np.uint8)
            if name == "still":
                assert (video == video[:1]).all()
            elif growth or turn:
                assert not (video[0] == video[-1]).all()
            else:
                moved, way = np.array(shift(video[6].astype(float), video[9].astype(float))), np.array([-down, -right])
                along, across = moved @ way, moved @ way[::-1] if 0 in way else moved @ (way * [1, -1])
                assert along > abs(across), (name, moved)  # the camera is tilted a little


def test_splits_and_draws(clips):
    assert np.array_equal(clips[Key(5, 1)].video, clips[Key(5, 1)].video)
    assert not np.array_equal(clips[Key(5, 1)].video, clips[Key(5, 2)].video)
    checked = Motions("same films", 11)
    assert np.array_equal(checked[Key(5, 1)].video, checked[Key(5, 2)].video)
    trained, held = ([len(film) for film in part.frames] for part in (clips, checked))
    assert all(4 * few <= many + 4 for many, few in zip(trained, held, strict=True))
    seen = {frame.numpy().tobytes() for film in clips.frames for frame in film}
    assert sum(frame.numpy().tobytes() in seen for film in checked.frames for frame in film) == 0
    assert len(Motions("other film", 11).frames) == 1


def test_the_whole_way(run, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "CLIPS", 32)
    monkeypatch.setattr(demo, "CHECKED", 11)
    code, out, err = run("train", "--demo", "--set", "schedule.epochs=1", "--clips", 32, "--workers", 0)
    assert code == 0, err
    found = json.loads((tmp_path / "run/demo.json").read_text())
    assert found["classes"] == 11 and found["steps"] == 1
    assert 0 <= found["accuracy, other film"] <= 1 and "accuracy, same films" in out
    start, end = (torch.load(tmp_path / f"run/{name}/checkpoints/step-{step:08d}.pt")["model"]
                  for name, step in (("pretrain", 2), ("finetune", 1)))  # fmt: skip
    # One step of AdamW from the pre-trained encoder goes no farther than lr.
    moved = [(end[name] - value).abs().max() for name, value in start.items() if name.startswith("encoder.")]
    assert 0 < max(moved) <= 1.1e-3
