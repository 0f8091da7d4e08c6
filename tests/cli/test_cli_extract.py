"""mar-fast extract: videos or a list to files of features, what is printed, and bad input."""

import json
import re

import pytest

pytest.importorskip("av")

import clips
import numpy as np
import safetensors.torch
import torch
from helpers import small_config

import mar_fast
from mar_fast.eval import extract

SIZE = (64, 64)


@pytest.fixture
def mar(run, tmp_path):
    """Run mar-fast extract in a folder with a checkpoint and four videos."""
    torch.manual_seed(0)
    mar_fast.save_checkpoint(mar_fast.MAR(small_config()), tmp_path / "model.safetensors")
    for number, name in enumerate(("a", "b c", "deep/er/d", "e")):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        clips.textured(tmp_path / f"videos/{name}.mkv", 12 + 5 * number, SIZE)

    def call(*arguments):
        code, out, err = run("extract", *arguments, "--checkpoint", "model.safetensors")
        return code, out, " ".join(err.replace("│", " ").split())

    return call


def features(path, **options):
    """By the generator, in batches of the command's size."""
    model = mar_fast.from_pretrained("model.safetensors", classifier=None, decoder_depth=0)
    return list(extract(model, path, **options))


def test_videos(mar, tmp_path):
    code, out, _ = mar("videos/a.mkv", "videos/deep/er/d.mkv", "--stride", 2, "--frame-stride", 1)
    assert code == 0 and re.search(r"^\d+ windows in [\d.]+ s: [\d.]+ windows and [\d.]+ s of video a second, ", out)
    assert re.search(r", (data|compute)-bound \(the model ran \d+% of the time\)\nWritten: features\n$", out)
    for name, path in (("a", "a"), ("d", "deep/er/d")):
        found = safetensors.torch.load_file(f"features/{name}.safetensors")
        want = features(f"videos/{path}.mkv", stride=2, frame_stride=1, keep=1.0)
        assert torch.equal(found["layer.2"], torch.stack([window.layers[2] for window in want])) and len(found) == 1
    about = json.loads((tmp_path / "features/a.json").read_text())
    assert about["settings"]["stride"] == 2 and about["settings"]["dtype"] == "fp32" and about["batch"] == 8
    assert about["frames"][0] == [0, 3] and about["seconds"][1] == [0.08, 0.2]
    assert about["environment"]["mar_fast"] and "commit" in about["environment"] and about["checkpoint"]


def test_fp8(mar):
    options = ("videos/a.mkv", "--keep", 0.5, "--quantize", "fp8-emulated")
    assert mar(*options)[0] == 0
    model = mar_fast.from_pretrained("model.safetensors", classifier=None, decoder_depth=0)
    want = list(extract(mar_fast.quantize(model, "fp8", emulate=True), "videos/a.mkv", keep=0.5))
    found = safetensors.torch.load_file("features/a.safetensors")["layer.2"]
    assert torch.equal(found, torch.stack([window.layers[2] for window in want]))
    code, _, err = mar(*options[:3])
    assert code == 2 and "quantize" in err


