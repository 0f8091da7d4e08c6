"""What several tests need: golden data by formula, error measures, small models."""

import zlib
from pathlib import Path

import numpy as np
import torch

from mar_fast import named_config
from mar_fast.config import IMAGENET_MEAN, IMAGENET_STD

GOLDEN = Path(__file__).parent / "golden"


def relative(got, want) -> float:
    """Norm of the difference over the norm of ``want``, in float64."""
    got, want = (torch.as_tensor(value).detach().double().flatten() for value in (got, want))
    return float((got - want).norm() / want.norm())


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
