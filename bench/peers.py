"""Whole models that classify the same clips, each behind one small interface: ours and what one would otherwise use.

A peer is a function of a `Job` that gives `Prepared`. All start from the same weights, the reference's, and get the
same normalised clips.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import mar_fast
from mar_fast import reference
from mar_fast.inference import Backend

from .case import Candidate, Prepared
from .jobs import (
    CHECKED_CLIPS,
    WEIGHT,
    Job,
    classifier,
    compiled_learner,
    learner,
    materialise,
    original_loss,
    sum_of_losses,
    timed,
)
from .plain import PlainMAR, patch_loss
from .transformers_peers import hugging_face

# ---------------------------------------------------------------------------------------------------------------------
# Inference


def ours(job: Job) -> Prepared:
    """mar_fast.MAR with weights in the job's dtype."""
    model = _ours(job).to(job.dtype)
    return classifier(job, lambda job: model(job.clips).logits)


def ours_compiled(job: Job, backend: Backend = "inductor") -> Prepared:
    """The same through compile_for_inference."""
    materialise(job)
    compiled = mar_fast.compile_for_inference(_ours(job).to(job.dtype), job.clips, backend=backend)
    return Prepared(
        lambda: compiled(job.clips).logits,
        lambda: [compiled(job.clips).logits[:CHECKED_CLIPS]],
        compiled.compile_seconds,
    )


def _ours(job: Job) -> mar_fast.MAR:
    model = mar_fast.MAR(job.config).to(job.device).train(job.training)
    model.load_state_dict(job.weights)
    return model


def original(job: Job) -> Prepared:
    """reference.MAR as the original is run: all tubelets embedded, attention written out, float32 under autocast."""
    model = _reference(job)

    def logits(job: Job) -> Tensor:
        with job.autocast():
            return model(job.clips, job.mask).logits

    return classifier(job, logits)


def _reference(job: Job) -> reference.MAR:
    model = reference.MAR(job.config).to(job.device).train(job.training)
    model.load_state_dict(job.weights)
    return model


def plain(job: Job, *, sdpa: bool = True, autocast: bool = False) -> Prepared:
    """PlainMAR; its weights in the job's dtype, or float32 under autocast."""
    model = _plain(job, sdpa)
    if not autocast:
        model = model.to(job.dtype)

    def logits(job: Job) -> Tensor:
        with job.autocast() if autocast else nullcontext():
            return model(job.clips, job.mask.keep_idx.long())[0]

    return classifier(job, logits)


def _plain(job: Job, sdpa: bool = True) -> PlainMAR:
    model = PlainMAR(job.config, sdpa=sdpa).to(job.device).train(job.training)
    model.load_state_dict(job.weights)
    return model


def plain_compiled(job: Job, mode: str | None = None) -> Prepared:
    """PlainMAR under torch.compile, in one graph of fixed shapes."""
    materialise(job)
    model, keep_idx = _plain(job).to(job.dtype), job.mask.keep_idx.long()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)

    @torch.inference_mode()
    def logits() -> Tensor:
        return compiled(job.clips, keep_idx)[0]

    return Prepared(logits, lambda: [logits()[:CHECKED_CLIPS]], timed(logits))


