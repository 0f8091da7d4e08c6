"""Checkpoints of a run: everything that it goes on from, written whole or not at all."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from .. import MAR, save_checkpoint
from ..files import write_whole
from ..kernels import checks
from .distributed import World

FORMAT = 1


@dataclass
class Checkpoints:
    """The checkpoints of a run in its folder.

    They have no states of random numbers: each draw is made from the seed, the step, the rank and the micro-batch.

    Attributes:
        folder: Where they are.
        keep: How many of the newest stay.
        settings: What a run must have in common with one that it continues.
    """

    folder: Path
    keep: int
    settings: Mapping[str, Any]

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending."""
        found = (path.stem.removeprefix("step-") for path in self.folder.glob("step-*.pt"))
        return sorted(int(step) for step in found if step.isdecimal())

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"

    def save(self, step: int, parts: "Parts", extra: Mapping[str, Any], world: World) -> None:
        """Write a checkpoint, then remove those that are too old.

        Args:
            step: How many steps are done.
            parts: Model, optimizer, scaler and moving average.
            extra: What else goes on: best accuracy, unreadable videos.
            world: All processes. Rank 0 writes; where parameters are spread (FSDP2), each process writes its share.

        Raises:
            OSError: it cannot be written; older checkpoints are untouched.
        """
        plain = {"format": FORMAT, "settings": dict(self.settings), "extra": dict(extra)}
        plain["scaler"] = parts.scaler.state_dict()
        if parts.sharded:
            # The shares first, in a folder of their own; the small file that names it makes the checkpoint whole.
            shares = self.folder / f"shares-{step:08d}"
            if world.main:
                shutil.rmtree(shares, ignore_errors=True)
            world.barrier()
            try:
                dcp.save(parts.state(), checkpoint_id=shares)
            except CheckpointException as error:
                raise OSError(f"{shares}: cannot be written ({_first(error)})") from error
        else:
            plain |= parts.state()
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

    def load(self, parts: "Parts", *, allow_changes: bool = False) -> tuple[int, dict[str, Any]]:
        """Put the newest checkpoint into model and optimizer.

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
            raise checks.bad("--resume", f"{str(path)!r} of another format", "a checkpoint of mar-fast train")
        self._compare(content["settings"], allow_changes)
        if parts.sharded == ("model" in content):
            got = "whole weights" if "model" in content else "weights that are spread over processes"
            raise checks.bad("--resume", f"{str(path)!r} with {got}", "the same shard= and kind of run")
        state = content
        try:
            if parts.sharded:
                state = parts.state()
                dcp.load(state, checkpoint_id=self.folder / f"shares-{steps[-1]:08d}")
            parts.load(state, content["scaler"])
        except (CheckpointException, KeyError, RuntimeError) as error:
            raise checks.bad("--resume", f"{str(path)!r} ({_first(error)})", "a checkpoint that fits") from error
        return steps[-1], content["extra"]

    def _compare(self, old: Mapping[str, Any], allow_changes: bool) -> None:
        before, now = (dict(_flat(settings)) for settings in (old, self.settings))
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        told = "; ".join(f"{key} {_short(before.get(key))}, now {_short(now.get(key))}" for key in changed)
        if told and not allow_changes:
            raise checks.bad("--resume", f"a run of other settings ({told})", "the same, or --allow-changes")


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """("recipe.optimizer.lr", 1e-3) and so on."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def _first(error: BaseException) -> str:
    """The first fault of an error that has a line for each."""
    faults = list(error.failures.values()) if isinstance(error, CheckpointException) else []
    text = str(faults[0][0] if faults else error).strip()
    return next((line.strip() for line in text.splitlines()[1:2]), text)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@dataclass
class Parts:
    """What changes in a step.

    Attributes:
        model: Without wrappers; with FSDP2 its parameters are spread.
        optimizer: Of its parameters.
        scaler: Of gradients; does nothing but for fp16.
        average: The moving average of each parameter, empty where there is none.
    """

    model: MAR
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: dict[str, torch.Tensor]

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over the processes."""
        return isinstance(next(self.model.parameters()), DTensor)

    def state(self) -> dict[str, Any]:
        """Everything but the scaler, by names."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "average": dict(self.average)}

    def load(self, state: Mapping[str, Any], scaler: dict[str, Any]) -> None:
        """Put a state back; a moving average that it does not have begins with the weights."""
        groups = self.optimizer.param_groups
        rates = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, rates, strict=True):
            group.update(own)  # those of the recipe, which may be another one
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.average:
                    self.average[name].copy_(state["average"].get(name, parameter))
        if scaler:
            self.scaler.load_state_dict(scaler)


def export(model: MAR, path: Path, world: World) -> None:
    """Write a model's weights in our own layout, also where they are spread over the processes (FSDP2)."""
    whole = model
    if isinstance(next(model.parameters()), DTensor):
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if world.main:
            whole = MAR(model.config)
            whole.load_state_dict(state)
    if world.main:
        save_checkpoint(whole, path, force=True)
    world.barrier()
