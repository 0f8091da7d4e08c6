"""mar-fast visualize on a real clip, masks and small random models: what it draws, says and refuses."""

import json

import pytest

pytest.importorskip("av")

import clips
import matplotlib.image
import numpy as np
import torch
from checkpoint_cases import LINEAR, PRETRAINING, small_model

from mar_fast import masking, named_config, save_checkpoint
from mar_fast.data import video
from mar_fast.eval import clip_plot, reconstruct

pytestmark = pytest.mark.real_clip
CLIP = clips.real_clip("bikes.mp4")
SIZES = dict(num_frames=8, image_size=(32, 64))  # 4 x 2 x 4 tokens


@pytest.fixture
def checkpoint(tmp_path):
    """A small pre-training model, in VideoMAE's layout; in the file are sizes and mask of ours."""
    model = small_model(**{**PRETRAINING, **SIZES})
    return save_checkpoint(model, tmp_path / "pre.safetensors", layout="videomae")


@pytest.fixture
def drawn(monkeypatch):
    """The rows and texts of each picture, which is drawn all the same."""
    seen = []
    original = clip_plot.draw_frames

    def note(rows, config, path, **texts):
        seen.append((rows, texts))
        original(rows, config, path, **texts)

    monkeypatch.setattr(clip_plot, "draw_frames", note)
    return seen


def shows(rows, clip, mask, filled):
    """Whether the rows are the first frames of the clip's tubelets, their visible parts and the reconstruction."""
    masked = mask.bool_masked()[0].view(4, 2, 4).repeat_interleave(16, 1).repeat_interleave(16, 2)
    images = {name: torch.from_numpy(np.stack(frames)) for name, frames in rows.items()}
    first = [video[:, ::2].permute(1, 2, 3, 0) for video in (clip, filled)]
    veiled = images["masked"][masked]
    return (
        torch.equal(images["clip"], first[0]) and torch.equal(images["reconstruction"], first[1])
        and torch.equal(images["masked"][~masked], first[0][~masked]) and bool((veiled >= 229).all())
    )  # fmt: skip


def wanted(stride=4, ground_truth=False, mask=None, **overrides):
    """The clip, the mask and the reconstruction, computed beside the command."""
    model = small_model(**{**PRETRAINING, **SIZES, **overrides})
    clip = video.read_clip(CLIP, 8, size=(32, 64), stride=stride)
    mask = mask(clip) if mask else masking.cell_running(1, (4, 2, 4), 0.5, phase=0)
    return clip, mask, reconstruct(model, clip[None], mask, ground_truth_statistics=ground_truth)


def test_picture(run, checkpoint, drawn, tmp_path):
    code, out, err = run("visualize", CLIP, "--checkpoint", checkpoint)
    clip, mask, want = wanted()
    assert code == 0 and "error" not in err and "warning" not in err
    assert f"bikes.mp4, running masking, 50%: 16 of 32 patches visible, reconstruction loss {want.loss:.4f}" in out
    assert "estimated from visible ones nearby; no dropped pixel is used" in out and "visualize.png" in out
    ((rows, texts),) = drawn
    assert shows(rows, clip, mask, want.video[0]) and texts["columns"] is None
    assert texts["title"] in out and texts["note"] in out
    picture = matplotlib.image.imread(tmp_path / "visualize.png")
    assert picture.shape[1] > 900 and picture[..., :3].std() > 0.1


def test_json(run, checkpoint, drawn):
    arguments = ("--ground-truth-statistics", "--stride", 2, "--frames", 2, "--out", "a.png", "--json")
    code, out, _ = run("visualize", CLIP, "--checkpoint", checkpoint, *arguments)
    clip, mask, want = wanted(stride=2, ground_truth=True)
    content = json.loads(out)
    assert code == 0 and content["reconstruction_loss"] == pytest.approx(want.loss, rel=1e-5)
    assert content["statistics"] == "ground truth" and content["png"] == "a.png"
    assert (content["visible"], content["tokens"], content["kind"], content["ratio"]) == (16, 32, "running", 0.5)
    assert content["keep_idx"] == mask.keep_idx[0].tolist() and content["grid"] == [4, 2, 4]
    ((rows, texts),) = drawn
    assert shows(rows, clip, mask, want.video[0]) and texts["columns"] == 2
    assert texts["note"] == "reconstruction: mean and contrast of each patch taken from the clip itself"


