"""From lists of videos to an evaluated checkpoint: what mar-fast train does."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import MAR, from_pretrained
from ..data import read_views
from ..data.annotations import Sample
from ..data.video import open_film
from ..eval import accuracy
from ..kernels import checks
from .dataset import ClipDataset, Videos
from .distributed import World
from .log import draw_curves
from .loop import Result, Run
from .optim import accumulation
from .recipe import Recipe
from .start import start
from .step import Stepper


def fit(
    recipe: Recipe,
    samples: Sequence[Sample] | Videos,
    validation: Sequence[Sample] | Videos,
    out: Path,
    world: World,
    *,
    init: str | Path | None = None,
    clips: int = 8,
    workers: int = 2,
    resume: bool = False,
    allow_changes: bool = False,
    say: Callable[[str], None] = print,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Result:
    """Train a model by a recipe, in this process as one of all.

    Args:
        recipe: What to do.
        samples: The videos to train on, from `read_annotations`; or a dataset that gives items itself.
        validation: The videos to validate on; empty for no validation.
        out: The run's folder. It gets checkpoints/, log.jsonl, curves.png, best.safetensors, last.safetensors.
        world: All processes, see `distributed.world`.
        init: A checkpoint to start from, in any layout; None for random weights.
        clips: As many as a process takes at a time; a step accumulates gradients to the recipe's batch.
        workers: Processes that read for this one.
        resume: Go on from the newest checkpoint in ``out``.
        allow_changes: Resume with another recipe, list or number of processes.
        say: Told in words what happens, in rank 0.
        on_row: Told each row of the log, in rank 0.

    Raises:
        ValueError: something does not fit; the message names it. `DivergedError` if the loss does not stay finite.
        OSError: something is not there, or cannot be written.
    """
    if not resume and (out / "checkpoints").exists():
        raise FileExistsError(f"out: got {str(out)!r}, which has a run, expected a new folder (or resume)")

    def tell(text: object) -> None:
        if world.main:
            say(str(text))

    def videos(listed: Sequence[Sample] | Videos, training: bool) -> Videos:
        return listed if isinstance(listed, Videos) else ClipDataset(listed, recipe, training=training)

    accumulate = accumulation(recipe, world.size, clips)
    training, checked = videos(samples, True), videos(validation, False) if validation else None
    model, report, notes = start(recipe, init)
    for line in filter(None, (report, *notes)) if not resume else ():
        tell(line)
    if accumulate > 1:
        tell(f"{accumulate} micro-batches a step, in each of {world.size} processes, to {recipe.data.batch} videos")
    stepper = Stepper(model.to(world.device), recipe, world)
    run = Run(stepper, training, checked, out, accumulate=accumulate, workers=workers, on_row=on_row)
    if resume:
        run.resume(allow_changes=allow_changes)
        tell(f"{out}: goes on after step {run.done} of {run.steps}")
    try:
        result = run.train()
    except torch.OutOfMemoryError as error:
        accepted = "fewer (or gradient_checkpointing=true, or shard=true in several processes)"
        raise checks.bad("clips", f"{clips}, too many for the memory of the device ({error})", accepted) from error
    if world.main and not result.stopped:
        try:
            draw_curves(out / "log.jsonl", out / "curves.png")
        except ModuleNotFoundError as error:
            tell(f"no curves.png: {error}")
    return result


def multi_view_test(
    recipe: Recipe,
    checkpoint: Path,
    samples: Sequence[Sample],
    out: Path,
    world: World,
    *,
    workers: int = 2,
    on_video: Callable[[accuracy.Accuracy], None] = lambda so_far: None,
) -> accuracy.Accuracy:
    """The recipe's test, of several clips and crops of each video, in this process alone.

    Args:
        recipe: Views and sampling.
        checkpoint: What `fit` wrote.
        samples: The videos.
        out: A JSON line for each video; an interrupted test goes on there, one of other weights or views is replaced.
        world: Its device is used.
        workers: Videos that are read at a time.
        on_video: Told the accuracy so far.
    """
    model: MAR = from_pretrained(checkpoint).to(world.device).eval()
    data, config, views = recipe.data, model.config, recipe.test
    how: dict[str, Any] = dict(size=config.image_size, clips=views.clips, crops=views.crops, sampling=data.sampling)

    def read(path: Path) -> Tensor:
        stride = data.stride
        if data.fps:
            with open_film(path) as film:
                stride = max(1, round(stride * float(film.rate or data.fps) / data.fps))
        return read_views(path, config.num_frames, stride=stride, short="repeat", **how)

    settings = {"model": accuracy.fingerprint(model), "list": accuracy.list_fingerprint(samples)}
    settings["views"] = f"{views.clips}x{views.crops}"
    try:
        journal = accuracy.Journal(out, settings)
    except FileExistsError:
        journal = accuracy.Journal(out, settings, force=True)
    return accuracy.evaluate(model, samples, read, journal, workers=max(1, workers), on_video=on_video)
