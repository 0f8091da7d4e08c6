"""Checkpoints of transformers' three VideoMAE classes, both ways: the same outputs, in float32 and in float64."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("safetensors")

import torch
from checkpoint_cases import FRAMES, LINEAR, PRETRAINING, SIZE, clip, same_weights, small_model
from helpers import relative
from huggingface_cases import CLASSES, saved, their_model
from safetensors.torch import load_file

from mar_fast import TokenMask, from_pretrained, save_checkpoint

transformers = pytest.importorskip("transformers")

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-11}
every_class = pytest.mark.parametrize("case", CLASSES)


def masked_tokens():
    return torch.rand(2, 24, generator=torch.Generator().manual_seed(5)).argsort(1) < 14


@torch.no_grad()
def check_outputs(theirs, ours):
    """In both dtypes: float64 shows an eps of 1e-6 for 1e-12, which float32 hides in rounding."""
    masked = masked_tokens()
    for dtype, bound in BOUNDS.items():
        theirs, ours, video = theirs.to(dtype).eval(), ours.to(dtype).eval(), clip().to(dtype)
        if theirs.config.architectures[0] == "VideoMAEForVideoClassification":
            pairs = [(ours(video).logits, theirs(video.transpose(1, 2)).logits)]
        elif theirs.config.architectures[0] == "VideoMAEModel":
            pairs = [
                (ours(video, mask).features, theirs(video.transpose(1, 2), bool_masked_pos=bools).last_hidden_state)
                for bools, mask in ((None, None), (masked, TokenMask.from_bool_masked(masked)))
            ]
        else:
            got = ours(video, TokenMask.from_bool_masked(masked), reconstruct=True)
            want = theirs(video.transpose(1, 2), bool_masked_pos=masked)
            pairs = [(got.pixels, want.logits), (got.reconstruction_loss, want.loss)]
        for got, want in pairs:
            assert got.shape == want.shape and relative(got, want) <= bound
    theirs.float(), ours.float()


@every_class
@pytest.mark.parametrize("biases", ["q_bias", "query.bias"])
@pytest.mark.parametrize("eps", [1e-12, 1e-4])
def test_reading(tmp_path, case, biases, eps):
    theirs = their_model(case, layer_norm_eps=eps)
    ours = from_pretrained(saved(tmp_path / "a", theirs, biases))
    assert ours.load_report.layout == f"Hugging Face {case.split(',')[0]}"
    assert len(ours.load_report.read) == len(theirs.state_dict()) and not ours.load_report.initial
    config = ours.config
    assert config.encoder_eps == eps and config.mask_ratio == 0 and config.num_heads == 3
    assert config.classifier == ("linear" if "Classification" in case else None)
    if config.classifier:
        assert config.classifier_norm_eps == 1e-5 and config.num_classes == 7 and not config.final_norm
    if "PreTraining" in case:
        assert config.decoder_eps == eps and config.decoder_norm_eps == 1e-5 and config.decoder_mlp_ratio == 3
    check_outputs(theirs, ours)


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded bin", "file", "file.bin"])
def test_files(tmp_path, form):
    """Everything that transformers has written over the years: shards with an index, pickled files, a lone file."""
    theirs = their_model("VideoMAEForPreTraining")
    folder = saved(tmp_path / "a", theirs, **({"max_shard_size": "300KB"} if "sharded" in form else {}))
    if "sharded" in form:
        assert len(list(folder.glob("*.safetensors"))) > 2
    if "bin" in form:
        for file in folder.glob("*.safetensors"):
            name = file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
            torch.save(load_file(file), folder / name)
            file.unlink()
        index = folder / "model.safetensors.index.json"
        if index.exists():
            text = index.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
            (folder / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    source = {"file": folder / "model.safetensors", "file.bin": folder / "pytorch_model.bin"}.get(form, folder)
    check_outputs(theirs, from_pretrained(source))


@every_class
def test_state_dict(case):
    """Without config.json eps is transformers' default, and heads are asked for."""
    theirs = their_model(case, layer_norm_eps=1e-12)
    told = dict(num_frames=FRAMES, image_size=SIZE, position="formula", num_heads=3)
    told |= dict(decoder_num_heads=3, norm_pix_loss=theirs.config.norm_pix_loss) if "PreTraining" in case else {}
    theirs.config.architectures = [case.split(",")[0]]
    check_outputs(theirs, from_pretrained(theirs.state_dict(), **told))
    with pytest.raises(ValueError, match=r"num_heads: got none .*expected num_heads="):
        from_pretrained(theirs.state_dict())