KINDS = {
    "random": lambda clip: masking.random(1, (4, 2, 4), 0.75, generator=torch.Generator().manual_seed(3)),
    "tube": lambda clip: masking.tube(1, (4, 2, 4), 0.75, generator=torch.Generator().manual_seed(3)),
    "frame": lambda clip: masking.frame(1, (4, 2, 4), 0.75, generator=torch.Generator().manual_seed(3)),
    "running": lambda clip: masking.cell_running(1, (4, 2, 4), 0.75, phase=0),
    "content": lambda clip: masking.content(clip[None], (4, 2, 4), budget=0.25),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(run, checkpoint, drawn, kind):
    code, _, _ = run("visualize", CLIP, "--checkpoint", checkpoint, "--kind", kind, "--ratio", 0.75, "--seed", 3)
    clip, mask, want = wanted(mask=KINDS[kind])
    ((rows, _),) = drawn
    assert code == 0 and shows(rows, clip, mask, want.video[0])


def test_a_decoder_of_pixels(run, checkpoint, drawn):
    changed = ("--set", "norm_pix_loss=false")
    code, out, _ = run("visualize", CLIP, "--checkpoint", checkpoint, *changed, "--dtype", "bf16", "--json")
    _, _, want = wanted(norm_pix_loss=False)
    ((rows, texts),) = drawn
    assert code == 0 and json.loads(out)["statistics"] == "predicted" and "the decoder predicts" in texts["note"]
    filled = torch.from_numpy(np.stack(rows["reconstruction"])).permute(3, 0, 1, 2)
    apart = (filled.int() - want.video[0][:, ::2].int()).abs().float().mean()
    assert 0 < apart < 2
    code, _, err = run("visualize", CLIP, "--checkpoint", checkpoint, *changed, "--ground-truth-statistics", "--force")
    assert code == 2 and "--ground-truth-statistics: got it with a decoder that predicts pixels" in err


@pytest.mark.parametrize("layout", ["mar", "mar_fast"])
def test_models_with_a_classifier_and_a_decoder(run, drawn, tmp_path, layout):
    model = small_model(**SIZES)
    with torch.no_grad():
        model.classifier.head.bias[0] = torch.nan  # which is not read, and so no error
    save_checkpoint(model, tmp_path / "mar.safetensors", layout=layout)
    assert run("visualize", CLIP, "--checkpoint", "mar.safetensors")[0] == 0
    ((rows, _),) = drawn
    clip, mask, _ = wanted()
    assert shows(rows, clip, mask, reconstruct(small_model(**SIZES), clip[None], mask).video[0])


def test_no_decoder(run, tmp_path):
    for number, changes in enumerate((LINEAR, {"decoder_depth": 0})):
        path = save_checkpoint(small_model(**{**changes, **SIZES}), tmp_path / f"{number}.safetensors")
        code, out, err = run("visualize", CLIP, "--checkpoint", path)
        assert code == 2 and out == "" and "without a pixel decoder, expected one from pre-training" in err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "a.jpg"), "--out: got 'a.jpg', expected a file name that ends with .png"),
        (("--out", "there.png"), "there.png: already exists, expected a new file"),
        (("--seed", "-1"), "Invalid value for '--seed'"),
        (("--ratio", "0.3"), "ratio: got 0.3, expected a whole number of the 4 slots"),
        (("--ratio", "1"), "ratio: got 1.0, expected a number in [0, 1)"),
        (("--kind", "content", "--ratio", "nan"), "--ratio: got nan, expected a number in [0, 1)"),
        (("--ratio", "0"), "--ratio: got 0.0, by which no patch is masked, expected a larger one, below 1"),
        (("--kind", "frame", "--ratio", "0.1"), "--ratio: got 0.1, by which no patch is masked"),
        (("--kind", "block"), "'block' is not one of 'running', 'random', 'tube', 'frame', 'content'"),
        (("--frames", "5"), "--frames: got 5, expected 1 to 4, the tubelets of a clip in time"),
        (("--frames", "0"), "--frames: got 0, expected 1 to 4"),
        (("--stride", "0"), "Invalid value for '--stride'"),
        (("--kind", "content", "--train"), "--train: got it with --kind content, expected --kind running"),
        (("--kind", "tube", "--train"), "--train: got it with --kind tube, expected --kind running"),
        (("--stride", "100"), "path: got a video of 250 frames, expected at least 701"),
        (("--dtype", "int8"), "'int8' is not one of 'fp32', 'bf16', 'fp16'"),
        (("--set", "heads=3"), "--set: got 'heads=3', expected FIELD=VALUE"),
    ],
)
def test_bad_input(run, checkpoint, tmp_path, arguments, message):
    (tmp_path / "there.png").write_bytes(b"old")
    code, out, err = run("visualize", CLIP, "--checkpoint", checkpoint, *arguments)
    assert code == 2 and out == "" and message in err and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pre.safetensors", "there.png"]
    assert (tmp_path / "there.png").read_bytes() == b"old"


