"""The trade-off: what masking costs and saves for one model on given videos, checked before it is timed."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .. import MAR, cost, machine
from ..kernels import checks
from . import ensemble
from .mask_settings import DENSE, MaskSetting
from .measured import Measured, OnStep, check, part, time_all

Tally = defaultdict[str, list[Any]]  # for a field of `Point` that is a mean, its values for the views or the videos


@dataclass(frozen=True, kw_only=True)
class Point(Measured):
    """One mask setting. What is not measured, because a setting is wrong, is None.

    Attributes:
        setting: In words; ``kind``, ``keep`` and ``passes`` are its parts (see `MaskSetting`).
        visible_tokens: Of a view in one pass; a mean, since content masks differ.
        multiply_adds: Of a view, in all passes.
        top1_agreement: Share of views with the dense model's class.
        kl: Mean over the views of KL(dense || this), in nats.
        same_answers: Share of videos with the dense model's class, scores summed over their views.
    """

    setting: str
    kind: str
    keep: float
    passes: int
    visible_tokens: float | None = None
    multiply_adds: float | None = None
    top1_agreement: float | None = None
    kl: float | None = None
    same_answers: float | None = None


@dataclass(frozen=True)
class Best:
    """The most probable class of a video, by the mean of its views' scores; its name, where names are known."""

    number: int
    name: str | None
    probability: float


@dataclass(frozen=True)
class Answer:
    """What the dense model answers for a video, and by their labels the settings that answer something else."""

    video: str
    views: int
    dense: Best
    changed: dict[str, Best]


@dataclass
class Tradeoff:
    """All points and what they were measured on.

    Attributes:
        model: Name of the checkpoint.
        random_weights: Whether the model was not read from one.
        batch: The most views of a forward pass.
        timed_views: The views of a timed call.
        broken: Videos that could not be read, and why.
        unavailable: Settings that the model does not allow, and why.
    """

    model: str
    random_weights: bool
    dtype: str
    dtype_reason: str
    batch: int
    seed: int
    environment: dict[str, str | int]
    timed_views: int = 0
    points: list[Point] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def correct(self) -> bool:
        """Whether every setting agrees with the reference."""
        return all(point.correct for point in self.points)

    @property
    def views(self) -> int:
        """Of all videos together."""
        return sum(answer.views for answer in self.answers)

    @property
    def seen(self) -> str:
        """The views and videos in words."""
        return f"{many(self.views, 'view')} of {many(len(self.answers), 'video')}"


