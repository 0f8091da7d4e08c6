"""One step of the trainer against a step written out in plain PyTorch on reference.MAR, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import relative
from test_optim import layer_of

import mar_fast
from mar_fast import TokenMask, reference
from mar_fast.train.augment import NO_BOX
from mar_fast.train.dataset import Item, Key, Videos
from mar_fast.train.distributed import World
from mar_fast.train.fit import fit
from mar_fast.train.masks import draw_mask, validation_masks
from mar_fast.train.master_weights import MasterWeights
from mar_fast.train.recipe import read_recipe
from mar_fast.train.start import start
from mar_fast.train.step import Inputs, Stepper

ALONE = World(0, 1, torch.device("cpu"))
SMALL = [
    "model.num_frames=8", "model.image_size=[64, 64]", "model.embed_dim=64", "model.depth=2", "model.num_heads=2",
    "model.bridge_embed_dim=32", "model.bridge_num_heads=2", "model.decoder_embed_dim=32", "model.decoder_num_heads=2",
    "optimizer.precision=fp32", "optimizer.layer_decay=0.75", "optimizer.lr=2e-3",
]  # fmt: skip
CASES = {
    "MAR": ("motions", ["optimizer.layer_decay_of=weights", "optimizer.clip_grad=0.0"]),
    "MAR, clipped": ("motions", ["optimizer.clip_grad=0.5"]),
    "VideoMAE": (
        "motions",
        ["model.classifier=linear", "model.final_norm=false", "model.mask_ratio=0.0", "model.decoder_depth=0",
         "mask.kind=none", "mask.ratio=0.0", "reconstruction_weight=0.0", "optimizer.clip_grad=0.0"],
    ),
    "pre-training": (
        "motions_pretrain", ["optimizer.clip_grad=0.02", "optimizer.betas=[0.9, 0.95]", "optimizer.eps=1e-6"]
    ),
    "dual masking": ("motions_pretrain", ["mask.decoder=cell_running", "optimizer.clip_grad=0.0"]),
}  # fmt: skip
LR = 1e-3  # not that of the recipes: each step sets it


def recipe_of(case, *changes):
    name, more = CASES[case]
    return read_recipe(name, [*SMALL, *more, *changes])


def models(recipe):
    """Ours and the reference with the same weights, none at a special value."""
    ours, _, _ = start(recipe)
    ours = ours.double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.05)
    plain = reference.MAR(recipe.config()).double()
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def inputs_of(recipe, clips=4):
    generator = torch.Generator().manual_seed(1)
    config = recipe.config()
    video = torch.randn(clips, 3, 8, 64, 64, generator=generator, dtype=torch.float64)
    target = torch.randn(clips, 11, generator=generator, dtype=torch.float64).softmax(1)
    mask, decoder_mask = draw_mask(recipe.mask, clips, config, generator)
    return Inputs(video, None if recipe.task == "pretrain" else target, mask, decoder_mask)


def rows(inputs, first, last):
    def cut(mask):
        return mask and mask.take(slice(first, last))

    target = None if inputs.target is None else inputs.target[first:last]
    return Inputs(inputs.video[first:last], target, cut(inputs.mask), cut(inputs.decoder_mask))


def plain_step(model, inputs, recipe):
    """A step of AdamW by its formulas; returns the gradients before they are clipped."""
    everything = TokenMask.from_bool_masked(torch.zeros(len(inputs.video), math.prod(recipe.config().grid)).bool())
    mask = everything if inputs.mask is None else inputs.mask
    pretrain = recipe.task == "pretrain"
    out = model(
        inputs.video,
        mask,
        reconstruct=pretrain or recipe.reconstruction_weight > 0,
        decoder_mask=inputs.decoder_mask,
    )
    loss = 0
    if not pretrain:
        loss = -(inputs.target * F.log_softmax(out.logits, dim=1)).sum() / len(inputs.video)
    if pretrain or recipe.reconstruction_weight:
        loss = loss + (1 if pretrain else recipe.reconstruction_weight) * out.reconstruction_loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    limit, (beta1, beta2) = recipe.optimizer.clip_grad, recipe.optimizer.betas
    shrink = min(1.0, limit / (norm.item() + 1e-6)) if limit else 1.0
    depth = recipe.config().depth
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in gradients:
                continue
            matrix = p.ndim > 1 and name != "mask_token"
            decays = recipe.optimizer.layer_decay_of == "all" or (matrix and name.startswith("encoder."))
            lr = LR * (recipe.optimizer.layer_decay ** (depth + 1 - layer_of(name, depth)) if decays else 1)
            g = gradients[name] * shrink
            first, second = (1 - beta1) * g / (1 - beta1), (1 - beta2) * g**2 / (1 - beta2)
            p.mul_(1 - lr * (recipe.optimizer.weight_decay if matrix else 0))
            p.sub_(lr * first / (second.sqrt() + recipe.optimizer.eps))
    return float(loss.detach()), gradients


def our_step(model, parts, recipe):
    """A step of ours; the gradients are seen by a hook, since the step sets them to None."""
    gradients = {}
    for name, parameter in model.named_parameters():

        def seen(p, name=name):
            gradients[name] = p.grad.clone()

        parameter.register_post_accumulate_grad_hook(seen)
    stepper = Stepper(model, recipe, ALONE)
    assert stepper.optimizer.defaults["fused"] and stepper.optimizer.defaults["betas"] == recipe.optimizer.betas
    told = stepper.step(iter(parts), len(parts), LR)
    return told, gradients, stepper


# The loss of dual masking is a mean over as many positions as the masks leave, which differ from clip to clip.
@pytest.mark.parametrize(
    ("case", "micro_batches"),
    [(case, count) for case in CASES for count in (1, 4) if case != "dual masking" or count == 1],
)
def test_a_step_is_a_plain_step(case, micro_batches):
    recipe = recipe_of(case)
    (ours, plain), inputs = models(recipe), inputs_of(recipe)
    size = 4 // micro_batches
    told, gradients, _ = our_step(ours, [rows(inputs, i * size, (i + 1) * size) for i in range(micro_batches)], recipe)
    loss, expected = plain_step(plain, inputs, recipe)
    assert float(told[0]) == pytest.approx(loss, rel=1e-6)  # it is told in float32
    assert set(gradients) == set(expected)
    for name, want in expected.items():
        assert relative(gradients[name], want) <= 1e-10, name
    for (name, got), want in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (got - want).abs().max() <= 1e-8, name
        assert got.grad is None


def test_what_a_step_tells():
    recipe = recipe_of("MAR, clipped")
    (ours, plain), inputs = models(recipe), inputs_of(recipe)
    told, _, _ = our_step(ours, [inputs], recipe)
    out = plain(inputs.video, inputs.mask, reconstruct=True)
    classification = F.cross_entropy(out.logits, inputs.target)
    right = (out.logits.argmax(1) == inputs.target.argmax(1)).double().mean()
    (classification + 0.1 * out.reconstruction_loss).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    want = [classification + 0.1 * out.reconstruction_loss, classification, out.reconstruction_loss, right, norm]
    assert told.tolist() == pytest.approx([float(value.detach()) for value in want], rel=1e-6)


def test_moving_average():
    recipe = recipe_of("MAR", "optimizer.ema=0.9")
    (ours, _), inputs = models(recipe), inputs_of(recipe)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    _, _, stepper = our_step(ours, [inputs], recipe)
    after = {name: p.detach().clone() for name, p in ours.named_parameters()}
    with stepper.averaged():
        for name, p in ours.named_parameters():
            assert torch.allclose(p, 0.9 * before[name] + 0.1 * after[name], rtol=1e-12, atol=1e-14), name
    assert all(torch.equal(p, after[name]) for name, p in ours.named_parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(precision):
    """Autocast to 16 bits, weights in float32; fp16 with a scaler that skips a step whose gradients overflow."""
    recipe = recipe_of("MAR", f"optimizer.precision={precision}")
    ours, plain = (model.float() for model in models(recipe))
    inputs = inputs_of(recipe)
    inputs = Inputs(inputs.video.float(), inputs.target.float(), inputs.mask)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    stepper = Stepper(ours, recipe, ALONE)
    assert stepper.scaler.is_enabled() == (precision == "fp16")
    if precision == "fp16":
        stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
        stepper.step(iter([inputs]), 1, LR)
        assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())
        assert stepper.scaler.get_scale() == 2.0**59
        stepper.scaler = torch.amp.GradScaler("cpu")
    told = stepper.step(iter([inputs]), 1, LR)
    loss, _ = plain_step(plain, inputs, recipe)
    assert float(told[0]) == pytest.approx(loss, rel=1e-2)
    for (name, got), want in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert got.dtype == torch.float32
        assert not torch.equal(got, before[name]), name
        assert (got - want).abs().max() <= 2.1 * LR, name  # AdamW's first step is lr times a sign


def test_gradient_checkpointing_changes_nothing():
    found = []
    for changes in ([], ["gradient_checkpointing=true"]):
        recipe = recipe_of("MAR", *changes)
        (ours, _), inputs = models(recipe), inputs_of(recipe)
        found.append(our_step(ours, [inputs], recipe)[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_states_put_back_with_another_recipe():
    """Rates are those of the recipe; a moving average that was not there begins with the weights."""
    old, new = recipe_of("MAR"), recipe_of("MAR", "optimizer.weight_decay=0.2", "optimizer.ema=0.9")
    first, second = (Stepper(start(recipe)[0], recipe, ALONE) for recipe in (old, new))
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.add_(1.0)
    second.load(first.state(), {})
    assert {group["weight_decay"] for group in second.optimizer.param_groups} == {0.0, 0.2}
    for name, parameter in first.model.named_parameters():
        assert torch.equal(second.average[name], parameter)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("changes", [[], ["gradient_checkpointing=true"]])
def test_weights_rounded_at_once(precision, changes, monkeypatch):
    """The same bits as by autocast's casts, over two steps of two micro-batches; one launch a step rounds."""
    recipe, states, launches = recipe_of("MAR", f"optimizer.precision={precision}", *changes), [], []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: launches.append(len(to)) or copy(to, of))
    for by_autocast in (True, False):
        model, inputs = models(recipe)[0].float(), inputs_of(recipe)
        inputs = Inputs(inputs.video.float(), inputs.target.float(), inputs.mask)
        stepper = Stepper(model, recipe, ALONE)
        if by_autocast:
            stepper._weights = MasterWeights(model, None)
        for _ in range(2):
            stepper.step(iter([rows(inputs, 0, 2), rows(inputs, 2, 4)]), 2, LR)
        states.append(model.state_dict())
    config = recipe.config()
    blocks = config.depth + config.bridge_depth + config.decoder_depth
    assert launches == [4 * blocks] * 2
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


