"""AdamW's parameter groups, the learning rate of every step, and accumulation to a recipe's batch."""

import math
from typing import Any

import torch

from ..kernels import checks
from ..model import MAR
from .recipe import Optimizer, Recipe

Group = dict[str, Any]


def parameter_groups(model: MAR, optimizer: Optimizer, lr: float) -> list[Group]:
    """Groups of trainable parameters with the same rates, from the first layer to the last.

    The patch embedding is layer 0, block i of the encoder layer i + 1, and all else layer depth + 1. The learning rate
    of a layer is ``lr * layer_decay ** (depth + 1 - layer)``: for all its parameters ("all", VideoMAE), or for the
    encoder's matrices alone ("weights", MAR), while biases, norms and what follows the encoder keep ``lr``. Biases,
    norms and the mask token have no weight decay. The model is not DDP's wrapper, and sharded already if it is to be.

    Returns:
        Arguments for AdamW: ``params``, ``lr``, ``weight_decay``; and ``lr_scale``, the group's factor. Each trainable
        parameter is in one of them, in the model's order.

    Raises:
        ValueError: no parameter is trainable.
    """
    depth = model.config.depth
    groups: dict[tuple[float, float], Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, matrix = _layer(name, depth), parameter.ndim > 1 and name != "mask_token"
        decays = optimizer.layer_decay_of == "all" or (matrix and name.startswith("encoder."))
        scale = optimizer.layer_decay ** (depth + 1 - layer) if decays else 1.0
        key = scale, optimizer.weight_decay if matrix else 0.0
        group = groups.setdefault(key, dict(params=[], lr=lr * scale, lr_scale=scale, weight_decay=key[1]))
        group["params"].append(parameter)
    if not groups:
        raise checks.bad("model", "no parameter that requires a gradient", "at least one")
    return sorted(groups.values(), key=lambda group: (group["lr_scale"], group["weight_decay"]))


def _layer(name: str, depth: int) -> int:
    part, _, rest = name.removeprefix("encoder.").partition(".")
    if not name.startswith("encoder.") or part not in ("patch_embed", "blocks"):
        return depth + 1
    return 0 if part == "patch_embed" else int(rest.partition(".")[0]) + 1


def adamw(model: MAR, optimizer: Optimizer, lr: float) -> torch.optim.AdamW:
    """torch's fused AdamW on `parameter_groups`."""
    groups = parameter_groups(model, optimizer, lr)
    return torch.optim.AdamW(groups, lr=lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)


def set_lr(adamw: torch.optim.Optimizer, lr: float) -> None:
    """Give every group ``lr`` times its ``lr_scale``."""
    for group in adamw.param_groups:
        group["lr"] = lr * group["lr_scale"]


def lr_factor(recipe: Recipe) -> float:
    """What lr, min_lr and warmup_lr are multiplied by: videos a step / lr_batch, or 1 where lr is absolute.

    Repeated samples of a video do not count.
    """
    return recipe.data.batch / recipe.optimizer.lr_batch if recipe.optimizer.lr_batch else 1.0


def peak_lr(recipe: Recipe) -> float:
    """The learning rate that `learning_rate` rises to and falls from, of groups with factor 1."""
    return recipe.optimizer.lr * lr_factor(recipe)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of one step, of groups with factor 1.

    Steps are counted from 0 to epochs * steps_per_epoch - 1. Step 0 has warmup_lr, or lr if there is no warm-up; the
    last step is one short of the end of the cosine, where min_lr would be reached. With ``warmup_to = "peak"`` the W
    steps of the warm-up go linearly to lr, which step W - 1 has, and the cosine begins at step W, with lr again
    (VideoMAE). With "cosine" the cosine begins at step 0, and the warm-up goes linearly to the value that it has at
    step W, the first one after it (MAR). Rates are multiplied by `lr_factor`.

    Raises:
        ValueError: there is no such step.
    """
    schedule, factor = recipe.schedule, lr_factor(recipe)
    steps = schedule.epochs * steps_per_epoch
    if not 0 <= step < steps:
        raise checks.bad("step", step, f"0 to {steps - 1}: {schedule.epochs} epochs of {steps_per_epoch} steps")
    peak, low, start = (rate * factor for rate in (recipe.optimizer.lr, schedule.min_lr, schedule.warmup_lr))
    warmup = schedule.warmup_epochs * steps_per_epoch

    def cosine(done: float) -> float:
        return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2

    if schedule.warmup_to == "cosine":
        return start + (cosine(warmup / steps) - start) * step / warmup if step < warmup else cosine(step / steps)
    warmup = int(warmup)
    if step < warmup:
        return start + (peak - start) * step / max(1, warmup - 1)
    return cosine((step - warmup) / (steps - warmup))


def accumulation(recipe: Recipe, processes: int, clips_per_process: int) -> int:
    """How many micro-batches make a step of the recipe's batch: as few as fit, of equal size, of whole videos.

    ``processes`` share the batch equally, and each takes ``clips_per_process`` clips at a time, at most.

    Raises:
        ValueError: the batch cannot be shared equally, or the clips of one video are too many.
    """
    batch, repeats = recipe.data.batch, recipe.data.repeats
    checks.whole("processes", processes)
    checks.whole("clips_per_process", clips_per_process)
    if batch % processes:
        accepted = f"a divisor of data.batch = {batch} (or another batch: --set data.batch=...)"
        raise checks.bad("processes", processes, accepted)
    if clips_per_process < repeats:
        raise checks.bad("clips_per_process", clips_per_process, f"{repeats} (data.repeats) or more")
    videos = batch // processes
    return next(n for n in range(1, videos + 1) if videos % n == 0 and videos // n * repeats <= clips_per_process)
