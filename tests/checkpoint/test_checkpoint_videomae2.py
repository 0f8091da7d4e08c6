"""VideoMAE v2: folders of the hub, distilled and dual-masked files; outputs are those of a plain implementation."""

import argparse
import json

import pytest

pytest.importorskip("safetensors")

import torch
from checkpoint_cases import LINEAR, PRETRAINING, SMALL, TOLD, clip, fine_tuned_names, same_weights, small_model
from helpers import relative
from safetensors.torch import load_file
from videomae2_cases import v2_folder, v2_model, v2_state

import mar_fast
from mar_fast import MAR, cost, from_pretrained, named_config, reference, save_checkpoint

FEATURES = {**LINEAR, "num_classes": 0}
IMAGENET = {
    "image_processor_type": "VideoMAEImageProcessor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "size": {"shortest_edge": 32},
}


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_hub_folder(tmp_path, prefix, classes, eps):
    """Read whole; pooled features or logits are the plain implementation's, in float32 and in float64."""
    told = dict(num_classes=classes, layer_norm_eps=eps)
    ours = from_pretrained(v2_folder(tmp_path / "a", prefix, IMAGENET, **told))
    report, theirs = ours.load_report, v2_model(**told)
    assert report.layout == "VideoMAE v2 hub" and not report.initial and not report.ignored and not report.warnings
    assert sorted(report.read) == sorted(prefix + name.removeprefix("model.") for name in theirs.state_dict())
    config = ours.config
    assert (config.classifier, config.num_classes, config.final_norm, config.mask_ratio) == (
        "linear",
        classes,
        False,
        0,
    )
    assert config.encoder_eps == config.classifier_norm_eps == eps
    assert (config.num_frames, config.image_size) == (SMALL["num_frames"], SMALL["image_size"])
    assert report.origins["num_heads"] == "config.json, model_config.num_heads"
    plain = reference.MAR(config)
    plain.load_state_dict(ours.state_dict())
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        with torch.no_grad():
            want = theirs.to(dtype)(clip().to(dtype))
            got, again = (model.to(dtype).eval()(clip().to(dtype)).logits for model in (ours, plain))
        assert got.shape == want.shape == (2, classes or 96)
        assert relative(got, want) <= bound and relative(again, want) <= bound


def test_transformers_computes_the_same():
    """The other independent implementation: VideoMAEModel of transformers, whose mean goes through fc_norm."""
    transformers = pytest.importorskip("transformers")
    from huggingface_cases import their_model

    theirs = their_model("VideoMAEForVideoClassification", layer_norm_eps=1e-6)
    theirs.fc_norm.eps = 1e-6
    assert isinstance(theirs, transformers.VideoMAEForVideoClassification)
    told = dict(num_frames=SMALL["num_frames"], image_size=SMALL["image_size"], num_heads=3)
    ours = from_pretrained(theirs.state_dict(), encoder_eps=1e-6, classifier_norm_eps=1e-6, position="formula", **told)
    shell = v2_model(num_classes=ours.config.num_classes, mlp_ratio=ours.config.mlp_ratio)
    names = fine_tuned_names(ours.state_dict())
    shell.model.load_state_dict(names)
    with torch.no_grad():
        want = theirs(clip().transpose(1, 2)).logits
        assert relative(shell(clip()), want) <= 1e-5 and relative(ours(clip()).logits, want) <= 1e-5


def test_without_mean_pooling(tmp_path):
    """Token 0 after the last norm: the first feature of the encoder alone; a head on it is refused."""
    told = dict(use_mean_pooling=False)
    ours = from_pretrained(v2_folder(tmp_path / "a", **told))
    assert ours.config.classifier is None and ours.config.final_norm
    with torch.no_grad():
        assert relative(ours(clip()).features[:, 0], v2_model(**told)(clip())) <= 1e-5
    with pytest.raises(ValueError, match="got a classifier that reads token 0"):
        from_pretrained(v2_folder(tmp_path / "b", num_classes=5, **told))


@pytest.mark.parametrize("classifier", ["linear", "bridging"])
def test_a_new_head(tmp_path, classifier):
    """num_classes= on a folder without a head: fc_norm is kept and the head is new, or a whole new classifier."""
    folder = v2_folder(tmp_path / "a")
    given = {} if classifier == "linear" else {"classifier": "bridging"}
    model = from_pretrained(folder, num_classes=5, **given)
    initial = set(model.load_report.initial)
    assert model.config.classifier == classifier and model(clip()).logits.shape == (2, 5)
    if classifier == "linear":
        assert initial == {"classifier.head.weight", "classifier.head.bias"}
        assert torch.equal(
            model.classifier.norm.weight, load_file(folder / "model.safetensors")["model.fc_norm.weight"]
        )
    else:
        assert initial == {name for name in model.state_dict() if name.startswith("classifier.")}


