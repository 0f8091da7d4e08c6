"""save_pretrained and push_to_hub: a model as a folder with a card, by the conventions of PyTorchModelHubMixin."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..kernels import checks
from ..model import MAR
from ..scaled_linear import scaled_layers
from .read import hub, is_hub_id
from .report import by_reason, class_names
from .write import CARD, LayoutName, check_target, layout_for, write

_CARD = """---
library_name: mar_fast
{front}
---

# Video transformer of mar_fast

{parts}: {parameters:.2f} M parameters. Clips are {frames} frames of {height} x {width}. {seen}

```python
import mar_fast

model = mar_fast.from_pretrained("owner/name")  # this repository, or the folder
out = model(clips)  # (B, {channels}, {frames}, {height}, {width}), uint8 or normalised
```

## Weights

{weights}

Training that came after is not recorded here.
{classes}
## Licence

None is stated. It depends on the weights and the data that this model was made from: name it here, and as \
`license:` above, before others use the model.
"""


def save_pretrained(
    model: MAR,
    save_directory: str | Path,
    *,
    layout: LayoutName = "mar_fast",
    labels: Sequence[str] | None = None,
    force: bool = False,
) -> Path:
    """Write config.json, model.safetensors, preprocessor_config.json and README.md, the model card, into a folder.

    `from_pretrained` of the folder gives the same model back, bit for bit.

    Args:
        model: The model.
        save_directory: The folder, which is returned. A card that is there stays as it is.
        layout: The names of the weights, as for `save_checkpoint`.
        labels: The names of the classes; None for those that the model's checkpoint had.
        force: Replace a model that is there; other files in the folder are an error all the same.

    Raises:
        ValueError: the layout cannot express the model.
        FileExistsError, NotADirectoryError: something stands in the way.
        TypeError: not a `mar_fast.MAR`.
    """
    layout_for(model, layout)
    card = model_card(model, class_names(model, labels))
    return write(model, check_target(save_directory, True, force), layout, labels, True, card)


def push_to_hub(
    model: MAR,
    repo_id: str,
    *,
    commit_message: str = "Push model using huggingface_hub.",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    layout: LayoutName = "mar_fast",
    labels: Sequence[str] | None = None,
) -> str:
    """Upload what `save_pretrained` writes, in one commit; a repository that is not there is made.

    `mar_fast.from_pretrained(repo_id)` reads it. A model card that the repository has stays as it is: edit it there.

    Args:
        model: The model.
        repo_id: "owner/name", or a name for one of your own.
        commit_message: Of the commit.
        private: Whether a new repository is; None for your organisation's default.
        token: None for the one that you are logged in with.
        branch: Where the commit goes; None for the main one.
        create_pr: Make a pull request of it.
        layout, labels: As for `save_pretrained`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the hub refuses it, or the layout cannot express the model.
        ModuleNotFoundError: huggingface_hub is not installed.
    """
    huggingface_hub = hub(f"repo_id: got {repo_id!r}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(model, Path(temporary) / "model", layout=layout, labels=labels)
        api = huggingface_hub.HfApi(token=token)
        try:
            repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
            has_card = api.file_exists(repo_id, CARD, revision=branch)
            commit = api.upload_folder(
                repo_id=repo_id,
                repo_type="model",
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
                ignore_patterns=[CARD] if has_card else None,
            )
            return str(commit)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            got = f"{repo_id!r}, which the hub does not take ({reason})"
            raise checks.bad("repo_id", got, "a repository that you may write to") from error


def model_card(model: MAR, labels: Sequence[str] | None = None) -> str:
    """The text of README.md, from the model, its `LoadReport` and the names of its classes.

    It says what the model is, what was read into it and what is new; no licence, since files do not say theirs.
    """
    config, report = model.config, model.load_report
    classes = config.num_classes if config.classifier else 0
    parts = [f"An encoder {config.embed_dim} wide with {config.depth} blocks and {config.num_heads} heads"]
    if classes:
        parts.append(f"a {config.classifier} classifier of {classes} classes")
    elif config.classifier:
        parts.append("mean pooling with a norm and no head")
    if config.decoder_depth:
        parts.append(f"a pixel decoder {config.decoder_embed_dim} wide with {config.decoder_depth} blocks")
    if any(scaled_layers(model)):
        parts.append("large products in fp8 (e4m3), for inference")
    front = [*(["pipeline_tag: video-classification"] if classes else []), "tags:", "- videomae"]
    front += ["- mar"] if config.classifier == "bridging" else []
    seen = f"It sees {1 - config.mask_ratio:.0%} of each clip's patches (cell running masking)."
    weights = ["No checkpoint was read into this model: it began at random."]
    if report is not None:
        weights = [f"Read from {_shown(report.source)} ({report.layout} layout): {len(report.read)} tensors."]
        for title, lines in (
            ("New when it was loaded", by_reason(report.initial, 6)),
            ("In that checkpoint and not read", by_reason(report.ignored, 6)),
            ("Warnings", report.warnings),
        ):
            if lines:
                weights += ["", f"{title}:", "", *(f"- {_shown(line)}" for line in lines)]
    height, width = config.image_size
    return _CARD.format(
        front="\n".join(front),
        parts=", ".join(parts),
        parameters=sum(value.numel() for value in model.state_dict().values()) / 1e6,
        frames=config.num_frames,
        height=height,
        width=width,
        channels=config.channels,
        seen=seen if config.mask_ratio else "It sees every patch.",
        weights="\n".join(weights),
        classes=f"\n## Classes\n\n{', '.join(labels)}\n" if labels else "",
    )


def _shown(text: str) -> str:
    """Without the folders of this machine: a card is public."""
    return text if is_hub_id(text) else re.sub(r"(?<![\w.])~?(/[^/\s,;:]+)+/(?=[^/\s])", "", text)
