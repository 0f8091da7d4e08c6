"""scaling: how the cost of our model grows with tokens, batch, frames, resolution and keep ratio; fitted exponents.

Each axis is a few configurations that differ in it alone. The exponent is the slope of log time over log x.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mar_fast import MARConfig
from mar_fast.machine import short_name

from ..case import Candidate, Case, Setting
from ..jobs import Job, truth
from ..peers import YARDSTICK, original, ours
from ..records import OURS
from ..runner import Finding, Outcome
from .common import ABSOLUTE_BOUND, LETTERS, model_config
from .encoder import inference_floor

AXES: dict[str, tuple[float, ...]] = {
    "keep ratio": (0.25, 0.5, 0.75, 1.0),
    "batch": (1, 2, 4),
    "frames": (8, 16, 32),
    "resolution": (160, 224, 320),
}
QUICK_AXES = ("keep ratio",)


def cases(setting: Setting) -> Iterator[Case]:
    """Every place on every axis; a quick run takes the ends of one."""
    size = setting.sizes[0]
    for axis, places in AXES.items():
        if setting.quick and axis not in QUICK_AXES:
            continue
        for x in places[:: len(places) - 1] if setting.quick else places:
            config, batch = configuration(size, axis, x)
            job = Job(config, batch, setting.device, setting.dtype)
            candidates = [Candidate(OURS, functools.partial(ours, job))]
            if not setting.quick:
                candidates.insert(0, Candidate(YARDSTICK, functools.partial(original, job)))
            yield Case(
                "scaling", axis, "inference", x, setting.dtype, batch, tuple(candidates), functools.partial(truth, job),
                ABSOLUTE_BOUND[setting.dtype], YARDSTICK, inference_floor(job), OURS, share=0.5,
            )  # fmt: skip


def configuration(size: str, axis: str, x: float) -> tuple[MARConfig, int]:
    """The model and batch at place ``x``: ViT of a size at 50 %, 16 frames, 224 x 224, batch 1, but for the axis."""
    config = model_config(size, 0.5)
    if axis == "keep ratio":
        # MAR at every place, also at 1: another classifier there would be a step in the curve.
        return replace(config, mask_ratio=1 - x), 1
    if axis == "batch":
        return config, int(x)
    if axis == "frames":
        return replace(config, num_frames=int(x)), 1
    return replace(config, image_size=(int(x), int(x))), 1


def conclude(setting: Setting, outcomes: list[Outcome]) -> list[Finding]:
    """An exponent for each axis and provider, that of visible tokens over all axes but batch among them."""
    size = setting.sizes[0]
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for outcome in outcomes:
        case = outcome.case
        config, _ = configuration(size, case.name, case.x)
        for result in outcome.results:
            if result.time is None:
                continue
            points.setdefault((case.name, result.provider), []).append((case.x, result.time.p50))
            if case.name != "batch":
                points.setdefault(("tokens", result.provider), []).append((config.num_visible, result.time.p50))
    note = f"time of ViT-{LETTERS[size]}, fitted over {{}} points"
    return [
        Finding(
            axis, provider, "exponent", "1", exponent(found), mode="inference", dtype=short_name(setting.dtype),
            note=note.format(len(found)),
        )
        for (axis, provider), found in points.items() if len({x for x, _ in found}) > 1
    ]  # fmt: skip


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of a straight line through (log x, log y), by least squares."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])
