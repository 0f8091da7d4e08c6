"""reference.py and the model against numbers of the original MAR implementation (float32, CPU)."""

import functools

import numpy as np
import pytest
import torch
from helpers import GOLDEN, golden_clip, golden_weights, normalised, relative, tiny_config

import mar_fast
from mar_fast import TokenMask, masking, reference
from mar_fast.kernels.gather_patch_embed import gather_tubelets

BUILDS = {"reference": reference.MAR, "model": mar_fast.MAR}
VALUES = 1e-6  # logits, features, labels
PIXELS = 2e-6
GRADIENT_NORMS = 1e-5


@functools.cache
def run_eval(build: str, percent: int):
    golden = np.load(GOLDEN / f"mar_tiny_eval_{percent}.npz")
    model = BUILDS[build](tiny_config(mask_ratio=percent / 100)).eval()
    golden_weights(model)
    with torch.no_grad():
        return golden, model(normalised(golden_clip(2, 11)))  # mask=None: the test mask


@functools.cache
def run_train(build: str):
    golden = np.load(GOLDEN / "mar_tiny_train_50.npz")
    model = BUILDS[build](tiny_config()).train()
    names = golden_weights(model)
    mask = TokenMask.from_bool_masked(torch.from_numpy(golden["mask"]).flatten(1) == 0)
    video = normalised(golden_clip(2, 12))
    out = model(video, mask)
    target = torch.from_numpy(golden["soft_target"])
    loss = mar_fast.mar_loss(out, target) if build == "model" else reference.loss(out, target)
    loss.backward()
    return golden, model, names, mask, video, out, loss


@pytest.mark.parametrize("percent", [50, 75])
@pytest.mark.parametrize("build", BUILDS)
def test_eval(build, percent):
    golden, out = run_eval(build, percent)
    assert relative(out.logits, golden["logits"]) <= VALUES
    assert relative(out.features[:, ::97, ::41], golden["features"]) <= VALUES
    assert relative(out.features.double().abs().mean(), golden["features_mean_abs"]) <= VALUES


@pytest.mark.parametrize("percent", [50, 75])
def test_running_mask_is_the_originals(percent):
    golden = np.load(GOLDEN / f"mar_tiny_eval_{percent}.npz")
    mask = masking.cell_running(2, (8, 14, 14), percent / 100, phase=0)
    assert np.array_equal(mask.bool_masked().numpy(), golden["mask"].reshape(2, -1) == 0)


def test_rolled_train_mask_is_a_phase():
    """Sample 1 of the train file is the test mask rolled by one frame, which is the phase -1."""
    golden = np.load(GOLDEN / "mar_tiny_train_50.npz")
    mask = masking.cell_running(2, (8, 14, 14), 0.5, phase=torch.tensor([0, -1]))
    assert np.array_equal(mask.bool_masked().numpy(), golden["mask"].reshape(2, -1) == 0)


@pytest.mark.parametrize("build", BUILDS)
def test_train_values(build):
    golden, _, _, _, _, out, loss = run_train(build)
    assert relative(out.logits, golden["logits"]) <= VALUES
    assert relative(out.features[:, ::97, ::41], golden["features"]) <= VALUES
    assert relative(loss, golden["loss"]) <= VALUES
    assert relative(out.reconstruction_loss, golden["loss_mae"]) <= VALUES
    assert relative(loss - 0.1 * out.reconstruction_loss, golden["loss_cls"]) <= VALUES
    assert relative(out.pixels[:, ::97, ::61], golden["preds_pixel"]) <= PIXELS
    assert relative(out.pixels.double().abs().mean(), golden["preds_pixel_mean_abs"]) <= PIXELS


def test_reference_target():
    golden, _, _, _, _, out, _ = run_train("reference")
    assert relative(out.targets[:, ::97, ::61], golden["labels_pixel"]) <= VALUES
    assert relative(out.targets.double().abs().mean(), golden["labels_pixel_mean_abs"]) <= VALUES


def test_kernel_target():
    """masked_patch_loss never returns its target; but its gradient is 2 * (pixels - target) / count."""
    golden, model, _, mask, video, out, _ = run_train("model")
    pixels = out.pixels.detach().clone().requires_grad_()
    config = model.config
    mar_fast.kernels.masked_patch_loss(
        pixels, video, mask.drop_idx, patch_size=config.patch_size, mean=config.mean, std=config.std
    ).backward()
    target = (pixels - pixels.grad * pixels.numel() / 2).detach()
    assert relative(target[:, ::97, ::61], golden["labels_pixel"]) <= VALUES
    assert relative(target.double().abs().mean(), golden["labels_pixel_mean_abs"]) <= VALUES
    assert gather_tubelets(video, mask.drop_idx, config.patch_size).shape == (2, 784, 3, 2, 16, 16)


@pytest.mark.parametrize("build", BUILDS)
def test_gradient_norms(build):
    golden, model, names, *_ = run_train(build)
    parameters = dict(model.named_parameters())
    assert len(names) == len(parameters) == 117
    worst = max(
        (relative(parameters[ours].grad.norm(), golden[f"grad_norm/{theirs}"]), theirs)
        for theirs, ours in names.items()
    )
    assert worst[0] <= GRADIENT_NORMS, worst
