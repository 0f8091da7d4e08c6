"""The trade-off curve: what masking costs and saves for one model on given videos, checked before it is timed."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .. import MAR, MARConfig, TokenMask, cost, machine, masking, reference
from ..kernels import checks
from ..timing import Spread, interleaved
from . import ensemble
from .savings import FP32_BOUND, LOW_PRECISION_FLOOR, relative
from .tradeoff_settings import DENSE, Mask, Setting


@dataclass(frozen=True)
class Point:
    """One setting. What is not measured, because a setting is wrong, is None.

    Attributes:
        setting: In words; ``kind``, ``keep`` and ``passes`` are its parts (see `Setting`).
        difference_fp32: Of the logits to those of the reference model, relative, in float32.
        difference: The same in the dtype that is measured.
        reference_difference: The reference model's own in that dtype.
        correct: Whether both are within rounding.
        visible_tokens: Of a view in one pass; a mean, since content masks differ.
        multiply_adds: Of a view, in all passes.
        top1_agreement: Share of views with the dense model's class.
        kl: Mean over the views of KL(dense || this), in nats.
        same_answers: Share of videos with the dense model's class, scores summed over their views.
        latency: Seconds of a call: all passes over a batch of views, drawn masks included.
        views_per_second: By the median.
        peak_memory: Bytes of a call beyond what is held before it.
        speedup: Over dense, of medians.
    """

    setting: str
    kind: str
    keep: float
    passes: int
    difference_fp32: float
    difference: float
    reference_difference: float
    correct: bool
    visible_tokens: float | None = None
    multiply_adds: float | None = None
    top1_agreement: float | None = None
    kl: float | None = None
    same_answers: float | None = None
    latency: Spread | None = None
    views_per_second: float | None = None
    peak_memory: int | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Best:
    """The most probable class of a video, by the mean of its views' scores."""

    number: int
    probability: float

    @classmethod
    def of(cls, logs: Tensor) -> "Best":
        """Of the logarithms (V, classes) of its views' scores."""
        probability, number = logs.exp().mean(0).max(0)
        return cls(int(number), float(probability))


@dataclass(frozen=True)
class Answer:
    """What the dense model answers for a video, and by their labels the settings that answer something else."""

    video: str
    views: int
    dense: Best
    changed: dict[str, Best]


@dataclass(frozen=True)
class Tradeoff:
    """All points and what they were measured on.

    Attributes:
        model: Name of the checkpoint.
        random_weights: Whether the model was not read from one.
        batch: The most views of a forward pass.
        timed_views: The views of a timed call.
        broken: Videos that could not be read, and why.
        absent: Settings that the model does not allow, and why.
    """

    model: str
    random_weights: bool
    dtype: str
    dtype_reason: str
    batch: int
    timed_views: int
    seed: int
    environment: dict[str, str | int]
    points: tuple[Point, ...]
    answers: tuple[Answer, ...] = ()
    broken: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def correct(self) -> bool:
        """Whether every setting agrees with the reference."""
        return all(point.correct for point in self.points)

    @property
    def views(self) -> int:
        """Of all videos together."""
        return sum(answer.views for answer in self.answers)


@dataclass
class _Tally:
    """What is known of a setting so far: a value for each view, or for each video."""

    same: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    multiply_adds: list[int] = field(default_factory=list)
    same_answers: list[bool] = field(default_factory=list)


