"""Shared by the suites: keep ratios, names, models, tolerances, the least work."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

import mar_fast
from mar_fast import MARConfig, cost
from mar_fast.cost import Cost, Part
from mar_fast.data import sample_clip

from .. import peers, workloads
from ..case import Case, Provider, RunOptions
from ..workloads import Workload

KEPT = (0.5, 0.25, 1.0)
CLASSES = 174  # Something-Something v2
LETTERS = {"small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g"}

# How far logits, losses, or all gradients together may be from float64, even if the baseline is closer.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def model_config(size: str, keep: float, *, decoder: bool = False) -> MARConfig:
    """MAR of a size; the dense VideoMAE classifier if all tokens are kept, where MAR would only add work."""
    if keep == 1:
        return mar_fast.named_config(f"videomae_vit_{size}", num_classes=CLASSES)
    without = {} if decoder else {"decoder_depth": 0}
    return mar_fast.named_config(f"mar_vit_{size}", num_classes=CLASSES, mask_ratio=1 - keep, **without)


def film(options: RunOptions) -> Path:
    """The video file of a run."""
    return options.clip or sample_clip()


def case_name(size: str, batch: int) -> str:
    """ "ViT-B, batch 1"."""
    return f"ViT-{LETTERS[size]}, batch {batch}"


def model_case(suite: str, name: str, workload: Workload, providers: tuple[Provider, ...], **more: Any) -> Case:
    """A case of a whole model; ``more`` are fields of `Case` that are not as usual for one."""
    usual: dict[str, Any] = dict(
        mode="training step" if workload.training else "inference",
        x=1 - workload.config.mask_ratio,
        dtype=workload.dtype,
        clips=workload.batch,
        expected=partial(workloads.expected, workload),
        tolerance=TOLERANCE[workload.dtype],
        baseline=peers.BASELINE,
        floor=least_work(workload),
    )
    return Case(suite=suite, name=name, providers=providers, **(usual | more))


def least_work(workload: Workload) -> Cost:
    """The least work of a forward pass over float32 clips, or of a training step."""
    training = workload.training
    count = cost.count(
        workload.config,
        batch=workload.batch,
        reconstruct=training and workload.config.decoder_depth > 0,
        training=training,
        bytes_per_value=workload.dtype.itemsize,
        bytes_per_pixel=4,
    )
    if not training:
        return count
    # Gradient, weight and two moments in float32 are read, and all but the gradient are written.
    return Cost((*count.parts, Part("optimizer", 0, 0, 7 * 4 * count.parameters)))
