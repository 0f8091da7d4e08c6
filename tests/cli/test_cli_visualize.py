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
from mar_fast.eval import plot, reconstruct

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
    original = plot.draw_frames

    def note(rows, config, path, **texts):
        seen.append((rows, texts))
        original(rows, config, path, **texts)

    monkeypatch.setattr(plot, "draw_frames", note)
    return seen


def shows(rows, clip, mask, filled):
    """Whether the rows are the first frames of the clip's tubelets, their visible parts and the reconstruction."""
    masked = mask.bool_masked()[0].view(4, 2, 4).repeat_interleave(16, 1).repeat_interleave(16, 2)
    images = {name: torch.from_numpy(np.stack(frames)) for name, frames in rows.items()}
    first = [video[:, ::2].permute(1, 2, 3, 0) for video in (clip, filled)]
    veiled = images["masked"][masked]
    return (
        torch.equal(images["clip"], first[0])
        and torch.equal(images["reconstruction"], first[1])
        and torch.equal(images["masked"][~masked], first[0][~masked])
        and bool((veiled >= 229).all())
    )


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


def drawn_at_random(kind):
    return lambda clip, grid: getattr(masking, kind)(1, grid, 0.75, generator=torch.Generator().manual_seed(3))


KINDS = {
    **{kind: drawn_at_random(kind) for kind in ("random", "tube", "frame")},
    "running": lambda clip, grid: masking.cell_running(1, grid, 0.75, phase=0),
    "running --train": lambda clip, grid: masking.cell_running(
        1, grid, 0.75, temporal_shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "content": lambda clip, grid: masking.content(clip[None], grid, budget=0.25),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(run, checkpoint, drawn, kind):
    """With a checkpoint, and without one: there on the grid of the usual models, and on the sample clip."""
    options = ("--kind", *kind.split(), "--ratio", 0.75, "--seed", 3)
    assert run("visualize", CLIP, "--checkpoint", checkpoint, *options)[0] == 0
    clip, mask, want = wanted(mask=lambda clip: KINDS[kind](clip, (4, 2, 4)))
    assert shows(drawn[0][0], clip, mask, want.video[0])
    code, out, _ = run("visualize", *options, "--json", "--frames", 3, "--force")
    clip, content = video.read_clip(CLIP, 16), json.loads(out)
    mask = KINDS[kind](clip, (8, 14, 14))
    assert code == 0 and content["keep_idx"] == mask.keep_idx.flatten().tolist() and "statistics" not in content
    assert (content["visible"], content["tokens"], content["grid"]) == (392, 1568, [8, 14, 14])
    rows, texts = drawn[1]
    veiled = plot.frames(clip, named_config("mar_vit_base"), mask.bool_masked()[0])
    assert list(rows) == ["clip", "masked"] and np.array_equal(rows["masked"], veiled) and texts["note"] == ""
    assert ("training form" in texts["title"]) == ("--train" in kind) and texts["columns"] == 3


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


@pytest.mark.parametrize("changes", [LINEAR, {"decoder_depth": 0}])
def test_no_decoder(refused, tmp_path, changes):
    path = save_checkpoint(small_model(**{**changes, **SIZES}), tmp_path / "none.safetensors")
    said = refused("visualize", CLIP, "--checkpoint", path)
    assert "without a pixel decoder, expected one from pre-training" in said


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
def test_bad_input(refused, checkpoint, tmp_path, arguments, message):
    (tmp_path / "there.png").write_bytes(b"old")
    assert message in refused("visualize", CLIP, "--checkpoint", checkpoint, *arguments)


def test_bad_files(refused, checkpoint):
    for options in (("--checkpoint", checkpoint), ()):
        said = refused("visualize", "nowhere.mp4", *options)
        assert "path: got 'nowhere.mp4', expected an existing video file" in said
    assert "'nowhere.pth', which does not exist" in refused("visualize", CLIP, "--checkpoint", "nowhere.pth")


@pytest.mark.parametrize(("columns", "frames"), [(None, [0, 2, 4, 6]), (1, [0]), (2, [0, 6]), (3, [0, 4, 6])])
def test_what_is_in_the_picture(tmp_path, monkeypatch, columns, frames):
    """Rows and columns as the axes have them."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    config = small_model(**SIZES).config
    rows = {name: plot.frames(torch.randint(256, (3, 8, 32, 64), dtype=torch.uint8), config) for name in "abc"}
    texts = {"title": "bikes.mp4, a $title$", "note": "what was done"}
    plot.draw_frames(rows, config, tmp_path / "a.png", **texts, columns=columns)
    (figure,) = figures
    axes = np.array(figure.axes).reshape(3, len(frames))
    assert [axis.get_title() for axis in axes[0]] == [f"frame {number}" for number in frames]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["a", "b", "c"]
    assert figure.get_suptitle() == texts["title"] and figure.get_supxlabel() == texts["note"]
    for row, images in zip(axes, rows.values(), strict=True):
        for axis, number in zip(row, frames, strict=True):
            assert np.array_equal(axis.images[0].get_array(), images[number // 2])


def test_options_that_need_a_checkpoint(refused):
    options = ("--set depth=1", "--position formula", "--model-key a", "--dtype fp32", "--device cpu")
    for option in (*options, "--ground-truth-statistics"):
        said = f"error: {option.split()[0]}: got it without --checkpoint, expected both or neither"
        assert refused("visualize", *option.split()) == said
