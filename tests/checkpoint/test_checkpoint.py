"""from_pretrained and save_checkpoint: every layout, what comes out of it, and the report."""

import pytest

pytest.importorskip("safetensors")

import argparse
import copy
import dataclasses
import json
import logging
import pickle
import re
from pathlib import Path

import numpy as np
import torch
from checkpoint_cases import (
    LINEAR,
    PRETRAINING,
    SMALL,
    TOLD,
    clip,
    fine_tuned_names,
    mar_names,
    random_weights,
    same_weights,
    small_model,
)
from helpers import GOLDEN, golden_clip, golden_weights, normalised, relative, small_config, tiny_config
from safetensors.torch import save_file

import mar_fast
from mar_fast import from_pretrained, reference, save_checkpoint
from mar_fast.layers import sinusoid_table

BRIDGE = dict(bridge_num_heads=2, decoder_num_heads=3)


@pytest.mark.parametrize("percent", [50, 75])
def test_golden_file(tmp_path, percent):
    """A file as MAR writes it, with the weights of the golden data: the logits of the original."""
    source = mar_fast.MAR(tiny_config())
    names = golden_weights(source)
    parameters = dict(source.named_parameters())
    state = {theirs: parameters[ours].detach() for theirs, ours in names.items()}
    state |= {
        "mean": torch.tensor(mar_fast.config.IMAGENET_MEAN).view(1, 3, 1, 1, 1),
        "std": torch.tensor(mar_fast.config.IMAGENET_STD).view(1, 3, 1, 1, 1),
        "pos_embed": sinusoid_table(1568, 384)[None],
        "cls_head.mask_token": torch.randn(1, 1, 512),
    }
    torch.save({"model_state": state, "epoch": 3}, tmp_path / "mar.pyth")
    model = from_pretrained(tmp_path / "mar.pyth", num_heads=3, mask_ratio=percent / 100)
    assert model.config == tiny_config(mask_ratio=percent / 100) and not model.training
    golden = np.load(GOLDEN / f"mar_tiny_eval_{percent}.npz")
    with torch.no_grad():
        out = model(normalised(golden_clip(2, 11)))
    assert relative(out.logits, golden["logits"]) <= 1e-6
    assert relative(out.features[:, ::97, ::41], golden["features"]) <= 1e-6
    report = model.load_report
    assert len(report.read) == 117 and report.layout == "MAR" and not report.initial and not report.warnings
    assert set(report.ignored) == {"mean", "std", "pos_embed", "cls_head.mask_token"}
    assert "position table of the formula" in report.ignored["pos_embed"]
    assert "nothing in MAR uses it" in report.ignored["cls_head.mask_token"]
    assert "weights read under 'model_state'" in report.remarks


@pytest.mark.parametrize("file", ["a.pt", "a.bin", "a.ckpt", "a.PTH", "a.pkl", "a.pth.tar", "a.SafeTensors"])
def test_videomae_fine_tuned_v2(tmp_path, file):
    """fc_norm and head, as VideoMAE v2 has them, under "module", against the plain reference."""
    plain = random_weights(reference.MAR(small_config(**SMALL, **LINEAR)))
    state = fine_tuned_names(plain.state_dict())
    if file.lower().endswith("safetensors"):
        save_file(state, tmp_path / file)
    else:
        torch.save({"module": state}, tmp_path / file)
    model = from_pretrained(str(tmp_path / file), **TOLD)
    assert model.load_report.layout == "VideoMAE fine-tuned" and model.config.mask_ratio == 0
    assert model.config.classifier == "linear" and not model.config.final_norm and not model.config.decoder_depth
    with torch.no_grad():
        assert relative(model(clip()).logits, plain(clip()).logits) <= 1e-6


def inside(state, wrapper):
    """Names of a model of which each block, each patch embedding and each attention is wrapped."""
    part = re.compile(r"((blocks\.\d|patch_embed|attn)\.)")
    return {part.sub(rf"\1{wrapper}.", name): value for name, value in state.items()}


def under(state, begin):
    return {begin + name: value for name, value in state.items()}


