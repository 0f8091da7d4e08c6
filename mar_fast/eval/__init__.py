"""Evaluate a model: scores of videos, ensembles of masks, reconstruction; accuracy, trade-off and pictures (README)."""

from .ensemble import complementary, log_probabilities
from .reconstruction import reconstruct
from .scores import classify

__all__ = ["classify", "complementary", "log_probabilities", "reconstruct"]
