"""mar-fast train, in one process: what it says and writes, and what it refuses."""

import json
import resource
import sys
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("av")

import torch
from train_cases import RECIPE, VIDEOS, write_films

import mar_fast
from mar_fast import machine
from mar_fast.train.loop import Run


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    lines = write_films(folder)
    texts = {
        "empty.txt": "", "one.txt": "".join(line for line in lines if line.endswith("0\n")),
        "beyond.txt": "".join(lines).replace(" 1\n", " 7\n"), "few.txt": "".join(lines[:3]),
        "broken.txt": "".join(lines).replace("0.mp4", "cut.mp4"), "all_broken.txt": "cut.mp4 0\ngone.mp4 1\n",
        "gone.txt": "".join(lines).replace(".mp4", ".avi"),
        "small.toml": RECIPE.replace("epochs = 4", "epochs = 1").replace("1e-9", "0.0"),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "cut.mp4").write_bytes((folder / "0.mp4").read_bytes()[:300])
    return folder


@pytest.fixture
def train(run, films):
    def call(*more, videos="list.txt", recipe="small.toml"):
        named = ["--recipe", films / recipe] if recipe else []
        lists = ["--train", films / videos] if videos else []
        return run("train", *named, *lists, "--workers", 0, *more)

    return call


def test_from_a_list_to_an_evaluated_checkpoint(train, films, tmp_path):
    code, out, err = train("--val", films / "list.txt", "--clips", 4)
    assert code == 0, err
    assert "2 micro-batches a step" in err and "all weights are new" in err and "epoch 1: videos 8" in err
    assert "step 1 of 2, loss" in err and "step 2 of 2" not in err  # a minute has not passed
    assert "test of run/best.safetensors, 2 clips x 1 crops: top-1" in out
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {
        "best.safetensors", "last.safetensors", "checkpoints", "curves.png", "log.jsonl", "test.json", "test.jsonl"
    }  # fmt: skip
    outcome = json.loads((tmp_path / "run/test.json").read_text())
    assert outcome["finished"] == VIDEOS and outcome["broken"] == 0
    # Further epochs: the test is made again, of the new best one.
    further = ["--resume", "--allow-changes", "--set", "schedule.epochs=2", "--set", "test.clips=1"]
    code, out, err = train("--val", films / "list.txt", "--clips", 4, *further)
    assert code == 0 and "1 clips x 1 crops: top-1" in out and "all weights are new" not in err, err
    # A checkpoint of its own kind, of the same sizes: the encoder is taken, the classifier is new.
    code, _, err = train("--init", "run/last.safetensors", "--out", "second", "--clips", 8)
    assert code == 0, err
    assert "mar_fast layout" in err and "new: classifier" in err
    old, new = (mar_fast.from_pretrained(f"{name}/last.safetensors") for name in ("run", "second"))
    assert not torch.equal(old.classifier.head.weight, new.classifier.head.weight)
    assert not (tmp_path / "second/best.safetensors").exists()


def test_broken_videos(train, films):
    code, _, err = train("--val", films / "broken.txt")
    assert code == 0 and "cut.mp4 cannot be read" in err and "videos 7" in err, err
    changes = ["--set", "data.max_broken=1", "--set", "data.batch=1"]
    code, _, err = train(*changes, "--out", "all", "--workers", 1, videos="all_broken.txt")
    assert code == 2 and "list: got 10 unreadable videos one after the other" in err, err


