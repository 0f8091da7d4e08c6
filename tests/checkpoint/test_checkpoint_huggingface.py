"""Checkpoints of transformers' three VideoMAE classes, both ways: the same outputs, in float32 and in float64."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("safetensors")

import numpy as np
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


USUAL = dict(
    image_processor_type="VideoMAEImageProcessor", do_resize=True, size={"shortest_edge": 32}, do_center_crop=True,
    crop_size={"height": 32, "width": 64}, do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
    image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], resample=2,
)  # fmt: skip
IMAGE, VIDEO, BOTH = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"
# Changes of the usual settings, and what the report says of them.
SETTINGS = {
    "as usual": ({}, ""),
    "other numbers": (dict(image_mean=[0.1, 0, 1], image_std=[2, 0.5, 0.3]), ""),
    "not normalised": (dict(do_normalize=False), "do_normalize false"),
    "not rescaled": (dict(do_rescale=False), "do_rescale false"),
    "as they are": (dict(do_rescale=False, do_normalize=False), "do_rescale false, do_normalize false"),
    "not rescaled, by bytes": (dict(do_rescale=False, image_mean=[123.7, 116, 103], image_std=[58.4, 57, 57.4]), ""),
    "to -1 .. 1": (dict(image_mean=1.0, image_std=1.0, rescale_factor=1 / 127.5), "rescale_factor 0.0078"),
    "rescaled only": (dict(do_normalize=False, rescale_factor=0.5), "rescale_factor 0.5, do_normalize false"),
    "one number": (dict(image_mean=0, image_std=0.5), ""),
    "null": (dict(image_mean=None, image_std=None, do_normalize=None), "do_normalize false"),
    "factor of null": (dict(rescale_factor=None, do_rescale=None), "do_rescale false"),
    "left out": (dict.fromkeys(USUAL, ...), "image_mean by default, image_std by default"),
    "mean left out": (dict(image_mean=..., image_std=1), "image_mean by default"),
}


def with_settings(folder, **files):
    """A model of transformers, and a folder of it with files of settings; what is ... is left out."""
    theirs = their_model("VideoMAEForVideoClassification")
    saved(folder, theirs)
    for name, settings in files.items():
        (folder / f"{name}.json").write_text(json.dumps({key: it for key, it in settings.items() if it is not ...}))
    return theirs


@pytest.mark.parametrize("case", SETTINGS)
def test_processor_settings(tmp_path, case):
    """Clips of uint8 give transformers' logits of what its processor makes of them."""
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    changes, said = SETTINGS[case]
    settings = {name: value for name, value in {**USUAL, **changes}.items() if value is not ...}
    frames = torch.randint(256, (2, FRAMES, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    for file, content in (
        (IMAGE, settings),
        (VIDEO, settings),
        (BOTH, {"image_processor": settings}),
        (BOTH, {"video_processor": settings}),
    ):
        folder = tmp_path / f"{file}{len(list(tmp_path.iterdir()))}"
        theirs = with_settings(folder, **{file.removesuffix(".json"): content})
        if file == IMAGE:
            processor = VideoMAEImageProcessorPil.from_pretrained(folder, do_resize=False, do_center_crop=False)
            pixels = torch.tensor(np.array(processor([list(clip.numpy()) for clip in frames])["pixel_values"]))
            pixels = pixels.float()
        ours = from_pretrained(folder)
        with torch.no_grad():
            want = theirs(pixels).logits
            assert relative(ours(frames.transpose(1, 2)).logits, want) <= 1e-5
        origin = ours.load_report.origins["mean"]
        assert origin.startswith(file) and said in origin
        if case == "as usual":
            assert not any("carried" in remark for remark in ours.load_report.remarks)
            assert ours.config.mean == tuple(USUAL["image_mean"])  # the very same numbers


REFUSED = {
    "do_rescale": dict(do_rescale="no"),
    "do_normalize": dict(do_normalize=2),
    "rescale_factor, null": dict(rescale_factor=None),
    "rescale_factor": dict(rescale_factor=0),
    "rescale_factor, a list": dict(rescale_factor=[1 / 255] * 3),
    "image_mean": dict(image_mean=[0.5, 0.5]),
    "image_mean, a word": dict(image_mean="imagenet"),
    "image_mean, not a number": dict(image_mean=[0.5, float("nan"), 0.5]),
    "image_std": dict(image_std=[0.5, 0.5, 0]),
    "image_std, negative": dict(image_std=-1),
    "image_mean, of another processor": dict(image_mean=..., image_processor_type="ViTImageProcessor"),
    "image_std, null": dict(image_std=None),
    "offset": dict(image_processor_type="VivitImageProcessor", offset=True),
    "offset, by default": dict(image_processor_type="VivitImageProcessor"),
    "do_flip_channel_order": dict(image_processor_type="MobileViTImageProcessor", do_flip_channel_order=True),
}


@pytest.mark.parametrize("case", REFUSED)
def test_processor_settings_refused(tmp_path, case):
    with_settings(tmp_path / "a", preprocessor_config={**USUAL, **REFUSED[case]})
    name = case.split(",")[0]
    with pytest.raises(ValueError, match=rf"preprocessor_config.json, {name}: got .*expected .*or give mean= and std="):
        from_pretrained(tmp_path / "a")
    given = from_pretrained(tmp_path / "a", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert given.load_report.origins["std"] == "given" and given.config.std == (0.5, 0.5, 0.5)


def test_files_of_processors(tmp_path):
    """The nested file goes first, as for transformers; two processors that do not agree are refused."""
    other = dict(USUAL, image_mean=0.25)
    with_settings(tmp_path / "bare", tokenizer_config={})
    assert from_pretrained(tmp_path / "bare").load_report.origins["mean"] == "assumed: the file does not say"
    for name, files in {
        "nested": dict(
            processor_config={"image_processor": other, "video_processor": other}, preprocessor_config=USUAL
        ),
        "legacy": dict(processor_config={"processor_class": "A"}, preprocessor_config=other),
        "both": dict(video_preprocessor_config=other, preprocessor_config=other),
    }.items():
        with_settings(tmp_path / name, **files)
        assert from_pretrained(tmp_path / name).config.mean == (0.25, 0.25, 0.25)
    with_settings(tmp_path / "apart", video_preprocessor_config=other, preprocessor_config=USUAL)
    with pytest.raises(ValueError, match=r"image_mean and image_std: got mean .*0.485.* but mean .*by video_preproc"):
        from_pretrained(tmp_path / "apart")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(resample=3), "resample 3"),
        (dict(size={"height": 32, "width": 32}), "size {'height': 32, 'width': 32}"),
        (dict(size=32), ""),
        (dict(crop_size=224), "crop_size {'height': 224, 'width': 224}"),
        (dict(do_resize=False, do_center_crop=False), "do_resize False, do_center_crop False"),
    ],
)
def test_other_frames_are_remarked(tmp_path, changes, said):
    with_settings(tmp_path / "a", preprocessor_config={**USUAL, **changes})
    remarks = [remark for remark in from_pretrained(tmp_path / "a").load_report.remarks if "not carried over" in remark]
    assert len(remarks) == bool(said)
    assert not said or f"by preprocessor_config.json: {said}; the reader of videos" in remarks[0]


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
    assert set(ours.load_report.initial.values()) == {"zero: config.json says that query and value have no bias"}
    check_outputs(theirs, ours)


