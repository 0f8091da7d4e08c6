"""mar_loss: the loss that MAR is trained with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import checks
from .model import MAROutput


def mar_loss(out: MAROutput, target: Tensor, reconstruction_weight: float = 0.1) -> Tensor:
    """Cross-entropy + ``reconstruction_weight`` * reconstruction loss (MAR, arXiv 2207.11660, section 3.4).

    Args:
        out: What the model returned, with logits.
        target: (B,) int64 class indices or (B, classes) soft targets.
        reconstruction_weight: 0.1 on Something-Something v2, 0.01 on Kinetics-400; 0 leaves the second term out.

    Raises:
        ValueError: out lacks the logits or the reconstruction loss, or target does not fit.
    """
    if out.logits is None:
        raise checks.bad("out", "no logits", "the output of a model with a classifier")
    batch, classes = out.logits.shape
    soft = isinstance(target, Tensor) and target.is_floating_point()
    if not isinstance(target, Tensor) or tuple(target.shape) != ((batch, classes) if soft else (batch,)):
        got = f"{target.dtype} of shape {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise checks.bad("target", got, f"({batch},) class indices or ({batch}, {classes}) floating-point soft targets")
    if not soft:
        checks.index_range("target", target, classes)
    if not reconstruction_weight >= 0:
        raise checks.bad("reconstruction_weight", reconstruction_weight, "0 or more")
    logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, target.to(logits.dtype) if soft else target.long())
    if reconstruction_weight:
        if out.reconstruction_loss is None:
            accepted = "0, or an output of a model with a decoder in training or with reconstruct=True"
            raise checks.bad("reconstruction_weight", f"{reconstruction_weight} without reconstruction_loss", accepted)
        loss = loss + reconstruction_weight * out.reconstruction_loss
    return loss
