"""masked_patch_loss: the reconstruction loss straight from the clip, for dropped patches only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, eager, op
from .device import takes_triton
from .gather_patch_embed import check_normalisation, check_video


def _forward(
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    patch: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    normalize: bool,
) -> Tensor:
    from .jit import masked_patch_loss as launch

    return launch.forward(pixels, video, drop_idx, patch, mean, std, normalize)


def _forward_shape(
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    patch: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    normalize: bool,
) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=pixels.device)


def _backward(
    grad: Tensor,
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    patch: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    normalize: bool,
    needs: list[bool],
) -> Tensor:
    from .jit import masked_patch_loss as launch

    return launch.backward(grad, pixels, video, drop_idx, patch, mean, std, normalize)


def _backward_shape(
    grad: Tensor,
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    patch: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    normalize: bool,
    needs: list[bool],
) -> Tensor:
    return torch.empty(pixels.shape, dtype=pixels.dtype, device=pixels.device)


_triton_masked_patch_loss = op.declare(
    "masked_patch_loss",
    forward=_forward,
    forward_shape=_forward_shape,
    backward=_backward,
    backward_shape=_backward_shape,
    saves=lambda inputs, outputs: inputs[:3],
    gradients=("pixels",),
)


def masked_patch_loss(
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    *,
    patch: tuple[int, int, int],
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    normalize: bool = True,
) -> Tensor:
    """Mean squared error between predicted and true pixels of the dropped tubelets (VideoMAE, arXiv 2203.12602).

    The target is the clip in [0, 1], a tubelet flattened as (t, h, w, c), each channel of it normalised over its
    t * h * w values: (v - mean) / (sqrt(unbiased variance) + 1e-6).

    Args:
        pixels: (B, M, t * h * w * C), the prediction.
        video: (B, C, T, H, W), any strides. uint8 is divided by 255; floating point is un-normalised with mean and
            std where they are given, else taken as it is.
        drop_idx: (B, M) int32 or int64, flat indices into the grid (T/t, H/h, W/w).
        patch: (t, h, w).
        mean: one number a channel.
        std: one number a channel, with mean.
        normalize: Whether the target is normalised for each patch and channel.

    Returns:
        A float32 scalar (float64 for float64 pixels), 0 for M = 0. The gradient flows to pixels only.

    Raises:
        ValueError, TypeError: a shape, dtype, device or index does not fit; the message names it.
    """
    if not isinstance(patch, tuple) or len(patch) != 3 or not all(isinstance(step, int) and step > 0 for step in patch):
        raise checks.bad("patch", repr(patch), "three whole numbers (t, h, w) above 0")
    t, h, w = patch
    if normalize and t * h * w < 2:
        raise checks.bad("patch", patch, "at least 2 values a channel, or normalize=False: a variance needs two")
    checks.tensor("video", video, 5, (torch.uint8, *checks.FLOATS), "(B, C, T, H, W)")
    batch, channels = video.shape[:2]
    tokens = check_video("video", video, (t, h, w), channels)
    checks.tensor("drop_idx", drop_idx, 2, checks.INDICES, "(B, M)")
    if drop_idx.shape[0] != batch:
        raise checks.bad("drop_idx", f"{drop_idx.shape[0]} rows", f"{batch}, one for each clip of video")
    checks.tensor("pixels", pixels, 3, checks.FLOATS, "(B, M, t*h*w*C)")
    checks.size("pixels", pixels, (batch, drop_idx.shape[1], t * h * w * channels), "(B, M, t*h*w*C)")
    mean, std = check_normalisation(mean, std, channels)
    checks.same_device("video", video.device, pixels=pixels, drop_idx=drop_idx)
    checks.index_range("drop_idx", drop_idx, tokens)
    if takes_triton("masked_patch_loss", pixels):
        options = (patch, mean, std, normalize)
        loss: Tensor = _triton_masked_patch_loss(pixels, video.detach(), drop_idx, *options)
        return loss
    return eager.masked_patch_loss(pixels, video, drop_idx, (t, h, w), mean, std, normalize)
