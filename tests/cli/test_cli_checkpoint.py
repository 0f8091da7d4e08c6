"""mar-fast checkpoint inspect, convert and verify: what they print and write, exit codes, bad input."""

import json

import pytest
import torch
from checkpoint_cases import LINEAR, PRETRAINING, clip, fine_tuned_names, same_weights, small_model
from helpers import relative
from safetensors.torch import load_file, save_file
from videomae2_cases import v2_folder

from mar_fast import from_pretrained, save_checkpoint

TOLD = ("--set", "num_heads=3", "--set", "num_frames=6", "--set", "image_size=32,64", "--position", "formula")


@pytest.fixture
def mar(tmp_path):
    """A small MAR with everything, as a file."""
    return save_checkpoint(small_model(), tmp_path / "mar.safetensors", layout="mar")


@pytest.fixture
def classifier(tmp_path):
    """A small VideoMAE classifier as its trainer would save it: nothing in it but weights."""
    torch.save({"module": fine_tuned_names(small_model(**LINEAR).state_dict())}, tmp_path / "ft.pth")
    return tmp_path / "ft.pth"


def test_inspect(run, mar):
    code, out, _ = run("checkpoint", "inspect", mar)
    assert code == 0
    for text in ("MAR", "encoder", "bridging classifier, 11 classes", "decoder", "91 tensors read", "num_heads 3"):
        assert text in out
    code, out, _ = run("checkpoint", "inspect", mar, "--json", "--set", "classifier=none")
    content = json.loads(out)
    assert code == 0 and content["layout"] == "MAR" and content["config"]["classifier"] is None
    assert (
        content["parameters"] == sum(content["parameters_of"].values()) and "classifier" not in content["parameters_of"]
    )
    assert content["ignored"]["cls_head.norm.bias"] == "classifier=None was asked for"


def test_inspect_a_bare_file(run, classifier):
    code, out, err = run("checkpoint", "inspect", classifier)
    assert code == 2 and out == "" and "num_heads: got none" in err and "expected num_heads=" in err
    code, out, _ = run("checkpoint", "inspect", classifier, *TOLD)
    assert code == 0 and "weights read under 'module'" in out and "linear classifier, 11 classes" in out
    code, out, _ = run("checkpoint", "inspect", classifier, *TOLD[:2], "--json")
    assert json.loads(out)["config"]["num_frames"] == 16


def test_inspect_what_is_allowed(run, classifier, tmp_path):
    state = torch.load(classifier)["module"]
    state["scale"] = state.pop("head.bias")
    torch.save(state, tmp_path / "b.pth")
    code, _, err = run("checkpoint", "inspect", "b.pth", *TOLD)
    assert code == 2 and "1 missing (head.bias), 1 unknown (scale)" in err
    code, out, _ = run("checkpoint", "inspect", "b.pth", *TOLD, "--allow-missing", "head.*", "--allow-unknown", "scale")
    assert code == 0 and "classifier.head.bias: missing in the checkpoint, allowed" in out


def test_inspect_model_key(run, tmp_path):
    one, other = (small_model(seed=seed, **PRETRAINING).state_dict() for seed in (1, 2))
    torch.save({"model": one, "model_ema": other}, tmp_path / "a.pth")
    code, out, _ = run(
        "checkpoint", "inspect", "a.pth", *TOLD, "--set", "decoder_num_heads=3", "--model-key", "model_ema"
    )
    assert code == 0 and "weights read under 'model_ema'; 'model' not read" in out


@pytest.mark.parametrize(
    ("to", "out"), [("videomae", "new.safetensors"), ("hf", "new"), ("mar_fast", "new.safetensors")]
)
def test_convert(run, classifier, tmp_path, to, out):
    changed = ("--set", "classifier_norm_eps=1e-5") if to == "hf" else ()
    code, said, _ = run("checkpoint", "convert", classifier, out, "--to", to, *TOLD, *changed)
    assert code == 0 and "VideoMAE fine-tuned layout" in said and f"Written: {out} ({to})" in said
    assert "the same bits when read back" in said
    model = from_pretrained(tmp_path / out)
    assert same_weights(model, small_model(**LINEAR)) and model.config.num_heads == 3
    code, _, err = run("checkpoint", "convert", classifier, out, "--to", to, *TOLD, *changed)
    assert code == 2 and "already exists, expected a new file (or --force" in err
    assert run("checkpoint", "convert", classifier, out, "--to", to, *TOLD, *changed, "--force")[0] == 0


