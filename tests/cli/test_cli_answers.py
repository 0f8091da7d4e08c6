"""mar-fast classify and mar-fast eval on real clips, with a small model that learns to tell three of them apart."""

import json
import re
import shutil
from typing import get_args

import pytest

pytest.importorskip("av")

import clips
import safetensors.torch
import torch
from helpers import small_config

import mar_fast
from mar_fast.data.video import read_views
from mar_fast.eval import accuracy

pytestmark = pytest.mark.real_clip

NAMES = ["a rabbit", "bikes [outdoors]", "a phone call"]
SIZES = dict(num_classes=3, decoder_depth=0, bridge_depth=1)
FILES = ["bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file of weights after 120 steps over views at stride 3, at 50 % masking; the commands read at others."""
    torch.manual_seed(0)
    model = mar_fast.MAR(small_config(**SIZES)).train()
    video = torch.cat([read_views(clips.real_clip(f), 4, clips=6, stride=3, size=(64, 64)) for f in FILES])
    target = torch.arange(3).repeat_interleave(18)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for _ in range(120):
        drawn = torch.randperm(len(video))[:18]
        optimizer.zero_grad()
        mar_fast.mar_loss(model(video[drawn]), target[drawn], reconstruction_weight=0).backward()
        optimizer.step()
    return mar_fast.save_checkpoint(model, tmp_path_factory.mktemp("weights") / "three.safetensors")


@pytest.fixture
def mar(run, checkpoint, tmp_path):
    """Run mar-fast with the checkpoint, in a folder that has the labels."""
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")

    def call(command, *arguments):
        return run(command, *arguments, "--checkpoint", checkpoint)

    return call


def naive_scores(checkpoint, path, mask_ratio, **views):
    """Mean softmax by the plain reference, one view at a time."""
    model = mar_fast.reference.MAR(small_config(**SIZES, mask_ratio=mask_ratio)).eval()
    model.load_state_dict(safetensors.torch.load_file(checkpoint))
    seen = read_views(path, 4, size=(64, 64), **views)
    with torch.no_grad():
        return torch.stack([model(view[None]).logits[0].softmax(0) for view in seen]).mean(0)


def test_classify_names_real_clips(mar):
    """Each clip is named rightly; so is a distorted copy of one that the model has never seen."""
    seen = [clips.real_clip(name) for name in (*FILES, "carphone_distorted.mp4")]
    code, out, err = mar("classify", *seen, "--labels", "names.txt")
    assert code == 0 and "error" not in err
    parts = [part.splitlines() for part in re.split(r"(?=^/)", out, flags=re.MULTILINE) if part]
    for path, name, lines in zip(seen, [*NAMES, NAMES[2]], parts, strict=True):
        assert lines[0] == f"{path}, 5x3 views, 50% of patches visible"
        found = [re.fullmatch(r"\s*([\d.]+)% +(.+?)\s*", line).groups() for line in lines[1:]]
        shares = [float(share) for share, _ in found]
        assert found[0][1] == name and {n for _, n in found} == set(NAMES)
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.2) and shares[0] > 50


def test_classify_by_the_checkpoints_own_names(run, tmp_path):
    """Those of config.json, where no others are given."""
    model = mar_fast.MAR(
        mar_fast.MARConfig(
            num_frames=4, image_size=(64, 64), embed_dim=48, depth=1, num_heads=3, num_classes=3, classifier="linear",
            final_norm=False, mask_ratio=0.0, decoder_depth=0, classifier_norm_eps=1e-5,
        )
    )  # fmt: skip
    mar_fast.save_checkpoint(model, tmp_path / "named", layout="hf", labels=["a cat", "a dog", "a bird"])
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    path = clips.real_clip("bikes.mp4")
    for options, wanted in ((), {"a cat", "a dog", "a bird"}), (("--labels", "names.txt"), set(NAMES)):
        code, out, _ = run("classify", path, "--checkpoint", "named", "--json", *options)
        (video,) = json.loads(out)["videos"]
        assert code == 0 and {found["name"] for found in video["classes"]} == wanted


