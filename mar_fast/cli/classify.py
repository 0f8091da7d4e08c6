"""mar-fast classify: what a checkpoint sees in videos."""

from typing import Annotated, Any

import typer
from rich.table import Table

from ..eval import classify as classify_views
from .answers import (
    Labels,
    Precision,
    Sampling,
    SamplingName,
    Short,
    ShortName,
    Stride,
    Videos,
    class_name,
    label_names,
    load,
    names_for,
    parse_views,
    reader,
)
from .common import BAD_INPUT, Device, errors, print_json, progress, results


def classify(
    videos: Videos,
    checkpoint: Annotated[str, typer.Option(help="A file, a folder or a hub id, of any layout.")],
    views: Annotated[str, typer.Option(help="Clips x crops of each video; their scores are summed.")] = "5x3",
    keep: Annotated[float | None, typer.Option(help="Share of visible patches; without it the checkpoint's.")] = None,
    labels: Labels = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    sampling: Sampling = SamplingName.stride,
    stride: Stride = 4,
    short: Short = ShortName.error,
    batch: Annotated[int, typer.Option(min=1, help="The most views in a forward pass.")] = 8,
    dtype: Annotated[Precision, typer.Option(help="Of weights and activations.")] = Precision.fp32,
    device: Annotated[Device, typer.Option(help="auto: the GPU, where there is one.")] = Device.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print the most probable classes of each video."""
    clips_crops = parse_views(views)
    names = label_names(labels)
    model = load(checkpoint, keep, dtype, device)
    classes = model.config.num_classes
    names = names_for(model, names)
    read = reader(model.config, clips_crops, sampling, stride, short)
    answers: list[dict[str, Any]] = []
    with progress() as step:
        for number, path in enumerate(videos):
            step(f"video {number + 1} of {len(videos)}", number / len(videos))
            try:
                seen = read(path)
            except (ValueError, OSError) as error:
                answers.append({"video": str(path), "error": str(error)})
                continue
            best = (classify_views(model, seen, batch=batch) / len(seen)).topk(min(top, classes))
            found = [
                {"class": place, "name": names[place] if names else None, "probability": share}
                for place, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            answers.append({"video": str(path), "classes": found})
    if as_json:
        print_json({"checkpoint": checkpoint, "views": views, "mask_ratio": model.config.mask_ratio, "videos": answers})
    for answer in answers:
        if "error" in answer:
            errors.print(f"error: {answer['error']}", style="red", highlight=False, markup=False, soft_wrap=True)
        elif not as_json:
            _print(answer, f"{views} views, {1 - model.config.mask_ratio:.0%} of patches visible")
    if any("error" in answer for answer in answers):
        raise typer.Exit(BAD_INPUT)


def _print(answer: dict[str, Any], how: str) -> None:
    results.print(f"{answer['video']}, {how}", highlight=False, markup=False, soft_wrap=True)
    table = Table(box=None, show_header=False)
    for column in answer["classes"]:
        name = column["name"] if column["name"] is not None else class_name(None, column["class"])
        table.add_row(f"{column['probability']:.1%}", name)
    results.print(table, markup=False)