def test_convert_to_fp8(run, mar, tmp_path):
    """Only our own layout has it; the file can be converted again, and needs a GPU to run or to be emulated."""
    code, _, err = run("checkpoint", "convert", mar, "no.safetensors", "--to", "mar", "--quantize", "fp8")
    assert code == 2 and "got layers in fp8, which the layout MAR does not have" in err
    for source, options in ((mar, ("--quantize", "fp8")), ("0.safetensors", ())):
        out = f"{len(options) // 2 ^ 1}.safetensors"
        code, said, _ = run("checkpoint", "convert", source, out, "--to", "mar_fast", *options)
        assert code == 0 and "the same bits when read back" in said
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    code, said, _ = run("checkpoint", "inspect", "1.safetensors", "--json")
    assert code == 0 and json.loads(said)["parameters"] > sum(value.numel() for value in small_model().parameters())
    assert "layers in fp8 (e4m3)" in said


def test_convert_leaves_parts_out(run, mar, tmp_path):
    code, _, err = run("checkpoint", "convert", mar, "pre.safetensors", "--to", "videomae")
    assert (
        code == 2 and "classifier, for layout 'videomae': got 'bridging'" in err and "load with classifier=None" in err
    )
    assert not (tmp_path / "pre.safetensors").exists()
    code, _, _ = run("checkpoint", "convert", mar, "pre.safetensors", "--to", "videomae", "--set", "classifier=none")
    assert code == 0
    names = set(load_file(tmp_path / "pre.safetensors"))
    assert "encoder.norm.weight" in names and "mask_token" in names and not any("cls" in name for name in names)


def test_convert_checks_before_it_works(run, tmp_path):
    code, _, err = run("checkpoint", "convert", "absent.pth", "out.pth", "--to", "mar")
    assert code == 2 and "path: got 'out.pth', expected a file name that ends with .safetensors" in err
    code, _, err = run("checkpoint", "convert", "absent.pth", "out.safetensors", "--to", "mar")
    assert code == 2 and "'absent.pth', which does not exist" in err and not list(tmp_path.iterdir())
    assert run("checkpoint", "convert", "a", "b", "--to", "timm")[0] == 2


def test_convert_reads_back(run, classifier, monkeypatch):
    """A file that comes back with other values is exit code 1."""
    import sys

    from mar_fast import checkpoint

    def other(path):
        model = checkpoint.from_pretrained(path)
        with torch.no_grad():
            model.classifier.head.bias[0] += 1
        return model

    monkeypatch.setattr(sys.modules["mar_fast.cli.convert"], "from_pretrained", other)
    code, _, err = run("checkpoint", "convert", classifier, "new.safetensors", "--to", "videomae", *TOLD)
    assert code == 1 and "read back with other values: classifier.head.bias" in err


@pytest.fixture
def lost(tmp_path):
    """A Hugging Face folder with its biases, and the same as a bad version of transformers saves it."""
    model = small_model(**LINEAR, classifier_norm_eps=1e-5)
    original = save_checkpoint(model, tmp_path / "original", layout="hf")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_bias", "v_bias")):
                parameter.zero_()
    return original, save_checkpoint(model, tmp_path / "lost", layout="hf")