# content of a file, what the report must say
ENVELOPES = {
    "bare": (lambda state: state, ""),
    **{key: (lambda state, key=key: {key: state, "epoch": 7, "best": torch.tensor(0.5)}, f"read under '{key}'")
       for key in ("model", "module", "model_state", "model_state_dict", "model_ema_state", "model_ema", "state_dict",
                   "state_dict_ema", "ema_state_dict", "ema")},
    "DDP": (lambda state: {"model": under(state, "module.")}, "'module.' taken off"),
    "compiled": (lambda state: under(state, "_orig_mod."), "'_orig_mod.' taken off"),
    "DDP of a compiled model": (lambda state: under(state, "module._orig_mod."), "'module.' taken off"),
    "compiled blocks": (lambda state: {"model": inside(state, "_orig_mod")}, "'_orig_mod.' taken off"),
    "compiled blocks in DDP": (lambda state: under(inside(state, "_orig_mod"), "module."), "'module.' taken off"),
    "checkpointed compiled blocks": (
        lambda state: inside(state, "_checkpoint_wrapped_module._orig_mod"), "'_checkpoint_wrapped_module.' taken off",
    ),
    "FSDP": (
        lambda state: under(inside(state, "_fsdp_wrapped_module"), "_fsdp_wrapped_module."), "'_fsdp_wrapped_module.'",
    ),
    "DeepSpeed by Lightning": (lambda state: {"module": under(state, "_forward_module.model.")}, "'_forward_module.'"),
    "DeepSpeed": (lambda state: {"module": state, "param_shapes": [{"a": torch.Size([2])}]}, "'module'"),
    "AveragedModel": (lambda state: {"n_averaged": torch.tensor(3), **under(state, "module.")}, "AveragedModel"),
    "Lightning": (lambda state: {"state_dict": under(state, "net.model."), "loops": {}}, "'net.model.' taken off"),
    "args": (lambda state: {"model": state, "args": argparse.Namespace(model="x", num_frames=6, input_size=224)}, ""),
    "legacy": (lambda state: {"model": state}, ""),
    "deep": (lambda state: {"state_dict": {"model": state}}, "read under 'state_dict'"),
    "plain values": (
        lambda state: {"model": state, "best": np.float32(0.5), "at": [np.int64(3), np.bool_(1)], "out": Path("a")}, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_envelopes(tmp_path, envelope):
    model = small_model(**PRETRAINING)
    wrap, said = ENVELOPES[envelope]
    content = wrap(model.state_dict())
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=envelope != "legacy")
    before = set(torch.serialization.get_safe_globals())
    for source in (tmp_path / "a.pth", content):
        back = from_pretrained(source, decoder_num_heads=3, **TOLD)
        assert same_weights(back, model) and not back.load_report.ignored
        assert any(said in remark for remark in ["", *back.load_report.remarks])
    assert set(torch.serialization.get_safe_globals()) == before and argparse.Namespace not in before


# content of a file with two models, the key of the second; the error names them all where none is the usual one
CHOICES = {
    "unknown keys": (lambda one, two: {"student": one, "teacher": two, "epoch": 1}, "teacher", "'student', 'teacher'"),
    "inside one": (lambda one, two: {"nets": {"a": one, "b": two}}, "nets.b", "'nets.a', 'nets.b'"),
    "inside a known one": (lambda one, two: {"state_dict": {"b": two}}, "state_dict.b", "'state_dict.b'"),
    "two models in one": (
        lambda one, two: {"state_dict": {**under(one, "module.net."), **under(two, "module.ema_net.module.")}},
        "ema_net",
        "'net', 'ema_net'",
    ),
    "beside a loss": (lambda _, two: {**under(two, "net."), "loss.scale": torch.ones(1)}, "net", "1 unknown .loss"),
    "the usual one": (lambda one, two: {"model": two, "teacher": one}, None, ""),
    "beside the usual one": (lambda one, two: {"model": one, "teacher": two}, "teacher", ""),
    "the first of the usual ones": (lambda one, two: {"model_ema": one, "model": two}, None, ""),
    "the second of the usual ones": (lambda one, two: {"model": one, "model_ema": two}, "model_ema", ""),
}


@pytest.mark.parametrize("case", CHOICES)
def test_model_key(case):
    wrap, key, listed = CHOICES[case]
    one, two = small_model(**PRETRAINING), small_model(seed=2, **PRETRAINING)
    content, told = wrap(one.state_dict(), two.state_dict()), dict(decoder_num_heads=3, **TOLD)
    model = from_pretrained(content, model_key=key, **told)
    assert same_weights(model, two)
    assert "of the usual" not in case or "not read (model_key= chooses)" in str(model.load_report)
    if listed:
        with pytest.raises(ValueError, match=listed if "unknown" in listed else f"model_key= opens one of {listed}"):
            from_pretrained(content, **told)


def test_joint_biases():
    """timm has one bias for query, key and value; that of the key is without effect."""
    model = small_model(**PRETRAINING)
    state = model.state_dict()
    for name in [name for name in state if name.endswith("q_bias")]:
        query, value = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.randn(len(query)), value])
    told = dict(decoder_num_heads=3, **TOLD)
    back = from_pretrained(state, **told)
    assert same_weights(back, model) and set(back.load_report.read) == set(state)
    name = "encoder.blocks.1.attn.qkv.bias"
    for damaged, message in (
        (state[name][:-3], r"blocks.1.attn.qkv.bias: got shape \(95,\), expected \(96,\)"),
        (torch.ones(()), r"blocks.1.attn.qkv.bias: got shape \(\), expected \(96,\)"),
        (state[name].where(torch.arange(288) != 100, torch.nan), "blocks.1.attn.qkv.bias .its part for the key is not"),
    ):
        with pytest.raises(ValueError, match=message):
            from_pretrained({**state, name: damaged}, **told)
    del state[name]
    with pytest.raises(ValueError, match=r"missing \(encoder.blocks.1.attn.qkv.bias"):
        from_pretrained(state, **told)