@pytest.mark.parametrize(
    ("options", "mask_ratio", "views"),
    [
        ((), 0.5, dict()),
        (("--keep", "0.25", "--views", "2x3", "--sampling", "uniform"), 0.75, dict(clips=2, sampling="uniform")),
        (("--keep", "1", "--views", "3x1", "--stride", "7", "--batch", "2"), 0.0, dict(clips=3, crops=1, stride=7)),
    ],
)
def test_classify_probabilities(mar, checkpoint, options, mask_ratio, views):
    path = clips.real_clip("bikes.mp4")
    code, out, _ = mar("classify", path, "--json", "--top", "2", *options)
    content = json.loads(out)
    want = naive_scores(checkpoint, path, mask_ratio, **views).topk(2)
    (video,) = content["videos"]
    assert code == 0 and content["mask_ratio"] == mask_ratio and video["video"] == str(path)
    assert [found["class"] for found in video["classes"]] == want.indices.tolist()
    assert [found["probability"] for found in video["classes"]] == pytest.approx(want.values.tolist(), abs=1e-5)
    assert [found["name"] for found in video["classes"]] == [None, None]


def test_keep_and_dtype_change_the_answer(mar):
    path = clips.real_clip("bikes.mp4")
    shares = {}
    for options in ((), ("--keep", "0.5"), ("--keep", "0.75"), ("--dtype", "bf16"), ("--quantize", "fp8-emulated")):
        _, out, _ = mar("classify", path, "--json", "--views", "1x1", *options)
        shares[options] = json.loads(out)["videos"][0]["classes"][0]["probability"]
    assert shares[()] == shares["--keep", "0.5"] and len(set(shares.values())) == 4
    for dtype, told in (
        ("fp32", "--dtype: got fp32 with --quantize fp8"),
        ("bf16", "--quantize: got fp8 on cpu, expected a GPU"),
    ):
        code, _, err = mar("classify", path, "--quantize", "fp8", "--dtype", dtype, "--device", "cpu")
        assert code == 2 and told in err


def test_classify_goes_on_after_a_bad_video(mar, tmp_path):
    (tmp_path / "text [x].mp4").write_text("not a video")
    clips.textured(tmp_path / "short.mp4", 5, codec="libx264")
    good = clips.real_clip("bikes.mp4")
    code, out, err = mar("classify", "text [x].mp4", "short.mp4", good, "--json")
    first, second, third = json.loads(out)["videos"]
    assert code == 2 and third["classes"][0]["class"] == 1
    assert "FFmpeg can decode" in first["error"] and "a video of 5 frames, expected at least 13" in second["error"]
    assert "error: path: got 'text [x].mp4'" in err and "a video of 5 frames" in err
    code, out, _ = mar("classify", "short.mp4", "--short", "repeat")
    assert code == 0 and out.startswith("short.mp4, 5x3 views")


@pytest.fixture
def listed(tmp_path):
    """Four real clips in a folder, the last with a wrong label."""
    folder = tmp_path / "my videos"
    folder.mkdir()
    for name in (*FILES, "carphone_distorted.mp4"):
        shutil.copy(clips.real_clip(name), folder / name)
    lines = [f"{name} {label}" for label, name in enumerate(FILES)]
    (tmp_path / "val.csv").write_text("\n".join([*lines, "carphone_distorted.mp4 0"]))
    return folder


def test_eval_scores_real_clips(mar, listed, checkpoint, tmp_path):
    code, out, err = mar("eval", "val.csv", "--root", listed, "--views", "2x1")
    assert code == 0
    assert "val.csv: 4 videos, read as list (lines of a path, " in err and "2x1 views, stride 4" in err
    assert "top-1 75.00%, top-5 100.00% of 4 videos, 50% of patches visible" in out and "could not" not in out
    head, *rows = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert head["settings"]["views"] == "2x1" and [row["video"] for row in rows] == [*FILES, "carphone_distorted.mp4"]
    for row in rows:
        want = naive_scores(checkpoint, listed / row["video"], 0.5, clips=2, crops=1)
        assert row["classes"] == want.argsort(descending=True).tolist()
        assert row["probabilities"] == pytest.approx(want.sort(descending=True).values.tolist(), abs=1e-5)


