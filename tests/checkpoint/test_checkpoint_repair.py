"""Biases of query and value that transformers lost, put back from the original: the same model as before."""

import json

import pytest

pytest.importorskip("safetensors")

import torch
from checkpoint_cases import LAYOUTS, LINEAR, clip, fine_tuned_names, same_weights, small_model
from huggingface_cases import CLASSES, saved, their_model
from safetensors.torch import load_file, save_file

from mar_fast import from_pretrained, save_checkpoint
from mar_fast.checkpoint.write import FOLDERS

transformers = pytest.importorskip("transformers")

LOST = ("q_bias", "v_bias", "query.bias", "value.bias")
every_class = pytest.mark.parametrize("case", CLASSES)


def edit(folder, change):
    """Rewrite the tensors of a saved folder; ``change`` gives the new ones."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def zeroed(tensors):
    """What transformers 5.5 to 5.17 writes: zeros, under the names of linear layers, and a key bias."""
    changed = {}
    for name, tensor in tensors.items():
        name = name.replace("q_bias", "query.bias").replace("v_bias", "value.bias")
        changed[name] = torch.zeros_like(tensor) if name.endswith(LOST) else tensor
        if name.endswith("query.bias"):
            changed[name.replace("query", "key")] = torch.zeros_like(tensor)
    return changed


def hub_names_zeroed(tensors):
    return {name: torch.zeros_like(tensor) if name.endswith(LOST) else tensor for name, tensor in tensors.items()}


def missing(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(LOST)}


def half_missing(tensors):
    return {name: tensor for name, tensor in zeroed(tensors).items() if not name.endswith("value.bias")}


WAYS = {"zero": zeroed, "zero, hub names": hub_names_zeroed, "missing": missing, "half": half_missing}


def pair(tmp_path, case="VideoMAEForPreTraining", way="zero", **more):
    """The original folder, as the hub has it, and one that has lost the biases."""
    theirs = their_model(case, **more)
    return saved(tmp_path / "original", theirs), edit(saved(tmp_path / "lost", theirs), WAYS[way])


@every_class
@pytest.mark.parametrize("way", WAYS)
def test_repair(tmp_path, case, way):
    original, lost = pair(tmp_path, case, way)
    want = from_pretrained(original)
    got = from_pretrained(lost, biases_from=original)
    assert same_weights(got, want)
    count = 8 if "PreTraining" in case else 4
    state = {"missing": "missing", "half": f"zero, {count // 2} of them missing,"}.get(way, "all zero")
    others = sum(1 for _ in want.parameters()) - count
    assert got.load_report.remarks == (
        f"{count} biases of query and value, {state} in the file, put back from {original}",
        f"the other {others} weights that both have are the same",
    )
    assert not got.load_report.warnings and not got.load_report.initial


def test_without_the_original(tmp_path):
    """Zeros are read, with a warning; missing ones are an error; both name the repair."""
    _, lost = pair(tmp_path)
    for change in (lambda tensors: tensors, hub_names_zeroed):
        (warning,) = from_pretrained(edit(lost, change)).load_report.warnings
        assert "all biases of query and value are zero" in warning and "convert FILE OUT --biases-from" in warning
    with pytest.raises(ValueError, match=r"8 missing .* convert FILE OUT --biases-from ORIGINAL .*biases_from="):
        from_pretrained(edit(lost, missing))


@pytest.mark.parametrize("case", LAYOUTS)
def test_zero_biases_are_told_in_every_layout(tmp_path, case):
    """... and repaired in every one."""
    layout, model = case.split(",")[0], small_model(**LAYOUTS[case])
    path = save_checkpoint(model, tmp_path / "good.safetensors")
    assert not from_pretrained(path).load_report.warnings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(LOST):
                parameter.zero_()
    file = save_checkpoint(model, tmp_path / ("a" if layout in FOLDERS else "a.safetensors"), layout=layout)
    assert [w for w in from_pretrained(file).load_report.warnings if "are zero, as in a model that was never" in w]
    assert same_weights(from_pretrained(file, biases_from=path), small_model(**LAYOUTS[case]))


def test_one_bias_that_is_not_zero_is_no_loss(tmp_path):
    original, lost = pair(tmp_path)

    def trained(tensors):
        tensors["videomae.encoder.layer.1.attention.attention.value.bias"][3] = 1e-8
        return tensors

    edit(lost, trained)
    assert not from_pretrained(lost).load_report.warnings
    with pytest.raises(ValueError) as error:
        from_pretrained(lost, biases_from=original)
    assert str(error.value) == (
        f"{lost}: got biases of query and value that are not zero "
        "(videomae.encoder.layer.1.attention.attention.value.bias), expected zeros or none: "
        "it has not lost them, or they were trained since and fit its other weights"
    )


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_key_biases_have_no_effect(tmp_path, value):
    """Versions that lose the others have one more, zero at first; trained or not, softmax takes it out."""
    theirs = their_model("VideoMAEModel")
    with torch.no_grad():
        want = theirs(clip().transpose(1, 2)).last_hidden_state

    def add(tensors):
        shape = (96,)
        names = [f"encoder.layer.{i}.attention.attention.key.bias" for i in range(2)]
        return {**tensors, **{name: value * torch.randn(shape) for name in names}}

    ours = from_pretrained(edit(saved(tmp_path / "a", theirs), add))
    (reason,) = set(ours.load_report.ignored.values())
    assert reason == "it adds the same to all scores of a query, which softmax takes out"
    # The same computed with the key bias, by the definition of attention.
    keys = load_file(tmp_path / "a/model.safetensors")["encoder.layer.0.attention.attention.key.bias"]
    block, x = ours.encoder.blocks[0].attn, torch.randn(5, 96)
    q, k, v = torch.nn.functional.linear(x, block.qkv.weight).view(5, 3, 3, 32).permute(1, 2, 0, 3)
    q = q + block.q_bias.view(3, 1, 32)
    with_bias, without = (((q @ (k + bias).mT) * 32**-0.5).softmax(-1) @ v for bias in (keys.view(3, 1, 32), 0))
    assert torch.allclose(with_bias, without, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(ours(clip()).features, want, atol=1e-4)


def test_other_sources_of_the_biases(tmp_path):
    """Another class, VideoMAE's own layout, a state dict: whatever has the same encoder."""
    theirs = their_model("VideoMAEForVideoClassification")
    original = saved(tmp_path / "original", theirs)
    lost = edit(saved(tmp_path / "lost", theirs), zeroed)
    want = from_pretrained(original)
    ours = {name.replace("classifier.", "", 1): value for name, value in want.state_dict().items()}
    torch.save({"module": fine_tuned_names(ours)}, tmp_path / "videomae.pth")
    encoder = {f"encoder.{name}": value for name, value in want.encoder.state_dict().items()}
    for source, shared in ((tmp_path / "videomae.pth", 26), (encoder, 24), (theirs.state_dict(), 28)):
        got = from_pretrained(lost, biases_from=source)
        assert same_weights(got, want) and not got.load_report.warnings
        assert f"the other {shared} weights that both have are the same" in str(got.load_report)


