"""What whole models are given to do, what is right for it, and how a model is made ready to be timed at it.

In inference weights have the job's dtype; a training step has float32 weights under autocast, and AdamW.
"""

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mar_fast import MARConfig, TokenMask, masking, reference

from .case import Prepared

# The weight of the reconstruction loss on Something-Something v2.
WEIGHT = 0.1
# Steps are taken, but so small that many timed ones leave the weights what they were.
LEARNING_RATE = 1e-9
CHECKED_CLIPS = 1


@dataclass(frozen=True)
class Job:
    """Classify, or learn from, a batch of clips.

    Attributes:
        config: The model.
        batch: Clips.
        device: Where.
        dtype: Of weights in inference, of autocast in training.
        training: Whether it is a training step: forward, backward, optimizer; else the logits of one call.
    """

    config: MARConfig
    batch: int
    device: torch.device
    dtype: torch.dtype
    training: bool = False

    @functools.cached_property
    def weights(self) -> dict[str, Tensor]:
        """The reference's state dict, the same for every peer."""
        torch.manual_seed(0)
        return reference.MAR(self.config).state_dict()

    @functools.cached_property
    def clips(self) -> Tensor:
        """(B, C, T, H, W) float32, random, as normalised clips are."""
        config, source = self.config, torch.Generator().manual_seed(1)
        shape = (self.batch, config.channels, config.num_frames, *config.image_size)
        return torch.randn(shape, generator=source).to(self.device)

    @functools.cached_property
    def target(self) -> Tensor:
        """(B,) int64."""
        return (torch.arange(self.batch) % self.config.num_classes).to(self.device)

    @functools.cached_property
    def mask(self) -> TokenMask:
        """The test mask of the config's ratio."""
        config = self.config
        if not config.mask_ratio:
            return masking.random(self.batch, config.grid, 0.0, device=self.device)
        return masking.cell_running(self.batch, config.grid, config.mask_ratio, phase=0, device=self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """Low precision by autocast, as the original has it; nothing for float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def few(self) -> "Job":
        """The same with only so many clips as a check needs."""
        smaller, kept = replace(self, batch=min(self.batch, CHECKED_CLIPS)), slice(CHECKED_CLIPS)
        mask = TokenMask(self.mask.keep_idx[kept], self.mask.drop_idx[kept], self.mask.grid)
        vars(smaller).update(clips=self.clips[kept], target=self.target[kept], mask=mask)
        return smaller


Losses = Callable[[Job], Tensor]


def truth(job: Job) -> list[Tensor]:
    """The reference in float64: logits, or with training the loss and all gradients in one."""
    few = job.few()
    model = reference.MAR(job.config).double().to(job.device).train(job.training)
    model.load_state_dict(job.weights)
    if not job.training:
        with torch.inference_mode():
            return [model(few.clips.double(), few.mask).logits]
    return loss_and_gradients(original_loss(model(few.clips.double(), few.mask), few), model)


def loss_and_gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """The loss and, as one long vector, every gradient, in the order of the parameters' names."""
    named = sorted((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in named])
    return [loss.detach(), torch.cat([gradient.double().flatten() for gradient in gradients])]


def classifier(job: Job, logits: Callable[[Job], Tensor]) -> Prepared:
    """Inference: ``logits`` calls a model with what a job has."""

    @torch.inference_mode()
    def run() -> Tensor:
        return logits(job)

    materialise(job)
    return Prepared(run, lambda: [run()[:CHECKED_CLIPS]])


def materialise(job: Job) -> None:
    """Make clips, mask and target now: a call does not make them."""
    assert len(job.clips) == len(job.target) == job.mask.batch


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def learner(job: Job, model: nn.Module, loss: Losses) -> Prepared:
    """Training steps: ``loss`` calls a model with what a job has."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with job.autocast():
            value = loss(job)
        value.backward()
        optimizer.step()

    def outputs() -> list[Tensor]:
        with job.autocast():
            value = loss(job.few())
        return loss_and_gradients(value, model)

    materialise(job)
    return Prepared(step, outputs)


def compiled_learner(job: Job, model: nn.Module, loss: Losses) -> Prepared:
    """With the time of compiling, which the first call takes: forward and backward."""
    prepared = learner(job, model, loss)
    return replace(prepared, compile_seconds=timed(prepared.run))


def original_loss(out: Any, job: Job) -> Tensor:
    """The classifier's loss alone, where nothing is masked and so nothing predicted."""
    if not job.config.mask_ratio:
        return F.cross_entropy(out.logits.to(torch.promote_types(out.logits.dtype, torch.float32)), job.target)
    return reference.loss(out, job.target, WEIGHT)


def sum_of_losses(logits: Tensor, reconstruction: Tensor, target: Tensor) -> Tensor:
    """Of classification, and of reconstruction by its weight."""
    return F.cross_entropy(logits.float(), target) + WEIGHT * reconstruction