def test_inspect_warns_of_lost_biases(run, lost):
    original, broken = lost
    code, out, err = run("checkpoint", "inspect", broken)
    told = "all biases of query and value are zero"
    assert code == 0 and told in out
    assert (
        err.startswith(f"warning: {broken}: {told}")
        and "mar-fast checkpoint convert FILE OUT --biases-from ORIGINAL" in err
    )
    assert err.count(told) == 1
    code, out, err = run("checkpoint", "inspect", broken, "--json")
    (warning,) = json.loads(out)["warnings"]
    assert code == 0 and warning.startswith(told) and "--biases-from" in warning and err.startswith("warning: ")
    code, out, err = run("checkpoint", "inspect", original, "--json")
    assert code == 0 and json.loads(out)["warnings"] == [] and err == ""


@pytest.mark.parametrize(("to", "out"), [((), "new"), (("--to", "videomae"), "new.safetensors")])
def test_convert_puts_biases_back(run, lost, tmp_path, to, out):
    original, broken = lost
    more = ("--set", "classifier_norm_eps=1e-6") if to else ()
    code, said, err = run("checkpoint", "convert", broken, out, *to, *more, "--biases-from", original)
    assert code == 0 and err == ""
    assert f"note: 4 biases of query and value, all zero in the file, put back from {original}" in said
    assert "the other 28 weights that both have are the same" in said and "the same bits when read back" in said
    assert same_weights(from_pretrained(tmp_path / out), from_pretrained(original))
    if not to:
        files = [folder / "model.safetensors" for folder in (tmp_path / out, original)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_convert_says_what_was_trained_since(run, lost, tmp_path):
    original, broken = lost
    state = load_file(broken / "model.safetensors")
    state["classifier.bias"] += 1
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    code, said, err = run("checkpoint", "convert", broken, "new", "--biases-from", original)
    assert code == 0 and "put back" in said and f"warning: {broken}: 1 of 28 weights that both have differ" in err


def test_convert_repairs_nothing_else(refused, lost):
    original, broken = lost
    for arguments, message in (
        ((original, "new", "--biases-from", original), "got biases of query and value that are not zero"),
        (
            (broken, "new", "--biases-from", broken),
            "in which all of them are zero, expected one that has not lost them",
        ),
        ((broken, "new", "--biases-from", "nowhere"), "source: got 'nowhere', which does not exist"),
        (
            (broken, "new"),
            "--to: got none, expected one of mar_fast, mar, videomae, videomae2, hf, or --biases-from",
        ),
        ((broken, "original", "--biases-from", original), "already exists"),
    ):
        assert message in refused("checkpoint", "convert", *arguments)


def test_convert_keeps_names_of_classes(run, tmp_path):
    model = small_model(**LINEAR, classifier_norm_eps=1e-5)
    names = [f"class {place}" for place in range(model.config.num_classes)]
    save_checkpoint(model, tmp_path / "a", layout="hf", labels=names)
    assert run("checkpoint", "convert", "a", "b", "--to", "hf")[0] == 0
    assert from_pretrained(tmp_path / "b").load_report.labels == tuple(names)
    code, out, _ = run("checkpoint", "convert", "a", "c.safetensors", "--to", "mar_fast")
    assert code == 0 and "not carried over: the names of classes" in out


def test_verify_the_same(run, mar, tmp_path):
    save_checkpoint(from_pretrained(mar), tmp_path / "ours.safetensors")
    code, out, _ = run("checkpoint", "verify", mar, "ours.safetensors")
    assert code == 0
    for layer in ("encoder.blocks.1", "features", "classifier.blocks.0", "logits", "decoder.blocks.1", "pixels"):
        assert layer in out
    code, out, _ = run("checkpoint", "verify", mar, "ours.safetensors", "--json", "--tolerance", 0)
    content = json.loads(out)
    assert code == 0 and content["within"] and all(layer["difference"] == 0 for layer in content["layers"])


def test_verify_another(run, mar, tmp_path):
    """One weight of the second encoder block differs: what comes before it is equal, what comes after it is not."""
    state = load_file(mar)
    state["backbone.blocks.1.mlp.fc2.bias"][5] += 3
    other = small_model()
    other.load_state_dict(
        {**other.state_dict(), "encoder.blocks.1.mlp.fc2.bias": state["backbone.blocks.1.mlp.fc2.bias"]}
    )
    save_checkpoint(other, tmp_path / "b.safetensors", layout="mar")
    code, out, err = run("checkpoint", "verify", mar, "b.safetensors", "--json")
    layers = {layer["layer"]: layer["difference"] for layer in json.loads(out)["layers"]}
    assert code == 1 and "not the same model within 1e-05" in err
    assert layers["encoder.blocks.0"] == 0 and layers["encoder.blocks.1"] > 1e-3 and layers["pixels"] > 1e-4
    with torch.no_grad():
        video = clip(1, seed=0)
        first, second = from_pretrained(mar), from_pretrained(tmp_path / "b.safetensors")
        assert relative(second(video).logits, first(video).logits) > 1e-4
    assert run("checkpoint", "verify", mar, "b.safetensors", "--tolerance", 10)[0] == 0


def test_verify_parts_and_nan(run, mar, classifier, tmp_path):
    code, out, _ = run("checkpoint", "verify", mar, classifier, *TOLD)
    assert code == 1 and "only in the first" in out
    save_checkpoint(small_model(num_classes=3), tmp_path / "three.safetensors")
    code, out, _ = run("checkpoint", "verify", mar, "three.safetensors", "--json")
    assert code == 1 and {"layer": "logits", "difference": None} in json.loads(out)["layers"]  # of another shape
    model = small_model()
    with torch.no_grad():
        model.decoder.head.bias[3] = torch.nan
    save_checkpoint(model, tmp_path / "nan.safetensors")
    code, _, err = run("checkpoint", "verify", mar, "nan.safetensors")
    assert code == 2 and "1 with NaN or infinity (decoder.head.bias)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tolerance", "-1"), "--tolerance: got -1.0, expected a number, 0 or more"),
        (("--seed", "-1"), "Invalid value for '--seed'"),
        (("--ratio", "1"), "ratio: got 1.0, expected a number in [0, 1)"),
        (("--set", "heads=3"), "--set: got 'heads=3', expected FIELD=VALUE with one of the fields num_frames"),
        (("--set", "num_heads"), "--set: got 'num_heads', expected FIELD=VALUE"),
        (("--set", "image_size=64"), "image_size: got 64, expected a tuple"),
    ],
)
def test_verify_bad_input(refused, mar, arguments, message):
    assert message in refused("checkpoint", "verify", mar, mar, *arguments)


