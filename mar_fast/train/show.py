"""What a run will do, before it does it: groups, steps, learning rates, memory and time, by arithmetic alone."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import machine
from ..config import MARConfig
from ..cost import Cost, count
from ..eval.plot import OTHERS, OURS, legend_below, new_figure, save
from ..kernels import checks
from ..model import MAR
from .loader import StepSampler
from .masks import draw_mask
from .optim import Group, accumulation, learning_rate, lr_factor, parameter_groups, peak_lr
from .recipe import Recipe


def visible_tokens(recipe: Recipe) -> int:
    """Tokens of a clip that the encoder sees in training."""
    config = recipe.config()
    mask, _ = draw_mask(recipe.mask, 1, config, torch.Generator())
    return config.num_tokens if mask is None else mask.num_visible


def activation_bytes(recipe: Recipe, clips: int) -> int:
    """Bytes of activations that one micro-batch keeps for backward: an estimate.

    A block D wide keeps of each token, in b bytes a value (2 under autocast to 16 bits, else 4): two norms, the
    attention's output, q, k and v, and the MLP's hidden values before and after GELU, (6 + 2 * mlp_ratio) * D; and the
    residual stream twice, in 4 bytes. With gradient checkpointing a block keeps its two inputs, and one block at a time
    keeps all. The encoder's blocks run on visible tokens, and so do the bridge's; the decoder's on all. Added are the
    visible pixels at the embedding in b bytes, and the predicted ones and their targets in 4 each. What is left out:
    masks of dropout, statistics of norms, 16-bit copies of weights (see `memory`), work space. On a GPU the kernels
    keep one of the two hidden activations: a fifth less.
    """
    config, visible = recipe.config(), visible_tokens(recipe)
    value = machine.DTYPES[recipe.optimizer.precision].itemsize
    stacks = [(visible, config.embed_dim, config.mlp_ratio, config.depth)]
    if config.classifier == "bridging":
        stacks.append((visible, config.bridge_embed_dim, config.bridge_mlp_ratio, config.bridge_depth))
    kept = visible * config.patch_values * value
    if recipe.reconstructs:
        stacks.append((config.num_tokens, config.decoder_embed_dim, config.decoder_mlp_ratio, config.decoder_depth))
        kept += (config.num_tokens - visible) * config.patch_values * 8
    full = [round(tokens * dim * ((6 + 2 * ratio) * value + 8)) for tokens, dim, ratio, _ in stacks]
    if recipe.gradient_checkpointing:
        kept += max(full) + sum(tokens * dim * (value + 4) * depth for tokens, dim, _, depth in stacks)
    else:
        kept += sum(block * depth for block, (*_, depth) in zip(full, stacks, strict=True))
    return clips * kept


def memory(recipe: Recipe, clips: int, shards: int = 1) -> dict[str, int]:
    """Bytes of a process, by what they are for; the last is the estimate of `activation_bytes`.

    Args:
        recipe: Model, precision, moving average.
        clips: Of a micro-batch.
        shards: Processes that share weights, gradients and states (FSDP); 1 where each has all of them (DDP).
    """
    parameters = sum(parameter.numel() for parameter in _shapes(recipe.config()).parameters())
    parts = {"weights": 4, "gradients": 4, "AdamW's two moments": 8, "moving average": 4 * (recipe.optimizer.ema > 0)}
    found = {name: size * parameters // shards for name, size in parts.items() if size}
    if recipe.optimizer.precision != "fp32":
        found["weights in 16 bits"] = 2 * parameters
    return found | {"activations": activation_bytes(recipe, clips)}


def cost_of_step(recipe: Recipe) -> Cost:
    """The work of a step over all processes, forward and backward; what gradient checkpointing repeats is left out.

    So is the pixel decoder where it predicts a part of what was dropped (dual masking): the count stays a lower bound.
    """
    reconstruct = recipe.reconstructs and recipe.mask.decoder == "dropped"
    clips = recipe.data.batch * recipe.data.repeats
    return count(recipe.config(), batch=clips, visible=visible_tokens(recipe), reconstruct=reconstruct, training=True)


def describe(recipe: Recipe, videos: int, processes: int = 1, clips_per_process: int = 8, *, flops: float) -> str:
    """What a run will do, as text: model, mask, data, learning rates, groups, memory and time.

    ``videos`` are those in the list to train on, ``flops`` the FLOP/s of a process, as `machine.matmul_rates` measures
    them; for ``processes`` and ``clips_per_process`` see `accumulation`.

    Raises:
        ValueError: fewer videos than a batch, or the batch cannot be shared, see `accumulation`.
    """
    checks.positive("flops", flops)
    data, optimizer = recipe.data, recipe.optimizer
    micro_batches = accumulation(recipe, processes, clips_per_process)
    per_epoch = StepSampler(videos, data.batch).steps
    clips = data.batch * data.repeats // processes // micro_batches
    steps = per_epoch * recipe.schedule.epochs
    model = _shapes(recipe.config())
    kept = memory(recipe, clips, shards=processes if recipe.shard else 1)
    work = 2 * cost_of_step(recipe).multiply_adds
    seconds = work / flops / processes
    rows = [
        ("task", {"finetune": "fine-tuning", "pretrain": "pre-training"}[recipe.task] + _losses(recipe)),
        ("model", f"{recipe.model.get('name', 'mar_vit_base')}: {_parameters(model)}"),
        ("mask", _mask(recipe)),
        ("data", f"videos {videos}, steps an epoch {per_epoch} (an incomplete last batch is left out)"),
        ("batch", f"videos a step {data.batch}, clips of each {data.repeats}: {processes} (processes) x "
         f"{micro_batches} (micro-batches) x {clips} (clips)"),
        ("run", f"epochs {recipe.schedule.epochs}, steps {steps}, clips {steps * data.batch * data.repeats}"),
        ("learning rate", _rates(recipe, per_epoch)),
        ("AdamW", f"betas {optimizer.betas}, eps {optimizer.eps:g}, gradients "
         + (f"clipped to norm {optimizer.clip_grad:g}" if optimizer.clip_grad else "not clipped")),
        *_groups(model, parameter_groups(model, optimizer, peak_lr(recipe))),
        ("memory", f"about {sum(kept.values()) / 1e9:.2f} GB a process, by arithmetic; "
         "the activations are an estimate"),
        ("", ", ".join(f"{name} {size / 1e9:.2f}" for name, size in kept.items())),
        ("work", f"{work / 1e12:.3g} TFLOP a step, {work * steps / 1e18:.3g} EFLOP in all"),
        ("time", f"at least {seconds:.3g} s a step, {seconds * steps / 3600:.3g} hours in all, at {flops:.3g} FLOP/s"),
        ("", "a process: a floor, without loading, communication, validation and what is no matrix product"),
    ]  # fmt: skip
    wide = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{wide}}  {text}".rstrip() for name, text in rows)


def draw_schedule(recipe: Recipe, videos: int, path: Path) -> None:
    """A PNG of the learning rates of the run: of the head, of a block in the middle and of the patch embedding.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    per_epoch = StepSampler(videos, recipe.data.batch).steps
    schedule, optimizer, depth = recipe.schedule, recipe.optimizer, recipe.config().depth
    steps = schedule.epochs * per_epoch
    # All steps of a short run; of a long one enough for a smooth curve.
    shown = sorted({*range(0, steps, max(1, steps // 2000)), steps - 1})
    rates = [learning_rate(recipe, step, per_epoch) for step in shown]
    epochs = [step / per_epoch for step in shown]
    of = "matrices of " if optimizer.layer_decay_of == "weights" else ""
    layers = {depth + 1: "head, biases and norms" if of else "head"}
    if optimizer.layer_decay < 1:
        layers |= {depth // 2 + 1: f"{of}block {depth // 2}", 0: f"{of}the patch embedding"}
    figure = new_figure(figsize=(8, 6.5))
    linear, logarithmic = figure.subplots(2, sharex=True)
    for axis in (linear, logarithmic):
        for (layer, name), colour in zip(layers.items(), (OURS, *OTHERS), strict=False):
            factor = optimizer.layer_decay ** (depth + 1 - layer)
            axis.plot(epochs, [factor * rate for rate in rates], color=colour, label=f"{name} (x {factor:.3g})")
        axis.axvline(schedule.warmup_epochs, color="#555555", linestyle=":", linewidth=1, label="end of the warm-up")
        axis.set(ylabel="learning rate", xlim=(0, schedule.epochs))
        axis.grid(alpha=0.3)
    linear.set_ylim(0, 1.05 * max(rates))
    linear.ticklabel_format(axis="y", scilimits=(-3, 3))
    logarithmic.set_yscale("log", nonpositive="mask")  # a warm-up may begin at 0
    logarithmic.set_xlabel(f"epoch (steps {per_epoch}, videos a step {recipe.data.batch})")
    legend_below(figure, [linear])
    save(figure, path)


def _shapes(config: MARConfig) -> MAR:
    """The model without values."""
    with torch.device("meta"):
        return MAR(config)


def _losses(recipe: Recipe) -> str:
    weight = recipe.reconstruction_weight
    if recipe.task == "pretrain":
        return ": squared error of " + ("normalised pixels" if recipe.config().norm_pix_loss else "pixels")
    return ": cross-entropy" + (f" + {weight:g} x squared error of dropped pixels" if weight else "")


def _parameters(model: MAR) -> str:
    sizes = Counter[str]()
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        sizes[part if part in ("encoder", "classifier") else "decoder"] += parameter.numel()
    parts = ", ".join(f"{part} {size / 1e6:.2f}" for part, size in sizes.items())
    return f"{sum(sizes.values()) / 1e6:.2f} M parameters ({parts})"


def _mask(recipe: Recipe) -> str:
    mask, config = recipe.mask, recipe.config()
    text = f"{mask.kind}: {visible_tokens(recipe)} of {config.num_tokens} tokens visible"
    if mask.decoder != "dropped":
        text += f"; the decoder predicts the dropped ones of a running {1 - mask.decoder_ratio:.0%} of cells"
    return text


def _rates(recipe: Recipe, per_epoch: int) -> str:
    batch, schedule, factor = recipe.data.batch, recipe.schedule, lr_factor(recipe)
    steps = schedule.epochs * per_epoch
    warmup = min(int(schedule.warmup_epochs * per_epoch), steps - 1)
    of = f"{recipe.optimizer.lr:g} x {batch} / {recipe.optimizer.lr_batch}" if factor != 1 else "absolute"
    points = dict.fromkeys((0, warmup, (warmup + steps) // 2, steps - 1))
    told = ", ".join(f"{learning_rate(recipe, step, per_epoch):.3g} at step {step}" for step in points)
    return f"{peak_lr(recipe):.4g} ({of}), cosine by iteration: {told}"


def _groups(model: MAR, groups: list[Group]) -> Iterator[tuple[str, str]]:
    """A row for each group: its rates, its size, and the names of its first and its last parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for number, group in enumerate(groups):
        rates = f"lr {group['lr']:.3g} (x {group['lr_scale']:.3g}), weight decay {group['weight_decay']:g}"
        size = sum(parameter.numel() for parameter in group["params"]) / 1e6
        span = " to ".join(dict.fromkeys(names[id(group["params"][end])] for end in (0, -1)))
        yield ("" if number else "groups"), f"{rates}: {size:.3f} M, {span}"