def test_a_state_dict_says_nothing_of_its_head():
    """Without config.json a head that is not there has been lost, unless the caller says that there is none."""
    state = v2_state()
    with pytest.raises(ValueError, match=r"2 missing \(head.weight; head.bias\)"):
        from_pretrained(state, num_classes=5, **TOLD)
    model = from_pretrained(state, num_classes=0, **TOLD)
    with torch.no_grad():
        assert relative(model(clip()).logits, v2_model()(clip())) <= 1e-5


def test_distilled_file(tmp_path):
    """vit_b_k710_dl_from_giant.pth: fine-tuned names under "module", beside the arguments of the run."""
    model = small_model(**LINEAR, num_classes=710)
    path = tmp_path / "vit_s_k710_dl_from_giant.pth"
    arguments = argparse.Namespace(model="vit_small_patch16_224", num_frames=6, input_size=32, nb_classes=710)
    torch.save({"module": fine_tuned_names(model.state_dict()), "args": arguments}, path)
    back = from_pretrained(path, **{**TOLD, "image_size": (32, 64)})
    assert back.config.num_classes == 710 and same_weights(back, model)


def test_dual_masked_file(tmp_path):
    """vit_g_hybrid_pt_1200e.pth: pre-training names, patch 14, 4 decoder blocks, 1176 values a tubelet."""
    sizes = dict(patch_size=(2, 14, 14), image_size=(28, 56), mlp_ratio=48 / 11, embed_dim=66, num_heads=3)
    model = small_model(**PRETRAINING, **sizes, decoder_depth=4, decoder_mlp_ratio=48 / 11, decoder_embed_dim=66)
    torch.save({"model": model.state_dict(), "epoch": 1199}, tmp_path / "a.pth")
    told = {**TOLD, "image_size": (28, 56), "decoder_num_heads": 3}
    back = from_pretrained(tmp_path / "a.pth", **told)
    assert same_weights(back, model) and not back.load_report.initial and not back.load_report.ignored
    for name in back.load_report.origins:
        assert getattr(back.config, name) == getattr(model.config, name), name
    assert back.decoder.head.weight.shape == (2 * 14 * 14 * 3, 66)
    written = save_checkpoint(back, tmp_path / "a.safetensors", layout="videomae")
    names, want = load_file(written), model.state_dict()
    assert names.keys() == want.keys() and all(torch.equal(names[name], want[name]) for name in want)


