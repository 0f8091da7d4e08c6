"""save_checkpoint: round trips, what a layout cannot express, and files that are whole or not there."""

import json
from pathlib import Path

import pytest

pytest.importorskip("safetensors")

import torch
from checkpoint_cases import LINEAR, PRETRAINING, SMALL, TOLD, mar_names, same_weights, small_model
from helpers import small_config
from safetensors.torch import load_file, save_file

import mar_fast
from mar_fast import from_pretrained, save_checkpoint
from mar_fast.checkpoint.write import FOLDERS

MODELS = {
    "mar_fast, bridging": ("mar_fast", {}),
    "mar_fast, linear with everything": ("mar_fast", dict(classifier="linear", drop_path_rate=0.2, encoder_eps=1e-5)),
    "mar": ("mar", {}),
    "mar without decoder": ("mar", dict(decoder_depth=0, mask_ratio=0.75)),
    "videomae pre-training": ("videomae", PRETRAINING),
    "videomae encoder": ("videomae", {**PRETRAINING, "decoder_depth": 0}),
    "videomae fine-tuned": ("videomae", LINEAR),
    "videomae features": ("videomae", {**LINEAR, "num_classes": 0}),
    "videomae2 classifier": ("videomae2", {**LINEAR, "encoder_eps": 1e-5, "classifier_norm_eps": 1e-5}),
    "videomae2 features": ("videomae2", {**LINEAR, "num_classes": 0, "drop_path_rate": 0.2}),
    "hf classifier": ("hf", {**LINEAR, "classifier_norm_eps": 1e-5, "encoder_eps": 1e-12}),
    "hf pre-training": ("hf", {**PRETRAINING, "decoder_norm_eps": 1e-5, "norm_pix_loss": False}),
    "hf model": ("hf", {**PRETRAINING, "decoder_depth": 0, "final_norm": False}),
}


def target(folder, layout):
    return folder / ("folder" if layout in FOLDERS else "file.safetensors")


@pytest.mark.parametrize("case", MODELS)
def test_round_trip(tmp_path, case):
    """Model to file to model: the same bits and the same configuration; file to model to file: the same bytes."""
    layout, overrides = MODELS[case]
    model = small_model(**overrides)
    path = save_checkpoint(model, target(tmp_path, layout), layout=layout)
    back = from_pretrained(path)
    assert back.config == model.config and same_weights(back, model)
    assert len(back.load_report.initial) == len(back.load_report.ignored) == 0
    again = save_checkpoint(back, target(tmp_path / "again", layout), layout=layout)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        other = again / file.name if again.is_dir() else again
        assert file.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("case", MODELS)
def test_round_trip_without_metadata(tmp_path, case):
    """As another program would write it: sizes from shapes, the rest given."""
    layout, overrides = MODELS[case]
    model = small_model(**overrides)
    path = save_checkpoint(model, target(tmp_path, layout), layout=layout)
    file = path / "model.safetensors" if path.is_dir() else path
    save_file(load_file(file), file, metadata={"format": "pt"})
    if path.is_dir():
        content = json.loads((path / "config.json").read_text())
        del content["mar_fast"]
        (path / "config.json").write_text(json.dumps(content))
    config = model.config
    told = {} if layout in FOLDERS else {**TOLD, "encoder_eps": config.encoder_eps}
    if layout not in FOLDERS and config.decoder_depth:
        told["decoder_num_heads"] = 3
    if layout == "videomae" and not config.num_classes:
        told["num_classes"] = 0
    if config.classifier == "bridging":
        told["bridge_num_heads"] = 2
    back = from_pretrained(path, mask_ratio=config.mask_ratio, drop_path_rate=config.drop_path_rate, **told)
    assert same_weights(back, model)
    origins = back.load_report.origins
    assert {"num_heads", "depth", "embed_dim"} <= set(origins)
    for name in origins:
        assert getattr(back.config, name) == getattr(config, name), name


def test_mar_names_are_those_of_the_original(tmp_path):
    """Written by hand on the other side."""
    model = small_model()
    written = load_file(save_checkpoint(model, tmp_path / "a.safetensors", layout="mar"))
    want = mar_names(model.state_dict())
    assert written.keys() == want.keys() and all(torch.equal(written[name], want[name]) for name in want)


def test_nothing_is_overwritten(tmp_path):
    model = small_model(**LINEAR)
    path = save_checkpoint(model, tmp_path / "a.safetensors")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"already exists, expected a new file \(or --force"):
        save_checkpoint(small_model(seed=9, **LINEAR), path)
    assert path.read_bytes() == before
    other = small_model(seed=9, **LINEAR)
    assert same_weights(from_pretrained(save_checkpoint(other, path, force=True)), other)


