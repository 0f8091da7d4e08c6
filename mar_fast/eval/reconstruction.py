"""reconstruct: a clip whose dropped tubelets are those that the pixel decoder predicts.

The decoder learns targets normalised for each tubelet and channel, so mean and contrast have to come from elsewhere: by
default they are estimated from visible tubelets, so that nothing in the result depends on a dropped pixel.

In comments: B clips, M dropped tubelets of a clip, N visible ones, K dropped ones of all clips.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import checks
from ..kernels.gather_patch_embed import per_channel, tubelets
from ..masking import TokenMask
from ..model import MAR


class Reconstruction(NamedTuple):
    """What `reconstruct` gives.

    Attributes:
        video: (B, C, T, H, W), of the dtype and in the units of the clips: uint8, rounded and clipped to 0 to 255, or
            normalised floating point, which is not clipped. Visible tubelets are the clips' own bits.
        loss: The reconstruction loss, mean squared error on the target (normalised, where the config says so) over the
            dropped tubelets: the one number that needs their pixels.
    """

    video: Tensor
    loss: float


@torch.no_grad()
def reconstruct(model: MAR, video: Tensor, mask: TokenMask, *, ground_truth_statistics: bool = False) -> Reconstruction:
    """Predict the dropped tubelets of clips and put them where they belong.

    Where the model's target is normalised (``norm_pix_loss``), mean and standard deviation of each dropped tubelet
    and channel are the weighted mean of those of the clip's visible tubelets, with weight 1 / distance^4, distances in
    tubelets (inverse distance weighting, Shepard 1968). In three dimensions the exponent has to be above 3, or the many
    tubelets far away outweigh the few near ones. A model that predicts pixels needs no statistics.

    Args:
        model: With a pixel decoder, in eval mode.
        video: (B, C, T, H, W) of the config's size, on the model's device; uint8, or normalised floating point.
        mask: Which tubelets are visible.
        ground_truth_statistics: Take mean and standard deviation of each dropped tubelet from its own pixels instead:
            the result then shows what the model has never seen.

    Raises:
        ValueError, TypeError: an argument does not fit the model, or a predicted value is not finite.
    """
    config = model.config
    if model.decoder is None:
        raise checks.bad("model", "one without a pixel decoder", "one with a pixel decoder, as pre-training leaves it")
    if model.training:
        raise checks.bad("model", "one in training mode", "model.eval()")
    if not isinstance(mask, TokenMask):
        raise checks.bad_type("mask", type(mask).__name__, "a TokenMask")
    if ground_truth_statistics and not config.norm_pix_loss:
        raise checks.bad("ground_truth_statistics", True, "False: this model predicts pixels (norm_pix_loss=False)")
    out = model(video, mask, reconstruct=True)
    assert out.pixels is not None and out.reconstruction_loss is not None
    masked = mask.bool_masked().view(-1, *config.grid)
    t, h, w = config.patch_size
    # Prediction and target have the channel last; dropped tubelets stand clip after clip, in flat order.
    pixels = out.pixels.float().reshape(-1, t, h, w, config.channels).permute(0, 4, 1, 2, 3)  # (K, C, t, h, w)
    if not bool(pixels.isfinite().all()):
        raise checks.bad("model", f"predictions that are not finite in {out.pixels.dtype}", "finite ones (try float32)")
    filled = video.clone(memory_format=torch.contiguous_format)
    mean, std = (per_channel(values, video.device).view(-1, 1, 1, 1) for values in (config.mean, config.std))
    if config.norm_pix_loss:
        unit = filled.float() / 255 if video.dtype == torch.uint8 else filled.float() * std + mean  # pixels in [0, 1]
        cells = tubelets(unit, config.patch_size)
        own_mean, own_deviation = _statistics(cells[masked]) if ground_truth_statistics else _estimated(cells, masked)
        # The target divides by the deviation + 1e-6 (mar_fast.reference.patch_targets).
        pixels = pixels * (own_deviation + 1e-6) + own_mean
    pixels = (pixels * 255).round().clamp(0, 255) if video.dtype == torch.uint8 else (pixels - mean) / std
    tubelets(filled, config.patch_size)[masked] = pixels.to(video.dtype)
    return Reconstruction(filled, float(out.reconstruction_loss))


def _statistics(tubelets: Tensor) -> tuple[Tensor, Tensor]:
    """(K, C, t, h, w) -> mean and standard deviation, (K, C, 1, 1, 1)."""
    deviation, mean = torch.std_mean(tubelets, dim=(2, 3, 4), correction=1, keepdim=True)
    return mean, deviation


def _estimated(tubelets: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of dropped tubelets, (K, C, 1, 1, 1), from those of visible ones."""
    means, deviations = [], []
    for clip, hidden in zip(tubelets, masked, strict=True):
        mean, deviation = _statistics(clip[~hidden])  # (N, C, 1, 1, 1)
        weights = _weights(hidden)
        means.append((weights @ mean.flatten(1)).view(-1, *mean.shape[1:]))
        deviations.append((weights @ deviation.flatten(1)).view(-1, *mean.shape[1:]))
    return torch.cat(means), torch.cat(deviations)


def _weights(hidden: Tensor) -> Tensor:
    """(T', H', W') bool, True = dropped -> (M, N), how much each visible tubelet counts for a dropped one."""
    dropped, visible = (where.nonzero().float() for where in (hidden, ~hidden))
    # Not by a matrix product, whose rounding would reach neighbours at distance 1.
    distance = torch.cdist(dropped, visible, compute_mode="donot_use_mm_for_euclid_dist")
    weights = distance**-4
    return weights / weights.sum(1, keepdim=True)
