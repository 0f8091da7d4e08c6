"""What whole models are given to do, the outputs that are expected, and how a model is made ready to be timed.

In inference weights have the workload's dtype; a training step has float32 weights under autocast, and AdamW.
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

import mar_fast
from mar_fast import MARConfig, TokenMask, masking, reference
from mar_fast.inference import Backend

from .case import Prepared

# The weight of the reconstruction loss on Something-Something v2.
WEIGHT = 0.1
# Steps are taken, but so small that many timed ones leave the weights what they were.
LEARNING_RATE = 1e-9
CHECKED_CLIPS = 1


@dataclass(frozen=True)
class Workload:
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

    def few(self) -> "Workload":
        """The same with only so many clips as a check needs."""
        smaller, kept = replace(self, batch=min(self.batch, CHECKED_CLIPS)), slice(CHECKED_CLIPS)
        mask = TokenMask(self.mask.keep_idx[kept], self.mask.drop_idx[kept], self.mask.grid)
        vars(smaller).update(clips=self.clips[kept], target=self.target[kept], mask=mask)
        return smaller


def expected(workload: Workload) -> list[Tensor]:
    """The reference in float64: logits, or with training the loss and all gradients in one."""
    few = workload.few()
    model = reference.MAR(workload.config).double().to(workload.device).train(workload.training)
    model.load_state_dict(workload.weights)
    if not workload.training:
        with torch.inference_mode():
            return [model(few.clips.double(), few.mask).logits]
    return loss_and_gradients(original_loss(model(few.clips.double(), few.mask), few), model)


def loss_and_gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """The loss and, as one long vector, every gradient, in the order of the parameters' names."""
    named = sorted((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in named])
    return [loss.detach(), torch.cat([gradient.double().flatten() for gradient in gradients])]


def classifier(workload: Workload, logits: Callable[[Workload], Tensor]) -> Prepared:
    """Inference: ``logits`` calls a model with what a workload has."""

    @torch.inference_mode()
    def run() -> Tensor:
        return logits(workload)

    materialise(workload)
    return Prepared(run, lambda: [run()[:CHECKED_CLIPS]])


def frozen(model: nn.Module, operands: tuple[Any, ...], logits: Callable[[Any], Tensor], backend: Backend) -> Prepared:
    """Inference through `mar_fast.compile_for_inference`; ``logits`` takes them from the model's output."""
    compiled = mar_fast.compile_for_inference(model, operands, backend=backend)
    return Prepared(
        lambda: logits(compiled(*operands)),
        lambda: [logits(compiled(*operands))[:CHECKED_CLIPS]],
        compiled.compile_seconds,
    )


def learner(workload: Workload, model: nn.Module, loss: Callable[[Workload], Tensor]) -> Prepared:
    """Training steps: ``loss`` calls a model with what a workload has."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with workload.autocast():
            value = loss(workload)
        value.backward()
        optimizer.step()

    def outputs() -> list[Tensor]:
        with workload.autocast():
            value = loss(workload.few())
        return loss_and_gradients(value, model)

    materialise(workload)
    return Prepared(step, outputs)


def materialise(workload: Workload) -> None:
    """Make clips, mask and target now: a call does not make them."""
    assert len(workload.clips) == len(workload.target) == workload.mask.batch


def first_call_timed(prepared: Prepared) -> Prepared:
    """The same with the seconds of its first call, which compiles: in training forward and backward."""
    begin = time.perf_counter()
    prepared.run()
    return replace(prepared, compile_seconds=time.perf_counter() - begin)


def original_loss(out: Any, workload: Workload) -> Tensor:
    """The classifier's loss alone, where nothing is masked and so nothing predicted."""
    if not workload.config.mask_ratio:
        return F.cross_entropy(out.logits.to(torch.promote_types(out.logits.dtype, torch.float32)), workload.target)
    return reference.loss(out, workload.target, WEIGHT)


def sum_of_losses(logits: Tensor, reconstruction: Tensor, target: Tensor) -> Tensor:
    """Of classification, and of reconstruction by its weight."""
    return F.cross_entropy(logits.float(), target) + WEIGHT * reconstruction
