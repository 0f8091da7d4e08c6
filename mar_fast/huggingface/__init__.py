"""The drop-in for VideoMAE models of transformers, and mar_fast.kernels as a kernel of the hub."""

from .dropin import accelerate, patch_transformers, register_attention, restore
from .hub_kernel import build_hub_kernel

__all__ = ["accelerate", "build_hub_kernel", "patch_transformers", "register_attention", "restore"]
