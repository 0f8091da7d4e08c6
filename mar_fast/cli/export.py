"""mar-fast export: a checkpoint as a file that runs without the model's code."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import data, export_model, machine
from ..export.read import Format
from ..export.write import weights_file
from ..kernels.gather_patch_embed import per_channel
from . import common, options


def export(
    checkpoint: options.Source,
    out: Annotated[Path, typer.Argument(help="The file to write: .onnx for onnx, else .pt2.")],
    to: Annotated[Format, typer.Option("--format", help="pt2: torch.export; aoti: AOTInductor; onnx: ONNX.")] = "pt2",
    keep: options.Keep = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Clips in a call, always. Default: any number.")] = None,
    pixels: Annotated[
        Literal["uint8", "float"], typer.Option("--input", help="uint8 pixels, or float32 that is already normalised.")
    ] = "uint8",
    clip: Annotated[
        Path | None, typer.Option(help="The video that results are compared on. Default: a short real clip.")
    ] = None,
    labels: options.Labels = None,
    dtype: options.PrecisionOption = "fp32",
    device: options.DeviceOption = common.Device.auto,
    given: options.Given = None,
    force: options.Force = False,
) -> None:
    """Write a checkpoint's model as a file that runs without its code: a video in, logits out.

    A checkpoint without a classifier (also by --set classifier=none) gives features. The mask is the test form;
    --keep 1 is the dense form. Before the file is put in place it is loaded again and compared with the model.

    From a CPU all formats have plain PyTorch's ops. From a GPU pt2 has this package's kernels and needs this package
    where it runs; aoti has the kernels in it and needs torch alone, but runs on that kind of GPU only. aoti needs a C++
    compiler and takes minutes. onnx has plain ops in float32 and needs: pip install 'mar-fast[export]'; weights of
    more than 2 GB are in a second file, OUT.data.
    """
    model = options.load_masked(checkpoint, keep, given).to(machine.device(device), machine.DTYPES[dtype]).eval()
    names = options.read_class_names(model, labels)
    config, path = model.config, clip or data.sample_clip()
    example = data.read_views(
        path, config.num_frames, clips=batch or 3, crops=1, size=config.image_size, short="repeat"
    )
    if pixels == "float":
        mean, std = (per_channel(values, example.device).view(-1, 1, 1, 1) for values in (config.mean, config.std))
        example = (example / 255 - mean) / std
    with common.progress() as step:
        step(f"writing {out}", 0.0)
        try:
            difference = export_model(
                model, out, example, format=to, dynamic_batch=batch is None, labels=names, force=force
            )
        except ArithmeticError as error:
            common.show_error(error)
            raise typer.Exit(common.CHECK_FAILED) from error
    weights = weights_file(model, out, to)
    written = [out] if weights is None else [out, weights]
    size = common.megabytes(sum(file.stat().st_size for file in written))
    shape = (batch or "B", config.channels, config.num_frames, *config.image_size)
    output = "features" if model.classifier is None else "logits"
    common.show(f"Written: {' and '.join(map(str, written))} ({to}), {size} MB")
    common.show(f"{pixels} video ({', '.join(map(str, shape))}) -> {output}, mask ratio {config.mask_ratio:g}")
    common.show(f"differs from the model by {difference:.1e} (relative norm) on {len(example)} clips of {path.name}")