def test_known_sizes():
    """ViT-B, ViT-L, ... need no number of heads; here with one narrow MLP, which is quick."""
    for width, depth, heads in ((768, 12, 12), (384, 12, 6)):
        config = small_config(
            **{**SMALL, **LINEAR, "embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": 0.25}
        )
        state = fine_tuned_names(mar_fast.MAR(config).state_dict())
        model = from_pretrained(state, position="formula", **SMALL)
        assert model.config.num_heads == heads and model.config.mlp_ratio == 0.25


def test_mean_and_std_of_a_mar_file():
    state = mar_names(small_model().state_dict())
    told = {**TOLD, **BRIDGE}
    model = from_pretrained(
        {**state, "mean": torch.tensor([0.5, 0.4, 0.3]), "std": torch.full((3, 1, 1, 1), 0.25)}, **told
    )
    assert model.config.mean == (0.5, 0.4, 0.3) and model.config.std == (0.25, 0.25, 0.25)
    assert from_pretrained(state, **told).config.mean == mar_fast.config.IMAGENET_MEAN


# What comes out: parts that are there, made anew, or left out.


@pytest.mark.parametrize("kind", [None, "bridging", "linear"])
def test_fine_tuning_a_pretraining_file(tmp_path, kind):
    """The main path: num_classes makes a new classifier, everything else is the checkpoint's."""
    pre = small_model(**PRETRAINING)
    asked = dict(num_classes=5, drop_path_rate=0.1, **({"classifier": kind} if kind else {}))
    model = from_pretrained({"model": pre.state_dict()}, decoder_num_heads=3, **TOLD, **asked)
    ours = from_pretrained(save_checkpoint(pre, tmp_path / "pre.safetensors"), **asked)
    assert ours.config == model.config
    assert model.config.classifier == (kind or "bridging") and model.config.drop_path_rate == 0.1
    assert model.config.mask_ratio == (0.0 if kind == "linear" else 0.5)
    ours, theirs = model.state_dict(), pre.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    fresh = model.load_report.initial
    assert set(fresh) == set(ours) - set(theirs) and all(name.startswith("classifier.") for name in fresh)
    assert f"new: the file has no {kind or 'bridging'} classifier" in str(model.load_report)
    assert ours["classifier.head.weight"].std() > 0 and bool((ours["classifier.norm.weight"] == 1).all())
    assert torch.equal(ours["classifier.head.bias"], torch.zeros(5))
    out = model.train()(clip())
    mar_fast.mar_loss(out, torch.tensor([1, 4]), 0.0 if kind == "linear" else 0.1).backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "classifier" in name)


def test_another_classifier_on_a_fine_tuned_file():
    """A bridging classifier on a Kinetics classifier: its head is left out because that was asked for."""
    state = fine_tuned_names(small_model(**LINEAR).state_dict())
    model = from_pretrained(state, classifier="bridging", num_classes=4, **TOLD)
    assert set(model.load_report.ignored) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert "classifier='bridging' was asked for" in str(model.load_report)
    assert model.config.num_classes == 4 and model.config.mask_ratio == 0.5


