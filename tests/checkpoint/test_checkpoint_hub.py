"""save_pretrained and push_to_hub: folders that come back as the same model, their cards, and a stand-in of the hub."""

import inspect
import json
import re
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("safetensors")

from checkpoint_cases import LAYOUTS, LINEAR, PRETRAINING, same_weights, small_model
from videomae2_cases import v2_folder

import mar_fast
from mar_fast import MAR, from_pretrained
from mar_fast.checkpoint import model_card, push_to_hub, save_pretrained

huggingface_hub = pytest.importorskip("huggingface_hub")


def front_matter(card):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_folder_comes_back(tmp_path, case):
    model = small_model(**LAYOUTS[case])
    folder = model.save_pretrained(tmp_path / "a", layout=case.split(",")[0])
    names = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert {file.name for file in folder.iterdir()} == names
    for back in (MAR.from_pretrained(folder), from_pretrained(str(folder))):
        assert back.config == model.config and same_weights(back, model) and not back.load_report.initial


def test_labels_go_along(tmp_path):
    names = [f"class {i}" for i in range(11)]
    model = from_pretrained(save_pretrained(small_model(), tmp_path / "a", labels=names))
    assert model.load_report.labels == tuple(names)
    again = save_pretrained(model, tmp_path / "b")
    assert json.loads((again / "config.json").read_text())["id2label"]["10"] == "class 10"
    assert ", ".join(names) in (again / "README.md").read_text()
    with pytest.raises(ValueError, match="labels: got 2 names, expected 11, one for each class"):
        save_pretrained(model, tmp_path / "c", labels=["a", "b"])
    assert not (tmp_path / "c").exists()


def test_nothing_is_overwritten(tmp_path):
    model, other = small_model(), small_model(seed=9)
    folder = save_pretrained(model, tmp_path / "a")
    with pytest.raises(FileExistsError, match="already exists"):
        save_pretrained(other, folder)
    assert same_weights(from_pretrained(folder), model)
    (folder / "README.md").write_text("mine")
    save_pretrained(other, folder, force=True)
    assert same_weights(from_pretrained(folder), other) and (folder / "README.md").read_text() == "mine"
    (folder / "notes.txt").write_text("mine too")
    with pytest.raises(FileExistsError, match=r"holds notes.txt, expected a new folder"):
        save_pretrained(model, folder, force=True)
    with pytest.raises(TypeError, match=r"model: got str, expected a mar_fast\.MAR"):
        save_pretrained("model", tmp_path / "b")


def test_the_card_says_what_was_read_and_what_is_new(tmp_path):
    """Of a folder of VideoMAE v2 with a new head; nothing of this machine's folders, no licence made up."""
    model = from_pretrained(v2_folder(tmp_path / "weights-v2"), num_classes=5)
    card = (save_pretrained(model, tmp_path / "a") / "README.md").read_text()
    meta = front_matter(card)
    assert meta == {"library_name": "mar_fast", "pipeline_tag": "video-classification", "tags": ["videomae"]}
    for said in (
        "An encoder 96 wide with 2 blocks and 3 heads, a linear classifier of 5 classes: 0.37 M parameters.",
        "It sees every patch.",
        f"Read from weights-v2 (VideoMAE v2 hub layout): {len(model.load_report.read)} tensors.",
        "New when it was loaded:\n\n- classifier.head.weight, classifier.head.bias: new: the file has no head",
        "Training that came after is not recorded here.",
        "None is stated.",
    ):
        assert said in card, said
    assert str(tmp_path) not in card and "apache" not in card.lower()


def test_cards_of_other_models():
    bridging = model_card(small_model())
    assert "It sees 50% of each clip's patches" in bridging and "No checkpoint was read" in bridging
    assert front_matter(bridging)["tags"] == ["videomae", "mar"]
    features = model_card(small_model(**{**LINEAR, "num_classes": 0}))
    assert "mean pooling with a norm and no head" in features and "pipeline_tag" not in features
    assert "a pixel decoder 48 wide with 2 blocks" in model_card(small_model(**PRETRAINING))


def test_the_cards_warnings_are_the_reports(tmp_path):
    state = small_model().state_dict()
    del state["mask_token"]
    told = dict(num_heads=3, bridge_num_heads=2, decoder_num_heads=3, num_frames=6, image_size=(32, 64))
    model = from_pretrained(state, allow_missing="mask_token", position="formula", **told)
    card = model_card(model)
    assert "Warnings:\n\n- missing in the checkpoint, allowed: mask_token" in card


