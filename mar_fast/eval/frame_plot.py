"""Pictures of a clip: its frames, what a mask leaves of them, and what a decoder makes of the rest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import MARConfig
from .plot import new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

Frame = np.ndarray[Any, Any]  # (H, W, 3) uint8


def frames(clip: Tensor, config: MARConfig, masked: Tensor | None = None) -> list[Frame]:
    """The first frame of every tubelet of a clip (C, T, H, W) uint8, veiled where ``masked``, (L,) bool, is True."""
    t, h, w = config.patch_size
    shown = clip[:, ::t].permute(1, 2, 3, 0).cpu()
    if masked is not None:
        pixels = masked.cpu().view(config.grid).repeat_interleave(h, 1).repeat_interleave(w, 2)[..., None]
        shown = torch.where(pixels, (0.1 * shown + 229).to(torch.uint8), shown)  # (T', H, W, 3)
    return list(shown.numpy())


def show_frames(figure: "Figure | SubFigure", rows: Mapping[str, Sequence[Frame]], numbers: Mapping[int, int]) -> None:
    """Fill a figure with rows of frames; ``numbers`` are those of the tubelets shown, and of their first frames."""
    axes = figure.subplots(len(rows), len(numbers), squeeze=False)
    for (name, images), line in zip(rows.items(), axes, strict=True):
        for axis, tubelet in zip(line, numbers, strict=True):
            axis.imshow(images[tubelet])
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=10)
    for axis, number in zip(axes[0], numbers.values(), strict=True):
        axis.set_title(f"frame {number}", fontsize=9)


def draw_frames(
    rows: Mapping[str, Sequence[Frame]],
    config: MARConfig,
    path: Path,
    *,
    title: str,
    note: str = "",
    columns: int | None = None,
) -> None:
    """A PNG with rows of frames, each row with its name; the title is above them, the note below.

    Args:
        rows: For each row one frame for every tubelet in time, as `frames` gives them.
        config: Of the model that the clip is for.
        path: The file.
        title, note: Text, which is wrapped.
        columns: Frames to show, evenly chosen; None shows all.
    """
    t, count = config.patch_size[0], config.grid[0]
    chosen = np.linspace(0, count - 1, columns or count).round().astype(int).tolist()
    height, width = config.image_size
    # Wide enough for the two lines of text, however few frames there are.
    across = max(1.9 * len(chosen), 8.5)
    tall = len(rows) * min(across / len(chosen) - 0.1, 2.6) * height / width + 0.6
    figure = new_figure(figsize=(across, tall + 0.3 * bool(note)))
    figure.suptitle(fill(title, round(13 * across)), fontsize=10, parse_math=False)  # a file name may have dollars
    figure.supxlabel(fill(note, round(14 * across)), fontsize=9)
    show_frames(figure, rows, {tubelet: t * tubelet for tubelet in chosen})
    save(figure, path)