class Noise(Videos):
    """Five clips; all from ``broken`` on cannot be read, which makes them black ones that do not count."""

    def __init__(self, broken=3):
        self.paths, self.broken = [*"abcde"], broken

    def __getitem__(self, key):
        generator = torch.Generator().manual_seed(key.video_index)
        video = torch.randint(256, (1, 8, 64, 64, 3), dtype=torch.uint8, generator=generator).numpy()
        bad = key.video_index >= self.broken
        return Item(video * (not bad), key.video_index, key.video_index, [NO_BOX], key.counts and not bad, {})


@pytest.mark.parametrize("case", ["MAR", "pre-training", "dual masking"])
def test_validation_means_over_the_clips_that_count(case, tmp_path):
    """Neither those that cannot be read nor those that only fill the last batch, which so has none at all."""
    recipe = recipe_of(case, "data.batch=2", "schedule.epochs=1", "schedule.warmup_epochs=0.0", "model.num_classes=5")
    found = fit(recipe, Noise(), Noise(), tmp_path, ALONE, clips=2, workers=0).best
    plain = reference.MAR(recipe.config()).double().eval()
    plain.load_state_dict(mar_fast.from_pretrained(tmp_path / "best.safetensors").state_dict())
    pretrain, losses = recipe.task == "pretrain", []
    for number, index in enumerate(([0, 1], [2])):
        video = torch.cat([torch.from_numpy(Noise()[Key(i)].video).movedim(-1, 1) for i in index])
        masks = validation_masks(recipe, recipe.config(), 2, number, torch.device("cpu"))
        mask, decoder_mask = (mask and mask.take(slice(len(index))) for mask in masks)
        out = plain(video, mask, reconstruct=pretrain, decoder_mask=decoder_mask)
        one = out.reconstruction_loss if pretrain else F.cross_entropy(out.logits, torch.tensor(index))
        losses += [one.item()] * len(index)
    assert found["videos"] == len(losses) == 3 and found["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_validation_of_nothing(tmp_path):
    """No video can be read: that is no best result."""
    recipe = recipe_of("MAR", "data.batch=2", "schedule.epochs=1", "schedule.warmup_epochs=0.0", "model.num_classes=5")
    result = fit(recipe, Noise(), Noise(broken=0), tmp_path, ALONE, clips=2, workers=0)
    assert result.best == {} and not (tmp_path / "best.safetensors").exists()