def measure(
    model: MAR,
    name: str,
    videos: Sequence[Path],
    read: Callable[[Path], Tensor],
    settings: Sequence[Setting],
    *,
    dtype: str = "auto",
    batch: int = 4,
    seed: int = 0,
    budget: float = 30.0,
    on_step: Callable[[str, float], None] = lambda what, share: None,
) -> Tradeoff:
    """Check every setting, compare its answers with the dense model's, then time all of them in turn.

    Args:
        model: A classifier of mask_ratio 0 in float32, in eval mode; it is moved to the dtype that is measured.
        name: Its checkpoint.
        videos: Files.
        read: From a file to its views (V, C, T, H, W).
        settings: The dense one first.
        dtype: "fp32", "bf16", "fp16", or "auto": bf16 where that is clearly faster here, else fp32.
        batch: The most views in a forward pass; the first of these views are timed.
        seed: Of the random masks.
        budget: Seconds for the timed rounds.
        on_step: Told what is going on and which share of the whole is done.

    Raises:
        ValueError: an argument does not fit, no video can be read, or a score is not finite.
    """
    if not isinstance(batch, int) or batch < 1:
        raise checks.bad("batch", batch, "a whole number, 1 or more")
    checks.positive("seconds", budget)
    if settings[0].kind != DENSE:
        raise checks.bad("settings", f"{settings[0].label} first", "dense")
    if model.config.mask_ratio:
        raise checks.bad("model", f"mask_ratio {model.config.mask_ratio}", "0, so that without a mask it is dense")
    device = next(model.parameters()).device
    reason = "asked for"
    if dtype == "auto":
        on_step("measuring this machine's matrix-product rate", 0.0)
        dtype, reason = machine.choose_dtype(device, machine.matmul_rates(device, ("fp32", "bf16")))
    points: list[Point] = []
    timed: Tensor | None = None
    answers, broken = list[Answer](), dict[str, str]()
    tallies = {setting: _Tally() for setting in settings}
    generators = {setting: torch.Generator().manual_seed(seed) for setting in settings}
    origin = (name, model.load_report is None, dtype, reason, batch)
    result = partial(Tradeoff, *origin, seed=seed, environment=machine.environment(device))
    for number, path in enumerate(videos):
        say = partial(_part, on_step, 0.05 + 0.45 * number / len(videos), 0.45 / len(videos))
        say(f"reading {path.name}", 0.0)
        try:
            views = read(path)
        except (ValueError, OSError) as error:
            broken[str(path)] = str(error)
            continue
        if timed is None:
            timed = views[:batch].to(device)
            points = check(model, timed[:1], settings, dtype, seed, partial(_part, on_step, 0.0, 0.05))
            if not all(point.correct for point in points):
                return result(len(timed), points=tuple(points), broken=broken)
        answers.append(_answer(model, str(path), views, batch, generators, tallies, say))
    if timed is None:
        reasons = "; ".join(broken.values())
        raise checks.bad("VIDEO", f"none of {len(videos)} that can be read ({reasons})", "at least one")
    points = [_agreeing(point, tally) for point, tally in zip(points, tallies.values(), strict=True)]
    points = _timed(model, timed, settings, points, seed, budget, partial(_part, on_step, 0.5, 0.5))
    on_step("done", 1.0)
    return result(len(timed), points=tuple(points), answers=tuple(answers), broken=broken)


def _part(on_step: Callable[[str, float], None], begin: float, size: float, what: str, share: float) -> None:
    on_step(what, begin + size * share)


def check(
    model: MAR,
    video: Tensor,
    settings: Sequence[Setting],
    dtype: str,
    seed: int,
    on_step: Callable[[str, float], None] = lambda what, share: None,
) -> list[Point]:
    """Compare the model with the reference, on the same weights and masks, and move it to ``dtype``.

    Args:
        model: In float32.
        video: (1, C, T, H, W), one view.
        settings: What to compare; of ensembles all passes.
        dtype: "fp32", "bf16" or "fp16".
        seed: Of the random masks.
        on_step: As in `measure`.
    """
    plain = reference.MAR(model.config).eval().to(video.device)
    plain.load_state_dict(model.state_dict())
    masks = [setting.masks(video, model.config, torch.Generator().manual_seed(seed)) for setting in settings]

    def logits(run: torch.nn.Module, what: str) -> list[Tensor]:
        found = []
        for number, own in enumerate(masks):
            on_step(f"comparing with the reference, {what}", number / len(masks))
            given = own if run is model else [_dense_form(mask, model.config, video.device) for mask in own]
            found.append(torch.cat([run(video, mask, reconstruct=False).logits for mask in given]).float())
        return found

    # cuDNN would run the reference's convolution in TF32.
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        truth, fast = logits(plain, "fp32"), logits(model, "fp32")
        low_plain, low_fast = truth, fast
        if dtype != "fp32":
            low = machine.DTYPES[dtype]
            low_plain, low_fast = logits(plain.to(low), dtype), logits(model.to(low), dtype)
    points = []
    for setting, *outputs in zip(settings, truth, fast, low_plain, low_fast, strict=True):
        fp32, theirs, ours = (relative(output, outputs[0]) for output in outputs[1:])
        bound = FP32_BOUND if dtype == "fp32" else 2 * theirs + LOW_PRECISION_FLOOR
        correct = fp32 <= FP32_BOUND and ours <= bound
        points.append(
            Point(setting.label, setting.kind, setting.keep, setting.passes, fp32, ours, theirs, correct)
        )  # fmt: skip
    return points


