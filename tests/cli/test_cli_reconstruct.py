"""mar-fast reconstruct on a real clip, with small random models: what it draws, says and refuses."""

import json

import pytest

pytest.importorskip("av")

import clips
import matplotlib.image
import numpy as np
import torch
from checkpoint_cases import LINEAR, PRETRAINING, small_model

from mar_fast import TokenMask, masking, save_checkpoint
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
    """What is drawn: the arguments of the picture, which is drawn all the same."""
    seen = []
    original = plot.draw_reconstruction

    def note(*arguments):
        seen.append(arguments)
        original(*arguments)

    monkeypatch.setattr(plot, "draw_reconstruction", note)
    return seen


def wanted(stride=4, ground_truth=False, mask=None, **overrides):
    """The clip, the mask and the reconstruction, computed beside the command."""
    model = small_model(**{**PRETRAINING, **SIZES, **overrides})
    clip = video.read_clip(CLIP, 8, size=(32, 64), stride=stride)
    mask = mask(clip) if mask else masking.cell_running(1, (4, 2, 4), 0.5, phase=0)
    return clip, mask, reconstruct(model, clip[None], mask, ground_truth_statistics=ground_truth)


def test_picture(run, checkpoint, drawn, tmp_path):
    code, out, err = run("reconstruct", CLIP, "--checkpoint", checkpoint)
    clip, mask, want = wanted()
    assert code == 0 and "error" not in err and "warning" not in err
    assert f"bikes.mp4, running masking, 50%: 16 of 32 patches visible, reconstruction loss {want.loss:.4f}" in out
    assert "estimated from visible ones nearby; no dropped pixel is used" in out and "reconstruct.png" in out
    ((shown, filled, used, _, texts, _, columns),) = drawn
    assert torch.equal(shown, clip) and torch.equal(filled, want.video[0]) and columns is None
    assert torch.equal(used.keep_idx, mask.keep_idx) and texts[0] in out and texts[1] in out
    picture = matplotlib.image.imread(tmp_path / "reconstruct.png")
    assert picture.shape[1] > 900 and picture[..., :3].std() > 0.1


def test_json(run, checkpoint, drawn):
    arguments = ("--ground-truth-statistics", "--stride", 2, "--frames", 2, "--out", "a.png", "--json")
    code, out, _ = run("reconstruct", CLIP, "--checkpoint", checkpoint, *arguments)
    clip, _, want = wanted(stride=2, ground_truth=True)
    content = json.loads(out)
    assert code == 0 and content["reconstruction_loss"] == pytest.approx(want.loss, rel=1e-5)
    assert content["statistics"] == "ground truth" and content["png"] == "a.png"
    assert (content["visible"], content["tokens"], content["kind"], content["ratio"]) == (16, 32, "running", 0.5)
    ((shown, filled, _, _, texts, _, columns),) = drawn
    assert torch.equal(shown, clip) and torch.equal(filled, want.video[0]) and columns == 2
    assert texts[1] == "mean and contrast of each patch taken from the clip itself"


