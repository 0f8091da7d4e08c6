"""load_exported: a file that `export_model` wrote, as a function of clips; and what the file says about itself."""

import importlib.util
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import MARConfig
from ..kernels import checks  # with the ops that a file from a GPU calls

Format = Literal["pt2", "onnx", "aoti"]
KEY = "mar_fast"  # of the metadata
EXTRA_FILE = "mar_fast.json"  # its name in a file of torch.export, which has extra files and no metadata


@dataclass(frozen=True, kw_only=True)
class ExportInfo:
    """What an exported file takes and gives; it is in the file as JSON.

    Attributes:
        format: "pt2" (torch.export), "aoti" (AOTInductor) or "onnx".
        config: Of the model: its clips, mask_ratio, mean, std and everything else.
        batch: Clips in a call; None for any number.
        input_dtype: "uint8" for pixels, "float32" for clips that are already normalised.
        output: "logits" (B, classes), or without a classifier "features" (B, N, D).
        dtype: Of the weights, and of the output.
        device: "cpu" or "cuda".
        labels: Names of the classes, if they are known.
        versions: Of mar_fast and torch, with which it was written.
    """

    format: Format
    config: MARConfig
    batch: int | None
    input_dtype: str
    output: str
    dtype: str
    device: str
    labels: tuple[str, ...] | None
    versions: dict[str, str]

    def to_json(self) -> str:
        """As it is written into a file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ExportInfo":
        """The inverse of `to_json`."""
        content = json.loads(text)
        labels = None if content["labels"] is None else tuple(content["labels"])
        return cls(**content | {"config": MARConfig(**content["config"]), "labels": labels})


@dataclass(frozen=True)
class ExportedModel:
    """An exported file, loaded: call it with a video.

    Attributes:
        info: What the file says about itself.
        run: The same call without checks.
    """

    info: ExportInfo
    run: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Logits (B, classes) or features (B, N, D), see ``info.output``.

        The video is (B, C, T, H, W) of ``info``'s sizes, dtype and device, with any strides.

        Raises:
            ValueError, TypeError: the video does not fit the file.
        """
        info, config = self.info, self.info.config
        checks.tensor("video", video, 5, (getattr(torch, info.input_dtype),), "(B, C, T, H, W)")
        if info.batch is None and video.shape[0] == 0:
            raise checks.bad("video", "no clip", "at least one")
        batch = video.shape[0] if info.batch is None else info.batch
        checks.size("video", video, (batch, config.channels, config.num_frames, *config.image_size), "(B, C, T, H, W)")
        if video.device.type != info.device:
            raise checks.bad("video", f"a tensor on {video.device}", f"one on {info.device}, as it was exported")
        return self.run(video.contiguous())  # compiled code reads memory by the strides that it was compiled for


def load_exported(path: str | Path) -> ExportedModel:
    """Load a file that `export_model` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file.
        ModuleNotFoundError: an ONNX file, and onnxruntime is not installed.
    """
    path, text = Path(path), ""
    if not path.is_file():
        raise FileNotFoundError(f"path: got {path}, which is no file; expected one that mar-fast export wrote")
    if path.suffix == ".onnx":
        text, run = _onnx(path)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any("/data/aotinductor/" in name for name in names):
            text, run = _compiled(path)
        elif any(name.endswith(f"/extra/{EXTRA_FILE}") for name in names):
            text, run = _program(path)
    if not text:
        raise checks.bad("path", path, "a .pt2 or .onnx file that mar-fast export wrote")
    return ExportedModel(ExportInfo.from_json(text), run)


def _program(path: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
    extra_files: dict[str, Any] = {EXTRA_FILE: ""}
    program = torch.export.load(path, extra_files=extra_files)
    return extra_files[EXTRA_FILE], program.module()


def _compiled(path: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
    from torch._inductor import aoti_load_package  # takes a second

    run = aoti_load_package(str(path))
    return run.get_metadata().get(KEY, ""), run


def _onnx(path: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
    check_installed("onnxruntime")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its types of error are not public
        raise checks.bad("path", f"{path}, which onnxruntime does not read ({error})", "an ONNX model") from error
    text = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    return text, lambda video: torch.from_numpy(session.run(None, {"video": video.numpy()})[0])


def check_installed(package: str) -> None:
    """Check that a package which only ONNX needs can be imported."""
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"format: got 'onnx', but the package {package} is not installed; "
            "expected 'pt2' or 'aoti', or: pip install 'mar-fast[export]'"
        )