def test_what_is_missing_at_the_end(train, tmp_path, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("matplotlib is not there")

    monkeypatch.setitem(mar_fast.train.fit.__globals__, "draw_curves", missing)
    code, _, err = train()
    assert code == 0 and "no curves.png: matplotlib is not there" in err

    def too_large(*_):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr("mar_fast.train.step.Stepper.step", too_large)
    code, _, err = train("--out", "large")
    assert code == 2 and "clips: got 8, too many for the memory of the device (tried to allocate)" in err


def test_tensorboard(train, tmp_path, monkeypatch):
    boards = []

    class Board(dict):
        def __init__(self, folder, purge_step):
            boards.append(self)
            self.folder, self.first, self.closed = folder, purge_step, False

        def add_scalar(self, name, value, step):
            self[name, step] = value

        def close(self):
            self.closed = True

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    assert train("--tensorboard", "--init", "nothing.pth")[0] == 2
    assert not boards and not list((tmp_path / "run").iterdir())
    assert train("--tensorboard")[0] == 0
    (board,) = boards
    assert (board.folder, board.first, board.closed) == ("run/tensorboard", 1, True)
    assert all(("loss", step) in board for step in (1, 2))


def test_show(train, tmp_path, monkeypatch):
    rates = {"fp32": 1e11, "bf16": 2e11}  # fp16 is not measured: on a CPU a product takes seconds
    monkeypatch.setattr(machine, "matmul_rates", lambda device, dtypes, budget: {name: rates[name] for name in dtypes})
    code, out, _ = train("--show", "--processes", 2, "--clips", 2, videos=None)
    assert code == 0
    assert "2 (processes) x 2 (micro-batches) x 2 (clips)" in out and "AdamW" in out and "at 1e+11 FLOP/s" in out
    assert (tmp_path / "run.schedule.png").is_file() and not (tmp_path / "run").exists()
    code, out, _ = train("--show", "--out", "v1.5", "--set", "optimizer.precision=fp16")
    assert code == 0 and "at 2e+11 FLOP/s" in out and (tmp_path / "v1.5.schedule.png").is_file()
    code, out, _ = train("--recipe", "list", recipe=None, videos=None)
    assert code == 0 and out.split() == mar_fast.train.list_recipes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(recipe=None), "--recipe: got none, expected one of mar_k400_base"),
        (dict(more=["--demo"]), "--demo: got also --recipe, --train"),
        (dict(videos=None), "--train: got none, expected a list of videos"),
        (dict(videos="empty.txt"), "empty.txt: got no video"),
        (dict(videos="one.txt"), "got no video of 1 of 2 classes, the first 1"),
        (dict(videos="beyond.txt"), "got label 7, expected 0 to 1, as the model has"),
        (dict(videos="few.txt"), "3 videos"),
        (dict(videos="gone.txt"), "none of the 8 videos"),
        (dict(videos="no.txt"), "no.txt"),
        (dict(more=["--clips", 1]), "clips_per_process: got 1, expected 2 (data.repeats) or more"),
        (dict(more=["--set", "optimizer.lrr=1"]), "optimizer.lrr: got an unknown key, expected 'lr', the nearest"),
        (dict(more=["--set", "augment.rand_augment=strong"]), "rand_augment"),
        (dict(more=["--resume"]), "--resume: got 'run/checkpoints' without a checkpoint"),
        (dict(more=["--init", "wide.safetensors"]), "--init: got a checkpoint of embed_dim 64, expected 32"),
        (dict(more=["--out", "full"]), "--out: full is not empty"),
        (dict(more=["--out", "wide.safetensors"]), "--out: wide.safetensors is a file"),
    ],
)
def test_bad_input(train, options, message, tmp_path):
    config = mar_fast.named_config(
        "mar_vit_small", num_frames=4, image_size=(32, 32), patch_size=(2, 8, 8), embed_dim=64, depth=2, num_heads=2,
        decoder_embed_dim=16, decoder_num_heads=2,
    )  # fmt: skip
    mar_fast.save_checkpoint(mar_fast.MAR(config), tmp_path / "wide.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = train(*options.pop("more", ()), **options)
    assert (code, message in err) == (2, True), err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_resuming_something_else(train, films, tmp_path):
    assert train()[0] == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for more, videos, said in (
        (["--set", "optimizer.lr=3e-4"], "list.txt", "(recipe.optimizer.lr 0.001, now 0.0003)"),
        ([], "turned.txt", "list"),
        (["--clips", 2], "list.txt", "accumulate 1, now 4"),
    ):
        (films / "turned.txt").write_text("".join(reversed((films / "list.txt").read_text().splitlines(True))))
        code, _, err = train("--resume", *more, videos=videos)
        assert code == 2 and "--resume: got a run of other settings" in err and said in err, err
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == kept
    code, _, err = train("--resume", "--allow-changes", "--set", "schedule.epochs=2")
    assert code == 0 and "goes on after step 2 of 4" in err
    again = ["--resume", "--allow-changes", "--set"]
    code, _, err = train(*again, "schedule.epochs=1")
    assert code == 2 and "--resume: got a run after step 4, expected 2 steps or fewer" in err
    code, _, err = train(*again, "model.embed_dim=64", "--set", "schedule.epochs=2")
    assert code == 2 and "size mismatch for encoder.patch_embed.proj.weight" in err


def test_the_configuration_of_a_checkpoint(train, tmp_path):
    """Mean colours are the checkpoint's: a run that is resumed without it would have others."""
    assert train()[0] == 0
    model = mar_fast.from_pretrained("run/last.safetensors", mean=(0.5, 0.5, 0.5))
    mar_fast.save_checkpoint(model, tmp_path / "gray.safetensors")
    assert train("--out", "second", "--init", "gray.safetensors")[0] == 0
    code, _, err = train("--out", "second", "--resume")
    assert code == 2 and "config.mean [0.5, 0.5, 0.5], now [0.485" in err, err


def test_a_disk_that_is_full(train, films, tmp_path):
    """The checkpoint of before stays, and no half of a new one."""
    assert train("--set", "checkpoint_minutes=1e-9")[0] == 0
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code, _, err = train("--resume", "--allow-changes", "--set", "schedule.epochs=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and "step-" in err and "cannot be written" in err, err
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == names
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code, _, err = train("--out", "second", "--val", films / "list.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and "second/best.safetensors: cannot be written" in err, err


@pytest.mark.parametrize("how", ["nan", "exploded"])
def test_a_loss_that_does_not_stay_finite(train, films, tmp_path, monkeypatch, how):
    monkeypatch.setattr("mar_fast.train.loop.REMEMBERED", 2)
    inputs = Run._inputs

    def spoiled(self, read, step):
        for one in inputs(self, read, step):
            if step.number == 4:
                one.video.copy_(one.video * (float("nan") if how == "nan" else 1e4))
            yield one

    monkeypatch.setattr(Run, "_inputs", spoiled)
    changes = ["--set", "schedule.epochs=3", "--set", "augment.mixup=0.5"]
    if how == "exploded":
        changes += ["--set", "reconstruction_weight=1e6", "--set", "model.norm_pix_loss=false"]
    code, _, err = train(*changes)
    assert code == 2 and "loss: got" in err and "in step 4" in err and ".mp4" in err, err
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002.pt"]
    assert str(films) in err.split("Videos of the step: ")[1]


def test_gradients_that_overflow(train, tmp_path, monkeypatch):
    """fp16 with too large a scale: steps are skipped, and their norm is null, for JSON has no infinity."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**60))
    code, *_ = train("--set", "optimizer.precision=fp16", "--set", "optimizer.clip_grad=1.0")
    text = (tmp_path / "run/log.jsonl").read_text()
    norms = [row["norm"] for row in map(json.loads, text.splitlines()) if "norm" in row]
    assert code == 0 and norms == [None] * len(norms) != [] and "Infinity" not in text