def test_nothing_is_half_written(tmp_path, monkeypatch):
    import safetensors.torch

    model = small_model(**LINEAR, classifier_norm_eps=1e-5)
    save_checkpoint(model, tmp_path / "a.safetensors")
    save_checkpoint(model, tmp_path / "folder", layout="hf")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def half(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    for layout, name in (("mar_fast", "a.safetensors"), ("mar_fast", "b.safetensors"), ("hf", "folder"), ("hf", "new")):
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(model, tmp_path / name, layout=layout, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "folder"]


def test_a_folder_with_other_things_is_kept(tmp_path):
    model = small_model(**LINEAR, classifier_norm_eps=1e-5)
    save_checkpoint(model, tmp_path / "folder", layout="hf")
    (tmp_path / "folder/README.md").write_text("my card")
    save_checkpoint(model, tmp_path / "folder", layout="hf", force=True)
    assert (tmp_path / "folder/README.md").read_text() == "my card"
    (tmp_path / "folder/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes.txt, expected a new folder"):
        save_checkpoint(model, tmp_path / "folder", layout="hf", force=True)
    assert (tmp_path / "folder/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", [".", ""])
def test_the_folder_that_one_is_in_has_no_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    model = small_model(**LINEAR, classifier_norm_eps=1e-5)
    with pytest.raises(ValueError, match=r"path: got '\.', expected the name of a folder"):
        save_checkpoint(model, name, layout="hf")
    assert list(tmp_path.iterdir()) == []


# layout, what the model is, what stands in the way
REFUSED = {
    "mar, linear": ("mar", LINEAR, "classifier, for layout 'mar': got 'linear', expected 'bridging'"),
    "mar, eps": ("mar", dict(encoder_eps=1e-5), "encoder_eps, for layout 'mar': got 1e-05, expected 1e-06"),
    "mar, no norm": ("mar", dict(final_norm=False), "final_norm, for layout 'mar': got False"),
    "mar, position": ("mar", dict(position_grid=(8, 14, 14)), "position_grid, for layout 'mar'"),
    "videomae, bridging": ("videomae", {}, "classifier, for layout 'videomae': got 'bridging', .*classifier=None"),
    "videomae, decoder": ("videomae", {**LINEAR, "decoder_depth": 1}, "decoder_depth, for layout 'videomae': got 1"),
    "videomae, norm": ("videomae", {**LINEAR, "final_norm": True}, "final_norm, for layout 'videomae': got True"),
    "videomae, no norm": ("videomae", {**PRETRAINING, "final_norm": False}, "final_norm, .*: got False"),
    "videomae, eps": ("videomae", {**LINEAR, "classifier_norm_eps": 1e-5}, "classifier_norm_eps, .*: got 1e-05"),
    "hf, bridging": ("hf", {}, "classifier, for layout 'hf': got 'bridging'"),
    "hf, decoder": ("hf", {**LINEAR, "decoder_depth": 1}, "decoder_depth, for layout 'hf': got 1"),
    "hf, norm": ("hf", {**LINEAR, "final_norm": True}, "final_norm, for layout 'hf': got True"),
    "hf, fixed eps": ("hf", LINEAR, "classifier_norm_eps, .*: got 1e-06, expected 1e-05, which transformers fixes"),
    "hf, decoder's eps": ("hf", PRETRAINING, "decoder_norm_eps, for layout 'hf': got 1e-06"),
    "hf, two eps": (
        "hf",
        {**PRETRAINING, "decoder_norm_eps": 1e-5, "decoder_eps": 1e-5},
        "decoder_eps, .*got 1e-05, expected 1e-0",
    ),
    "hf, position": (
        "hf",
        {**LINEAR, "classifier_norm_eps": 1e-5, "position_grid": (8, 14, 14)},
        "position_grid, .*None: transf",
    ),
    "unknown layout": ("timm", {}, "layout: got 'timm', expected one of 'mar_fast', 'mar'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    layout, overrides, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        save_checkpoint(mar_fast.MAR(small_config(**SMALL, **overrides)), target(tmp_path, layout), layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_bad_calls(tmp_path):
    model = small_model(**LINEAR)
    with pytest.raises(TypeError, match=r"model: got Linear, expected a mar_fast.MAR"):
        save_checkpoint(torch.nn.Linear(2, 2), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"path: got '.*a.pth', expected a file name that ends with .safetensors"):
        save_checkpoint(model, tmp_path / "a.pth")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="got a file, expected a folder"):
        save_checkpoint(model, tmp_path / "file", layout="hf", force=True)
