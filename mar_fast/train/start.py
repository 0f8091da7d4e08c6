"""The model that a run starts from: random, or with the encoder of a checkpoint."""

from pathlib import Path

import torch

from .. import MAR, LoadReport, from_pretrained
from ..kernels import checks
from .recipe import Recipe

# What a checkpoint knows better than a recipe that does not say it.
_OF_THE_FILE = ("mean", "std", "position_grid", "encoder_eps")
# What must be the same in both.
_SAME = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "channels", "num_frames", "image_size")
# What a recipe may ask for, and the checkpoint's positions are then interpolated to.
_OF_A_CLIP = ("num_frames", "image_size", "position_grid")


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
    config, loaded = recipe.config(), None
    if init is not None:
        sizes = {name: recipe.model[name] for name in _OF_A_CLIP if name in recipe.model}
        loaded = from_pretrained(init, classifier=None, **sizes)
        config = recipe.config(**{n: getattr(loaded.config, n) for n in _OF_THE_FILE if n not in recipe.model})
        for name in _SAME:
            ours, theirs = getattr(config, name), getattr(loaded.config, name)
            if ours != theirs:
                raise checks.bad("--init", f"a checkpoint of {name} {theirs}", f"{ours}, as the recipe's model.{name}")
    model = MAR(config)
    if model.classifier is not None:
        with torch.no_grad():
            for value in model.classifier.head.parameters():
                value.mul_(recipe.optimizer.head_scale)
    if loaded is None:
        return model, None, ["all weights are new"]
    new = []
    for name, part in model.named_children():
        found = getattr(loaded, name, None)
        ours, theirs = part.state_dict(), {} if found is None else found.state_dict()
        if name == "encoder":  # all of it but its last norm, which not all models have
            part.load_state_dict(ours | {key: value for key, value in theirs.items() if key in ours})
            new += ["encoder.norm"] if ours.keys() - theirs.keys() else []
        elif name == "classifier" or _shapes(ours) != _shapes(theirs):
            new.append(name)
        else:
            part.load_state_dict(theirs)
            if name == "decoder":
                model.mask_token.data.copy_(loaded.mask_token)
    return model, loaded.load_report, [f"new: {', '.join(new)}"] if new else []


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