def _dense_form(mask: Mask, config: MARConfig, device: torch.device) -> TokenMask:
    """The mask of one clip as the reference takes it."""
    if mask is None:
        return masking.random(1, config.grid, 0.0, device=device)
    return mask if mask.cu_seqlens is None else TokenMask.from_bool_masked(mask.bool_masked())


@torch.inference_mode()
def _answer(
    model: MAR,
    name: str,
    views: Tensor,
    batch: int,
    generators: Mapping[Setting, torch.Generator],
    tallies: Mapping[Setting, _Tally],
    on_step: Callable[[str, float], None],
) -> Answer:
    """Run all settings, the dense one first, on the views of a video; adds to the tallies."""
    device = next(model.parameters()).device
    dense, best, changed = torch.empty(0), Best(0, 0.0), dict[str, Best]()
    for number, (setting, tally) in enumerate(tallies.items()):
        on_step(f"{Path(name).name}: {setting.label}", number / len(tallies))
        parts = []
        for part in views.split(batch):
            part = part.to(device)
            masks = setting.masks(part, model.config, generators[setting])
            parts.append(ensemble.log_probabilities(model, part, masks).cpu())
            _count(tally, masks, len(part), model.config)
        logs = torch.cat(parts)
        if not bool(logs.isfinite().all()):
            short = machine.short_name(next(model.parameters()).dtype)
            raise checks.bad("model", f"scores of {setting.label} that are not finite in {short}", "finite ones")
        own = Best.of(logs)
        if number == 0:
            dense, best = logs, own
        elif own.number != best.number:
            changed[setting.label] = own
        tally.same += (logs.argmax(-1) == dense.argmax(-1)).tolist()
        tally.kl += divergence(dense, logs).tolist()
        tally.same_answers.append(own.number == best.number)
    return Answer(name, len(views), best, changed)


def divergence(logs: Tensor, others: Tensor) -> Tensor:
    """KL(p || q) in nats of each row, from the logarithms (V, classes) of p and of q."""
    return (logs.exp() * (logs - others)).sum(-1).clamp_min(0)  # rounding can leave less than 0


def _count(tally: _Tally, masks: Sequence[Mask], views: int, config: MARConfig) -> None:
    for mask in masks:
        if mask is not None and mask.cu_seqlens is not None:
            lengths = mask.cu_seqlens.diff().tolist()
        else:
            lengths = [config.num_tokens if mask is None else mask.num_visible] * views
        tally.tokens += lengths
        tally.multiply_adds += [cost.count(config, visible=length).multiply_adds for length in lengths]


def _agreeing(point: Point, tally: _Tally) -> Point:
    return replace(
        point,
        visible_tokens=fmean(tally.tokens),
        multiply_adds=point.passes * fmean(tally.multiply_adds),
        top1_agreement=fmean(tally.same),
        kl=fmean(tally.kl),
        same_answers=fmean(tally.same_answers),
    )


def _timed(
    model: MAR,
    video: Tensor,
    settings: Sequence[Setting],
    points: Sequence[Point],
    seed: int,
    budget: float,
    on_step: Callable[[str, float], None],
) -> list[Point]:
    gc.collect()
    runs = {setting.label: _call(model, video, setting, seed) for setting in settings}
    on_step("timing, settings in turn", 0.0)
    latency = interleaved(
        runs, video.device, budget=budget, warm=1,
        on_round=lambda share: on_step("timing, settings in turn", 0.9 * share),
    )  # fmt: skip
    on_step("measuring peak memory", 0.9)
    memory = {label: machine.peak_memory(run, video.device) for label, run in runs.items()}
    dense = latency[settings[0].label].p50
    return [
        replace(
            point,
            latency=latency[point.setting],
            views_per_second=len(video) / latency[point.setting].p50,
            peak_memory=memory[point.setting],
            speedup=dense / latency[point.setting].p50,
        )
        for point in points
    ]


def _call(model: MAR, video: Tensor, setting: Setting, seed: int) -> Callable[[], Any]:
    """A call as a user makes it: masks that are drawn, or go by the clip, are made anew each time."""
    generator = torch.Generator(video.device).manual_seed(seed)
    made = setting.masks(video, model.config, generator)

    @torch.inference_mode()
    def run() -> Any:
        masks = made if setting.fixed else setting.masks(video, model.config, generator)
        return ensemble.log_probabilities(model, video, masks)

    return run
