"""Pictures: what masking saves, what a mask leaves of a clip, and what a decoder makes of the rest."""

from collections.abc import Iterable
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import MARConfig, TokenMask, masking
from ..files import write_whole
from .savings import CASES, Savings, model_config

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "#0072B2"
# Okabe and Ito's colours, told apart with every kind of colour vision (jfly.uni-koeln.de/color), without the yellow,
# which is too light on white; blue is for mar_fast.
OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = "osD^vP*X<>"
COST, TIME = "#4c78a8", "#e45756"
VEIL = 235  # the grey that lies over what is masked


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


def masked_frames(clip: Tensor, mask: TokenMask, config: MARConfig) -> list[np.ndarray[Any, Any]]:
    """The first frame of every tubelet of a clip (C, T, H, W) uint8, veiled where masked; (H, W, 3) uint8 each."""
    t, h, w = config.patch_size
    masked = mask.bool_masked()[0].cpu().reshape(config.grid)
    masked = masked.repeat_interleave(h, 1).repeat_interleave(w, 2)[..., None]  # (T', H, W, 1)
    frames = clip[:, ::t].permute(1, 2, 3, 0).cpu()
    veiled = (0.15 * frames + 0.85 * VEIL).to(torch.uint8)
    return list(torch.where(masked, veiled, frames).numpy())


def draw_masks(clip: Tensor, mask: TokenMask, config: MARConfig, title: str, path: Path) -> None:
    """A PNG of one mask over a clip's frames."""
    frames = masked_frames(clip, mask, config)
    columns = min(len(frames), 4)
    rows = -(-len(frames) // columns)
    height, width = config.image_size
    figure = new_figure(figsize=(2.4 * columns, 2.4 * rows * height / width + 0.3 * rows + 0.5))
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for number, axis in enumerate(axes):
        axis.axis("off")
        if number < len(frames):
            axis.imshow(frames[number])
            first = number * config.patch_size[0]
            last = first + config.patch_size[0] - 1
            axis.set_title(f"frames {first}-{last}" if last > first else f"frame {first}", fontsize=9)
    save(figure, path)


def draw_reconstruction(
    clip: Tensor,
    filled: Tensor,
    mask: TokenMask,
    config: MARConfig,
    texts: tuple[str, str],
    path: Path,
    columns: int | None = None,
) -> None:
    """A PNG of a clip, of what a mask leaves of it, and of its reconstruction, one row each.

    Args:
        clip: (C, T, H, W) uint8, on the CPU.
        filled: The reconstruction, likewise.
        mask: Of this one clip.
        config: The model's.
        texts: The title, and what is said of the reconstruction below it.
        path: The file.
        columns: Frames to show, evenly chosen; None shows the first frame of every tubelet.
    """
    t, count = config.patch_size[0], config.grid[0]
    chosen = np.linspace(0, count - 1, columns or count).round().astype(int)
    rows = {
        "clip": list(clip[:, ::t].permute(1, 2, 3, 0).numpy()),
        "masked": masked_frames(clip, mask, config),
        "reconstruction": list(filled[:, ::t].permute(1, 2, 3, 0).numpy()),
    }
    height, width = config.image_size
    # Wide enough for the two lines of text, however few frames there are.
    across = max(1.9 * len(chosen), 8.5)
    figure = new_figure(figsize=(across, 3 * min(across / len(chosen) - 0.1, 2.6) * height / width + 0.9))
    figure.suptitle(fill(texts[0], round(13 * across)), fontsize=10)
    figure.supxlabel(fill(f"reconstruction: {texts[1]}", round(14 * across)), fontsize=9)
    axes = figure.subplots(len(rows), len(chosen), squeeze=False)
    for (name, frames), line in zip(rows.items(), axes, strict=True):
        for axis, number in zip(line, chosen, strict=True):
            axis.imshow(frames[number])
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=10)
    for axis, number in zip(axes[0], chosen, strict=True):
        axis.set_title(f"frame {number * t}", fontsize=9)
    save(figure, path)


