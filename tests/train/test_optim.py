"""Parameter groups, learning rates and accumulation against the definitions of the original implementations."""

import math

import numpy as np
import pytest
import torch
from helpers import small_config

from mar_fast import MAR
from mar_fast.train import list_recipes, read_recipe
from mar_fast.train.optim import accumulation, learning_rate, parameter_groups, peak_lr
from mar_fast.train.recipe import Optimizer

STEPS = 7  # an epoch


def videomae_curve(lr, lowest, warmup_lr, epochs, warmup_epochs, batch):
    """The rate of each step: linear to lr over the warm-up's steps, both ends included, then half a cosine."""
    lr, lowest, warmup_lr = (rate * batch / 256 for rate in (lr, lowest, warmup_lr))
    warmup = int(warmup_epochs * STEPS)
    left = epochs * STEPS - warmup
    falling = lowest + 0.5 * (lr - lowest) * (1 + np.cos(np.pi * np.arange(left) / left)) if left else np.empty(0)
    return np.concatenate((np.linspace(warmup_lr, lr, warmup), falling))


def mar_curve(lr, lowest, warmup_lr, epochs, warmup_epochs):
    """By fractions of epochs: half a cosine over all epochs, and a line up to it."""

    def cosine(epoch):
        return (lr - lowest) * (math.cos(math.pi * epoch / epochs) + 1) * 0.5 + lowest

    def rate(epoch):
        if epoch < warmup_epochs:
            return epoch * (cosine(warmup_epochs) - warmup_lr) / warmup_epochs + warmup_lr
        return cosine(epoch)

    return np.array([rate(step / STEPS) for step in range(epochs * STEPS)])


# lr, lowest, warm-up from, epochs, warm-up epochs[, batch]
MAR_RATES = {
    "mar_k400_base": (1e-3, 1e-6, 1e-6, 100, 5),
    "mar_k400_large": (5e-4, 1e-6, 1e-6, 60, 5),
    "mar_ssv2_base": (1e-3, 1e-6, 1e-6, 40, 5),
    "mar_ssv2_large": (2.5e-4, 1e-6, 1e-6, 40, 5),
}
VIDEOMAE_RATES = {
    "videomae_k400_small": (5e-4, 1e-6, 0, 150, 5, 384),
    "videomae_k400_base": (5e-4, 1e-6, 0, 75, 5, 384),
    "videomae_k400_large": (2e-3, 1e-6, 0, 35, 5, 128),
    "videomae_k400_huge": (1e-3, 1e-5, 0, 50, 5, 512),
    "videomae_ssv2_small": (1e-3, 1e-6, 0, 40, 5, 384),
    "videomae_ssv2_base": (5e-4, 1e-6, 0, 30, 5, 384),
    "videomae_ucf101_base": (5e-4, 1e-5, 0, 100, 5, 128),
    "videomaev2_k400_base": (7e-4, 1e-6, 0, 90, 5, 512),
    "videomaev2_k400_large": (2e-3, 1e-6, 0, 35, 5, 192),
    "videomaev2_ssv2_base": (2e-3, 1e-6, 0, 25, 5, 256),
    "videomaev2_ssv2_large": (5e-4, 1e-6, 0, 20, 5, 192),
    "videomae_pretrain_base": (1.5e-4, 1e-5, 0, 1601, 40, 2048),
    "videomae_pretrain_large": (1.5e-4, 1e-5, 0, 1601, 40, 512),
    "videomae_pretrain_huge": (1.5e-4, 1e-5, 0, 1601, 40, 1024),
    "videomaev2_pretrain_base": (1e-3, 1e-5, 0, 200, 20, 1024),
}


def rates(recipe):
    return np.array([learning_rate(recipe, step, STEPS) for step in range(recipe.schedule.epochs * STEPS)])


@pytest.mark.parametrize("name", [*MAR_RATES, *VIDEOMAE_RATES])
def test_learning_rate_of_every_step(name):
    recipe = read_recipe(name)
    curve = mar_curve(*MAR_RATES[name]) if name in MAR_RATES else videomae_curve(*VIDEOMAE_RATES[name])
    np.testing.assert_allclose(rates(recipe), curve, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1 / 7, 2.75, 4.0])
@pytest.mark.parametrize("rule", ["peak", "cosine"])
def test_other_warmups_and_batches(rule, warmup):
    changes = [f"schedule.warmup_epochs={warmup}", f"schedule.warmup_to={rule}", "schedule.epochs=4"]
    changes += ["schedule.warmup_lr=1e-5", "optimizer.lr_batch=256", "schedule.min_lr=1e-6", "optimizer.lr=2e-4"]
    changes += ["data.batch=384"]
    recipe = read_recipe("mar_k400_base", changes)
    if rule == "cosine":
        curve = 1.5 * mar_curve(2e-4, 1e-6, 1e-5, 4, warmup)
    else:
        curve = videomae_curve(2e-4, 1e-6, 1e-5, 4, warmup, 384)
    np.testing.assert_allclose(rates(recipe), curve, rtol=1e-12)


@pytest.mark.parametrize("step", [-1, 700, 10**6])
def test_no_such_step(step):
    with pytest.raises(ValueError, match=f"step: got {step}, expected 0 to 699: 100 epochs of 7 steps"):
        learning_rate(read_recipe("mar_k400_base"), step, STEPS)


