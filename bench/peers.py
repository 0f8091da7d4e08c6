"""Whole models that classify the same clips or learn from them: ours, and what one would otherwise use.

A peer is a function of a `Workload` that gives `Prepared`, in inference the logits and in training a step (float32
weights under autocast, AdamW). All start from the same weights, the reference's, and get the same normalised clips.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mar_fast
from mar_fast import reference
from mar_fast.inference import Backend

from .case import Prepared, Provider
from .plain import PlainMAR, patch_loss
from .transformers_peers import hugging_face
from .workloads import (
    WEIGHT,
    Workload,
    classifier,
    first_call_timed,
    frozen,
    learner,
    materialise,
    original_loss,
    sum_of_losses,
)

REFERENCE, BASELINE = "reference, autocast", "PyTorch SDPA"
Prepare = Callable[[Workload], Prepared]


def _built(workload: Workload, kind: Callable[..., Any], *, autocast: bool = False) -> Any:
    """A model with the workload's weights, in inference in its dtype unless that comes by autocast."""
    model = kind(workload.config).to(workload.device).train(workload.training)
    model.load_state_dict(workload.weights)
    return model if autocast or workload.training else model.to(workload.dtype)


def ours(workload: Workload) -> Prepared:
    """mar_fast.MAR; in training its loss straight from the clip."""
    model = _built(workload, mar_fast.MAR)
    if workload.training:
        return learner(workload, model, partial(_our_loss, model))
    return classifier(workload, lambda workload: model(workload.clips).logits)


def ours_compiled(workload: Workload, backend: Backend = "inductor") -> Prepared:
    """The same through compile_for_inference, in training under torch.compile."""
    model = _built(workload, mar_fast.MAR)
    if workload.training:
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        return first_call_timed(learner(workload, model, partial(_our_loss, compiled)))
    materialise(workload)
    return frozen(model, (workload.clips,), lambda out: out.logits, backend)


def _our_loss(model: Any, workload: Workload) -> Tensor:
    return mar_fast.mar_loss(model(workload.clips, workload.mask), workload.target, reconstruction_weight=WEIGHT)


def ours_plain_loss(workload: Workload) -> Prepared:
    """Training of our model with the reconstruction's target written out: the step before the fused loss."""
    model = _built(workload, mar_fast.MAR)

    def loss(workload: Workload) -> Tensor:
        mask = workload.mask
        features = model.encoder(workload.clips, mask.keep_idx)
        logits = model.classifier(features)
        visible = model.encoder_to_decoder(features).to(model.mask_token.dtype)
        pixels = model.decoder(visible, model.mask_token.flatten(), mask)
        reconstruction = patch_loss(pixels, workload.clips, mask.drop_idx.long(), workload.config)
        return sum_of_losses(logits, reconstruction, workload.target)

    return learner(workload, model, loss)


def original(workload: Workload) -> Prepared:
    """reference.MAR as the original runs it: all tubelets embedded, attention written out, float32 under autocast."""
    model = _built(workload, reference.MAR, autocast=True)
    if workload.training:
        return learner(workload, model, lambda work: original_loss(model(work.clips, work.mask), work))

    def logits(workload: Workload) -> Tensor:
        with workload.autocast():
            return model(workload.clips, workload.mask).logits

    return classifier(workload, logits)


def plain(workload: Workload, *, sdpa: bool = True, autocast: bool = False) -> Prepared:
    """PlainMAR; in inference its weights in the workload's dtype, or float32 under autocast."""
    model = _built(workload, partial(PlainMAR, sdpa=sdpa), autocast=autocast)
    if workload.training:
        return learner(workload, model, lambda workload: plain_loss(model, *_operands(workload)))

    operands = _operands(workload)[:2]

    def logits(workload: Workload) -> Tensor:
        with workload.autocast() if autocast else nullcontext():
            return model(*operands)[0]

    return classifier(workload, logits)


def plain_compiled(workload: Workload, mode: str | None = None) -> Prepared:
    """PlainMAR, in training with its losses, under torch.compile: one graph of fixed shapes."""
    model = _built(workload, PlainMAR)
    what: Any = plain_loss if workload.training else model
    run = torch.compile(what, fullgraph=True, dynamic=False, mode=mode)
    if workload.training:
        return first_call_timed(learner(workload, model, lambda workload: run(model, *_operands(workload))))
    operands = _operands(workload)[:2]
    return first_call_timed(classifier(workload, lambda workload: run(*operands)[0]))


def plain_frozen(workload: Workload, backend: Backend = "inductor") -> Prepared:
    """PlainMAR through compile_for_inference: what is left between this and ours is the model."""
    return frozen(_built(workload, PlainMAR), _operands(workload)[:2], lambda out: out[0], backend)


def _operands(workload: Workload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return workload.clips, workload.mask.keep_idx.long(), workload.mask.drop_idx.long(), workload.target


def plain_loss(model: PlainMAR, clips: Tensor, keep_idx: Tensor, drop_idx: Tensor, target: Tensor) -> Tensor:
    """Classification and reconstruction, both in plain PyTorch."""
    logits, features = model(clips, keep_idx)
    pixels = model.pixels(features, keep_idx, drop_idx)
    return sum_of_losses(logits, patch_loss(pixels, clips, drop_idx, model.config), target)


def providers(workload: Workload, *, compiled: bool = True) -> tuple[Provider, ...]:
    """Every way to the logits or to a step, without or with those that compile for a minute; CUDA graphs on a GPU."""
    graphs = workload.device.type == "cuda" and not workload.training
    every: list[tuple[str, Prepare, bool]] = [
        (REFERENCE, original, True),
        (BASELINE, plain, True),
        (f"{BASELINE}, CUDA graph", partial(plain_frozen, backend="graph"), graphs),
        (f"{BASELINE}, compiled", plain_compiled, compiled),
        (f"{BASELINE}, max-autotune", partial(plain_compiled, mode="max-autotune"), compiled),
        (f"{BASELINE}, frozen", plain_frozen, compiled and not workload.training),
        ("mar_fast", ours, True),
        ("mar_fast, CUDA graph", partial(ours_compiled, backend="graph"), graphs),
        ("mar_fast, compiled", ours_compiled, compiled),
    ]
    found = (Provider(name, partial(prepare, workload)) for name, prepare, wanted in every if wanted)
    return (*found, hugging_face(workload))