class Hub:
    """Stands in for huggingface_hub.HfApi: keeps what is uploaded in a folder, and what it was asked for."""

    def __init__(self, folder, card=None, refuses=None):
        self.folder, self.refuses, self.calls = folder, refuses, []
        if card is not None:
            folder.mkdir()
            (folder / "README.md").write_text(card)

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, private, exist_ok):
        assert exist_ok
        if self.refuses:
            raise self.refuses
        self.calls.append(("create_repo", repo_id, private))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def file_exists(self, repo_id, filename, revision):
        return (self.folder / filename).is_file()

    def upload_folder(self, *, repo_id, repo_type, folder_path, ignore_patterns, **options):
        assert repo_type == "model"
        self.folder.mkdir(exist_ok=True)
        for file in Path(folder_path).iterdir():
            if file.name not in (ignore_patterns or ()):
                (self.folder / file.name).write_bytes(file.read_bytes())
        self.calls.append(("upload_folder", repo_id, options))
        return f"https://hub.test/{repo_id}/commit/1"


def test_push_and_read_back(tmp_path, monkeypatch):
    """Through the stand-in: the upload's arguments, and from_pretrained("owner/name") of what it keeps."""
    hub, model = Hub(tmp_path / "hub"), small_model()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    address = model.push_to_hub("mine", private=True, token="t", branch="main", commit_message="first")
    assert address == "https://hub.test/me/mine/commit/1" and hub.token == "t"
    options = dict(commit_message="first", revision="main", create_pr=None)
    assert hub.calls == [("create_repo", "mine", True), ("upload_folder", "me/mine", options)]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "hub"))
    back = mar_fast.from_pretrained("me/mine")
    assert back.config == model.config and same_weights(back, model) and back.load_report.source == "me/mine"
    assert "Read from me/mine (mar_fast layout)" in model_card(back)


def test_a_card_on_the_hub_stays(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub", card="mine")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    push_to_hub(small_model(), "me/mine")
    assert (hub.folder / "README.md").read_text() == "mine" and (hub.folder / "model.safetensors").is_file()


def test_what_the_hub_refuses(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub", refuses=OSError("403\nForbidden"))
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    with pytest.raises(ValueError, match=r"repo_id: got 'me/mine', which the hub does not take \(403 Forbidden\)"):
        push_to_hub(small_model(), "me/mine")
    assert not hub.folder.exists()
    with pytest.raises(ValueError, match="classifier, for layout 'hf'"):
        push_to_hub(small_model(), "me/mine", layout="hf")
    assert not hub.calls


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"for which huggingface_hub is needed: pip install 'mar-fast\[hf\]'"):
        push_to_hub(small_model(), "me/mine")


@pytest.mark.parametrize("name", ["save_pretrained", "push_to_hub"])
def test_arguments_are_the_mixins(name):
    """What PyTorchModelHubMixin has too has its name and its default; its own are as listed."""
    ours = inspect.signature(getattr(mar_fast.checkpoint, name)).parameters
    theirs = inspect.signature(getattr(huggingface_hub.PyTorchModelHubMixin, name)).parameters
    extra = set(ours) - set(theirs) - {"model"}
    assert extra == {"layout", "labels"} | ({"force"} if name == "save_pretrained" else set())
    for argument in set(ours) & set(theirs):
        assert ours[argument].default == theirs[argument].default, argument
    names = list(theirs)[1:2]
    assert list(inspect.signature(getattr(MAR, name)).parameters)[1:2] == names


# What is asked of the hub's client, for which the tests have stand-ins.
ASKED = {
    "HfApi.upload_folder": "repo_id repo_type folder_path commit_message revision create_pr ignore_patterns",
    "HfApi.create_repo": "repo_id private exist_ok",
    "HfApi.file_exists": "repo_id filename revision",
    "snapshot_download": "repo_id revision allow_patterns",
}


@pytest.mark.parametrize("name", ASKED)
def test_the_stand_ins_are_like_the_hubs_client(name):
    function = attrgetter(name)(huggingface_hub)
    assert set(ASKED[name].split()) <= set(inspect.signature(function).parameters)
