"""mar-fast tradeoff as a command: its table and files, exit codes, bad input."""

import gc
import importlib
import json
import sys
from dataclasses import replace

import pytest

pytest.importorskip("av")

import matplotlib.image
import torch
from rich.console import Console
from tradeoff_cases import PATHS, made

import mar_fast


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return mar_fast.save_checkpoint(made(), tmp_path_factory.mktemp("weights") / "three [x].safetensors")


NAMES = [f"class of <{number}> [b]" for number in range(11)]
QUICK = ("--dtype", "fp32", "--seconds", "0.01", "--views", "2x1", "--batch", "2")


@pytest.fixture(autouse=True)
def uncollected(monkeypatch):
    """A collection of garbage looks at all of torch, for a second at each measurement of memory."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


@pytest.fixture
def mar(run, checkpoint, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    return lambda *arguments: run("tradeoff", *arguments, "--checkpoint", checkpoint, *QUICK)


def test_command(mar, monkeypatch, tmp_path):
    """Table, names, notes and files; a damaged video is named and makes exit code 2, the others are done."""
    # Wide enough that no heading is broken into lines, whatever the times are.
    monkeypatch.setattr(importlib.import_module("mar_fast.cli.common"), "results", Console(width=400))
    (tmp_path / "bad [x].mp4").write_text("not a video")
    code, out, err = mar(PATHS[0], "bad [x].mp4", PATHS[2], "--labels", "names.txt", "--keep", "0.5", "--keep", "0.25")
    assert code == 2 and "error: path: got 'bad [x].mp4'" in err
    for text in (
        "three [x].safetensors, fp32: masked against dense", "dense", "running 50 %", "running 50 %, 2 views",
        "running 25 %, 4 views", "random 25 %", "content 25 %", "8 x 4", "16 x 2", "views agreeing", "KL, nats",
        "latency of 2 views, ms", "p20 - p80", "speed-up", "bikes.mp4", "bigbuckbunny.mp4", "4 views of 2 videos",
        torch.__version__, "asked for", "tradeoff.json", "class of <",
    ):  # fmt: skip
        assert text in out, text
    assert "random weights" not in out.lower()
    content = json.loads((tmp_path / "mar-fast-tradeoff/tradeoff.json").read_text())
    assert list(content["broken"]) == ["bad [x].mp4"] and len(content["points"]) == 11
    assert content["model"] == "three [x].safetensors" and not content["random_weights"] and content["dtype"] == "fp32"
    assert content["environment"]["torch"] == torch.__version__ and "commit" in content["environment"]
    for answer in content["answers"]:
        assert answer["dense"]["name"] == NAMES[answer["dense"]["number"]]
        for label, best in answer["changed"].items():
            assert f"{label}: {best['name']}" in out
    for point in content["points"]:
        assert point["correct"] and point["difference_fp32"] < 1e-5
        time = point["latency"]
        assert 0 < time["p20"] <= time["p50"] <= time["p80"] and time["n"] >= 5
        assert point["speedup"] == pytest.approx(content["points"][0]["latency"]["p50"] / time["p50"])
    image = matplotlib.image.imread(tmp_path / "mar-fast-tradeoff/tradeoff.png")
    assert image.std() > 0.05


def test_json_is_all_of_stdout_and_the_file(mar, tmp_path, run):
    code, out, _ = mar(PATHS[0], "--json", "--kind", "tube", "--keep", "0.5", "--ensembles", "none", "--out", "new/a")
    content = json.loads(out)
    assert code == 0 and content == json.loads((tmp_path / "new/a/tradeoff.json").read_text())
    assert [point["setting"] for point in content["points"]] == ["dense", "tube 50 %"]
    assert content["answers"][0]["dense"]["name"] is None and content["views_of_a_video"] == "2x1"


def test_random_weights(run, monkeypatch):
    small, command = made().config, importlib.import_module("mar_fast.cli.tradeoff")
    monkeypatch.setattr(command, "create_model", lambda name, **options: mar_fast.MAR(replace(small, **options)))
    code, out, _ = run("tradeoff", PATHS[0], "--random-weights", "base", *QUICK, "--keep", "0.5", "--kind", "random")
    assert code == 0 and "ViT-Base, random weights" in out and "tells nothing about a trained model" in out


def test_a_wrong_model_makes_exit_code_1(mar, monkeypatch, tmp_path):
    module = sys.modules["mar_fast.kernels.attention"]
    right = module.eager_attention
    monkeypatch.setattr(module, "eager_attention", lambda qkv, scale: right(qkv, 1.05 * scale))
    (tmp_path / "mar-fast-tradeoff").mkdir()
    (tmp_path / "mar-fast-tradeoff/tradeoff.png").write_text("of a run before")
    code, out, err = mar(PATHS[0], "--keep", "0.5", "--force")
    assert code == 1 and "differs from the reference beyond rounding; no speed is given" in err
    assert "latency" not in out.split("Written")[0].split("AMD")[0] and ", wrong" in out and "speed-up" not in out
    assert sorted(path.name for path in (tmp_path / "mar-fast-tradeoff").iterdir()) == ["tradeoff.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--views", "0x1"), "--views: got '0x1'"),
        (("--seconds", "0"), "--seconds: got 0.0, expected a number above 0"),
        (("--labels", "few.txt"), "labels: got 2 names, expected 11, one for each class"),
        (("--labels", "nowhere.txt"), "labels: got 'nowhere.txt', expected an existing file"),
        (("--keep", "0"), "keep: got 0.0, expected a share above 0"),
        (("--keep", "0.4", "--kind", "running"), "a share that one of the masks can keep"),
        (("--random-weights", "base"), "--checkpoint and --random-weights: got both, expected one of them"),
        (("--kind", "spiral"), "Invalid value"),
        (("--batch", "0"), "Invalid value"),
        (("--seed", "-1"), "Invalid value for '--seed'"),
        (("--out", "names.txt"), "names.txt is a file, expected a folder"),
        (("--out", "old"), "already exists, expected a new file (or --force to replace it)"),
        (("--views", "1x1", "--stride", "1000"), "VIDEO: got none of 1 that can be read"),
    ],
)
def test_bad_input(refused, checkpoint, tmp_path, arguments, said):
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/tradeoff.json").write_text("kept")
    assert said in refused("tradeoff", PATHS[0], "--checkpoint", checkpoint, *QUICK, *arguments)


def test_neither_checkpoint_nor_random(refused):
    said = "--checkpoint and --random-weights: got neither, expected one of them"
    assert said in refused("tradeoff", PATHS[0], *QUICK)


def test_no_video_can_be_read(refused, checkpoint, tmp_path):
    (tmp_path / "bad.mp4").write_text("not a video")
    said = refused("tradeoff", "bad.mp4", "worse.mp4", "--checkpoint", checkpoint, *QUICK)
    assert "bad.mp4" in said and "worse.mp4" in said