WRITTEN = {
    "VideoMAEModel": {**PRETRAINING, "decoder_depth": 0, "final_norm": False, "encoder_eps": 1e-3},
    "VideoMAEModel, last norm": {**PRETRAINING, "decoder_depth": 0, "final_norm_eps": 1e-3, "encoder_eps": 1e-3},
    "VideoMAEForVideoClassification": {**LINEAR, "classifier_norm_eps": 1e-5, "encoder_eps": 1e-12},
    "VideoMAEForPreTraining": {**PRETRAINING, "decoder_norm_eps": 1e-5, "decoder_mlp_ratio": 2.0},
}


@pytest.mark.parametrize("case", WRITTEN)
def test_writing(tmp_path, case):
    """transformers' own from_pretrained finds everything in it and computes the same."""
    ours = small_model(**WRITTEN[case], mean=(0.4, 0.5, 0.6), patch_size=(2, 16, 16))
    path = save_checkpoint(ours, tmp_path / "a", layout="hf")
    kind = getattr(transformers, case.split(",")[0])
    theirs, found = kind.from_pretrained(path, output_loading_info=True, attn_implementation="eager")
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.use_mean_pooling is not ours.config.final_norm
    if ours.config.classifier:
        assert theirs.config.num_labels == ours.config.num_classes
    if "PreTraining" in case:  # their loss takes ImageNet's mean whatever the preprocessor says
        ours.config = ours.decoder.config = from_pretrained(path, mean=(0.485, 0.456, 0.406)).config
    check_outputs(theirs, ours)
    assert json.loads((path / "preprocessor_config.json").read_text())["image_mean"] == [0.4, 0.5, 0.6]
    assert from_pretrained(path).config.mean == (0.4, 0.5, 0.6)


def test_there_and_back(tmp_path):
    """transformers to ours to transformers: the same tensors under the same names."""
    theirs = their_model("VideoMAEForVideoClassification", layer_norm_eps=1e-12)
    saved(tmp_path / "a", theirs)
    save_checkpoint(from_pretrained(tmp_path / "a"), tmp_path / "b", layout="hf")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_edited_config_json_counts(tmp_path):
    """transformers reads config.json and nothing else, so we go by it too where it says something."""
    ours = small_model(**LINEAR, classifier_norm_eps=1e-5, drop_path_rate=0.25)
    path = save_checkpoint(ours, tmp_path / "a", layout="hf")
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, "layer_norm_eps": 1e-3}))
    back = from_pretrained(path)
    assert back.config.encoder_eps == 1e-3 and back.config.drop_path_rate == 0.25
    theirs = transformers.VideoMAEForVideoClassification.from_pretrained(path, attn_implementation="eager")
    check_outputs(theirs, back)


def test_biases_of_zero_by_configuration(tmp_path):
    """qv_bias false: there are no biases in the file, and none are missing."""
    theirs = their_model("VideoMAEModel", qv_bias=False)
    ours = from_pretrained(saved(tmp_path / "a", theirs))
    assert {note.reason for note in ours.load_report.initial} == {
        "zero: config.json says that query and value have no bias"
    }
    check_outputs(theirs, ours)


def test_a_key_that_is_allowed_to_be_missing():
    """Query, key and value are one weight of ours: without one of them it is initial, and the others are told."""
    state = their_model("VideoMAEModel").state_dict()
    stem = "encoder.layer.1.attention.attention"
    del state[f"{stem}.key.weight"]
    report = from_pretrained(state, num_heads=3, allow_missing="*.key.weight").load_report
    assert [note.name for note in report.initial] == ["encoder.blocks.1.attn.qkv.weight"]
    assert {note.name for note in report.ignored} == {
        f"{stem}.query.weight",
        f"{stem}.value.weight",
    } and "rest of encoder.blocks.1" in str(report)