def test_eval_goes_on_and_refuses_other_settings(mar, listed, monkeypatch, tmp_path):
    options = ("eval", "val.csv", "--root", listed, "--views", "1x1", "--json")
    read, names = accuracy.classify, []

    def interrupted(*args, **kwargs):
        names.append(1)
        if len(names) == 3:
            raise KeyboardInterrupt
        return read(*args, **kwargs)

    monkeypatch.setattr(accuracy, "classify", interrupted)
    code, out, err = mar(*options)
    assert "results.jsonl: 2 of 4 videos finished; the same command continues there" in err
    assert code == 130 and out == "" and len((tmp_path / "results.jsonl").read_text().splitlines()) == 3
    code, out, err = mar(*options)
    content = json.loads(out)
    assert code == 0 and len(names) == 5 and "2 videos were finished before; continuing" in err
    assert (content["finished"], content["top1"], content["top5"], content["format"]) == (4, 0.75, 1.0, "list")

    before = (tmp_path / "results.jsonl").read_bytes()
    for other, told in (
        (("--keep", "0.75"), "mask_ratio 0.5, now 0.25"),
        (("--stride", "2"), "stride 4, now 2"),
        (("--dtype", "bf16"), "dtype 'fp32', now 'bf16'"),
        (("--quantize", "fp8-emulated"), "quantize None, now 'fp8-emulated'"),
        (("--short", "repeat"), "short 'error', now 'repeat'"),
        (("--sampling", "uniform"), "sampling 'stride', now 'uniform'"),
    ):
        code, _, err = mar(*options, *other)
        assert code == 2 and "got results of other settings (" in err and told in err
        assert "expected the same, another file, or --force to start anew" in err
    assert (tmp_path / "results.jsonl").read_bytes() == before
    code, out, _ = mar(*options, "--stride", "2", "--force")
    assert code == 0 and json.loads(out)["stride"] == 2


