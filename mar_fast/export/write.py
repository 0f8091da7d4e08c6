"""export_model: a model as a file that runs without the model's code."""

import copy
import platform
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import mar_fast

from ..checkpoint.compare import relative
from ..checkpoint.report import class_names
from ..files import may_write, write_whole, write_whole_files
from ..inference import has_cpp_compiler
from ..kernels import checks, use_backend
from ..layers import Constant
from ..model import MAR
from .read import EXTRA_FILE, KEY, ExportInfo, Format, check_installed, load_exported

SUFFIXES: dict[Format, str] = {"pt2": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}
ONNX_PACKAGES = ("onnxscript", "onnxruntime")
ONNX_LIMIT = 2**31 - 2**24  # bytes of weights in an ONNX file: a protobuf message has at most 2 GiB


class _TestForm(nn.Module):
    """What is exported: a video in, one tensor out, by the test mask of the model."""

    def __init__(self, model: MAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor) -> Tensor:
        out = self.model(video, reconstruct=False)
        return out.features if out.logits is None else out.logits


def export_model(
    model: MAR,
    path: str | Path,
    example: Tensor,
    *,
    format: Format = "pt2",
    dynamic_batch: bool = True,
    labels: Sequence[str] | None = None,
    force: bool = False,
) -> float:
    """Write a model as a file of torch.export, AOTInductor or ONNX, whole or not at all.

    The file takes a video and gives logits, or features where the model has no classifier, by the test mask of the
    model's mask_ratio. Before it is put in place it is loaded again and compared with the model on ``example``.

    On a CPU the file has plain PyTorch's ops. From a GPU "pt2" calls the ops of this package, which must be installed
    where it runs; "aoti" has the kernels in it, for that kind of GPU. "onnx" always has plain ops; weights that do not
    fit into its file are in a second one beside it (`weights_file`), and both are written or none.

    Args:
        model: In eval mode, with its final dtype and device; for "onnx" in float32. `from_pretrained` takes another
            ``mask_ratio``; 0 is the dense form.
        path: Where to write: .pt2 for "pt2" and "aoti", .onnx for "onnx".
        example: (B, C, T, H, W) uint8, or float32 that is normalised. Real clips: results are compared on them. The
            file takes clips of this dtype, and without ``dynamic_batch`` B of them.
        format: "pt2", "aoti" (needs a C++ compiler, takes minutes) or "onnx" (needs the packages of the extra export).
        dynamic_batch: Whether the file takes any number of clips.
        labels: Names of the classes, for the file's metadata; None for those that the model's checkpoint had.
        force: Replace files that exist.

    Returns:
        Norm of the difference between the file's results and the model's, relative to the norm of the model's, for the
        number of clips where it is largest.

    Raises:
        ValueError, TypeError: an argument does not fit, or no C++ compiler is found; the message says.
        FileExistsError: one of the files exists, and ``force`` is not set.
        ModuleNotFoundError: "onnx" needs a package that is not installed.
        ArithmeticError: results differ by more than 1e-4 (in 16 bits five units of the last place). Nothing is written.
    """
    path = Path(path)
    _check(model, path, example, format)
    config, names = model.config, class_names(model, labels)
    weights = weights_file(model, path, format)
    paths = [path] if weights is None else [weights, path]
    may_write(paths, force)
    where = next(model.parameters()).device
    with torch.inference_mode(False), torch.no_grad():
        served = _TestForm(_inference_copy(model))
        if format == "onnx":
            served = served.cpu()
        weight = next(served.parameters())
        # Compiled code is made for these strides.
        example = example.to(weight.device, copy=True, memory_format=torch.contiguous_format)
        batches = [example]
        if dynamic_batch:
            batches += [example[:1], torch.cat((example, example[:1]))]
        plain = _TestForm(model)
        expected = [plain(clips.to(where)) for clips in batches]
        # Of the batches the longest: a size of 1 would become a constant.
        sizes = ({0: Dim("batch", min=1)},) if dynamic_batch else None
        with use_backend("eager") if weight.device.type == "cpu" else nullcontext():
            program = torch.export.export(served, (batches[-1],), dynamic_shapes=sizes, strict=False)
    info = ExportInfo(
        format=format,
        config=config,
        batch=None if dynamic_batch else len(example),
        input_dtype=str(example.dtype).removeprefix("torch."),
        output="features" if config.classifier is None else "logits",
        dtype=str(weight.dtype).removeprefix("torch."),
        device=weight.device.type,
        labels=names,
        versions={"mar_fast": mar_fast.__version__, "torch": torch.__version__, "python": platform.python_version()},
    )
    differences: list[float] = []

    def write(temporary: Path) -> None:
        _write(program, temporary, info, None if weights is None else weights.name)
        run = load_exported(temporary)
        differences.extend(relative(run(clips), want) for clips, want in zip(batches, expected, strict=True))
        tolerance = max(1e-4, 5 * torch.finfo(weight.dtype).eps)
        if not all(difference <= tolerance for difference in differences):
            raise ArithmeticError(
                f"{path}: not written, since results of the {format} file differ from the model's by "
                f"{max(differences):.1e}, expected at most {tolerance:.0e}"
            )

    if weights is None:
        write_whole(path, write)
    else:
        write_whole_files(paths, lambda folder: write(folder / path.name))
    return max(differences)


