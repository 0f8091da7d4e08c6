"""What the README says is true: its Python runs, its commands and files exist."""

import re
from pathlib import Path

import pytest

pytest.importorskip("av")

import torch
from helpers import tiny_config

import mar_fast
from mar_fast import cli, cost, create_model, named_config
from mar_fast.data import sample_clip

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def example(text):
    """The example that has this text in it."""
    (found,) = (code for code in EXAMPLES if text in code)
    return found


@pytest.mark.real_clip
def test_python_example_runs():
    code = example("create_model")
    names = {}
    exec(code.replace('"bikes.mp4"', repr(str(sample_clip()))), names)
    assert names["clip"].shape == (3, 16, 224, 224) and names["logits"].shape == (1, 174)
    assert names["features"].shape == (1, 392, 768)


@pytest.mark.real_clip
def test_views_example_runs():
    """It goes on where the first example ends; here with a small model."""
    names = {"mar_fast": mar_fast, "data": mar_fast.data, "model": mar_fast.MAR(tiny_config(depth=1)).eval()}
    exec(example("read_views").replace('"bikes.mp4"', repr(str(sample_clip()))), names)
    assert names["views"].shape == (6, 3, 16, 224, 224) and names["scores"].shape == (174,)


def test_ensemble_example_runs():
    clip, names = torch.randint(256, (3, 16, 224, 224), dtype=torch.uint8), {}
    exec(example("complementary"), {"model": mar_fast.MAR(tiny_config(depth=1)), "clip": clip}, names)
    assert len(names["masks"]) == 4 and float(names["scores"].detach().sum()) == pytest.approx(1)


@pytest.mark.compiles
def test_inference_example_runs():
    clip = torch.randint(256, (3, 16, 224, 224), dtype=torch.uint8)
    names = {"mar_fast": mar_fast, "clip": clip, "model": mar_fast.MAR(tiny_config(depth=1, decoder_depth=0))}
    exec(example("compile_for_inference"), names)
    assert names["logits"].shape == (1, 174) and names["fast"].compile_seconds > 0


def test_op_example_runs():
    names = {}
    exec(example("class SelfAttention"), names)
    assert names["x"].grad.shape == (2, 100, 256)
    assert all(parameter.grad is not None for parameter in names["layer"].parameters())


def test_checkpoint_example_runs(tmp_path, monkeypatch):
    """On files of a ViT-S, whose number of heads is known."""
    monkeypatch.chdir(tmp_path)
    dense = create_model("videomae_vit_small", num_classes=5).state_dict()
    names = {"classifier.norm.": "fc_norm.", "classifier.head.": "head.", "encoder.": ""}
    for ours, theirs in names.items():
        dense = {name.replace(ours, theirs): value for name, value in dense.items()}
    torch.save({"module": dense}, "classifier.pth")
    torch.save({"model": create_model("mar_vit_small", classifier=None).state_dict()}, "pretraining.pth")
    found = {}
    exec(next(example for example in EXAMPLES if "from_pretrained" in example), found)
    model = found["model"]
    assert (
        model.config.classifier == "bridging" and model.config.num_classes == 174 and Path("mar.safetensors").is_file()
    )


def test_named_files_and_commands_exist():
    for name in re.findall(r"(?:mar_fast|kernels|bench|tests)/[\w/]+\.py", README):
        assert (ROOT / name).is_file(), name
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert {name for name in re.findall(r"^mar-fast (\w+)", README, re.MULTILINE)} == commands
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test", "gpu", "sanitize", "matrix", "oldest"]
    rules = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^(\w+ )*{target}\b.*:", rules, re.MULTILINE) for target in [*targets, "newest"])


@pytest.mark.parametrize(("letter", "size"), [("B", "base"), ("L", "large")])
def test_cost_table(letter, size):
    row = re.search(rf"ViT-{letter}: mar_fast \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)", README).groups()
    dense = cost.count(named_config(f"videomae_vit_{size}", num_classes=174))
    masked = [cost.count(named_config(f"mar_vit_{size}", num_classes=174, mask_ratio=r)) for r in (0.5, 0.75)]
    assert row == tuple(f"{case.multiply_adds / 1e9:.2f}" for case in (dense, *masked))
