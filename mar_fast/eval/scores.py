"""classify: the scores of a video's views, summed."""

import torch
from torch import Tensor

from ..kernels import checks
from ..model import MAR


@torch.inference_mode()
def classify(model: MAR, views: Tensor, *, batch: int = 8) -> Tensor:
    """Softmax scores of all views of one video, summed (MAR, arXiv 2207.11660, section 4; VideoMAE tests the same way).

    Args:
        model: A model with a classifier, in eval mode; it masks by its config's mask_ratio.
        views: (V, C, T, H, W), from `mar_fast.data.read_views`; moved to the model's device in parts.
        batch: The most views in a forward pass.

    Returns:
        (classes,) float32 on the CPU; divided by V these are probabilities.

    Raises:
        ValueError, TypeError: an argument does not fit the model, or a logit is not finite.
    """
    if model.classifier is None or not model.config.num_classes:
        raise checks.bad("model", "one without a classifier", "a model that was trained to classify")
    if model.training:
        raise checks.bad("model", "one in training mode", "model.eval()")
    checks.whole("batch", batch)
    checks.tensor("views", views, 5, (torch.uint8, *checks.FLOATS), "(V, C, T, H, W)")
    if len(views) == 0:
        raise checks.bad("views", "no view", "at least one")
    weight = next(model.parameters())
    scores = torch.zeros(model.config.num_classes, device=weight.device)
    for part in views.split(batch):
        part = part.to(weight.device)
        logits = model(part if part.dtype == torch.uint8 else part.to(weight.dtype)).logits
        assert logits is not None
        scores += logits.float().softmax(-1).sum(0)
    if not bool(scores.isfinite().all()):
        raise checks.bad("model", f"logits that are not finite in {weight.dtype}", "finite ones (try float32)")
    return scores.cpu()