def weights_file(model: MAR, path: Path, format: Format) -> Path | None:
    """The second file that `export_model` writes: path.onnx.data if ONNX needs one, else None."""
    large = format == "onnx" and sum(weight.nbytes for weight in _weights(model)) > ONNX_LIMIT
    return path.with_name(f"{path.name}.data") if large else None


def _check(model: MAR, path: Path, example: Tensor, format: Format) -> None:
    if not isinstance(model, MAR):
        raise checks.bad_type("model", type(model).__name__, "a mar_fast.MAR")
    if model.training:
        raise checks.bad("model", "a model in training mode", "one in eval mode: model.eval()")
    checks.tensor("example", example, 5, (torch.uint8, torch.float32), "(B, C, T, H, W)")
    if len(example) == 0:
        raise checks.bad("example", "no clip", "at least one")
    if format not in get_args(Format):
        raise checks.bad("format", repr(format), " or ".join(map(repr, get_args(Format))))
    if path.suffix != SUFFIXES[format]:
        raise checks.bad("path", path, f"a name that ends with {SUFFIXES[format]}, for format {format!r}")
    if format == "aoti" and not has_cpp_compiler():
        raise checks.bad("format", "'aoti' without a C++ compiler", "g++ or clang++ on the PATH ('pt2' needs none)")
    if format == "onnx":
        dtypes = {weight.dtype for weight in _weights(model)}
        if dtypes != {torch.float32}:
            raise checks.bad(
                "model", f"weights in {checks.names(sorted(dtypes, key=str))}", "float32 for format 'onnx'"
            )
        for package in ONNX_PACKAGES:
            check_installed(package)


def _weights(model: MAR) -> list[nn.Parameter]:
    """Of what is exported."""
    return [*model.encoder.parameters(), *(model.classifier.parameters() if model.classifier else ())]


def _inference_copy(model: MAR) -> MAR:
    """Without what only training needs, and without tensors that share memory, which exporters would copy whole."""
    model = copy.deepcopy(model).requires_grad_(False)
    if model.decoder is not None:
        model.decoder = None
        del model.encoder_to_decoder, model.mask_token
    for module in model.modules():
        if isinstance(module, Constant):
            module.value = module.value.clone()
    return model


def _write(program: ExportedProgram, path: Path, info: ExportInfo, weights: str | None) -> None:
    text = info.to_json()
    if info.format == "pt2":
        with path.open("wb") as file:  # with a path its archive would be named after the temporary file
            torch.export.save(program, file, extra_files={EXTRA_FILE: text})
    elif info.format == "aoti":
        import torch._inductor.config as inductor  # takes a second
        from torch._inductor import aoti_compile_and_package

        settings: dict[str, Any] = {"aot_inductor.metadata": {KEY: text}}
        if hasattr(inductor.aot_inductor, "check_lowerbound"):  # it would refuse a batch of 1
            settings["aot_inductor.check_lowerbound"] = False
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    else:
        import onnx_ir  # which onnxscript stands on

        exported = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["video"], output_names=[info.output]
        )
        assert exported is not None
        exported.model.metadata_props[KEY] = text
        # exported.save would have a second file from 1.5 GiB on, whose name would be the temporary one.
        onnx_ir.save(exported.model, path, external_data=weights)
