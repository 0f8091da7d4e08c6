"""Evaluate a model: scores, features, ensembles of masks, reconstruction; accuracy, trade-off and pictures (README)."""

from .ensemble import complementary, log_probabilities
from .extraction import extract
from .reconstruction import reconstruct
from .scores import classify

__all__ = ["classify", "complementary", "extract", "log_probabilities", "reconstruct"]
