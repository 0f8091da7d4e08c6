"""What tests of the trade-off curve share: real videos, and a model whose answers differ."""

import clips
import torch
from checkpoint_cases import random_weights
from helpers import small_config

import mar_fast

PATHS = [clips.real_clip(name) for name in ["bikes.mp4", "carphone_pristine.mp4", "bigbuckbunny.mp4"]]


def made(seed=7, **overrides):
    """Random weights that answer differently from view to view and from mask to mask."""
    model = random_weights(mar_fast.MAR(small_config(decoder_depth=0, mask_ratio=0.0, **overrides)), seed)
    with torch.no_grad():
        model.classifier.head.weight.mul_(3)
    return model
