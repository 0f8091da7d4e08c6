"""What a model is worth: scores of videos, ensembles, the trade-off curve, reconstruction; and their pictures."""

from .ensemble import complementary, log_probabilities
from .reconstruction import reconstruct
from .scores import classify

__all__ = ["classify", "complementary", "log_probabilities", "reconstruct"]