def test_another_number_of_classes():
    state = fine_tuned_names(small_model(**LINEAR).state_dict())
    with pytest.raises(ValueError, match=r"num_classes: got 5, expected 11 .*allow_mismatched='classifier.head"):
        from_pretrained(state, num_classes=5, **TOLD)
    for pattern in ("classifier.head.*", "head.*"):
        model = from_pretrained(state, num_classes=5, allow_mismatched=pattern, **TOLD)
        assert set(model.load_report.initial) == {"classifier.head.weight", "classifier.head.bias"}
        assert torch.equal(model.classifier.norm.weight, state["fc_norm.weight"])


def test_a_missing_head_needs_its_size():
    state = fine_tuned_names(small_model(**LINEAR).state_dict())
    del state["head.weight"], state["head.bias"]
    with pytest.raises(ValueError, match="num_classes: got none: the file has no head that says, expected num_cl"):
        from_pretrained(state, allow_missing="head.*", **TOLD)
    model = from_pretrained(state, allow_missing="head.*", num_classes=3, **TOLD)
    assert model.classifier.head.weight.shape == (3, 96) and bool(model.classifier.head.weight.any())
    assert torch.equal(model.classifier.norm.bias, state["fc_norm.bias"])


def test_parts_left_out():
    state = mar_names(small_model().state_dict()) | {"decoder.pos_embed": torch.ones(1, 24, 48)}  # as if learned
    model = from_pretrained(state, classifier=None, decoder_depth=0, **TOLD)
    assert model.classifier is None and model.decoder is None
    ignored = model.load_report.ignored
    assert ignored["mask_token"] == ignored["decoder.pos_embed"] == "decoder_depth=0 was asked for"
    assert ignored["cls_head.norm.weight"] == "classifier=None was asked for"
    assert all(name.startswith("backbone.") for name in model.load_report.read)


def test_new_decoder_and_new_final_norm():
    state = fine_tuned_names(small_model(**LINEAR).state_dict())
    model = from_pretrained(
        state, decoder_depth=1, decoder_embed_dim=48, decoder_num_heads=3, final_norm=True, mask_ratio=0.5, **TOLD
    )
    fresh = set(model.load_report.initial)
    assert {"mask_token", "encoder.norm.weight", "decoder.head.bias"} <= fresh
    assert bool((model.encoder.norm.weight == 1).all()) and bool(model.mask_token.any())


def test_allowed_by_name():
    state = small_model(**PRETRAINING).state_dict()
    lost, extra = "encoder.blocks.1.mlp.fc2.bias", "encoder.blocks.0.gamma_1"
    del state[lost]
    state[extra] = torch.ones(3)
    state["decoder.norm.bias"] = torch.full((48,), torch.inf)
    model = from_pretrained(
        state,
        allow_missing=lost,
        allow_unknown=["*.gamma_?"],
        allow_nonfinite=("decoder.norm.*",),
        decoder_num_heads=3,
        **TOLD,
    )
    report = model.load_report
    assert list(report.initial) == [lost] and list(report.ignored) == [extra]
    assert not model.encoder.blocks[1].mlp.fc2.bias.any() and bool(model.decoder.norm.bias.isinf().all())
    assert sum(name in " ".join(report.warnings) for name in (lost, extra, "decoder.norm.bias")) == 3


# The report, dtypes, and how it is written.


def test_report(tmp_path, caplog):
    path = save_checkpoint(small_model(**PRETRAINING), tmp_path / "pre.safetensors", layout="videomae")
    with caplog.at_level(logging.INFO, logger="mar_fast.checkpoint"):
        model = from_pretrained(path, num_classes=3)
    report = model.load_report
    assert str(report) in caplog.text and str(path) in str(report)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.layout = "other"
    content = json.loads(json.dumps(report.as_dict()))
    assert content["layout"] == "VideoMAE pre-training" and content["config"]["num_classes"] == 3
    assert set(content["initial"]) == {name for name, _ in model.named_parameters() if "classifier" in name}
    assert content["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.load_report == report
    assert mar_fast.MAR(model.config).load_report is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(tmp_path, dtype):
    model = small_model(**PRETRAINING).to(dtype)
    back = from_pretrained(save_checkpoint(model, tmp_path / "a.safetensors"))
    want = {name: value.float() for name, value in model.state_dict().items()}
    assert all(torch.equal(value, want[name]) for name, value in back.state_dict().items())
    how = "rounded" if dtype == torch.float64 else "widened"
    assert f"{str(dtype)[6:]} {how} to float32" in back.load_report.remarks


def test_loading_does_not_change_the_source():
    state = small_model(**PRETRAINING).state_dict()
    before = copy.deepcopy(state)
    model = from_pretrained(state, decoder_num_heads=3, **TOLD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(state[name], before[name]) for name in before)
