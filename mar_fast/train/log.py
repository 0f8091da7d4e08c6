"""log.jsonl: a row for each step and each validation, and their curves as a picture."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..eval.plot import OTHERS, OURS, new_figure, save
from ..files import write_whole
from ..kernels import checks

# What is drawn of a row, in this order, and how it is called.
TITLES = {"loss": "loss", "reconstruction": "reconstruction loss", "accuracy": "accuracy", "lr": "learning rate"}


def begin_log(path: Path, step: int) -> None:
    """Begin a log, or go on with one after ``step``: rows of later steps, which will be taken again, are removed."""
    rows = [row for row in read_log(path) if row["step"] <= step] if step and path.exists() else []
    write_whole(path, lambda file: file.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last one that was cut off is left out.

    Raises:
        ValueError: a line of the file is damaged.
    """
    content = path.read_bytes()
    rows = list[dict[str, Any]]()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"]
        except (ValueError, LookupError, TypeError) as error:
            raise checks.bad(f"{path}, line {number}", repr(line[:60]), "a row of a log: mend or remove it") from error
    return rows


def draw_curves(log: Path, picture: Path) -> None:
    """Draw log.jsonl as a PNG: each step faintly, their running mean, and validations as points.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    rows = read_log(log)
    steps, validations = ([row for row in rows if key in row] for key in ("loss", "validation"))
    if not steps:
        return
    names = [name for name in TITLES if name in steps[0]]
    if "accuracy" not in names:
        names.remove("reconstruction")  # in pre-training it is the loss
    epochs = [row["epoch"] for row in steps]
    figure = new_figure(figsize=(4 * len(names), 3.2))
    for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
        values = np.array([row[name] for row in steps])
        axis.set(title=TITLES[name], xlabel="epoch")
        axis.grid(alpha=0.3)
        if name == "lr":
            axis.plot(epochs, values, color=OURS)
            axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
            continue
        axis.plot(epochs, values, color=OURS, alpha=0.25, linewidth=0.8)
        axis.plot(epochs, _running_mean(values), color=OURS, label="training, running mean")
        key = {"accuracy": "top1"}.get(name, name)
        points = [(row["epoch"], row["validation"][key]) for row in validations if key in row["validation"]]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=OTHERS[0], markersize=4, label="validation")
        axis.legend(fontsize=8)
        if name == "accuracy":
            axis.set_ylim(0, 1)
    save(figure, picture)


def _running_mean(values: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """Over a twentieth of all values; at both ends over those that there are."""
    width = max(1, len(values) // 20)
    weights = np.convolve(np.ones(len(values)), np.ones(width), mode="same")
    return np.convolve(values, np.ones(width), mode="same") / weights
