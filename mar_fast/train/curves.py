"""The curves of a run: loss, accuracy and learning rate, from its log."""

from pathlib import Path
from typing import Any

import numpy as np

from ..eval.plot import OTHERS, OURS, new_figure, save
from .log import read_log


def draw_curves(log: Path, picture: Path) -> None:
    """Draw log.jsonl as a PNG: each step faintly, their running mean, and validations as points.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    rows = read_log(log)
    steps = [row for row in rows if "loss" in row]
    checked = [row for row in rows if "validation" in row]
    if not steps:
        return
    classifies = "accuracy" in steps[0]  # else the loss is the reconstruction's
    names = [name for name in ("loss", "reconstruction", "accuracy") if name in steps[0]] if classifies else ["loss"]
    figure = new_figure(figsize=(4 * (len(names) + 1), 3.2))
    axes = figure.subplots(1, len(names) + 1)
    epochs = np.array([row["epoch"] for row in steps])
    for axis, name in zip(axes, names, strict=False):
        values = np.array([row[name] for row in steps])
        axis.plot(epochs, values, color=OURS, alpha=0.25, linewidth=0.8)
        axis.plot(epochs, _running_mean(values), color=OURS, label="training, running mean")
        _points(axis, checked, {"loss": "loss", "accuracy": "top1"}.get(name))
        axis.set_title({"loss": "loss", "reconstruction": "reconstruction loss", "accuracy": "accuracy"}[name])
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    if classifies:
        axes[names.index("accuracy")].set_ylim(0, 1)
    axes[-1].plot(epochs, [row["lr"] for row in steps], color=OURS)
    axes[-1].set_title("learning rate")
    axes[-1].set_xlabel("epoch")
    axes[-1].grid(alpha=0.3)
    axes[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    save(figure, picture)


def _points(axis: Any, checked: list[dict[str, Any]], name: str | None) -> None:
    found = [(row["epoch"], row["validation"][name]) for row in checked if name in row["validation"]]
    if found:
        axis.plot(*zip(*found, strict=True), "o-", color=OTHERS[0], markersize=4, label="validation")


def _running_mean(values: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """Over a twentieth of all values; at both ends over those that there are."""
    width = max(1, len(values) // 20)
    weights = np.convolve(np.ones(len(values)), np.ones(width), mode="same")
    return np.convolve(values, np.ones(width), mode="same") / weights
