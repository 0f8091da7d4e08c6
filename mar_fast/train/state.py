"""Checkpoints of a run: everything that it goes on from, written whole or not at all."""

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from .. import MAR, save_checkpoint
from ..files import write_whole
from ..kernels import checks
from .distributed import World
from .step import Stepper

FORMAT = 2


@dataclass
class Checkpoints:
    """The checkpoints of a run in its folder.

    They have no states of random numbers: each draw is made from the seed, the step, the rank and the micro-batch.
    """

    folder: Path
    keep: int  # how many of the newest stay
    settings: Mapping[str, Any]  # what a run must have in common with one that it continues

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending."""
        found = (path.stem.removeprefix("step-") for path in self.folder.glob("step-*.pt"))
        return sorted(int(step) for step in found if step.isdecimal())

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"

    def save(self, step: int, stepper: Stepper, extra: Mapping[str, Any], world: World) -> None:
        """Write a checkpoint after ``step`` steps, then remove those that are too old.

        Rank 0 writes; where parameters are spread (FSDP2), each process writes its share. ``extra`` is what else a
        resumed run needs: the best validation, unreadable videos.

        Raises:
            OSError: it cannot be written; older checkpoints are untouched.
        """
        plain = {"format": FORMAT, "settings": dict(self.settings), "extra": dict(extra)}
        plain["scaler"] = stepper.scaler.state_dict()
        if stepper.sharded:
            # The shares first, in a folder of their own; the small file that names it makes the checkpoint whole.
            shares = self.folder / f"shares-{step:08d}"
            if world.main:
                shutil.rmtree(shares, ignore_errors=True)
            world.barrier()
            try:
                dcp.save(stepper.state(), checkpoint_id=shares)
            except CheckpointException as error:
                raise OSError(f"{shares}: cannot be written ({_first(error)})") from error
        else:
            plain |= stepper.state()
        if world.main:
            try:
                write_whole(self._path(step), lambda file: torch.save(plain, file))
            except RuntimeError as error:  # torch's own writer, of a disk that is full
                raise OSError(f"{self._path(step)}: cannot be written ({error})") from error
            self._clean()
        world.barrier()

    def _clean(self) -> None:
        """Remove old checkpoints, and what is left of one that was not written to its end."""
        for step in self.steps()[: -self.keep]:
            self._path(step).unlink()
        for file in self.folder.glob(".step-*.pt"):
            file.unlink()  # half of one, where the process was killed
        kept = {f"shares-{step:08d}" for step in self.steps()}
        for shares in self.folder.glob("shares-*"):
            if shares.name not in kept:
                shutil.rmtree(shares, ignore_errors=True)

    def load(self, stepper: Stepper, *, allow_changes: bool = False) -> tuple[int, dict[str, Any]]:
        """Put the newest checkpoint into model, optimizer, scaler and moving average.

        Returns:
            Its step and what ``extra`` was.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is of a run with other settings, or damaged.
        """
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"--resume: got {str(self.folder)!r} without a checkpoint, expected a run's folder")
        path = self._path(steps[-1])
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: cannot be read ({error}); remove it to go on from the one before") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise checks.bad("--resume", f"{str(path)!r} of another format", "one of this version of mar-fast train")
        self._compare(content["settings"], allow_changes)
        if stepper.sharded == ("model" in content):
            got = "whole weights" if "model" in content else "weights that are spread over processes"
            raise checks.bad("--resume", f"{str(path)!r} with {got}", "the same shard= and kind of run")
        state = content
        try:
            if stepper.sharded:
                state = stepper.state()
                dcp.load(state, checkpoint_id=self.folder / f"shares-{steps[-1]:08d}")
            stepper.load(state, content["scaler"])
        except (CheckpointException, KeyError, RuntimeError) as error:
            raise checks.bad("--resume", f"{str(path)!r} ({_first(error)})", "a checkpoint that fits") from error
        return steps[-1], content["extra"]

    def _compare(self, old: Mapping[str, Any], allow_changes: bool) -> None:
        before, now = (dict(_flat(settings)) for settings in (old, self.settings))
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        told = "; ".join(f"{key} {_told(before.get(key))}, now {_told(now.get(key))}" for key in changed)
        if told and not allow_changes:
            raise checks.bad("--resume", f"a run of other settings ({told})", "the same, or --allow-changes")


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """("recipe.optimizer.lr", 1e-3) and so on."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def _told(value: object) -> str:
    return textwrap.shorten(json.dumps(value), 40, placeholder="...")


def _first(error: BaseException) -> str:
    """The first fault of an error that has a line for each."""
    faults = list(error.failures.values()) if isinstance(error, CheckpointException) else []
    text = str(faults[0][0] if faults else error).strip()
    return next((line.strip() for line in text.splitlines()[1:2]), text)


def export(stepper: Stepper, path: Path, world: World) -> None:
    """Write the model's weights in our own layout, also where they are spread over the processes (FSDP2)."""
    model = stepper.model
    if stepper.sharded:
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if world.main:
            model = MAR(model.config)
            model.load_state_dict(state)
    if world.main:
        save_checkpoint(model, path, force=True)
    world.barrier()
