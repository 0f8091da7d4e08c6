"""What whole models are given to do, the outputs that are expected, and how a model is made ready to be timed.

In inference weights have the workload's dtype; a training step has float32 weights under autocast, and AdamW.
"""

import functools
import time
from collections.abc import Callable
from contextlib import nullcontext
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
        return masking.cell_running(self.batch, self.config.grid, self.config.mask_ratio, phase=0, device=self.device)

    def few(self) -> "Workload":
        """The same with only so many clips as a check needs."""
        smaller, kept = replace(self, batch=min(self.batch, CHECKED_CLIPS)), slice(CHECKED_CLIPS)
        mask = TokenMask(self.mask.keep_idx[kept], self.mask.drop_idx[kept], self.mask.grid)
        vars(smaller).update(clips=self.clips[kept], target=self.target[kept], mask=mask)
        return smaller


def built(workload: Workload, kind: Callable[[MARConfig], nn.Module], dtype: torch.dtype | None = None) -> Any:
    """A model with the workload's weights; None is float32 in training, else the workload's dtype."""
    model = kind(workload.config).to(workload.device).train(workload.training)
    model.load_state_dict(workload.weights)
    return model.to(dtype or (torch.float32 if workload.training else workload.dtype))


def of_reference(model: nn.Module, workload: Workload) -> Tensor:
    """The logits of reference.MAR; in training its loss, the classifier's alone where nothing is masked."""
    out = model(workload.clips, workload.mask)
    if not workload.training:
        return out.logits
    if not workload.config.mask_ratio:
        return F.cross_entropy(reference.wide(out.logits), workload.target)
    return reference.loss(out, workload.target, WEIGHT)


def expected(workload: Workload) -> list[Tensor]:
    """The reference in float64: logits, or in training the loss and all gradients in one."""
    model = built(workload, reference.MAR, torch.float64)
    return of_few(workload, model, functools.partial(of_reference, model))


def of_few(workload: Workload, model: nn.Module, call: Callable[[Workload], Tensor]) -> list[Tensor]:
    """What a check compares of a ``call``, on as many clips as it needs.

    The logits; in training the loss and, as one long vector, every gradient, in the order of the parameters' names.
    """
    few = workload.few()
    if not workload.training:
        with torch.inference_mode():
            return [call(few)]
    loss = call(few)
    differentiated = [parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, differentiated)
    return [loss.detach(), torch.cat([gradient.double().flatten() for gradient in gradients])]


def ready(
    workload: Workload, model: nn.Module, call: Callable[[Workload], Tensor], *, autocast: bool = False
) -> Prepared:
    """A model ready to be timed: ``call(workload)`` gives logits, or in training, always under autocast, the loss."""
    # Made now, and not by the first call.
    assert len(workload.clips) == len(workload.target) == workload.mask.batch
    low = (autocast or workload.training) and workload.dtype != torch.float32

    def result(workload: Workload) -> Tensor:
        with torch.autocast(workload.device.type, workload.dtype) if low else nullcontext():
            return call(workload)

    @torch.inference_mode()
    def logits() -> Tensor:
        return result(workload)

    if not workload.training:
        return Prepared(logits, lambda: [logits()[:CHECKED_CLIPS]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        result(workload).backward()
        optimizer.step()

    return Prepared(step, lambda: of_few(workload, model, result))


def frozen(model: nn.Module, operands: tuple[Any, ...], logits: Callable[[Any], Tensor], backend: Backend) -> Prepared:
    """Inference through `mar_fast.compile_for_inference`; ``logits`` takes them from the model's output."""
    compiled = mar_fast.compile_for_inference(model, operands, backend=backend)

    def run() -> Tensor:
        return logits(compiled(*operands))

    return Prepared(run, lambda: [run()[:CHECKED_CLIPS]], compiled.compile_seconds)


def first_call_timed(prepared: Prepared) -> Prepared:
    """The same with the seconds of its first call, which compiles: in training forward and backward."""
    begin = time.perf_counter()
    prepared.run()
    return replace(prepared, compile_seconds=time.perf_counter() - begin)
