"""The loop: steps, validations and checkpoints, from the first step or from where a run was left.

Every random number is drawn from the seed and from what it is for (epoch, step, rank, micro-batch, video), so that a
run that was ended at any moment goes on with the same bits.
"""

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..files import remove_leftovers
from ..kernels import checks
from .dataset import Batch, Item, Videos, add_broken
from .distributed import to_host
from .loader import StepSampler, batches, make_loader
from .log import add_row, begin_log
from .masks import draw_mask, seed_of, validation_masks
from .mixing import mix_batch
from .optim import learning_rate
from .state import Checkpoints, export
from .step import Inputs, Stepper

# A loss this many times the mean of the last ones has exploded.
EXPLODED, REMEMBERED = 20, 100


class DivergedError(ValueError):
    """The loss is not finite, or it exploded."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int  # steps done
    best: Mapping[str, float]  # the numbers of the best validation and its epoch; empty if there was none
    broken: Mapping[str, str]  # videos that could not be read, and why
    stopped: bool  # whether somebody asked it to stop before its end


class Run:
    """The part of a run in this process; a step takes ``accumulate`` micro-batches, other arguments are as in `fit`.

    Raises:
        ValueError: too few videos for a step, or a batch that cannot be shared out.
    """

    def __init__(
        self,
        stepper: Stepper,
        videos: Videos,
        validation: Videos | None,
        out: Path,
        *,
        accumulate: int,
        workers: int,
        on_row: Callable[[dict[str, Any]], None],
    ) -> None:
        self.stepper, self.videos, self.out, self.accumulate, self._on_row = stepper, videos, out, accumulate, on_row
        recipe, world, self.config = stepper.recipe, stepper.world, stepper.model.config
        self.recipe, self.world = recipe, world
        share: dict[str, Any] = dict(rank=world.rank, world=world.size)
        self.sampler = StepSampler(len(videos), recipe.data.batch, accumulate=accumulate, seed=recipe.seed, **share)
        self.loader = make_loader(videos, self.sampler, workers=workers)
        self.validation: DataLoader[Item] | None = None
        if validation is not None:
            size = recipe.data.batch // (world.size * accumulate) * recipe.data.repeats  # clips of a micro-batch
            every = StepSampler(len(validation), size * world.size, training=False, **share)
            self.validation = make_loader(validation, every, workers=workers)
        common: dict[str, Any] = {"recipe": asdict(recipe), "config": asdict(self.config), "list": videos.fingerprint}
        common |= {"processes": world.size, "accumulate": accumulate}
        self.checkpoints = Checkpoints(out / "checkpoints", recipe.keep, common)
        self.done, self.best, self.broken = 0, dict[str, float](), dict[str, str]()
        self.stopped = self.due = False
        self.steps = self.sampler.steps * recipe.schedule.epochs
        self._losses = deque[float](maxlen=REMEMBERED)
        self._pending: _Step | None = None
        self._clock, self._saved = time.perf_counter(), time.monotonic()

    def resume(self, *, allow_changes: bool = False) -> None:
        """Go on from the newest checkpoint; `fit` says what ``allow_changes`` allows.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is one of a run with other settings, or damaged.
        """
        self.done, extra = self.checkpoints.load(self.stepper, allow_changes=allow_changes)
        if self.done > self.steps:
            raise checks.bad("--resume", f"a run after step {self.done}", f"{self.steps} steps or fewer, as asked now")
        self.best, self.broken = extra["best"], extra["broken"]
        if self.world.main:
            for name in ("best.safetensors", "last.safetensors", "log.jsonl"):
                remove_leftovers(self.out / name)

    def train(self) -> Result:
        """Train from here to the end, or until the process is interrupted (SIGINT) or told to end (SIGTERM).

        Raises:
            DivergedError: the loss is not finite or it exploded; the checkpoints are of before.
            ValueError: too many videos could not be read.
            OSError: something cannot be written.
        """
        recipe, per_epoch, self._clock = self.recipe, self.sampler.steps, time.perf_counter()
        if self.world.main:
            begin_log(self.out / "log.jsonl", self.done)
        with _asked_to_stop() as asked:
            for epoch in range(self.done // per_epoch, recipe.schedule.epochs):
                self._epoch(epoch, asked)
                number, last = epoch + 1, epoch + 1 == recipe.schedule.epochs
                whole = self.done == number * per_epoch  # also on a stop: a whole epoch is validated and saved
                if whole and self.validation is not None and (number % recipe.test.every == 0 or last):
                    self._validate(number)
                if self.stopped or (whole and (number % recipe.checkpoint_every == 0 or last)):
                    self._save()
                if self.stopped:
                    break
            if self.done == self.steps:
                self.stopped = False
                with self.stepper.averaged():
                    export(self.stepper, self.out / "last.safetensors", self.world)
        return Result(self.done, self.best, self.broken, self.stopped)

    def _epoch(self, epoch: int, asked: list[int]) -> None:
        per_epoch = self.sampler.steps
        self.sampler.set_epoch(epoch, self.done - epoch * per_epoch)
        read = batches(self.loader)
        while self.done < (epoch + 1) * per_epoch and not self.stopped:
            lr = learning_rate(self.recipe, self.done, per_epoch)
            step = _Step(self.done + 1, (self.done + 1) / per_epoch, lr)
            told = self.stepper.step(self._inputs(read, step), self.accumulate, lr)
            # Rank 0 says when it is time for a checkpoint within the epoch.
            due = self.world.main and 0 < 60 * self.recipe.checkpoint_minutes < time.monotonic() - self._saved
            told = torch.cat((told / self.world.size, told.new_tensor([len(step.broken), len(asked), due])))
            step.told = to_host(self.world.sum(told))
            self.done += 1
            self._settle()  # the step before, so that the device always has work
            self._pending = step
            if self.world.device.type == "cpu":
                self._settle()
            if self.due and self.done < (epoch + 1) * per_epoch:
                self._save()
        self._settle()

    def _inputs(self, read: Iterator[Batch], step: "_Step") -> Iterator[Inputs]:
        """The micro-batches of a step, on the device, masked and mixed."""
        device, recipe, config = self.world.device, self.recipe, self.config
        for number in range(self.accumulate):
            began = time.perf_counter()
            batch = next(read)
            step.waited += time.perf_counter() - began
            step.clips += len(batch.video)
            step.broken |= batch.broken
            step.index += batch.video_index.tolist()
            seed = seed_of(recipe.seed, step.number, self.world.rank, number)
            torch.manual_seed(seed)  # of dropout and drop path
            generator = torch.Generator().manual_seed(seed)
            masks = draw_mask(recipe.mask, len(batch.video), config, generator, device)
            video = batch.video.to(device, non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True) if recipe.task == "finetune" else None
            video, target = mix_batch(recipe.augment, config, video, labels, batch.boxes, generator)
            yield Inputs(video, target, *masks)

    def _settle(self) -> None:
        """Look at the numbers of the step that was taken last, and write them down."""
        step, self._pending = self._pending, None
        if step is None:
            return
        loss, classification, reconstruction, right, norm, broken, asked, due = step.told()
        if broken:
            every = dict(self.world.gather([*step.broken.items()]))
            new = add_broken(self.broken, every, len(self.videos), self.recipe.data.max_broken)
            self._say_broken(step.number, new)
        mean = sum(self._losses) / len(self._losses) if len(self._losses) == REMEMBERED else math.inf
        if not math.isfinite(loss) or loss > EXPLODED * mean:
            names = sorted({self.videos.paths[index] for index in self.world.gather(step.index)})
            before = self.checkpoints.steps()
            raise DivergedError(
                f"loss: got {loss:.3g} in step {step.number}, after a mean of {mean:.3g}, expected a finite one below "
                f"{EXPLODED} times that. Videos of the step: {', '.join(names)}. Checkpoints of before it, in "
                f"{self.checkpoints.folder}: {', '.join(map(str, before)) or 'none'}; --resume goes on there, with "
                "--allow-changes and, for example, a lower optimizer.lr"
            )
        self._losses.append(loss)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        row: dict[str, Any] = {"step": step.number, "steps": self.steps, "epoch": step.epoch}
        row |= {"loss": loss, "lr": step.lr}
        if self.recipe.task == "finetune":
            row |= {"classification": classification, "accuracy": right}
        if self.recipe.reconstructs:
            row["reconstruction"] = reconstruction
        if self.recipe.optimizer.clip_grad:
            row["norm"] = norm if math.isfinite(norm) else None  # fp16 may overflow; JSON has no inf
        if self.stepper.scaler.is_enabled():
            row["scale"] = self.stepper.scaler.get_scale()
        row |= {"clips_per_second": step.clips * self.world.size / seconds, "waiting": min(step.waited / seconds, 1.0)}
        self._say(row)
        self.stopped, self.due = asked > 0, due > 0

    def _say(self, row: dict[str, Any]) -> None:
        if self.world.main:
            add_row(self.out / "log.jsonl", row)
            self._on_row(row)

    def _say_broken(self, step: int, broken: Mapping[str, str]) -> None:
        if broken:
            self._say({"step": step, "broken": [dict(path=path, error=error) for path, error in broken.items()]})

    def _validate(self, epoch: int) -> None:
        """Validate after ``epoch`` epochs the weights that are exported too, and keep the best ones."""
        with self.stepper.averaged():
            found = self._measure()
            score = found.get("top1", -found["loss"])
            if found["videos"] and (not self.best or score > self.best.get("top1", -self.best["loss"])):
                self.best = {"epoch": epoch, **found}
                export(self.stepper, self.out / "best.safetensors", self.world)
        self._say({"step": self.done, "epoch": epoch, "validation": found, "best": self.best})

    def _measure(self) -> dict[str, float]:
        """Loss, and in fine-tuning top-1 and top-5, of the videos to validate on; each counts once."""
        stepper, device, pretrain = self.stepper, self.world.device, self.recipe.task == "pretrain"
        stepper.called.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # videos, loss, first, among the first five
        broken = dict[str, str]()
        assert self.validation is not None
        for number, batch in enumerate(batches(self.validation)):
            broken |= batch.broken
            mask, decoder_mask = validation_masks(self.recipe, self.config, len(batch.video), number, device)
            video, labels, counts = (value.to(device) for value in (batch.video, batch.labels, batch.counts))
            with torch.no_grad(), stepper.autocast():
                out = stepper.called(video, mask, decoder_mask=decoder_mask, reconstruct=pretrain)
                if pretrain:
                    loss = out.reconstruction_loss  # of all clips
                    if 0 < int(batch.counts.sum()) < len(video):
                        assert mask is not None  # a recipe that pre-trains has one
                        masks = mask.take(counts), decoder_mask and decoder_mask.take(counts)
                        loss = stepper.model.reconstruction_loss(out.pixels[counts], video[counts], *masks)
                    sums[:2] += torch.stack((counts.sum(), loss * counts.sum()))
                    continue
            logits = out.logits.float()[counts]
            rank = (logits > logits.gather(1, labels[counts, None])).sum(1)  # classes before the right one
            loss = torch.nn.functional.cross_entropy(logits, labels[counts], reduction="sum")
            sums += torch.stack((counts.sum(), loss, (rank < 1).sum(), (rank < 5).sum()))
        self._say_broken(self.done, dict(self.world.gather([*broken.items()])))
        videos, *rest = self.world.sum(sums).tolist()
        means = dict(zip(("loss",) if pretrain else ("loss", "top1", "top5"), rest, strict=False))
        return {"videos": videos} | {name: value / max(videos, 1) for name, value in means.items()}

    def _save(self) -> None:
        self._settle()  # no checkpoint of weights that are not finite
        self._saved, self.due = time.monotonic(), False
        extra = {"best": self.best, "broken": self.broken}
        self.checkpoints.save(self.done, self.stepper, extra, self.world)


@dataclass
class _Step:
    """What is known of a step on the host."""

    number: int
    epoch: float
    lr: float
    told: Callable[[], list[float]] = list
    waited: float = 0.0
    clips: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    index: list[int] = field(default_factory=list)


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list to which the numbers of signals are added that ask this process to stop; a second one stops it at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
