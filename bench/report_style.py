"""What all pictures of a report share: who has which colour, headings, legends."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mar_fast.eval.plot import MARKERS, OTHERS, OURS

from . import rows
from .records import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":")
# Of the same colour where there are more providers than colours.
HATCHES = ("", "///", "...")


@dataclass(frozen=True)
class Look:
    """How a provider is drawn, in every picture the same."""

    colour: str
    marker: str
    dash: str
    hatch: str
    width: float


def looks(providers: Iterable[str]) -> dict[str, Look]:
    """A look for each provider: variants of mar_fast in one blue, all others by their place."""
    found: dict[str, Look] = {}
    counts = {"ours": 0, "others": 0}
    for place, name in enumerate(rows.distinct(providers)):
        ours = name.startswith("mar_fast")
        kind = "ours" if ours else "others"
        number = counts[kind]
        counts[kind] += 1
        again = number if ours else number // len(OTHERS)
        colour = OURS if ours else OTHERS[number % len(OTHERS)]
        found[name] = Look(
            colour, MARKERS[place % len(MARKERS)], DASHES[again % len(DASHES)], HATCHES[again % len(HATCHES)],
            2.2 if ours else 1.4,
        )  # fmt: skip
    return found


def heading(figure: "Figure", title: str, record: Record) -> None:
    """Title of a picture, with what it was measured on below."""
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)  # inches; long names would touch the edge
    figure.suptitle(f"{title}\n{origin(record)}", fontsize=10)


def origin(record: Record) -> str:
    """Device, versions and commit of a row, for a caption."""
    commit = f", commit {record.commit}" if record.commit else ""
    return f"{record.device}, torch {record.torch}{commit}"


def slug(*words: str) -> str:
    """Words as a file name: lower case, letters and digits, the rest as hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower().replace("%", "percent")).strip("-.")
