"""What is done to a batch on the device: normalisation, random erasing, mixup, cutmix, soft targets.

The order is that of timm and VideoMAE: erasing writes noise into the normalised clips, then clips are mixed.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MARConfig
from ..kernels import checks
from .recipe import Augment


def mix_batch(
    augment: Augment, config: MARConfig, video: Tensor, labels: Tensor | None, boxes: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Normalise and erase clips, mix them and make targets.

    Args:
        augment: Rates of erasing, mixup, cutmix and label smoothing.
        config: Classes, mean and standard deviation of the model.
        video: (B, C, T, H, W) uint8; or floating-point, normalised already. It is not changed.
        labels: (B,) int64; None for a model that does not classify.
        boxes: (B, 4) int64 on the CPU: top, left, height and width of what is erased; height 0 for nothing.
        generator: Of the CPU. One number is drawn from it, whatever the recipe asks for, and all else follows from it.

    Returns:
        The clips and (B, classes) float32 soft targets, None without labels. Where mixup or erasing are on, clips
        are normalised, (video / 255 - mean) / std, in float32; else they keep their dtype.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    checks.tensor("video", video, 5, (torch.uint8, *checks.FLOATS), "(B, C, T, H, W)")
    if tuple(boxes.shape) != (len(video), 4):
        raise checks.bad("boxes", f"shape {tuple(boxes.shape)}", f"({len(video)}, 4)")
    rng = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
    # By recipe and not by batch: every batch has the same dtype.
    normalises = augment.erase > 0 or (augment.mixup > 0 and augment.mix > 0)
    mixed = _normalised(video, config) if normalises and video.dtype == torch.uint8 else video.clone()
    if augment.erase:
        _erase(mixed, boxes.tolist(), rng)
    share = _mix(mixed, augment, rng)
    return mixed, None if labels is None else soft_targets(labels, config.num_classes, share, augment.smoothing)


def _normalised(video: Tensor, config: MARConfig) -> Tensor:
    mean, std = (
        torch.tensor(values).to(video.device, non_blocking=True).view(-1, 1, 1, 1)
        for values in (config.mean, config.std)
    )
    return video.float().div_(255).sub_(mean).div_(std)


def _erase(video: Tensor, boxes: list[list[int]], rng: np.random.Generator) -> None:
    """Normal noise of its own for every value of the boxes."""
    noise = torch.Generator(video.device).manual_seed(int(rng.integers(2**63)))
    for clip, (top, left, height, width) in zip(video, boxes, strict=True):
        if height:
            box = clip[:, :, top : top + height, left : left + width]
            box.copy_(torch.randn(box.shape, generator=noise, device=video.device, dtype=video.dtype))


def _mix(video: Tensor, augment: Augment, rng: np.random.Generator) -> float:
    """Mix each clip with the one at the other end of the batch, and return the share that is left of it."""
    both = augment.mixup > 0 and augment.cutmix > 0
    mixes, cuts = rng.random() < augment.mix, rng.random() < augment.switch if both else augment.cutmix > 0
    alpha = augment.cutmix if cuts else augment.mixup
    if not mixes or not alpha:
        return 1.0
    share = float(rng.beta(alpha, alpha))
    if not cuts:
        video.copy_(video * share + video.flip(0) * (1 - share))
        return share
    top, left, height, width = cut_box(video.shape[-2], video.shape[-1], share, rng)
    box = video[..., top : top + height, left : left + width]
    box.copy_(box.flip(0))
    return 1 - height * width / math.prod(video.shape[-2:])


def cut_box(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The box that cutmix replaces (arXiv 1905.04899): top, left, height and width.

    Its area is 1 - ``share`` of the picture; the centre is anywhere, and what lies outside is cut off.
    """
    rows, columns = (int(side * math.sqrt(1 - share)) // 2 for side in (height, width))  # half of each side
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, left = max(y - rows, 0), max(x - columns, 0)
    return top, left, min(y + rows, height) - top, min(x + columns, width) - left


def soft_targets(labels: Tensor, classes: int, share: float = 1.0, smoothing: float = 0.0) -> Tensor:
    """(B, classes) float32 targets: ``share`` of a clip's own label, the rest of that of its partner, smoothed.

    Smoothing s gives s / classes to every class, and 1 - s more to the label.
    """
    checks.index_range("labels", labels, classes)
    hot = F.one_hot(labels.long(), classes).float() * (1 - smoothing) + smoothing / classes
    return hot * share + hot.flip(0) * (1 - share)
