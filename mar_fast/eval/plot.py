"""What all pictures share: figures without a screen, colours, units, legends."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
