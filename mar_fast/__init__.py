"""mar_fast: masked video transformers (MAR, VideoMAE) that compute visible tokens only."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import checkpoint, cost, data, eval, kernels, masking, reference
    from .checkpoint import LoadReport, from_pretrained, save_checkpoint
    from .config import MARConfig, list_models, named_config
    from .export import ExportedModel, ExportInfo, export_model, load_exported
    from .huggingface import accelerate, patch_transformers, register_attention, restore
    from .inference import CompiledModel, compile_for_inference
    from .kernels import debug_checks
    from .loss import mar_loss
    from .masking import TokenMask
    from .model import MAR, MAROutput, create_model
    from .quantization import quantize

# Imported on first use, so that mar_fast.kernels can be used alone and the command line starts fast.
_NAMES = {
    "checkpoint": ("LoadReport", "from_pretrained", "save_checkpoint"),
    "config": ("MARConfig", "list_models", "named_config"),
    "export": ("ExportInfo", "ExportedModel", "export_model", "load_exported"),
    "huggingface": ("accelerate", "patch_transformers", "register_attention", "restore"),
    "inference": ("CompiledModel", "compile_for_inference"),
    "kernels": ("debug_checks",),
    "loss": ("mar_loss",),
    "masking": ("TokenMask",),
    "model": ("MAR", "MAROutput", "create_model"),
    "quantization": ("quantize",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "MAR",
    "CompiledModel",
    "ExportInfo",
    "ExportedModel",
    "LoadReport",
    "MARConfig",
    "MAROutput",
    "TokenMask",
    "accelerate",
    "checkpoint",
    "compile_for_inference",
    "cost",
    "create_model",
    "data",
    "debug_checks",
    "eval",
    "export_model",
    "from_pretrained",
    "kernels",
    "list_models",
    "load_exported",
    "mar_loss",
    "masking",
    "named_config",
    "patch_transformers",
    "quantize",
    "reference",
    "register_attention",
    "restore",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_HOME.get(name, name)}", __name__)
    return getattr(module, name) if name in _HOME else module


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
