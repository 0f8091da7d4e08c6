"""Checkpoints of every layout, read and written: MAR, VideoMAE, Hugging Face VideoMAE and our own.

A source goes through `read` (files to named tensors), `sources` (to our names: foreign ones end there), `plan` (with
what the caller asks for, one `MARConfig`) and `load` (tensors into the model, strictly). README.md says more.
"""

from .compare import Comparison, compare
from .hub import model_card, push_to_hub, save_pretrained
from .load import from_pretrained
from .report import LoadReport
from .write import save_checkpoint

__all__ = [
    "Comparison",
    "LoadReport",
    "compare",
    "from_pretrained",
    "model_card",
    "push_to_hub",
    "save_checkpoint",
    "save_pretrained",
]
