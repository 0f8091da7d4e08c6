"""masked_patch_loss: the reconstruction loss straight from the clip, for dropped patches only."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .device import HAS_TRITON, takes_triton
from .gather_patch_embed import check_index, check_normalisation, check_video, gather_tubelets, per_channel
from .plan import Plans

if HAS_TRITON:
    from .jit import masked_patch_loss as jit

_plans = Plans()


def masked_patch_loss(
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    clip_idx: Tensor | None = None,
    *,
    patch_size: tuple[int, int, int],
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    normalize: bool = True,
) -> Tensor:
    """Mean squared error between predicted and true pixels of the dropped tubelets (VideoMAE, arXiv 2203.12602).

    The target is the clip in [0, 1], a tubelet flattened as (t, h, w, c), each channel of it normalised over its
    t * h * w values: (v - mean) / (sqrt(unbiased variance) + 1e-6).

    Args:
        pixels: (B, M, t * h * w * C), the prediction; (total, t * h * w * C) where clips drop different numbers.
        video: (B, C, T, H, W), any strides. uint8 is divided by 255; floating point is un-normalised with mean and
            std where they are given, else taken as it is.
        drop_idx: (B, M) or (total,) int32 or int64, flat indices into the grid (T/t, H/h, W/w).
        clip_idx: (total,) int32 or int64, the clip of each tubelet in a ``drop_idx`` of that shape; None for (B, M).
        patch_size: (t, h, w).
        mean: one number a channel.
        std: one number a channel, with mean.
        normalize: Whether the target is normalised for each patch and channel.

    Returns:
        A float32 scalar (float64 for float64 pixels), 0 if nothing is dropped. The gradient flows to pixels only.

    Raises:
        ValueError, TypeError: a shape, dtype, device or index does not fit; the message names it.
    """
    key, run = _plans.find(pixels, video, drop_idx, clip_idx, patch_size, mean, std, normalize)
    if run is None:
        whole = isinstance(patch_size, tuple) and len(patch_size) == 3
        if not whole or not all(isinstance(step, int) and step > 0 for step in patch_size):
            raise checks.bad("patch_size", repr(patch_size), "three whole numbers (t, h, w) above 0")
        t, h, w = patch_size
        if normalize and t * h * w < 2:
            raise checks.bad(
                "patch_size", patch_size, "at least 2 values a channel, or normalize=False: a variance needs two"
            )
        checks.tensor("video", video, 5, (torch.uint8, *checks.FLOATS), "(B, C, T, H, W)")
        channels = video.shape[1]
        check_video("video", video, patch_size, channels)
        check_index("drop_idx", drop_idx, clip_idx, video, "M")
        shape = "(B, M, t*h*w*C)" if clip_idx is None else "(total, t*h*w*C)"
        checks.tensor("pixels", pixels, drop_idx.ndim + 1, checks.FLOATS, shape)
        checks.size("pixels", pixels, (*drop_idx.shape, t * h * w * channels), shape)
        mean, std = check_normalisation(mean, std, channels)
        checks.same_device("video", video.device, pixels=pixels, drop_idx=drop_idx, clip_idx=clip_idx)
    if checks.may_read(drop_idx):
        t, h, w = patch_size
        checks.index_range("drop_idx", drop_idx, video.shape[2] // t * (video.shape[3] // h) * (video.shape[4] // w))
        if clip_idx is not None:
            checks.index_range("clip_idx", clip_idx, video.shape[0])
    if video.requires_grad:
        video = video.detach()
    if run is None:
        tensors = (pixels, video, drop_idx, clip_idx)
        if not takes_triton("masked_patch_loss", pixels):
            return eager_masked_patch_loss(*tensors, patch_size=patch_size, mean=mean, std=std, normalize=normalize)
        run = _plans.keep(key, jit.masked_patch_loss.plan(*tensors, patch_size, mean, std, normalize))
    return run(pixels, video, drop_idx, clip_idx)


def eager_masked_patch_loss(
    pixels: Tensor, video: Tensor, drop_idx: Tensor, clip_idx: Tensor | None = None, **options: Any
) -> Tensor:
    """What `masked_patch_loss` means, in plain PyTorch; all its options are given."""
    if pixels.numel() == 0:
        return pixels.to(torch.promote_types(pixels.dtype, torch.float32)).sum()  # 0, still connected to pixels
    target = patch_targets(video, drop_idx, clip_idx, dtype=pixels.dtype, **options)
    return F.mse_loss(pixels.to(target.dtype), target)


def patch_targets(
    video: Tensor,
    index: Tensor,
    clip_idx: Tensor | None = None,
    *,
    patch_size: tuple[int, int, int],
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    normalize: bool,
    dtype: torch.dtype,
) -> Tensor:
    """(B, M, t * h * w * C), or (total, ...) with clip_idx: the target of pixels of ``dtype``, in float32 or wider."""
    target = gather_tubelets(video.detach(), index, patch_size, clip_idx)  # (B, M, C, t, h, w), or (total, C, ...)
    # Not -4 and -1, which ONNX's older exporter would keep. (B, M, t, h, w, C), or (total, t, h, w, C)
    target = target.movedim(target.ndim - 4, target.ndim - 1)
    target = target.to(torch.promote_types(dtype, torch.float32))
    if video.dtype == torch.uint8:
        target = target / 255
    elif mean is not None and std is not None:
        scale, shift = (per_channel(values, video.device) for values in (std, mean))
        target = (target * scale).add_(shift)
    if normalize:
        variance, average = torch.var_mean(target, dim=(-4, -3, -2), keepdim=True, correction=1)
        target = (target - average).div_(variance.sqrt_().add_(1e-6))
    return target.flatten(-4)