def test_a_key_that_is_allowed_to_be_missing():
    """Query, key and value are one weight of ours: without one of them it is initial, and the others are told."""
    state = their_model("VideoMAEModel").state_dict()
    stem = "encoder.layer.1.attention.attention"
    del state[f"{stem}.key.weight"]
    report = from_pretrained(state, num_heads=3, allow_missing="*.key.weight").load_report
    assert list(report.initial) == ["encoder.blocks.1.attn.qkv.weight"]
    assert set(report.ignored) == {f"{stem}.query.weight", f"{stem}.value.weight"}
    assert "rest of encoder.blocks.1" in str(report)


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
    assert {name.split(".")[0] for name in model.load_report.initial} == {"classifier"}
    assert model(clip(frames=12)).logits.shape == (2, 4)


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
    (folder / "processor_config.json").write_text('{"image_processor": {"image_mean": 0.25}}')
    hub = StandIn(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    model = from_pretrained("owner/some-model", revision="v1")
    assert model.load_report.source == "owner/some-model" and model.config.mean == (0.25,) * 3
    assert all(call[:2] == ("owner/some-model", "v1") for call in hub.calls)
    assert len(hub.calls) == (2 if form == "bin" else 1)
    assert (tmp_path / "cache/pytorch_model.bin").exists() == (form == "bin")  # weights are fetched once
    check_outputs(theirs, model)


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