def many(count: int, what: str) -> str:
    """ "1 view", "2 views"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def measure(
    model: MAR,
    name: str,
    videos: Sequence[Path],
    read: Callable[[Path], Tensor],
    settings: Sequence[MaskSetting],
    *,
    names: Sequence[str] | None = None,
    dtype: str = "auto",
    batch: int = 4,
    seed: int = 0,
    budget: float = 30.0,
    on_step: OnStep = lambda what, share: None,
) -> Tradeoff:
    """Check every setting, compare its answers with the dense model's, then time all of them in turn.

    Args:
        model: A classifier of mask_ratio 0 in float32, in eval mode; it is moved to the dtype that is measured.
        name: Its checkpoint.
        videos: Files.
        read: From a file to its views (V, C, T, H, W).
        settings: The dense one first.
        names: Of the classes.
        dtype, budget, on_step: As in `savings.measure`.
        batch: The most views in a forward pass; the first of these views are timed.
        seed: Of the random masks.

    Raises:
        ValueError: an argument does not fit, no video can be read, or a score is not finite.
    """
    config, device = model.config, next(model.parameters()).device
    checks.whole("batch", batch)
    checks.positive("seconds", budget)
    if settings[0].kind != DENSE:
        raise checks.bad("settings", f"{settings[0].label} first", "dense")
    if config.mask_ratio:
        raise checks.bad("model", f"mask_ratio {config.mask_ratio}", "0, so that without a mask it is dense")
    reason = "asked for"
    if dtype == "auto":
        on_step("measuring this machine's matrix-product rate", 0.0)
        dtype, reason = machine.choose_dtype(device, machine.matmul_rates(device, ("fp32", "bf16")))
    found = Tradeoff(name, model.load_report is None, dtype, reason, batch, seed, machine.environment(device))
    timed: Tensor | None = None
    runs = {setting: (torch.Generator().manual_seed(seed), Tally(list)) for setting in settings}
    for number, path in enumerate(videos):
        say = part(on_step, 0.05 + 0.45 * number / len(videos), 0.45 / len(videos))
        say(f"reading {path.name}", 0.0)
        try:
            views = read(path)
        except (ValueError, OSError) as error:
            found.broken[str(path)] = str(error)
            continue
        if timed is None:
            timed = views[:batch].to(device)
            found.timed_views = len(timed)
            ways = [setting.masks(timed[:1], config, torch.Generator().manual_seed(seed)) for setting in settings]
            checked = check(model, timed[:1], ways, dtype, part(on_step, 0.0, 0.05))
            for setting, one in zip(settings, checked, strict=True):
                found.points.append(Point(setting=setting.label, **vars(setting), **vars(one)))
            if not found.correct:
                return found
        found.answers.append(_answer(model, names, path, views, batch, runs, say))
    if timed is None:
        reasons = "; ".join(found.broken.values())
        raise checks.bad("VIDEO", f"none of {len(videos)} that can be read ({reasons})", "at least one")
    means: list[dict[str, Any]] = [{name: fmean(own) for name, own in tally.items()} for _, tally in runs.values()]
    points = [replace(point, **own) for point, own in zip(found.points, means, strict=True)]
    calls = {setting.label: _call(model, timed, setting, seed) for setting in settings}
    found.points = time_all(points, calls, len(timed), device, budget, part(on_step, 0.5, 0.5))
    on_step("done", 1.0)
    return found


@torch.inference_mode()
def _answer(
    model: MAR,
    names: Sequence[str] | None,
    path: Path,
    views: Tensor,
    batch: int,
    runs: Mapping[MaskSetting, tuple[torch.Generator, Tally]],
    on_step: OnStep,
) -> Answer:
    """Run all settings, the dense one first, on the views of a video; values for fields of `Point` go to tallies."""
    config, weight = model.config, next(model.parameters())
    best = dict[str, Best]()
    dense = torch.empty(0)
    for number, (setting, (generator, tally)) in enumerate(runs.items()):
        on_step(f"{path.name}: {setting.label}", number / len(runs))
        parts = []
        for some in views.split(batch):
            some = some.to(weight.device)
            masks = setting.masks(some, config, generator)
            parts.append(ensemble.log_probabilities(model, some, masks).cpu())
            for mask in masks:
                every = [config.num_tokens] * len(some)
                lengths = every if mask is None else (~mask.bool_masked()).sum(1).tolist()
                tally["visible_tokens"] += lengths
                work = [cost.count(config, visible=length).multiply_adds for length in lengths]
                tally["multiply_adds"] += [setting.passes * adds for adds in work]
        logs = torch.cat(parts)
        if not bool(logs.isfinite().all()):
            short = machine.short_name(weight.dtype)
            raise checks.bad("model", f"scores of {setting.label} that are not finite in {short}", "finite ones")
        if setting.kind == DENSE:
            dense = logs
        probability, answer = logs.exp().mean(0).max(0)
        name = None if names is None else names[int(answer)]
        best[setting.label] = Best(int(answer), name, float(probability))
        tally["top1_agreement"] += (logs.argmax(-1) == dense.argmax(-1)).tolist()
        tally["kl"] += divergence(dense, logs).tolist()
        tally["same_answers"].append(best[setting.label].number == best[DENSE].number)
    changed = {label: own for label, own in best.items() if own.number != best[DENSE].number}
    return Answer(str(path), len(views), best[DENSE], changed)


def divergence(logs: Tensor, others: Tensor) -> Tensor:
    """KL(p || q) in nats of each row, from the logarithms (V, classes) of p and of q."""
    return (logs.exp() * (logs - others)).sum(-1).clamp_min(0)  # rounding can leave less than 0


def _call(model: MAR, video: Tensor, setting: MaskSetting, seed: int) -> Callable[[], Any]:
    """A call as a user makes it: masks that are drawn, or go by the clip, are made anew each time."""
    generator = torch.Generator(video.device).manual_seed(seed)
    made = setting.masks(video, model.config, generator)

    def run() -> Any:
        masks = made if setting.fixed else setting.masks(video, model.config, generator)
        return ensemble.log_probabilities(model, video, masks)

    return run
