"""What several suites agree on: keep ratios, names, models, bounds."""

import torch

import mar_fast
from mar_fast import MARConfig

KEPT = (0.5, 0.25, 1.0)
CLASSES = 174  # Something-Something v2
LETTERS = {"small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g"}

# What logits, losses or all gradients together may differ from float64 by, whatever the yardstick does.
ABSOLUTE_BOUND = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def model_config(size: str, keep: float, *, decoder: bool = False) -> MARConfig:
    """MAR of a size; where all is kept, the dense VideoMAE classifier: MAR would do needless work there."""
    if keep == 1:
        return mar_fast.named_config(f"videomae_vit_{size}", num_classes=CLASSES)
    without = {} if decoder else {"decoder_depth": 0}
    return mar_fast.named_config(f"mar_vit_{size}", num_classes=CLASSES, mask_ratio=1 - keep, **without)


def case_name(size: str, batch: int) -> str:
    """ "ViT-B, batch 1"."""
    return f"ViT-{LETTERS[size]}, batch {batch}"