def test_eval_with_broken_videos(mar, listed, tmp_path):
    """Missing, cut off and too short: counted, told, and exit code 1 unless that is allowed."""
    (listed / "bikes.mp4").unlink()
    whole = (listed / "carphone_pristine.mp4").read_bytes()
    (listed / "carphone_pristine.mp4").write_bytes(whole[: len(whole) // 2])
    options = ("eval", "val.csv", "--root", listed, "--views", "1x1")
    code, out, err = mar(*options)
    assert code == 1 and "top-1 50.00%, top-5 100.00% of 2 videos" in out and "2 of 4 videos could not be read" in out
    assert "error: bikes.mp4: path: got" in err and "error: carphone_pristine.mp4: path: got" in err
    code, out, _ = mar(*options, "--allow-broken")
    assert code == 0 and "2 of 4 videos could not be read" in out
    shutil.copy(clips.real_clip("bikes.mp4"), listed / "bikes.mp4")
    code, out, _ = mar(*options)
    assert code == 1 and "top-1 66.67%" in out and "1 of 4 videos could not be read" in out


def test_eval_of_something_something(mar, tmp_path):
    """Names by templates, files by id, and the data set's usual test."""
    entries = [{"id": str(n), "template": f"Showing [{name}]"} for n, name in enumerate(("bunny", "bikes", "phone"))]
    (tmp_path / "validation.json").write_text(json.dumps(entries))
    labels = {"Showing phone": "2", "Showing bikes": "1", "Showing bunny": "0"}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    for number, name in enumerate(FILES):
        shutil.copy(clips.real_clip(name), tmp_path / f"{number}.mp4")
    code, out, err = mar("eval", "validation.json", "--labels", "labels.json", "--json")
    content = json.loads(out)
    assert code == 0 and "read as ssv2" in err and "2x3 views, uniform" in err
    assert (content["top1"], content["views"], content["sampling"], content["stride"]) == (1.0, "2x3", "uniform", None)


def test_eval_of_hmdb51_and_ucf101(mar, tmp_path):
    for number, (action, name) in enumerate(zip(("a_bunny", "bikes", "phone"), FILES, strict=True)):
        (tmp_path / action).mkdir()
        images = clips.every_frame(clips.real_clip(name), (72, 96))[:40]
        clips.write(tmp_path / action / f"v_{action}_g01_c01.avi", images, codec="mpeg4", options={"q:v": "2"})
        with (tmp_path / "testlist01.txt").open("a") as file:
            file.write(f"{action}/v_{action}_g01_c01.avi\n")
        with (tmp_path / "classInd.txt").open("a") as file:
            file.write(f"{number + 1} {action}\n")
        (tmp_path / f"{action}_test_split1.txt").write_text(f"v_{action}_g01_c01.avi 2\nother.avi 1\n")
    code, out, err = mar("eval", "testlist01.txt", "--out", "ucf.jsonl", "--views", "1x3")
    assert code == 0 and "read as ucf101" in err and "top-1 100.00%, top-5 100.00% of 3 videos" in out
    code, out, err = mar("eval", ".", "--out", "hmdb.jsonl", "--views", "1x3")
    assert code == 0 and "read as hmdb51" in err and "top-1 100.00%, top-5 100.00% of 3 videos" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify"], "Missing argument 'VIDEO...'"),
        (["classify", "a.mp4", "--views", "5"], "--views: got '5', expected clips x crops, for example 5x3"),
        (["classify", "a.mp4", "--views", "0x3"], "--views: got '0x3'"),
        (["classify", "a.mp4", "--top", "0"], "Invalid value for '--top': Input should be greater than or equal to 1"),
        (["classify", "a.mp4", "--keep", "0"], "--keep: got 0.0, expected a share above 0, up to 1"),
        (["classify", "a.mp4", "--keep", "0.3"], "--keep: got 0.3, .* not allowed. mask_ratio: got 0.7, expected"),
        (["classify", "a.mp4", "--labels", "two.txt"], "labels: got 2 names, expected 3, one for each class"),
        (["classify", "a.mp4", "--labels", "none.txt"], "labels: got 'none.txt', expected an existing file"),
        (["classify", "a.mp4", "--sampling", "dense"], "'dense' is not one of 'stride', 'uniform'"),
        (["classify", "a.mp4", "--device", "cuda"], "device: got 'cuda', but torch finds no GPU here"),
        (["eval", "none.csv"], "list: got 'none.csv', expected an existing list of videos"),
        (["eval", "bad.csv"], "bad.csv, line 2: got 'b.mp4', expected a path and a label number"),
        (["eval", "high.csv"], "high.csv, line 2: got label 3, expected 0 to 2, as the model has"),
        (["eval", "gone.csv"], "root: got a folder with none of the 1 videos, expected one that has them"),
        (["eval", "good.csv", "--labels", "two.txt"], "--labels: got 2 classes, expected 3, as the checkpoint has"),
        (["eval", "walk_test_split1.txt"], "LIST: got 1 classes, expected 3, as the checkpoint has"),
        (["eval", "good.csv", "--views", "x"], "--views: got 'x'"),
        (["eval", "good.csv", "--format", "ava"], "'ava' is not one of 'auto', 'list', 'kinetics', 'ssv2'"),
        (["eval", "good.csv", "--format", "kinetics"], "labels: got none, expected a file of class names"),
        (["eval", "good.csv", "--out", "two.txt"], "two.txt, line 1: got .*expected JSON"),
        (["eval", "good.csv", "--out", "two.txt/r.jsonl"], "two.txt is a file, expected a folder"),
        *(
            (["eval", "good.csv", name, "0"], f"Invalid value for '{name}': Input should be greater than or equal to 1")
            for name in ("--workers", "--stride", "--batch")
        ),
    ],
)
def test_bad_input_is_one_clear_line(refused, mar, checkpoint, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clips.textured(tmp_path / "a.mp4", 80, codec="libx264")
    for name, text in {
        "two.txt": "walk\nrun\n",
        "bad.csv": "a.mp4 0\nb.mp4",
        "high.csv": "a.mp4 0\nb.mp4 3",
        "gone.csv": "b.mp4 0",
        "good.csv": "a.mp4 0\n",
        "walk_test_split1.txt": "a.avi 2\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert re.search(message, refused(*arguments, "--checkpoint", checkpoint))


def test_checkpoint_without_a_classifier(refused, tmp_path):
    path = mar_fast.save_checkpoint(mar_fast.MAR(small_config(classifier=None)), tmp_path / "a.safetensors")
    said = "a.safetensors', without a classifier, expected one that was trained to classify"
    assert said in refused("classify", "a.mp4", "--checkpoint", path)


def test_names_of_formats_agree():
    from mar_fast.cli import options
    from mar_fast.data.annotations import FORMATS
    from mar_fast.machine import DTYPES

    assert get_args(options.Format) == ("auto", *FORMATS)
    assert get_args(options.Precision) == tuple(DTYPES)