@pytest.mark.parametrize("classes", [0, 7])
def test_written_folder(tmp_path, classes):
    """By hand on the other side: the names, and a config.json from which the plain implementation is built."""
    model = small_model(**{**LINEAR, "num_classes": classes}, encoder_eps=1e-5, classifier_norm_eps=1e-5)
    path = save_checkpoint(model, tmp_path / "a", layout="videomae2")
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "VideoMAEv2_Base"
    theirs = v2_model(**config["model_config"])
    theirs.load_state_dict(load_file(path / "model.safetensors"))
    with torch.no_grad():
        assert relative(theirs(clip()), model(clip()).logits) <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(classifier=None, decoder_depth=0), "classifier, for layout 'videomae2': got None, expected 'linear'"),
        (
            dict(num_classes=7, **{**LINEAR, "decoder_depth": 2}),
            "decoder_depth, for layout 'videomae2': got 2, expected 0",
        ),
        (dict(LINEAR, classifier_norm_eps=1e-5), "classifier_norm_eps, .*: got 1e-05, expected 1e-06, as encoder_eps"),
        ({}, "got 'bridging', expected 'linear' or None"),
    ],
)
def test_what_the_layout_cannot_say(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        save_checkpoint(small_model(**change), tmp_path / "a", layout="videomae2")
    with pytest.raises(ValueError, match="num_classes, for layout 'hf': got 0, expected 1 or more"):
        save_checkpoint(small_model(**FEATURES, classifier_norm_eps=1e-5), tmp_path / "a", layout="hf")
    assert not (tmp_path / "a").exists()


def test_labels(tmp_path):
    names = [f"class {i}" for i in range(7)]
    model = small_model(**LINEAR, num_classes=7)
    back = from_pretrained(save_checkpoint(model, tmp_path / "a", layout="videomae2", labels=names))
    assert back.load_report.labels == tuple(names)


# What config.json says that mar_fast does not compute, or that the weights contradict.
CONFIGS = {
    "cosine attention": (dict(cos_attn=True), r"model_config.cos_attn: got True, expected False"),
    "layer scale": (dict(init_values=0.1), r"model_config.init_values: got 0.1, expected 0"),
    "learned positions": (dict(use_learnable_pos_emb=True), "use_learnable_pos_emb: got True, expected False"),
    "another norm": (dict(norm_layer="nn.BatchNorm1d"), "norm_layer: got 'nn.BatchNorm1d', expected 'nn.LayerNorm'"),
    "another scale": (dict(qk_scale=0.5), "qk_scale: got 0.5, expected None"),
    "another width": (dict(embed_dim=192), "model_config.embed_dim: got 192, expected 96, by the shape"),
    "another depth": (dict(depth=3), "model_config.depth: got 3, expected 2"),
    "another MLP": (dict(mlp_ratio=3), "model_config.mlp_ratio: got 3.0, expected 4.0"),
    "another patch": (dict(patch_size=14), r"patch_size: got \(2, 14, 14\), expected \(2, 16, 16\)"),
    "another tubelet": (dict(tubelet_size=1), r"got \(1, 16, 16\), expected \(2, 16, 16\)"),
    "other channels": (dict(in_chans=1), "model_config.in_chans: got 1, expected 3"),
    "classes that are not there": (dict(num_classes=7), r"2 missing \(model.head.weight; model.head.bias\)"),
    "no divisor": (dict(num_heads=5), "num_heads: got 5, expected a divisor of embed_dim 96"),
    "a word": (dict(mlp_ratio="wide"), "config.json, model_config: got a value that does not fit"),
    "a lost norm": (dict(use_mean_pooling=False), "2 missing .*model.norm.weight"),
}


@pytest.mark.parametrize("ratio", [4, 3.998, 4.001])
def test_a_rounded_mlp_ratio(tmp_path, ratio):
    """Its product with the width is rounded to a whole number of features."""
    assert from_pretrained(v2_folder(tmp_path / "a", state=v2_state(), mlp_ratio=ratio)).config.mlp_ratio == 4.0


@pytest.mark.parametrize("case", CONFIGS)
def test_config_against_weights(tmp_path, case):
    change, message = CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        from_pretrained(v2_folder(tmp_path / "a", state=v2_state(), **change))


def gone(name):
    return lambda state: state.pop(name)


def changed(name, by):
    return lambda state: state.update({name: by(state[name])})


NORM, QKV = "model.fc_norm.weight", "model.blocks.0.attn.qkv.weight"
# Damage to the weights, and the message, by the file's own names.
DAMAGE = {
    "lost bias": (gone("model.blocks.1.attn.v_bias"), r"1 missing \(model.blocks.1.attn.v_bias\)"),
    "lost fc_norm": (gone(NORM), r"1 missing \(model.fc_norm.weight\)"),
    "lost embedding": (gone("model.patch_embed.proj.weight"), "no model.patch_embed.proj.weight"),
    "lost block": (lambda s: [s.pop(name) for name in list(s) if ".1." in name], "depth: got 2, expected 1"),
    "unknown entry": (lambda s: s.update({"model.cls_token": torch.ones(1)}), r"1 unknown \(model.cls_token\)"),
    "layer scale": (lambda s: s.update({"model.blocks.0.gamma_1": torch.ones(96)}), r"unknown \(model.blocks.0.gamma"),
    "a head": (lambda s: s.update({"model.head.weight": torch.ones(5, 96)}), "num_classes: got 0, expected 5"),
    "last norm too": (lambda s: s.update({"model.norm.weight": torch.ones(96)}), r"unknown \(model.norm.weight\)"),
    "learned table": (lambda s: s.update({"model.pos_embed": torch.ones(1, 24, 96)}), "model.pos_embed .values up to"),
    "entry outside": (lambda s: s.update({"blocks.0.norm1.weight": torch.ones(96)}), r"unknown \(blocks.0.norm1"),
    "transposed": (changed(QKV, torch.t), r"attn.qkv.weight: got shape \(96, 288\), expected \(288, 96\)"),
    "integers": (changed(NORM, torch.Tensor.long), "model.fc_norm.weight: got torch.int64"),
    "NaN": (changed(NORM, lambda value: value * torch.nan), r"with NaN or infinity \(model.fc_norm.weight\)"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights(tmp_path, case):
    damage, message = DAMAGE[case]
    state = v2_state()
    damage(state)
    state = {name: value.contiguous() for name, value in state.items()}
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(v2_folder(tmp_path / "a", state=state))
    assert "got" in str(caught.value) and "expected" in str(caught.value)


def test_a_table_by_the_formula_is_passed_over(tmp_path):
    table = v2_model().model.pos_embed
    model = from_pretrained(v2_folder(tmp_path / "a", state={**v2_state(), "model.pos_embed": table}))
    assert list(model.load_report.ignored) == ["model.pos_embed"]


def test_config_of_another_model(tmp_path):
    folder = v2_folder(tmp_path / "a")
    content = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"model_type": "internvideo2"}, "model_type: got 'internvideo2', expected 'VideoMAEv2_Base'"),
        ({"model_config": [1]}, "model_config: got list, expected an object"),
    ):
        (folder / "config.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=message):
            from_pretrained(folder)


def test_what_is_not_carried_over_is_said(tmp_path):
    state = v2_state()
    bare = {name: tensor for name, tensor in state.items() if "_bias" not in name}
    folder = v2_folder(tmp_path / "a", state=bare, qkv_bias=False, drop_rate=0.1, warp=9, drop_path_rate=0.2)
    model = from_pretrained(folder)
    assert set(model.load_report.initial.values()) == {"zero: config.json says that query and value have no bias"}
    assert not model.encoder.blocks[0].attn.q_bias.any() and model.config.drop_path_rate == 0.2
    said = "\n".join(model.load_report.remarks)
    assert "not carried over, without effect in evaluation: drop_rate 0.1" in said and "not read: warp" in said


def test_another_size_is_interpolated(tmp_path):
    """config.json says the clip's size, so no choice is asked for."""
    model = from_pretrained(v2_folder(tmp_path / "a"), num_frames=12)
    assert model.config.position_grid == (3, 2, 4) and model(clip(frames=12)).logits.shape == (2, 96)


def test_features_are_no_classifier():
    model = small_model(**FEATURES)
    with pytest.raises(ValueError, match="got one without a classifier"):
        mar_fast.eval.classify(model, clip())
    with pytest.raises(ValueError, match="num_classes: got 0, expected a whole number, 1 or more"):
        named_config("mar_vit_base", num_classes=0)


# As published for VideoMAE v2 (arXiv 2303.16727), 16 x 224 x 224: parameters in M, multiply-adds in G. Parameters are
# rounded up there, and its counter counts a little more than matrix products.
PUBLISHED = {"small": (22, 57), "base": (87, 180), "large": (305, 597), "huge": (633, 1192), "giant": (1012, 2544)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    config = named_config(f"videomae_vit_{size}", num_classes=400)
    count = cost.count(config)
    with torch.device("meta"):
        parameters = sum(value.numel() for value in MAR(config).parameters())
    assert parameters == count.parameters
    millions, giga = PUBLISHED[size]
    assert millions - 1 < parameters / 1e6 < millions + 0.2
    assert count.multiply_adds / 1e9 == pytest.approx(giga, rel=2.5e-3)


# Embed_dim, blocks, heads and values a tubelet of the published pre-training decoders: VideoMAE's, of which MAR has
# base and large; giant is VideoMAE v2's, whose huge has the decoder of large here: that has 8 heads too.
DECODERS = {
    "small": (192, 4, 3, 1536),
    "base": (384, 4, 6, 1536),
    "large": (512, 12, 8, 1536),
    "huge": (640, 12, 8, 1536),
    "giant": (512, 4, 8, 1176),
}


@pytest.mark.parametrize("size", DECODERS)
def test_published_decoders(size):
    config = named_config(f"mar_vit_{size}")
    embed_dim, *_ = got = config.decoder_embed_dim, config.decoder_depth, config.decoder_num_heads, config.patch_values
    assert got == DECODERS[size]
    assert mar_fast.config.known_heads("decoder_", embed_dim, 1) == config.decoder_num_heads
    with torch.device("meta"):
        assert MAR(config).decoder.head.weight.shape == (config.patch_values, embed_dim)
