"""Damaged checkpoints: each a clear error, and never a model that is loaded by half."""

import json
import os
import re

import pytest

pytest.importorskip("safetensors")

import torch
from checkpoint_cases import LINEAR, PRETRAINING, TOLD, fine_tuned_names, mar_names, small_model
from safetensors.torch import load_file, save_file

from mar_fast import from_pretrained, save_checkpoint
from mar_fast.checkpoint.read import METADATA_KEY

BRIDGE = dict(bridge_num_heads=2, decoder_num_heads=3, **TOLD)
STATES = {
    "mar": (lambda: mar_names(small_model().state_dict()), BRIDGE),
    "ours": (lambda: small_model().state_dict(), BRIDGE),
    "pre-training": (lambda: small_model(**PRETRAINING).state_dict(), dict(decoder_num_heads=3, **TOLD)),
    "fine-tuned": (lambda: fine_tuned_names(small_model(**LINEAR).state_dict()), TOLD),
    "hf": (lambda: hf_state(), dict(num_heads=3, **{k: v for k, v in TOLD.items() if k != "num_heads"})),
}


def hf_model():
    return small_model(**LINEAR, classifier_norm_eps=1e-5, encoder_eps=1e-12)


def hf_state():
    from mar_fast.checkpoint.write import layout_for, named_tensors

    model = hf_model()
    return named_tensors(model, layout_for(model, "hf"))


@pytest.mark.parametrize("layout", STATES)
def test_whole(layout):
    """Without damage all of them load: what is red below is red because of the damage."""
    state, told = STATES[layout]
    report = from_pretrained(state(), **told).load_report
    assert len(report.read) == len(state()) and not report.initial and not report.ignored


def drop(*patterns):
    def damage(state):
        gone = [name for name in state if any(re.search(pattern, name) for pattern in patterns)]
        assert gone
        for name in gone:
            del state[name]

    return damage


def change(name, by):
    def damage(state):
        state[name] = by(state[name])

    return damage


def add(**entries):
    return lambda state: state.update({name.replace("__", "."): value for name, value in entries.items()})


def rename(old, new):
    def damage(state):
        state[new] = state.pop(old)

    return damage


def poison(value):
    def by(tensor):
        tensor = tensor.clone()
        tensor.flatten()[7] = value
        return tensor

    return by


