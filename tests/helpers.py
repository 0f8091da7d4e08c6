"""What several tests need: golden data by formula, error measures, small models."""

import zlib
from pathlib import Path

import numpy as np
import torch

from mar_fast import named_config, reference
from mar_fast.config import IMAGENET_MEAN, IMAGENET_STD

GOLDEN = Path(__file__).parent / "golden"


def relative(got, want) -> float:
    """Norm of the difference over the norm of ``want``, in float64."""
    got, want = (torch.as_tensor(value).detach().double().flatten() for value in (got, want))
    return float((got - want).norm() / want.norm())


def plain(model):
    """The plain reference in float64 and in eval mode, with a model's weights."""
    made = reference.MAR(model.config).double().eval()
    made.load_state_dict(model.state_dict())
    return made


def tiny_config(**overrides):
    """The model of the golden data."""
    return named_config("mar_vit_base", **{**dict(embed_dim=96, depth=2, num_heads=3, num_classes=174), **overrides})


def small_config(**overrides):
    """A clip of 4 frames of 64 x 64 in 2 x 4 x 4 tokens: fast enough for gradients in float64."""
    small = dict(
        num_frames=4, image_size=(64, 64), embed_dim=96, depth=2, num_heads=3, num_classes=11,
        bridge_embed_dim=64, bridge_num_heads=2, decoder_embed_dim=48, decoder_depth=2, decoder_num_heads=3,
    )  # fmt: skip
    return named_config("mar_vit_base", **{**small, **overrides})


def small_clips(batch=2, dtype=torch.uint8, seed=7):
    """(B, 3, 4, 64, 64), for models of `small_config`."""
    shape, generator = (batch, 3, 4, 64, 64), torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    return torch.randn(shape, dtype=dtype, generator=generator)


@torch.no_grad()
def draw_weights(model):
    """Give every weight a random value, none of them a special one; returns the model."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        z = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            z = 1 + 0.1 * z if "norm" in name and name.endswith("weight") else 0.1 * z
        else:
            z = z / parameter[0].numel() ** 0.5
        parameter.copy_(z)
    return model


def values(model, video, mask, reconstruct):
    """What a model or the reference gives, by name; without targets, which the reference alone has."""
    out = model(video, mask, reconstruct=reconstruct)
    found = out._asdict() if hasattr(out, "_asdict") else vars(out)
    return {name: value for name, value in found.items() if value is not None and name != "targets"}


def training_step(run, model, video, mask, autocast=False):
    """What ``run(model, video, mask, reconstruct)`` gives, as `values` does, and all gradients, in float64."""
    reconstruct = model.decoder is not None and mask.drop_idx.numel() > 0
    model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = run(model, video, mask, reconstruct)
    logits, target = out["logits"], torch.arange(mask.batch, device=video.device) * 2 + 3
    loss = torch.nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)
    (loss + 0.1 * out.get("reconstruction_loss", 0)).backward()
    out |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: value.detach().double().clone() for name, value in out.items()}


def assert_near(got, want, own_error, floor, few=1):
    """Nothing is further from ``want`` than twice the error ``own_error`` of the plain model, and ``floor``.

    The error of up to ``few`` numbers may be small by luck: what went into them counts too.
    """
    assert set(got) == set(own_error) == set(want)
    largest = max(float(value.norm()) for value in want.values())
    for name, value in want.items():
        assert got[name].shape == value.shape
        if value.norm() == 0:  # the query bias, where there is only one key
            assert got[name].norm() <= floor * largest, name
            continue
        compared = [name, *(key for key in ("logits", "pixels") if value.numel() <= few and key in want)]
        allowed = 2 * max(own_error[key] for key in compared) + floor
        assert relative(got[name], value) <= allowed, (name, relative(got[name], value), allowed)


# MAR's layout on the left, ours on the right.
_RENAMED = (
    ("backbone.", "encoder."),
    ("encoder_to_cls_decoder.", "classifier.proj."),
    ("cls_head.", "classifier."),
    (".norm_ffn.", ".norm2."),
    (".attn.to_qkv.", ".attn.qkv."),
    (".ffn.net.0.", ".mlp.fc1."),
    (".ffn.net.3.", ".mlp.fc2."),
)


def our_name(mar_name: str) -> str:
    name = mar_name
    for theirs, ours in _RENAMED:
        name = name.replace(theirs, ours)
    if mar_name.startswith("cls_head.blocks.") and ".norm." in mar_name:
        name = name.replace(".norm.", ".norm1.")
    return name


def golden_weights(model):
    """Fill ``model`` by the formula of the golden data, which goes by MAR's parameter names; returns the name map."""
    names = [
        key.removeprefix("grad_norm/")
        for key in np.load(GOLDEN / "mar_tiny_train_50.npz").files
        if key.startswith("grad_norm/")
    ]
    parameters = dict(model.named_parameters())
    ours = {name: our_name(name) for name in names}
    assert set(ours.values()) == set(parameters)
    with torch.no_grad():
        for name in names:
            parameter = parameters[ours[name]]
            shape = tuple(parameter.shape)
            rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
            z = rng.standard_normal(shape, dtype=np.float32)
            if len(shape) == 1 and "norm" in name and name.endswith("weight"):
                z = 1 + np.float32(0.1) * z
            elif len(shape) == 1 or "mask_token" in name:
                z = np.float32(0.02) * z
            else:
                z = z / np.float32(np.sqrt(np.prod(shape[1:])))
            parameter.copy_(torch.from_numpy(z))
    return ours


def golden_clip(batch: int, seed: int):
    """(B, 16, 224, 224, 3) uint8, smooth enough that patches have structure."""
    rng = np.random.Generator(np.random.PCG64(seed))
    v = rng.integers(0, 256, (batch, 16, 224, 224, 3), dtype=np.uint8).astype(np.float32)
    f = (v + np.roll(v, 1, axis=2) + np.roll(v, 1, axis=3) + np.roll(v, 1, axis=1)) / 4
    return torch.from_numpy(np.rint(f).astype(np.uint8))


def normalised(clip):
    """(B, T, H, W, C) uint8 -> (B, C, T, H, W) float32, normalised with ImageNet's mean and std."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((clip.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