KINDS = {
    "random": lambda clip: masking.random(1, (4, 2, 4), 0.75, generator=torch.Generator().manual_seed(3)),
    "tube": lambda clip: masking.tube(1, (4, 2, 4), 0.75, generator=torch.Generator().manual_seed(3)),
    "frame": lambda clip: masking.frame(1, (4, 2, 4), 0.75, generator=torch.Generator().manual_seed(3)),
    "running": lambda clip: masking.cell_running(1, (4, 2, 4), 0.75, phase=0),
    "content": lambda clip: TokenMask.from_bool_masked(
        masking.content(clip[None], (4, 2, 4), budget=0.25).bool_masked().view(1, 4, 2, 4)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(run, checkpoint, drawn, kind):
    code, _, _ = run("reconstruct", CLIP, "--checkpoint", checkpoint, "--kind", kind, "--ratio", 0.75, "--seed", 3)
    _, mask, want = wanted(mask=KINDS[kind])
    ((_, filled, used, *_),) = drawn
    assert code == 0 and torch.equal(used.keep_idx, mask.keep_idx) and torch.equal(filled, want.video[0])


def test_a_decoder_of_pixels(run, checkpoint, drawn):
    changed = ("--set", "norm_pix_loss=false")
    code, out, _ = run("reconstruct", CLIP, "--checkpoint", checkpoint, *changed, "--dtype", "bf16", "--json")
    _, _, want = wanted(norm_pix_loss=False)
    ((_, filled, *_, texts, _, _),) = drawn
    assert code == 0 and json.loads(out)["statistics"] == "predicted" and texts[1].startswith("the decoder predicts")
    apart = (filled.int() - want.video[0].int()).abs().float().mean()
    assert 0 < apart < 2
    code, _, err = run(
        "reconstruct", CLIP, "--checkpoint", checkpoint, *changed, "--ground-truth-statistics", "--force"
    )
    assert code == 2 and "--ground-truth-statistics: got it with a decoder that predicts pixels" in err


@pytest.mark.parametrize("layout", ["mar", "mar_fast"])
def test_models_with_a_classifier_and_a_decoder(run, drawn, tmp_path, layout):
    model = small_model(**SIZES)
    with torch.no_grad():
        model.classifier.head.bias[0] = torch.nan  # which is not read, and so no error
    save_checkpoint(model, tmp_path / "mar.safetensors", layout=layout)
    assert run("reconstruct", CLIP, "--checkpoint", "mar.safetensors")[0] == 0
    ((_, filled, *_),) = drawn
    clip, mask, _ = wanted()
    assert torch.equal(filled, reconstruct(small_model(**SIZES), clip[None], mask).video[0])


def test_no_decoder(run, tmp_path):
    for number, changes in enumerate((LINEAR, {"decoder_depth": 0})):
        path = save_checkpoint(small_model(**{**changes, **SIZES}), tmp_path / f"{number}.safetensors")
        code, out, err = run("reconstruct", CLIP, "--checkpoint", path)
        assert code == 2 and out == "" and "without a pixel decoder, expected one from pre-training" in err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "a.jpg"), "--out: got 'a.jpg', expected a file name that ends with .png"),
        (("--out", "there.png"), "there.png: already exists, expected a new file"),
        (("--seed", "-1"), "--seed: got -1, expected a whole number from 0"),
        (("--ratio", "0.3"), "ratio: got 0.3, expected a whole number of the 4 slots"),
        (("--ratio", "1"), "ratio: got 1.0, expected a number in [0, 1)"),
        (("--kind", "content", "--ratio", "nan"), "--ratio: got nan, expected a number in [0, 1)"),
        (("--ratio", "0"), "--ratio: got 0.0, by which no patch is masked, expected a larger one, below 1"),
        (("--kind", "frame", "--ratio", "0.1"), "--ratio: got 0.1, by which no patch is masked"),
        (("--kind", "block"), "'block' is not one of 'running', 'random', 'tube', 'frame', 'content'"),
        (("--frames", "5"), "--frames: got 5, expected 1 to 4, the tubelets of a clip in time"),
        (("--frames", "0"), "--frames: got 0, expected 1 to 4"),
        (("--stride", "0"), "stride: got 0, expected a whole number, 1 or more"),
        (("--stride", "100"), "path: got a video of 250 frames, expected at least 701"),
        (("--dtype", "int8"), "'int8' is not one of 'fp32', 'bf16', 'fp16'"),
        (("--set", "heads=3"), "--set: got 'heads=3', expected FIELD=VALUE"),
    ],
)
def test_bad_input(run, checkpoint, tmp_path, arguments, message):
    (tmp_path / "there.png").write_bytes(b"old")
    code, out, err = run("reconstruct", CLIP, "--checkpoint", checkpoint, *arguments)
    assert code == 2 and out == "" and message in err and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pre.safetensors", "there.png"]
    assert (tmp_path / "there.png").read_bytes() == b"old"


def test_bad_files(run, checkpoint, tmp_path):
    code, _, err = run("reconstruct", "nowhere.mp4", "--checkpoint", checkpoint)
    assert code == 2 and "path: got 'nowhere.mp4', expected an existing video file" in err
    code, _, err = run("reconstruct", CLIP, "--checkpoint", "nowhere.pth")
    assert code == 2 and "'nowhere.pth', which does not exist" in err
    assert run("reconstruct", CLIP)[0] == 2 and run("reconstruct", "--help")[0] == 0


@pytest.mark.parametrize(("columns", "frames"), [(None, [0, 2, 4, 6]), (1, [0]), (2, [0, 6]), (3, [0, 4, 6])])
def test_what_is_in_the_picture(tmp_path, monkeypatch, columns, frames):
    """Rows and columns as the axes have them."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    clip, mask, want = wanted()
    config = small_model(**{**PRETRAINING, **SIZES}).config
    texts = ("bikes.mp4, a title", "what was done")
    plot.draw_reconstruction(clip, want.video[0], mask, config, texts, tmp_path / "a.png", columns)
    (figure,) = figures
    axes = np.array(figure.axes).reshape(3, len(frames))
    assert [axis.get_title() for axis in axes[0]] == [f"frame {number}" for number in frames]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["clip", "masked", "reconstruction"]
    assert figure.get_suptitle() == texts[0] and figure.get_supxlabel() == "reconstruction: what was done"
    for column, number in enumerate(frames):
        shown = [axis.images[0].get_array() for axis in axes[:, column]]
        assert np.array_equal(shown[0], clip[:, number].permute(1, 2, 0))
        assert np.array_equal(shown[1], plot.masked_frames(clip, mask, config)[number // 2])
        assert np.array_equal(shown[2], want.video[0, :, number].permute(1, 2, 0))
