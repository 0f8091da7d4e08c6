"""What the READMEs say is true: their Python runs, their commands, files and links exist."""

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("av")

import torch

import mar_fast
from mar_fast import cli, cost, create_model, named_config
from mar_fast.data import sample_clip

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ROOMS = [
    "mar_fast/data",
    "mar_fast/checkpoint",
    "mar_fast/huggingface",
    "mar_fast/eval",
    "mar_fast/train",
    "mar_fast/export",
    "kernels",
    "bench",
]
READMES = [ROOT / "README.md", *(ROOT / room / "README.md" for room in ROOMS)]
NEEDS = {"huggingface": "transformers", "checkpoint": "safetensors", "train": "transformers"}


def examples(file):
    return re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL)


def relative(file):
    return str(file.relative_to(ROOT))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the examples run: with a clip, and checkpoints of a ViT-S, whose number of heads is known."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(sample_clip(), tmp_path / "bikes.mp4")
    dense = create_model("videomae_vit_small", num_classes=5).state_dict()
    names = {"classifier.norm.": "fc_norm.", "classifier.head.": "head.", "encoder.": ""}
    for ours, theirs in names.items():
        dense = {name.replace(ours, theirs): value for name, value in dense.items()}
    torch.save({"module": dense}, "classifier.pth")
    torch.save({"model": create_model("mar_vit_small", classifier=None).state_dict()}, "pretraining.pth")
    return tmp_path


@pytest.mark.compiles
@pytest.mark.real_clip
@pytest.mark.parametrize(
    "file", [file for file in READMES if examples(file)], ids=lambda file: str(file.relative_to(ROOT))
)
def test_examples_run(file, folder):
    """In turn: each goes on where the one before it ended."""
    pytest.importorskip(NEEDS.get(file.parent.name, "torch"))
    names = {}
    for code in examples(file):
        exec(code, names)
    found = {name: value for name, value in names.items() if isinstance(value, torch.Tensor)}
    assert all(value.isfinite().all() for value in found.values() if value.is_floating_point())
    if file.parent == ROOT:
        assert found["logits"].shape == (1, 174) and found["features"].shape == (1, 392, 768)
        assert len(names["motion"].keep_idx) and "fast" not in names
        fast = mar_fast.compile_for_inference(mar_fast.MAR(small()).eval(), found["clip"][None])
        assert fast(found["clip"][None]).logits.shape == (1, 174)
    if file.parent.name == "checkpoint":
        assert names["model"].config.classifier == "bridging" and (folder / "mar.safetensors").is_file()


def small():
    return named_config("mar_vit_small", num_classes=174, depth=1, decoder_depth=0)


def test_lengths():
    """Each is read in one sitting."""
    assert len(README.splitlines()) <= 200
    assert all(len(file.read_text().splitlines()) <= 150 for file in READMES[1:])


def commands(app):
    """{name: function or sub-commands}."""
    found = {command.name or command.callback.__name__: command.callback for command in app.registered_commands}
    return found | {group.name: commands(group.typer_instance) for group in app.registered_groups}


@pytest.mark.parametrize("file", READMES, ids=relative)
def test_named_files_commands_and_links_exist(file):
    text, known = file.read_text(), commands(cli.app)
    for name in re.findall(r"(?:mar_fast|kernels|bench|tests)/[\w/]+\.(?:py|png)", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"(?<!/)\b\w+\.py\b", text.partition("\n## Files")[2]):
        assert (file.parent / name).is_file(), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        assert (file.parent / link).exists(), link
    for words in re.findall(r"mar-fast ([a-z]\w*(?: (?:inspect|convert|verify))?)", text):
        name, *sub = words.split()
        assert name in known and (not sub or sub[0] in known[name]), words
    rules = (ROOT / "Makefile").read_text()
    said = "".join(re.findall(r"`make [^`\n]+`|```sh\n.*?```", text, re.DOTALL))
    for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", said, re.MULTILINE):
        assert re.search(rf"^([\w-]+ )*{target}\b.*:", rules, re.MULTILINE), target


def test_every_command_and_room_is_named():
    assert {name for name in re.findall(r"^mar-fast (\w+)", README, re.MULTILINE)} == set(commands(cli.app))
    assert all(f"]({room}/README.md)" in README for room in ROOMS)


@pytest.mark.parametrize(("letter", "size"), [("B", "base"), ("L", "large")])
def test_cost_table(letter, size):
    rows = re.findall(rf"ViT-{letter}(?:, \d+ %)? \| \d+ \| ([\d.]+) \|", README)
    dense = cost.count(named_config(f"videomae_vit_{size}", num_classes=174))
    masked = [cost.count(named_config(f"mar_vit_{size}", num_classes=174, mask_ratio=r)) for r in (0.5, 0.75)]
    assert rows == [f"{case.multiply_adds / 1e9:.2f}" for case in (dense, *masked)]
