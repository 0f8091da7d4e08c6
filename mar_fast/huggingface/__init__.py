"""The drop-in for VideoMAE models of transformers."""

from .dropin import accelerate, patch_transformers, register_attention, restore

__all__ = ["accelerate", "patch_transformers", "register_attention", "restore"]
