"""scaling: how the cost of our model grows with tokens, batch, frames, resolution and keep ratio; fitted exponents.

Each axis is a few configurations that differ in it alone. The exponent is the slope of log time over log x.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mar_fast import MARConfig
from mar_fast.machine import short_name

from ..case import Case, Provider, RunOptions
from ..peers import REFERENCE, original, ours
from ..records import OURS, Record
from ..workloads import Workload
from .common import LETTERS, model_case, model_config

AXES: dict[str, tuple[float, ...]] = {
    "keep ratio": (0.25, 0.5, 0.75, 1.0),
    "batch": (1, 2, 4),
    "frames": (8, 16, 32),
    "resolution": (160, 224, 320),
}


def cases(options: RunOptions) -> Iterator[Case]:
    """Every position on every axis; a quick run takes the ends of one."""
    size = options.sizes[0]
    for axis, positions in AXES.items():
        if options.quick and axis != "keep ratio":
            continue
        for x in positions[:: len(positions) - 1] if options.quick else positions:
            config, batch = configuration(size, axis, x)
            workload = Workload(config, batch, options.device, options.dtype)
            found = (Provider(REFERENCE, partial(original, workload)), Provider(OURS, partial(ours, workload)))
            yield model_case("scaling", axis, workload, found, baseline=REFERENCE, x=x, share=0.5)


def configuration(size: str, axis: str, x: float) -> tuple[MARConfig, int]:
    """The model and batch at position ``x``: ViT of a size at 50 %, 16 frames, 224 x 224, batch 1, but on the axis."""
    changes: dict[str, dict[str, Any]] = {
        "keep ratio": dict(mask_ratio=1 - x),  # MAR even at 1: another classifier would be a step in the curve
        "batch": {},
        "frames": dict(num_frames=int(x)),
        "resolution": dict(image_size=(int(x), int(x))),
    }
    return replace(model_config(size, 0.5), **changes[axis]), int(x) if axis == "batch" else 1


def conclude(options: RunOptions, found: list[Record]) -> list[Record]:
    """An exponent for each axis and provider, and one for visible tokens, from all axes but batch."""
    size = options.sizes[0]
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for one in found:
        if one.metric == "time":
            points.setdefault((one.case, one.provider), []).append((one.x, one.p50))
            if one.case != "batch":
                tokens = configuration(size, one.case, one.x)[0].num_visible
                points.setdefault(("tokens", one.provider), []).append((tokens, one.p50))
    where = dict(suite="scaling", metric="exponent", mode="inference", dtype=short_name(options.dtype))
    note = f"time of ViT-{LETTERS[size]}, fitted over {{}} points"
    return [
        Record.of(options.environment, exponent(own), case=axis, provider=provider, note=note.format(len(own)), **where)
        for (axis, provider), own in points.items()
        if len({x for x, _ in own}) > 1
    ]


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of a straight line through (log x, log y), by least squares."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])