def test_bad_files(run, checkpoint, tmp_path):
    code, _, err = run("visualize", "nowhere.mp4", "--checkpoint", checkpoint)
    assert code == 2 and "path: got 'nowhere.mp4', expected an existing video file" in err
    code, _, err = run("visualize", CLIP, "--checkpoint", "nowhere.pth")
    assert code == 2 and "'nowhere.pth', which does not exist" in err
    assert run("visualize", "nowhere.mp4")[0] == 2


@pytest.mark.parametrize(("columns", "frames"), [(None, [0, 2, 4, 6]), (1, [0]), (2, [0, 6]), (3, [0, 4, 6])])
def test_what_is_in_the_picture(tmp_path, monkeypatch, columns, frames):
    """Rows and columns as the axes have them."""
    figures = []
    monkeypatch.setattr(clip_plot, "save", lambda figure, path: figures.append(figure))
    clip, mask, want = wanted()
    config = small_model(**{**PRETRAINING, **SIZES}).config
    masked = mask.bool_masked()[0]
    rows = {"clip": clip_plot.frames(clip, config), "masked": clip_plot.frames(clip, config, masked)}
    rows["reconstruction"] = clip_plot.frames(want.video[0], config)
    texts = {"title": "bikes.mp4, a title", "note": "what was done"}
    clip_plot.draw_frames(rows, config, tmp_path / "a.png", **texts, columns=columns)
    (figure,) = figures
    axes = np.array(figure.axes).reshape(3, len(frames))
    assert [axis.get_title() for axis in axes[0]] == [f"frame {number}" for number in frames]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["clip", "masked", "reconstruction"]
    assert figure.get_suptitle() == texts["title"] and figure.get_supxlabel() == texts["note"]
    for row, images in zip(axes, rows.values(), strict=True):
        for axis, number in zip(row, frames, strict=True):
            assert np.array_equal(axis.images[0].get_array(), images[number // 2])


@pytest.mark.parametrize("kind", KINDS)
def test_masks_without_a_checkpoint(run, drawn, kind):
    """The grid of the usual models, on the sample clip; a content mask goes by the clip."""
    ratio = 0.75 if kind == "content" else 0.5
    code, out, _ = run("visualize", "--kind", kind, "--ratio", ratio, "--seed", 3, "--stride", 2, "--json")
    clip = video.read_clip(CLIP, 16, stride=2)
    made = {"running": dict(phase=0), "content": None}.get(kind, dict(generator=torch.Generator().manual_seed(3)))
    draw = masking.cell_running if kind == "running" else getattr(masking, kind)
    mask = draw(clip[None], (8, 14, 14), budget=0.25) if made is None else draw(1, (8, 14, 14), 0.5, **made)
    content = json.loads(out)
    assert code == 0 and content["keep_idx"] == mask.keep_idx.flatten().tolist() and "statistics" not in content
    assert content["visible"] == (392 if kind == "content" else 784) and content["tokens"] == 1568
    ((rows, texts),) = drawn
    assert list(rows) == ["clip", "masked"] and texts["note"] == "" and len(rows["masked"]) == 8


def test_training_form(run, drawn):
    code, out, _ = run("visualize", "--train", "--ratio", "0.75", "--seed", "3", "--out", "a.png", "--frames", 2)
    generator = torch.Generator().manual_seed(3)
    mask = masking.cell_running(1, (8, 14, 14), 0.75, temporal_shuffle=True, generator=generator)
    clip, config = video.read_clip(CLIP, 16), named_config("mar_vit_base")
    ((rows, _),) = drawn
    want = clip_plot.frames(clip, config, mask.bool_masked()[0])
    assert code == 0 and np.array_equal(rows["masked"], want)
    assert "running masking, 75%, training form: 392 of 1568 patches visible" in out


@pytest.mark.parametrize(
    "option",
    [
        "--ground-truth-statistics",
        "--set depth=1",
        "--position formula",
        "--model-key a",
        "--dtype fp32",
        "--device cpu",
    ],
)
def test_options_that_need_a_checkpoint(run, tmp_path, option):
    code, out, err = run("visualize", *option.split())
    assert code == 2 and out == "" and not list(tmp_path.iterdir())
    assert err == f"error: {option.split()[0]}: got it without --checkpoint, expected both or neither\n"