def test_fine_tuned_since(tmp_path):
    original, lost = pair(tmp_path, "VideoMAEForVideoClassification")

    def trained(tensors):
        tensors["classifier.weight"] += 0.01
        return tensors

    got = from_pretrained(edit(lost, trained), biases_from=original)
    (warning,) = got.load_report.warnings
    assert warning.startswith(f"1 of 28 weights that both have differ from {original} (relative difference ")
    assert "trained on without these biases" in warning
    before, after = load_file(original / "model.safetensors"), load_file(lost / "model.safetensors")
    names = [name for name in before if not name.endswith(LOST)]
    apart = sum(float((after[name] - before[name]).square().sum()) for name in names)
    relative = (apart / sum(float(before[name].square().sum()) for name in names)) ** 0.5
    assert f"(relative difference of all together {relative:.1e})" in warning
    # A head for other classes alone is a difference too; another model altogether is said to be one.
    head = {"classifier.weight": torch.ones(9, 96), "classifier.bias": torch.ones(9)}
    edit(lost, lambda tensors: {**tensors, **head})
    got = from_pretrained(lost, biases_from=original, num_classes=9)
    assert got.load_report.warnings[0].startswith("2 of 28 weights")
    other = save_checkpoint(small_model(seed=8, **LINEAR, classifier_norm_eps=1e-5), tmp_path / "other", layout="hf")
    (warning,) = from_pretrained(lost, biases_from=other).load_report.warnings
    assert "this looks like another model than the original" in warning


