"""mar-fast classify: what a checkpoint sees in videos."""

from typing import Annotated, Any

import typer
from rich.table import Table

from .. import eval as evaluation
from . import common, options


def classify(
    videos: options.Videos,
    checkpoint: options.Checkpoint,
    views: Annotated[str, typer.Option(help="Clips x crops of each video; their scores are summed.")] = "5x3",
    keep: options.Keep = None,
    labels: options.Labels = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    sampling: options.SamplingOption = "stride",
    stride: options.Stride = 4,
    short: options.ShortOption = "error",
    batch: options.Batch = 8,
    dtype: options.PrecisionOption = "fp32",
    quantize: options.QuantizeOption = None,
    device: options.DeviceOption = common.Device.auto,
    as_json: options.Json = False,
) -> None:
    """Print the most probable classes of each video."""
    model = options.load_classifier(checkpoint, keep, dtype, device, quantize)
    names = options.read_class_names(model, labels)
    read = options.view_reader(model.config, views, sampling, stride, short)
    ratio = model.config.mask_ratio
    answers: list[dict[str, Any]] = []
    with common.progress() as step:
        for number, path in enumerate(videos):
            step(f"video {number + 1} of {len(videos)}", number / len(videos))
            try:
                seen = read(path)
            except (ValueError, OSError) as error:
                answers.append({"video": str(path), "error": str(error)})
                continue
            scores = evaluation.classify(model, seen, batch=batch) / len(seen)
            best = scores.topk(min(top, len(scores)))
            found = [
                {"class": index, "name": names[index] if names else None, "probability": share}
                for index, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            answers.append({"video": str(path), "classes": found})
    if as_json:
        common.print_json({"checkpoint": checkpoint, "views": views, "mask_ratio": ratio, "videos": answers})
    for answer in answers:
        if "error" in answer:
            common.show_error(answer["error"])
        elif not as_json:
            common.show(f"{answer['video']}, {views} views, {1 - ratio:.0%} of patches visible")
            table = Table(box=None, show_header=False)
            for found in answer["classes"]:
                table.add_row(f"{found['probability']:.1%}", options.class_name(found["name"], found["class"]))
            common.results.print(table, markup=False)
    if any("error" in answer for answer in answers):
        raise typer.Exit(common.BAD_INPUT)