def test_a_list_is_mirrored_and_continued(mar, tmp_path):
    """Without labels or with them; broken videos are listed, and tried again."""
    (tmp_path / "list.txt").write_text("a.mkv\nb c.mkv\ndeep/er/d.mkv\ngone.mkv\n")
    (tmp_path / "labels.csv").write_text("a.mkv,3\nb c.mkv,0\ndeep/er/d.mkv,1\n")
    options = ("--root", "videos", "--layer", 1, "--npy", "--keep", 0.5, "--complementary", "--out", "o")
    code, out, err = mar("--list", "list.txt", *options)
    assert code == 1 and "list.txt: 4 videos, read as paths" in err and "1 of 4 videos could not be read" in out
    assert "error: gone.mkv: path: got 'videos/gone.mkv', expected an existing video file" in err
    (row,) = map(json.loads, (tmp_path / "o/broken.jsonl").read_text().splitlines())
    assert row["video"] == "gone.mkv" and row["error"].startswith("path: got")
    for name in ("a", "b c", "deep/er/d"):
        want = features(f"videos/{name}.mkv", layers=[1], keep=0.5, complementary=True)
        assert np.array_equal(np.load(f"o/{name}.npy"), np.stack([window.layers[1] for window in want]))
    code, out, err = mar("--list", "list.txt", *options, "--allow-broken", "--json")
    content = json.loads(out)
    assert code == 0 and "o: 3 of 4 videos were finished before; continuing" in err
    assert (content["finished"], list(content["broken"]), content["windows"]) == (0, ["gone.mkv"], 0)
    code, out, err = mar("--list", "labels.csv", *options)
    assert code == 0 and "read as list" in err and not (tmp_path / "o/broken.jsonl").exists()
    before = {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    code, _, err = mar("--list", "labels.csv", *options[:-2], "--out", "o", "--stride", 5)
    assert (
        code == 2 and "a.json: got results of other settings (stride 4, now 5), expected the same, another file" in err
    )
    assert {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()} == before
    code, _, _ = mar("--list", "labels.csv", *options, "--stride", 5, "--force")
    assert code == 0 and json.loads((tmp_path / "o/a.json").read_text())["settings"]["stride"] == 5


def test_every_token_of_other_windows_in_16_bits(mar, tmp_path):
    """A window of another length than the checkpoint's clips, in seconds at a rate of its own."""
    options = ("--window", 8, "--fps", 12.5, "--stride", 3, "--frame-stride", 1, "--tokens", "--dtype", "bf16")
    code, _, err = mar("videos/e.mkv", *options, "--keep", 0.5, "--tail", "drop", "--batch", 3)
    assert code == 0, err
    model = mar_fast.from_pretrained("model.safetensors", classifier=None, decoder_depth=0, num_frames=8)
    how = dict(stride=3, frame_stride=1, fps=12.5, tail="drop", keep=0.5, pooled=False, batch=3)
    want = [window.layers[2] for window in extract(model.bfloat16(), "videos/e.mkv", **how)]
    found = safetensors.torch.load_file("features/e.safetensors")["layer.2"]
    assert found.dtype == torch.bfloat16 and found.shape == (3, 32, 96) and torch.equal(found, torch.stack(want))
    about = json.loads((tmp_path / "features/e.json").read_text())
    assert len(about["token_idx"]) == 32 and about["seconds"][1] == [0.24, 0.8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "VIDEO: got none, expected videos or --list"),
        (["videos/a.mkv", "--list", "list.txt"], "VIDEO: got both videos and --list, expected videos or --list"),
        (["--list", "none.txt"], "list: got 'none.txt', expected an existing list"),
        (["--list", "list.txt", "--root", "elsewhere"], "--root: got none of the 1 videos; the first would be 'elsewhere"),
        (["gone.mkv"], "VIDEO: got none of the 1 videos; the first would be 'gone.mkv', expected videos that are there"),
        (["videos/a.mkv", "videos/a.avi"], "videos: got 'videos/a.mkv' and 'videos/a.avi', which would both be 'features/"),
        (["videos/a.mkv", "--root", "videos/deep"], "root: got 'videos/deep', without 'videos/a.mkv', expected a folder"),
        (["videos/a.mkv", "--npy", "--tokens"], "--npy: got --tokens, expected one layer, pooled"),
        (["videos/a.mkv", "--npy", "--layer", 1, "--layer", 2], "--npy: got 2 layers, expected one layer, pooled"),
        (["videos/a.mkv", "--layer", 3], r"layers: got \[3\], expected different numbers of blocks, 1 to 2"),
        (["videos/a.mkv", "--keep", 0.3], "keep: got 0.3, a share of visible tokens that is not allowed"),
        (["videos/a.mkv", "--complementary"], "complementary: got True, expected False, where every token is visible"),
        (["videos/a.mkv", "--fps", 0], "fps: got 0.0, expected frames a second, above 0"),
        (["videos/a.mkv", "--window", 5], "num_frames: got 5"),
        (["videos/a.mkv", "--out", "list.txt"], "list.txt is a file, expected a folder"),
        (["videos/a.mkv", "--workers", 0], "Invalid value for '--workers'"),
        (["videos/a.mkv", "--device", "cuda"], "device: got 'cuda', but torch finds no GPU here"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(refused, mar, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "list.txt").write_text("a.mkv\n")
    assert re.search(message, refused("extract", *arguments, "--checkpoint", "model.safetensors"))