def draw_savings(result: Savings, clip: Tensor, path: Path) -> None:
    """Latency and cost against keep ratio, above the clip's frames under each mask."""
    figure = new_figure(figsize=(11, 8.6))
    env = result.environment
    figure.suptitle(
        f"MAR on ViT-{result.model[0].upper()}, {result.dtype}, batch {result.batch}: what masking saves\n"
        f"{env['device']}, torch {env['torch']}",
        fontsize=11,
    )
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 1.25)), dtype=object)
    left, right = upper.subplots(1, 2)
    keep = [1 - row.mask_ratio for row in result.rows]
    _cost_axis(left, keep, [row.multiply_adds / 1e9 / result.batch for row in result.rows])
    _latency_axis(right, keep, result)
    names = {case: model_config(result.model, case) for case in CASES}
    columns = next(iter(names.values())).grid[0]
    axes = lower.subplots(len(names), columns, squeeze=False)
    for (case, config), line in zip(names.items(), axes, strict=True):
        for number, (axis, frame) in enumerate(zip(line, masked_frames(clip, _test_mask(config), config), strict=True)):
            axis.imshow(frame)
            axis.set(xticks=[], yticks=[])
            if number == 0:
                axis.set_ylabel(f"{case}\n{config.num_visible} tokens", fontsize=9)
            if case == "dense":
                axis.set_title(f"frame {number * config.patch_size[0]}", fontsize=8)
    save(figure, path)


def _test_mask(config: MARConfig) -> TokenMask:
    if not config.mask_ratio:
        return masking.random(1, config.grid, 0.0)
    return masking.cell_running(1, config.grid, config.mask_ratio, cell=config.cell, phase=0)


def _cost_axis(axis: "Axes", keep: list[float], cost: list[float]) -> None:
    axis.plot(keep, cost, "o-", color=COST, label="multiply-adds")
    axis.plot([0, keep[0]], [0, cost[0]], ":", color="grey", label="proportional to visible tokens")
    for x, y in zip(keep, cost, strict=True):
        _label(axis, f"{y:.1f} G", x, y)
    _finish(axis, max(cost), "multiply-adds of a clip, 10$^9$", "Cost")


def _latency_axis(axis: "Axes", keep: list[float], result: Savings) -> None:
    spreads = [row.latency for row in result.rows if row.latency is not None]
    middle = np.array([spread.p50 for spread in spreads]) * 1000
    low, high = (np.array([getattr(spread, key) for spread in spreads]) * 1000 for key in ("p20", "p80"))
    axis.errorbar(
        keep, middle, yerr=(middle - low, high - middle), fmt="o-", capsize=4, color=TIME, label="median, p20 to p80"
    )
    axis.plot([0, keep[0]], [0, middle[0]], ":", color="grey", label="proportional to visible tokens")
    for x, y, row in zip(keep, middle, result.rows, strict=True):
        label = f"{y:.0f} ms, {row.speedup:.2f}x" if y >= 10 else f"{y:.2f} ms, {row.speedup:.2f}x"
        _label(axis, label, x, y)
    _finish(axis, max(high), f"latency of a batch of {result.batch}, ms", "Latency, and speed-up over dense")


def _label(axis: "Axes", text: str, x: float, y: float) -> None:
    """Below and right of a point, where no line runs; left of the last one, which is at the edge."""
    offset, side = ((9, -11), "left") if x < 1 else ((-10, 9), "right")
    axis.annotate(text, (x, y), xytext=offset, textcoords="offset points", ha=side, fontsize=9)


def _finish(axis: "Axes", top: float, ylabel: str, title: str) -> None:
    axis.set(xlabel="keep ratio (share of visible tokens)", ylabel=ylabel, xlim=(0, 1.08))
    axis.set_title(title, fontsize=10)
    axis.set_ylim(0, 1.2 * top)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left")
