"""Models as files that run without the model's code: torch.export, AOTInductor, ONNX (README)."""

from .read import ExportedModel, ExportInfo, load_exported
from .write import export_model

__all__ = ["ExportInfo", "ExportedModel", "export_model", "load_exported"]
