"""What pictures share: figures without a screen, colours, units, legends, rows of frames."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import MARConfig
from ..files import write_whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Frame = np.ndarray[Any, Any]  # (H, W, 3) uint8

OURS = "#0072B2"
# Okabe and Ito's colours, told apart with every kind of colour vision (jfly.uni-koeln.de/color), without the yellow,
# which is too light on white; blue is for mar_fast.
OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = "osD^vP*X<>"


def new_figure(**options: Any) -> "Figure":
    """A matplotlib figure that needs no screen.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib, which is not installed: pip install 'mar-fast[plot]'"
        ) from error
    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG, whole or not at all."""
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def legend_below(figure: "Figure", axes: "Iterable[Axes]") -> None:
    """One legend for all axes, outside of them: however long the names are, nothing is covered."""
    entries: dict[str, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    longest = max(map(len, entries), default=1)
    columns = max(1, min(4, len(entries), int(figure.get_figwidth() * 13 / (longest + 8))))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def time_scale(seconds: Iterable[float]) -> tuple[float, str]:
    """The factor and unit in which the largest of some times has at least one digit before the point."""
    largest = max(seconds, default=1.0)
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if largest * factor >= 1:
            return factor, unit
    return 1e6, "us"


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