def plain_frozen(job: Job, backend: Backend = "inductor") -> Prepared:
    """PlainMAR through compile_for_inference: what is left between this and ours is the model."""
    materialise(job)
    example = (job.clips, job.mask.keep_idx.long())
    compiled = mar_fast.compile_for_inference(_plain(job).to(job.dtype), example, backend=backend)
    return Prepared(
        lambda: compiled(*example)[0], lambda: [compiled(*example)[0][:CHECKED_CLIPS]], compiled.compile_seconds
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training steps: float32 weights under autocast, AdamW


def ours_training(job: Job) -> Prepared:
    """mar_fast.MAR, its loss straight from the clip."""
    model = _ours(job)
    return learner(job, model, lambda job: _our_loss(model, job))


def ours_training_compiled(job: Job) -> Prepared:
    """The same under torch.compile."""
    model = _ours(job)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    return compiled_learner(job, model, lambda job: _our_loss(compiled, job))


def _our_loss(model: Any, job: Job) -> Tensor:
    return mar_fast.mar_loss(model(job.clips, job.mask), job.target, reconstruction_weight=WEIGHT)


def ours_training_plain_loss(job: Job) -> Prepared:
    """Our model, but the target of the reconstruction is written out: the step before the fused loss."""
    model: Any = _ours(job)

    def loss(job: Job) -> Tensor:
        features = model.encoder(job.clips, job.mask.keep_idx)
        logits = model.classifier(features)
        visible = model.encoder_to_decoder(features).to(model.mask_token.dtype)
        pixels = model.decoder(visible, model.mask_token.flatten(), job.mask.keep_idx, job.mask.drop_idx)
        return sum_of_losses(logits, patch_loss(pixels, job.clips, job.mask.drop_idx.long(), job.config), job.target)

    return learner(job, model, loss)


def original_training(job: Job) -> Prepared:
    """reference.MAR as the original trains."""
    model = _reference(job)
    return learner(job, model, lambda job: original_loss(model(job.clips, job.mask), job))


def plain_training(job: Job, *, sdpa: bool = True) -> Prepared:
    """PlainMAR."""
    model = _plain(job, sdpa)
    return learner(job, model, lambda job: plain_loss(model, *_operands(job)))


def plain_training_compiled(job: Job, mode: str | None = None) -> Prepared:
    """PlainMAR and its losses under torch.compile."""
    model = _plain(job)
    compiled = torch.compile(plain_loss, fullgraph=True, dynamic=False, mode=mode)
    return compiled_learner(job, model, lambda job: compiled(model, *_operands(job)))


def _operands(job: Job) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return job.clips, job.mask.keep_idx.long(), job.mask.drop_idx.long(), job.target


def plain_loss(model: PlainMAR, clips: Tensor, keep_idx: Tensor, drop_idx: Tensor, target: Tensor) -> Tensor:
    """Classification and reconstruction, both in plain PyTorch."""
    logits, features = model(clips, keep_idx)
    pixels = model.pixels(features, keep_idx, drop_idx)
    return sum_of_losses(logits, patch_loss(pixels, clips, drop_idx, model.config), target)


# ---------------------------------------------------------------------------------------------------------------------

YARDSTICK = "reference, autocast"


def inference_candidates(job: Job, *, compiled: bool = True) -> tuple[Candidate, ...]:
    """Every way to the logits, without or with those that compile for a minute; CUDA graphs on a GPU alone."""
    graphs = job.device.type == "cuda"
    found: list[tuple[str, Callable[[Job], Prepared]]] = [(YARDSTICK, original), ("PyTorch SDPA", plain)]
    if graphs:
        found.append(("PyTorch SDPA, CUDA graph", functools.partial(plain_frozen, backend="graph")))
    if compiled:
        found += [
            ("PyTorch SDPA, compiled", plain_compiled),
            ("PyTorch SDPA, max-autotune", functools.partial(plain_compiled, mode="max-autotune")),
            ("PyTorch SDPA, frozen", plain_frozen),
        ]
    found.append(("mar_fast", ours))
    if graphs:
        found.append(("mar_fast, CUDA graph", functools.partial(ours_compiled, backend="graph")))
    if compiled:
        found.append(("mar_fast, compiled", ours_compiled))
    return (*_candidates(job, found), hugging_face(job))


def training_candidates(job: Job, *, compiled: bool = True) -> tuple[Candidate, ...]:
    """Every way to take a training step."""
    found: list[tuple[str, Callable[[Job], Prepared]]] = [
        (YARDSTICK, original_training),
        ("PyTorch SDPA", plain_training),
    ]
    if compiled:
        found += [
            ("PyTorch SDPA, compiled", plain_training_compiled),
            ("PyTorch SDPA, max-autotune", functools.partial(plain_training_compiled, mode="max-autotune")),
        ]
    found.append(("mar_fast", ours_training))
    if compiled:
        found.append(("mar_fast, compiled", ours_training_compiled))
    return (*_candidates(job, found), hugging_face(job))


def _candidates(job: Job, found: list[tuple[str, Callable[[Job], Prepared]]]) -> Iterator[Candidate]:
    return (Candidate(provider, functools.partial(prepare, job)) for provider, prepare in found)
