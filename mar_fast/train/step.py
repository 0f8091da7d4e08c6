"""One step of training: forward, loss, backward, update; nothing here is random but dropout and drop path."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from .. import MAR, TokenMask, machine
from ..loss import mar_loss
from ..model import MAROutput
from .distributed import World, last_only, spread
from .master_weights import MasterWeights
from .optim import adamw, peak_lr, set_lr
from .recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """A micro-batch on the device, ready for the model."""

    video: Tensor  # (B, C, T, H, W), uint8 or normalised
    target: Tensor | None  # (B,) classes or (B, classes) soft targets; None in pre-training
    mask: TokenMask | None  # which tokens are visible; None where all are
    decoder_mask: TokenMask | None = None  # which positions the decoder predicts; None for all that are dropped


class Stepper:
    """Takes steps with a model, and holds all that they change.

    Args:
        model: On the device of this process; it is trained in place, and with ``recipe.shard`` spread (FSDP2).
        recipe: The optimizer and its precision, what the loss is, how the model is compiled and spread.
        world: All processes.

    Attributes:
        called: The model as it is called in training, see `distributed.spread`.
        optimizer: See `optim.adamw`; its learning rates are those of the last step.
        scaler: Of gradients; it does nothing unless the precision is fp16.
        average: The moving average of each parameter by name, empty where there is none.
    """

    def __init__(self, model: MAR, recipe: Recipe, world: World) -> None:
        # torch 2.13 on a CPU: the first large sqrt of a process is now and then wrong, a small one before prevents it.
        torch.ones(8, device=world.device).sqrt()
        self.model, self.recipe, self.world = model, recipe, world
        self.called = spread(model, world, shard=recipe.shard, compile=recipe.compile)
        self.optimizer = adamw(model, recipe.optimizer, peak_lr(recipe))
        precision = recipe.optimizer.precision
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        named = dict(model.named_parameters())
        self.average = {name: p.detach().clone() for name, p in named.items()} if recipe.optimizer.ema else {}
        self._averaged: list[Tensor] = [named[name] for name in self.average]
        self._autocast = None if precision == "fp32" else machine.DTYPES[precision]
        self._weights = MasterWeights(model, self._autocast)

    def step(self, inputs: Iterator[Inputs], count: int, lr: float) -> Tensor:
        """One step over ``count`` micro-batches.

        Returns:
            (5,) float32 on the device, of this process: the loss, its classification and its reconstruction part, the
            share of clips classified rightly (by their heaviest target), the norm of the gradients if they are clipped.
        """
        scaler, optimizer = self.scaler, self.optimizer
        self.called.train()
        set_lr(optimizer, lr)
        told = torch.zeros(5, device=self.world.device)
        self._weights.refresh()
        for number in range(count):
            batch = next(inputs)
            with last_only(self.called, number == count - 1):
                with self.autocast():
                    out = self._weights.call(self.called, batch.video, batch.mask, decoder_mask=batch.decoder_mask)
                    loss = objective(out, batch.target, self.recipe)
                scaler.scale(loss / count).backward()
            told[:4] += torch.stack(_numbers(out, batch.target, loss, self.recipe.reconstruction_weight)) / count
        if self.recipe.optimizer.clip_grad:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_grad)
            told[4] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if self.average:
            torch._foreach_lerp_(list(self.average.values()), self._averaged, 1 - self.recipe.optimizer.ema)
        return told

    def autocast(self) -> torch.autocast:
        """The precision of the recipe."""
        return torch.autocast(self.world.device.type, self._autocast, enabled=self._autocast is not None)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has the moving average of its weights, if there is one."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange weights and their moving average."""
        for parameter, value in zip(self._averaged, self.average.values(), strict=True):
            own = parameter.clone()
            parameter.copy_(value)
            value.copy_(own)

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


def objective(out: MAROutput, target: Tensor | None, recipe: Recipe) -> Tensor:
    """What is minimised: `mar_loss` in fine-tuning, the reconstruction loss in pre-training."""
    if recipe.task == "pretrain":
        assert out.reconstruction_loss is not None
        return out.reconstruction_loss
    assert target is not None
    return mar_loss(out, target, recipe.reconstruction_weight)


def _numbers(out: MAROutput, target: Tensor | None, loss: Tensor, weight: float) -> list[Tensor]:
    zero, loss = torch.zeros((), device=loss.device), loss.detach().float()
    reconstruction = zero if out.reconstruction_loss is None else out.reconstruction_loss.detach().float()
    if out.logits is None or target is None:
        return [loss, zero, reconstruction, zero]
    hard = target.argmax(-1) if target.ndim == 2 else target
    right = (out.logits.detach().argmax(-1) == hard).float().mean()
    return [loss, loss - weight * reconstruction, reconstruction, right]