# layout, damage, what the message must say
DAMAGE = {
    "one tensor missing": ("mar", drop(r"^cls_head.norm.bias"), r"1 missing \(cls_head.norm.bias\), expected none, or all"),
    "a whole block missing": ("fine-tuned", drop(r"^blocks.0\."), r"13 missing \(blocks.0.norm1.weight; .* and 7 more\)"),
    "last bias missing": ("hf", drop("classifier.bias"), r"1 missing \(classifier.bias\)"),
    "patch embedding missing": ("mar", drop("patch_embed.proj.weight"), "got no backbone.patch_embed.proj.weight"),
    "patch bias missing": ("mar", drop("patch_embed.proj.bias"), r"1 missing \(backbone.patch_embed.proj.bias\)"),
    "mask token missing": ("pre-training", drop("^mask_token"), r"1 missing \(mask_token\)"),
    "decoder but for its bridge": ("pre-training", drop("encoder_to_decoder"), "got no encoder_to_decoder.weight"),
    "decoder blocks missing": ("mar", drop(r"decoder\.blocks"), "got no blocks of the decoder"),
    "encoder blocks missing": ("pre-training", drop(r"^encoder\.blocks"), "got no blocks of the encoder"),
    "last norm missing": ("pre-training", drop(r"^encoder\.norm"), r"2 missing \(encoder.norm.weight; encoder.norm.bias\)"),
    "last norm of MAR missing": ("mar", drop(r"^backbone\.norm"), "2 missing"),
    "half of the last norm missing": ("ours", drop(r"^encoder\.norm\.bias"), "1 missing"),
    "classifier missing": ("fine-tuned", drop("^fc_norm", "^head"), r"4 missing \(fc_norm.weight; .*head.bias\)"),
    "classifier of MAR missing": ("mar", drop("^cls_head", "^encoder_to_cls"), r"29 missing \(encoder_to_cls_decoder.weight; cls_head"),
    "classifier of transformers missing": ("hf", drop("^fc_norm", "^classifier"), r"4 missing \(fc_norm"),
    "bridge missing": ("mar", drop("^encoder_to_cls_decoder"), "got no encoder_to_cls_decoder.weight"),
    "all query and value biases lost": (
        "hf", drop("_bias$"), r"4 missing .*The biases of query and value are lost: transformers 5.5 to 5.17",
    ),
    "value bias lost": ("fine-tuned", drop("blocks.1.attn.v_bias"), r"1 missing .*biases of query and value are lost"),
    "key lost": ("hf", drop("layer.1.attention.attention.key"), r"1 missing \(videomae.encoder.layer.1.attention.attention.key"),
    "key of a block more": (
        "hf", add(videomae__encoder__layer__2__attention__attention__key__weight=torch.ones(96, 96)), "14 missing .*layer.2",
    ),
    "key of another shape": (
        "hf", change("videomae.encoder.layer.1.attention.attention.key.weight", lambda w: w[:95]),
        r"key.weight torch.float32 \(95, 96\), .*expected three matrices",
    ),
    "key of integers": (
        "hf", change("videomae.encoder.layer.1.attention.attention.key.weight", torch.Tensor.long), "key.weight torch.int64",
    ),
    "query, key and value of integers": (
        "hf", lambda state: state.update({n: t.long() for n, t in state.items() if "layer.1.attention.attention" in n and t.ndim == 2}),
        r"1 of another shape or dtype .*got torch.int64",
    ),
    "extra": ("mar", add(cls_head__scale=torch.ones(3)), r"1 unknown \(cls_head.scale\), expected none, or allow_unknown="),
    "layer scale": ("fine-tuned", add(blocks__0__gamma_1=torch.ones(96)), r"1 unknown \(blocks.0.gamma_1\)"),
    "key bias of NaN": (
        "hf", add(videomae__encoder__layer__0__attention__attention__key__bias=torch.full((96,), torch.nan)), r"1 unknown .*key.bias",
    ),
    "key bias of MAR": ("mar", add(backbone__blocks__0__attn__k_bias=torch.ones(96)), r"1 unknown .*k_bias"),
    "both bias namings": (
        "hf", add(videomae__encoder__layer__0__attention__attention__query__bias=torch.ones(96)),
        r"got tensors 1 unknown \(.*query.bias\)",
    ),
    "fc_norm and norm": ("fine-tuned", add(norm__weight=torch.ones(96)), r"unknown \(norm.weight\)|1 missing"),
    "a learned position table": ("fine-tuned", add(pos_embed=torch.randn(1, 1568, 96)), r"unknown \(pos_embed \(values up to"),
    "a number among tensors": ("mar", add(epoch=3), r"1 unknown \(epoch \(a int and no tensor\)\)"),
    "renamed": ("mar", rename("backbone.norm.bias", "backbone.norm.beta"), r"1 missing .*norm.bias.* 1 unknown .*norm.beta"),
    "renamed to another layout": ("mar", rename("backbone.norm.bias", "encoder.norm.bias"), "1 missing.* 1 unknown"),
    "transposed": (
        "mar", change("backbone.blocks.1.mlp.fc1.weight", torch.t),
        r"1 of another shape or dtype \(backbone.blocks.1.mlp.fc1.weight: got shape \(96, 384\), expected \(384, 96\)\)",
    ),
    "transposed first": ("fine-tuned", change("blocks.0.mlp.fc1.weight", torch.t), "of another shape or dtype"),
    "transposed key": (
        "hf", change("videomae.encoder.layer.0.intermediate.dense.weight", torch.t), "of another shape or dtype",
    ),
    "channels last": (
        "fine-tuned", change("patch_embed.proj.weight", lambda w: w.permute(0, 2, 3, 4, 1)), "channels|mean",
    ),
    "flat patch embedding": (
        "fine-tuned", change("patch_embed.proj.weight", lambda w: w.flatten(1)),
        r"patch_embed.proj.weight: got shape \(96, 1536\), expected 5 dimensions",
    ),
    "no classes": ("fine-tuned", change("head.weight", lambda w: w[:0]), r"head.weight: got shape \(0, 96\), expected 2"),
    "cut head": ("fine-tuned", change("head.bias", lambda b: b[:-1]), r"head.bias: got shape \(10,\), expected \(11,\)"),
    "wider block": ("ours", change("encoder.blocks.1.norm1.weight", lambda w: torch.ones(97)), r"got shape \(97,\)"),
    "integers": ("mar", change("backbone.norm.weight", torch.Tensor.long), r"got torch.int64, expected float32 or"),
    "int8": ("fine-tuned", change("blocks.0.attn.qkv.weight", lambda w: w.to(torch.int8)), "got torch.int8"),
    "bools": ("pre-training", change("mask_token", lambda w: w > 0), r"mask_token: got torch.bool"),
    "complex": ("hf", change("fc_norm.weight", lambda w: w.to(torch.complex64)), "fc_norm.weight: got torch.complex64"),
    "meta": ("ours", change("encoder.norm.weight", lambda w: w.to("meta")), "got a meta tensor, expected values"),
    "sparse": ("fine-tuned", change("head.weight", torch.Tensor.to_sparse), "got a torch.sparse_coo tensor"),
    "NaN": ("mar", change("encoder_to_cls_decoder.weight", poison(torch.nan)), r"1 with NaN or infinity \(encoder_to_cls"),
    "infinity": ("hf", change("classifier.weight", poison(-torch.inf)), r"1 with NaN or infinity \(classifier.weight\)"),
    "beyond float32": (
        "ours", change("encoder.norm.weight", lambda w: w.double() * 1e60), r"with NaN or infinity \(encoder.norm.weight\)",
    ),
    "name twice": ("mar", add(module__mask_token=torch.zeros(1, 1, 48)), "got mask_token twice, with and without wrappers"),
    "nothing": ("mar", dict.clear, "state dict: got entries such as no tensors, expected the names of MAR"),
    "another model": ("mar", lambda state: (state.clear(), state.update({"conv1.weight": torch.ones(2)})), "such as conv1.weight"),
    "mean of four": ("mar", add(mean=torch.ones(4)), r"mean: got torch.float32 of shape \(4,\), expected 3 floating-point"),
    "mean of bytes": ("mar", add(mean=torch.tensor([123.0, 117, 104])), r"mean: got \(123.0, .*expected values in \[0, 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_state(case):
    layout, damage, message = DAMAGE[case]
    make, told = STATES[layout]
    state = dict(make())
    damage(state)
    with pytest.raises(ValueError) as caught:
        from_pretrained(state, **told)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "got" in str(caught.value) and "expected" in str(caught.value)


def test_several_faults_are_named_at_once():
    state = mar_names(small_model().state_dict())
    del state["mask_token"]
    state["extra"] = torch.ones(1)
    state["decoder.norm.bias"] = torch.full((48,), torch.nan)
    state["decoder.norm.weight"] = torch.ones(49)
    with pytest.raises(ValueError) as caught:
        from_pretrained(state, **BRIDGE)
    said = str(caught.value)
    assert all(name in said for name in ("mask_token", "extra", "decoder.norm.bias", "decoder.norm.weight"))
    assert said.count("patterns,") == 4


def test_an_encoder_alone_is_a_warning():
    """Other programs save encoders alone: not damage, but not to be passed over either."""
    state = small_model(**PRETRAINING).state_dict()
    drop(r"^decoder", "^mask_token", "^encoder_to_decoder")(state)
    report = from_pretrained(state, **TOLD).load_report
    assert report.warnings == ("the encoder alone: there is no pixel decoder in the file",)


# what the caller says, against what the file says
WRONG = {
    "heads that do not divide": (dict(num_heads=5), "num_heads: got 5, expected a divisor of embed_dim 96"),
    "no heads": (dict(num_heads=None), "num_heads: got None, expected a whole number"),
    "embed_dim": (
        dict(embed_dim=192),
        r"embed_dim: got 192, expected 96 \(shape of backbone.patch_embed.proj.weight\)",
    ),
    "depth": (dict(depth=3), r"depth: got 3, expected 2 \(blocks in the file\)"),
    "patch_size": (dict(patch_size=(2, 8, 8)), r"patch_size: got \(2, 8, 8\), expected \(2, 16, 16\)"),
    "decoder depth": (dict(decoder_depth=4), r"decoder_depth: got 4, expected 2 \(blocks"),
    "classes": (dict(num_classes=3), r"num_classes: got 3, expected 11 \(shape of cls_head.head.weight\)"),
    "classifier without classes": (dict(classifier="linear"), "num_classes: got none, expected num_classes="),
    "kind": (dict(classifier="mlp", num_classes=2), "classifier: got 'mlp', expected 'bridging', 'linear' or None"),
    "model_key": (dict(model_key="model"), "model_key: got 'model', expected one of none: the tensors stand bare"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    given, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        from_pretrained(mar_names(small_model().state_dict()), **{**BRIDGE, **given})


@pytest.mark.parametrize("heads", ["num_heads", "decoder_num_heads", "bridge_num_heads"])
def test_heads_that_nobody_knows(heads):
    told = {name: value for name, value in BRIDGE.items() if name != heads}
    with pytest.raises(ValueError, match=rf"{heads}: got none .* wide.*expected {heads}=, the number of attention"):
        from_pretrained(mar_names(small_model().state_dict()), **told)


def test_wrong_types():
    state = mar_names(small_model().state_dict())
    with pytest.raises(TypeError, match="heads: got an unknown argument, expected one of"):
        from_pretrained(state, heads=3)
    with pytest.raises(TypeError, match="source: got int, expected a path, a hub id or a state dict"):
        from_pretrained(3)
    with pytest.raises(TypeError, match="allow_missing: got 3, expected a shell pattern"):
        from_pretrained(state, allow_missing=3, **BRIDGE)


# Files.


class Foreign:
    """Runs a command when it is unpickled the ordinary way."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def pth(folder):
    path = folder / "a.pth"
    torch.save({"model": STATES["fine-tuned"][0]()}, path)
    return path


def tensors(folder):
    return save_checkpoint(small_model(**LINEAR), folder / "a.safetensors")


def rewritten(path, by):
    path.write_bytes(by(path.read_bytes()))
    return path


def pickled(folder, content):
    torch.save(content, folder / "a.pth")
    return folder / "a.pth"


def own_config(folder, text):
    path = tensors(folder)
    save_file(load_file(path), path, metadata={METADATA_KEY: text})
    return path


def hf(folder, edit=None, **config):
    path = save_checkpoint(hf_model(), folder / "hf", layout="hf")
    content = json.loads((path / "config.json").read_text())
    del content["mar_fast"]
    (path / "config.json").write_text(json.dumps({**content, **config}))
    if edit:
        edit(path)
    return path


def shards(path, weight_map=None, lost=None):
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(state)
    files = {name: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        if file != lost:
            save_file({name: state[name] for name in names if files[name] == file}, path / file)
    index = {"weight_map": files if weight_map is None else weight_map(files)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


# file, error, message
FILES = {
    "absent": (lambda folder: folder / "a.pth", FileNotFoundError, "source: got .*a.pth', which does not exist, expected a file"),
    "absent, a string": (lambda folder: "weights/mar.pth", FileNotFoundError, "'weights/mar.pth', which does not exist"),
    "empty pth": (lambda folder: rewritten(pth(folder), lambda b: b""), ValueError, "got an empty file, expected a checkpoint"),
    "empty safetensors": (lambda folder: rewritten(tensors(folder), lambda b: b""), ValueError, "got an empty file"),
    "truncated pth": (lambda folder: rewritten(pth(folder), lambda b: b[:-5000]), ValueError, "got a damaged file"),
    "half a pth": (lambda folder: rewritten(pth(folder), lambda b: b[: len(b) // 2]), ValueError, "got a damaged file"),
    "truncated safetensors": (
        lambda folder: rewritten(tensors(folder), lambda b: b[:-4]), ValueError, "no whole safetensors file",
    ),
    "cut header": (lambda folder: rewritten(tensors(folder), lambda b: b[:100]), ValueError, "no whole safetensors file"),
    "garbage pth": (lambda folder: rewritten(pth(folder), lambda b: b"garbage" * 99), ValueError, "no checkpoint of torch.save"),
    "garbage safetensors": (
        lambda folder: rewritten(tensors(folder), lambda b: b"garbage" * 99), ValueError, "no whole safetensors file",
    ),
    "pickle under the wrong name": (
        lambda folder: pth(folder).rename(folder / "b.safetensors"), ValueError, "no whole safetensors file",
    ),
    "safetensors under the wrong name": (
        lambda folder: tensors(folder).rename(folder / "b.pth"), ValueError, "no checkpoint of torch.save|damaged file",
    ),
    "another kind of file": (lambda folder: rewritten(pth(folder).rename(folder / "a.txt"), bytes), ValueError, "ends with .pth"),
    "a module": (
        lambda folder: pickled(folder, {"model": torch.nn.Linear(2, 2)}), ValueError, r"a pickle that asks for torch.nn.modules.*weights_only=False",
    ),
    "a list": (lambda folder: pickled(folder, [torch.ones(2)]), TypeError, "got list, expected a state dict"),
    "a tensor": (lambda folder: pickled(folder, torch.ones(2)), TypeError, "got Tensor, expected a state dict"),
    "no tensors": (lambda folder: pickled(folder, {"model": {}, "epoch": 3}), ValueError, "got entries such as no tensors"),
    "envelope within itself": (lambda folder: pickled(folder, endless()), ValueError, "such as no tensors|names of MAR"),
    "metadata": (lambda folder: own_config(folder, "{"), ValueError, "metadata mar_fast.config: got no valid JSON"),
    "metadata of a list": (lambda folder: own_config(folder, "[1]"), ValueError, "got list, expected an object of MARConfig"),
    "metadata of the future": (lambda folder: own_config(folder, '{"warp": 9}'), ValueError, "unknown fields warp"),
    "metadata out of range": (lambda folder: own_config(folder, '{"depth": -1}'), ValueError, "depth: got -1, expected"),
    "metadata of another model": (lambda folder: own_config(folder, '{"embed_dim": 192}'), ValueError, "missing .*another shape"),
    "folder without weights": (
        lambda folder: hf(folder, lambda p: (p / "model.safetensors").unlink()), FileNotFoundError, "without weights",
    ),
    "broken config.json": (
        lambda folder: hf(folder, lambda p: (p / "config.json").write_text("{")), ValueError, "config.json: got no valid JSON",
    ),
    "config.json of a list": (lambda folder: hf(folder, lambda p: (p / "config.json").write_text("[]")), ValueError, "got list"),
    "config.json of another model": (lambda folder: hf(folder, model_type="vit"), ValueError, "model_type: got 'vit', expected"),
    "another class": (
        lambda folder: hf(folder, architectures=["VideoMAEForPreTraining"]), ValueError, "those of VideoMAEForPreTraining",
    ),
    "another width": (lambda folder: hf(folder, hidden_size=192), ValueError, "hidden_size: got 192, expected 96, by the shape"),
    "another depth": (lambda folder: hf(folder, num_hidden_layers=3), ValueError, "num_hidden_layers: got 3, expected 2"),
    "another patch": (lambda folder: hf(folder, patch_size=14), ValueError, r"patch_size: got \(2, 14, 14\), expected"),
    "another activation": (lambda folder: hf(folder, hidden_act="relu"), ValueError, "hidden_act: got 'relu', expected 'gelu'"),
    "a word for a number": (lambda folder: hf(folder, hidden_size="wide"), ValueError, "a value that does not fit"),
    "no number of heads": (lambda folder: hf(folder, num_attention_heads=5), ValueError, "num_heads: got 5, expected a divisor"),
    "lost shard": (
        lambda folder: hf(folder, lambda p: shards(p, lost="model-00002-of-00002.safetensors")), FileNotFoundError,
        "got the shard 'model-00002-of-00002.safetensors', expected a file of this name",
    ),
    "shard elsewhere": (
        lambda folder: hf(folder, lambda p: shards(p, lambda files: dict.fromkeys(files, "../hf/config.json"))),
        FileNotFoundError, "got the shard '../hf/config.json', expected a file of this name beside it",
    ),
    "index with too much": (
        lambda folder: hf(folder, lambda p: shards(p, lambda files: {**files, "more": next(iter(files.values()))})), ValueError,
        "got shards without more, expected",
    ),
    "index with too little": (
        lambda folder: hf(folder, lambda p: shards(p, lambda files: dict(list(files.items())[1:]))), ValueError,
        "got the tensor classifier.bias, expected only those",
    ),
    "index of nothing": (
        lambda folder: hf(folder, lambda p: shards(p, lambda files: [])), ValueError, "weight_map: got list, expected an object",
    ),
}  # fmt: skip


def endless():
    content = {"epoch": 1}
    content["model"] = content
    return content


@pytest.mark.parametrize("case", FILES)
def test_damaged_file(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, error, message = FILES[case]
    source = make(tmp_path)
    with pytest.raises(error) as caught:
        from_pretrained(source)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "got" in str(caught.value) and "expected" in str(caught.value)


def test_foreign_code_is_not_run(tmp_path):
    torch.save({"model": Foreign(tmp_path / "marker")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a pickle that asks for (posix|nt).system, expected tensors, plain values"):
        from_pretrained(tmp_path / "a.pth")
    assert not (tmp_path / "marker").exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "marker").exists()  # so it would have run


def test_heads_against_the_files_own(tmp_path):
    """A head count cannot be seen in the weights: where the file says it, it is not overruled."""
    for path in (hf(tmp_path), save_checkpoint(small_model(**LINEAR), tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match=r"num_heads: got 2, expected 3 \((config.json|the file's own config)"):
            from_pretrained(path, num_heads=2)
        assert from_pretrained(path, num_heads=3).config.num_heads == 3
