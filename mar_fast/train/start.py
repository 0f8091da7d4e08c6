"""The model that a run starts from: random, or with the encoder of a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import MAR, LoadReport, MARConfig, from_pretrained
from ..kernels import checks
from .recipe import Recipe

# What a checkpoint knows better than a recipe that does not say it.
_OF_THE_FILE = ("mean", "std", "position_grid", "encoder_eps")


def start(recipe: Recipe, init: str | Path | None = None) -> tuple[MAR, LoadReport | None, list[str]]:
    """Make the model of a recipe.

    Args:
        recipe: Its sizes and rates.
        init: A checkpoint in any layout, as `from_pretrained` takes it; None for random weights. Its whole encoder is
            taken, its pixel decoder where sizes agree, and, for another run of the same task, nothing else: the
            classifier is new.

    Returns:
        The model on the CPU, what was read, and what is new or left out, in words.

    Raises:
        ValueError: the checkpoint's encoder is of another size than the recipe's; what `from_pretrained` raises.
    """
    torch.manual_seed(recipe.seed)
    if init is None:
        model = MAR(recipe.config())
        _scale_head(model, recipe)
        return model, None, ["all weights are new"]
    loaded = from_pretrained(init, classifier=None, **_clip_size(recipe))
    known = {name: getattr(loaded.config, name) for name in _OF_THE_FILE if name not in recipe.model}
    config = recipe.config(**known)
    _check_sizes(config, loaded.config)
    model = MAR(config)
    _scale_head(model, recipe)
    new = []
    for name, part in model.named_children():
        if not any(True for _ in part.parameters()):
            continue
        found = getattr(loaded, name, None)
        if name == "encoder":
            new += _take_encoder(model, loaded)
        elif name == "classifier" or not isinstance(found, nn.Module) or not _same_shapes(part, found):
            new.append(name)
        else:
            part.load_state_dict(found.state_dict())
            if name == "decoder":
                model.mask_token.data.copy_(loaded.mask_token)
    return model, loaded.load_report, [f"new: {', '.join(new)}"] if new else []


def _clip_size(recipe: Recipe) -> dict[str, Any]:
    """Sizes of clips that the recipe asks for, and which the checkpoint's positions are then interpolated to."""
    names = ("num_frames", "image_size", "position_grid")
    return {name: recipe.model[name] for name in names if name in recipe.model}


def _check_sizes(config: MARConfig, loaded: MARConfig) -> None:
    for name in ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "channels", "num_frames", "image_size"):
        ours, theirs = getattr(config, name), getattr(loaded, name)
        if ours != theirs:
            raise checks.bad("--init", f"a checkpoint of {name} {theirs}", f"{ours}, as the recipe's model.{name}")


def _take_encoder(model: MAR, loaded: MAR) -> list[str]:
    """Every weight of the encoder but its last norm, which not all models have; returns what is new."""
    ours, theirs = model.encoder.state_dict(), loaded.encoder.state_dict()
    model.encoder.load_state_dict({**ours, **{name: value for name, value in theirs.items() if name in ours}})
    return ["encoder.norm"] if set(ours) - set(theirs) else []


def _same_shapes(part: nn.Module, found: nn.Module) -> bool:
    ours, theirs = ({name: value.shape for name, value in one.state_dict().items()} for one in (part, found))
    return ours == theirs


def _scale_head(model: MAR, recipe: Recipe) -> None:
    if model.classifier is not None:
        with torch.no_grad():
            for value in model.classifier.head.parameters():
                value.mul_(recipe.optimizer.head_scale)