def test_verify_other_clips(refused, mar, tmp_path):
    save_checkpoint(small_model(num_frames=4), tmp_path / "b.safetensors")
    said = refused("checkpoint", "verify", mar, "b.safetensors")
    assert "second, num_frames: got 4, expected 6, as first" in said


def test_bad_files(refused, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"")
    save_file({"conv1.weight": torch.ones(2)}, tmp_path / "b.safetensors")
    for arguments, message in (
        (("inspect", "a.pth"), "a.pth: got an empty file"),
        (("inspect", "b.safetensors"), "such as conv1.weight, expected the names of MAR"),
        (("verify", "b.safetensors", "a.pth"), "conv1.weight"),
        (("inspect", "c/d.pth"), "which does not exist"),
    ):
        said = refused("checkpoint", *arguments)
        assert said.startswith("error: ") and message in said


def test_videomae2_folders(tmp_path, run):
    """Inspected, and written in their own layout and in VideoMAE's: pooled features stay pooled features."""
    folder = v2_folder(tmp_path / "hub")
    code, out, _ = run("checkpoint", "inspect", str(folder))
    assert code == 0 and "VideoMAE v2 hub" in out and "pooling" in out
    for layout, name in (("videomae2", "again"), ("videomae", "a.safetensors")):
        code, out, _ = run("checkpoint", "convert", str(folder), str(tmp_path / name), "--to", layout)
        assert code == 0 and "the same bits when read back" in out
        back = from_pretrained(tmp_path / name)
        assert back.config.num_classes == 0 and same_weights(back, from_pretrained(folder))