def test_a_copy_in_half_precision_is_the_same(tmp_path):
    original, lost = pair(tmp_path)
    edit(lost, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    got, want = from_pretrained(lost, biases_from=original), from_pretrained(original)
    assert not got.load_report.warnings and "weights that both have are the same" in str(got.load_report)
    assert torch.equal(got.encoder.blocks[1].attn.v_bias, want.encoder.blocks[1].attn.v_bias)
    assert torch.equal(got.decoder.head.weight, want.decoder.head.weight.bfloat16().float())


def test_parts_that_are_left_out(tmp_path):
    """An encoder's file is enough where the decoder is not read."""
    _, lost = pair(tmp_path)
    model = from_pretrained(tmp_path / "original", decoder_depth=0)
    encoder = save_checkpoint(model, tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"biases_from: got .*, with 0 blocks in its decoder, expected 2, as .*lost"):
        from_pretrained(lost, biases_from=encoder)
    assert same_weights(from_pretrained(lost, biases_from=encoder, decoder_depth=0), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (zeroed, "biases_from: got {original}, in which all of them are zero, expected one that has not lost them"),
        (missing, "biases_from: got {original}, without encoder.layer.0.attention.attention.query.bias, "
                  "encoder.layer.0.attention.attention.value.bias, encoder.layer.1.attention.attention.query.bias "
                  "and 1 more, expected a checkpoint that has all of them"),
        (lambda t: {n: v[:48] if n.endswith(LOST) else v for n, v in t.items()},
         "biases_from: got {original}, encoder.layer.0.attention.attention.q_bias of shape (48,), expected (96,), the "
         "width of {lost}"),
        (lambda t: {n: v for n, v in t.items() if ".layer.1." not in n},
         "biases_from: got {original}, with 1 blocks in its encoder, expected 2, as {lost} has"),
        (lambda t: {"conv1.weight": torch.ones(3)},
         "{original}: got entries such as conv1.weight, expected the names of"),
        (lambda t: {n: v * torch.nan if n.endswith("v_bias") else v for n, v in t.items()},
         "2 with NaN or infinity (encoder.layer.0.attention.attention.value.bias"),
    ],
)  # fmt: skip
def test_originals_that_do_not_fit(tmp_path, change, message):
    original, lost = pair(tmp_path, "VideoMAEModel")
    edit(original, change)
    with pytest.raises(ValueError) as error:
        from_pretrained(lost, biases_from=original)
    assert message.format(original=original, lost=lost) in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        from_pretrained(lost, biases_from=tmp_path / "nowhere")
    with pytest.raises(TypeError, match="source: got int"):
        from_pretrained(lost, biases_from=3)


def test_a_model_without_biases_by_configuration(tmp_path):
    original, lost = pair(tmp_path)
    content = json.loads((lost / "config.json").read_text())
    (lost / "config.json").write_text(json.dumps({**content, "qv_bias": False, "qkv_bias": False}))
    edit(lost, missing)
    with pytest.raises(ValueError, match=r"config.json: got a model without biases of query and value, expected one"):
        from_pretrained(lost, biases_from=original)


def test_names_of_classes_come_along(tmp_path):
    names = tuple(f"class {i}" for i in range(7))
    theirs = their_model("VideoMAEForVideoClassification", id2label=dict(enumerate(names)))
    folder = saved(tmp_path / "a", theirs)
    model = from_pretrained(folder)
    assert model.load_report.labels == names
    save_checkpoint(model, tmp_path / "b", layout="hf")
    again = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "b").config
    assert again.id2label == dict(enumerate(names)) and again.label2id == {name: i for i, name in enumerate(names)}
    # A head that is not the file's has none of its names, nor has a file whose names are transformers' own.
    assert from_pretrained(folder, num_classes=3, allow_mismatched="classifier.*").load_report.labels is None
    assert from_pretrained(folder, classifier=None).load_report.labels is None
    plain = saved(tmp_path / "c", their_model("VideoMAEForVideoClassification"))
    assert from_pretrained(plain).load_report.labels is None
    for damage in ({"0": "one"}, {str(i): i for i in range(7)}, ["a"] * 7):
        content = json.loads((plain / "config.json").read_text())
        (plain / "config.json").write_text(json.dumps({**content, "id2label": damage}))
        assert from_pretrained(plain, num_classes=7).load_report.labels is None


def test_names_of_classes_that_do_not_fit(tmp_path):
    model = from_pretrained(saved(tmp_path / "a", their_model("VideoMAEForVideoClassification")))
    with pytest.raises(ValueError, match="labels: got 2 names, expected 7, one for each class"):
        save_checkpoint(model, tmp_path / "b", layout="hf", labels=["a", "b"])
    with pytest.raises(ValueError, match="labels: got some, for layout 'videomae', expected None"):
        save_checkpoint(model, tmp_path / "b.safetensors", layout="videomae", labels=["a"] * 7)
    with pytest.raises(ValueError, match="labels: got 1 names, expected None: this model has no classes"):
        save_checkpoint(from_pretrained(tmp_path / "a", classifier=None), tmp_path / "b", layout="hf", labels=["a"])
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.safetensors").exists()