def test_token_0_is_refused(tmp_path):
    theirs = their_model("VideoMAEForVideoClassification", use_mean_pooling=False)
    folder = saved(tmp_path / "a", theirs)
    for source in (folder, theirs.state_dict()):
        with pytest.raises(ValueError, match=r"got a classifier that reads token 0 .*, expected one that averages"):
            from_pretrained(source, num_heads=3)
    ours = from_pretrained(folder, classifier=None)
    with torch.no_grad():
        want = theirs.videomae(clip().transpose(1, 2)).last_hidden_state
        assert relative(ours(clip()).features, want) <= 1e-5
    videomae = {name.removeprefix("encoder."): value for name, value in ours.state_dict().items()}
    head = {"head.weight": torch.randn(7, 96), "head.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match="reads token 0"):
        from_pretrained({**videomae, **head}, num_heads=3)


def test_fine_tuning_a_pretraining_checkpoint(tmp_path):
    folder = saved(tmp_path / "a", their_model("VideoMAEForPreTraining"))
    model = from_pretrained(folder, num_classes=4, num_frames=12)
    assert model.config.classifier == "bridging" and model.config.bridge_eps == 1e-6
    assert model.config.position_grid == (3, 2, 4) and model.config.grid == (6, 2, 4)
    assert {note.name.split(".")[0] for note in model.load_report.initial} == {"classifier"}
    assert model(clip(frames=12)).logits.shape == (2, 4)


def test_leaving_the_decoder_out(tmp_path):
    theirs = their_model("VideoMAEForPreTraining")
    ours = from_pretrained(saved(tmp_path / "a", theirs), decoder_depth=0)
    assert ours.decoder is None
    with torch.no_grad():
        want = theirs.videomae(clip().transpose(1, 2)).last_hidden_state
        assert relative(ours(clip()).features, want) <= 1e-5


def test_dropout_is_reported(tmp_path):
    folder = saved(tmp_path / "a", their_model("VideoMAEModel", hidden_dropout_prob=0.1))
    assert "hidden_dropout_prob 0.1" in str(from_pretrained(folder).load_report)


class StandIn:
    """huggingface_hub without a network: the hub is a folder, and what is asked for is noted."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None):
        self.calls.append((repo_id, revision, tuple(allow_patterns)))
        cache = self.folder.with_name("cache")
        cache.mkdir(exist_ok=True)
        for file in self.folder.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                (cache / file.name).write_bytes(file.read_bytes())
        return str(cache)


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded"])
def test_hub_id(tmp_path, monkeypatch, form):
    """By a stand-in for the hub: the real one was not asked."""
    monkeypatch.chdir(tmp_path)
    theirs = their_model("VideoMAEForVideoClassification")
    folder = saved(tmp_path / "hub", theirs, **({"max_shard_size": "300KB"} if form == "sharded" else {}))
    if form != "sharded":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    if form == "bin":
        (folder / "model.safetensors").unlink()
    hub = StandIn(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    model = from_pretrained("owner/some-model", revision="v1")
    assert model.load_report.source == "owner/some-model"
    assert all(call[:2] == ("owner/some-model", "v1") for call in hub.calls)
    assert len(hub.calls) == (2 if form == "bin" else 1)
    assert (tmp_path / "cache/pytorch_model.bin").exists() == (form == "bin")  # weights are fetched once
    check_outputs(theirs, model)


def test_the_stand_in_is_like_the_hubs_client():
    """The function and the arguments that we use exist in the installed huggingface_hub."""
    import inspect

    from huggingface_hub import snapshot_download

    assert {"repo_id", "revision", "allow_patterns"} <= set(inspect.signature(snapshot_download).parameters)


def test_hub_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(*args, **kwargs):
        raise OSError("no connection\nto the hub")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fail))
    with pytest.raises(ValueError, match=r"source: got 'owner/name' at 'v2', which .* \(no connection to the hub\)"):
        from_pretrained("owner/name", revision="v2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"mar-fast\[hf\]"):
        from_pretrained("owner/name")
    Path("owner").mkdir()
    model = small_model(**LINEAR)
    save_checkpoint(model, "owner/name.safetensors")
    assert same_weights(from_pretrained("owner/name.safetensors"), model)  # a file goes before the hub
    with pytest.raises(ValueError, match=r"revision: got 'v1', expected None: .* is not a hub id"):
        from_pretrained("owner/name.safetensors", revision="v1")