@pytest.mark.parametrize(
    ("name", "batch", "peak"),
    [
        ("mar_k400_base", 64, 1e-3),
        ("mar_k400_base", 8, 1e-3),  # absolute
        ("videomae_k400_small", 384, 7.5e-4),
        ("videomae_k400_small", 32, 6.25e-5),
        ("videomae_k400_huge", 512, 2e-3),
        ("videomaev2_pretrain_base", 1024, 4e-3),  # 4 samples of each video do not count
    ],
)
def test_peak(name, batch, peak):
    assert math.isclose(peak_lr(read_recipe(name, [f"data.batch={batch}"])), peak, rel_tol=1e-12)


def layer_of(name, depth):
    parts = name.split(".")
    if parts[:2] == ["encoder", "patch_embed"]:
        return 0
    return int(parts[2]) + 1 if parts[:2] == ["encoder", "blocks"] else depth + 1


def rates_of(model, groups):
    """(lr, lr_scale, weight decay) by parameter name; each parameter is in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["lr"], group["lr_scale"], group["weight_decay"]
    return found


# Written out for a MAR of 2 blocks at layer decay 0.5: what has a factor other than 1, by either rule.
WEIGHTS = {
    "encoder.patch_embed.proj.weight": 0.125,
    **{f"encoder.blocks.0.{part}.weight": 0.25 for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")},
    **{f"encoder.blocks.1.{part}.weight": 0.5 for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")},
}
BIASES = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias", "attn.v_bias", "attn.proj.bias",
          "mlp.fc1.bias", "mlp.fc2.bias")  # fmt: skip
ALL = {
    **WEIGHTS,
    "encoder.patch_embed.proj.bias": 0.125,
    **{f"encoder.blocks.{block}.{part}": scale for block, scale in ((0, 0.25), (1, 0.5)) for part in BIASES},
}


@pytest.mark.parametrize(("rule", "factors"), [("weights", WEIGHTS), ("all", ALL)])
def test_groups_of_a_small_model(rule, factors):
    model = MAR(small_config())
    groups = parameter_groups(model, Optimizer(layer_decay=0.5, layer_decay_of=rule, weight_decay=0.1), 0.8)
    found = rates_of(model, groups)
    assert set(found) == {name for name, _ in model.named_parameters()} >= set(factors)
    for name, rates_found in found.items():
        decay = 0.0 if name.endswith(("bias", "mask_token")) or "norm" in name else 0.1
        factor = factors.get(name, 1.0)
        assert rates_found == (0.8 * factor, factor, decay), name
    keys = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    assert len(set(keys)) == len(keys)  # nothing is split further


@pytest.mark.parametrize("name", list_recipes())
def test_groups_of_every_recipe(name):
    recipe = read_recipe(name)
    depth, decay = recipe.config().depth, recipe.optimizer.layer_decay
    with torch.device("meta"):
        model = MAR(recipe.config())
    lr = peak_lr(recipe)
    found = rates_of(model, parameter_groups(model, recipe.optimizer, lr))
    assert set(found) == {parameter for parameter, _ in model.named_parameters()}
    for parameter, value in model.named_parameters():
        plain = value.ndim == 1 or parameter == "mask_token"
        factor = decay ** (depth + 1 - layer_of(parameter, depth))
        if name.startswith("mar_") and (value.ndim == 1 or not parameter.startswith("encoder.")):
            factor = 1.0
        assert found[parameter] == pytest.approx((lr * factor, factor, 0.0 if plain else 0.05), rel=1e-12), parameter
    assert max(factor for _, factor, _ in found.values()) == 1.0


def test_frozen_parameters_are_left_out():
    model = MAR(small_config())
    model.encoder.requires_grad_(False)
    found = rates_of(model, parameter_groups(model, Optimizer(layer_decay=0.5), 1.0))
    assert set(found) == {name for name, _ in model.named_parameters() if not name.startswith("encoder.")}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model: got no parameter that requires a gradient"):
        parameter_groups(model, Optimizer(), 1.0)


@pytest.mark.parametrize(
    ("batch", "repeats", "processes", "clips", "micro_batches"),
    [
        (64, 2, 8, 16, 1),  # as the original ran
        (64, 2, 1, 16, 8),
        (64, 2, 1, 128, 1),
        (64, 2, 1, 127, 2),
        (64, 1, 4, 16, 1),
        (12, 1, 1, 5, 3),  # 3 micro-batches of 4: 5 do not divide 12
        (7, 2, 1, 13, 7),
        (384, 2, 1, 2, 384),
    ],
)
def test_accumulation(batch, repeats, processes, clips, micro_batches):
    recipe = read_recipe("mar_k400_base", [f"data.batch={batch}", f"data.repeats={repeats}"])
    found = accumulation(recipe, processes, clips)
    assert found == micro_batches
    videos, rest = divmod(batch, processes * found)
    assert rest == 0
    assert videos * repeats <= clips


@pytest.mark.parametrize(
    ("processes", "clips", "message"),
    [
        (3, 8, "processes: got 3, expected a divisor of data.batch = 64"),
        (128, 8, "processes: got 128, expected a divisor"),
        (0, 8, "processes: got 0, expected a whole number, 1 or more"),
        (1, 1, r"clips_per_process: got 1, expected 2 \(data.repeats\) or more"),
        (1, 1.5, "clips_per_process: got 1.5, expected a whole number"),
    ],
)
def test_batches_that_cannot_be_shared(processes, clips, message):
    with pytest.raises(ValueError, match=message):
        accumulation(read_recipe("mar_k400_base"), processes, clips)
