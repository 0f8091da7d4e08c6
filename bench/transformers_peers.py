"""transformers' VideoMAE, as it is and as `mar_fast.accelerate` makes it: what the drop-in is, and is measured against.

Models of a job all have the same random weights, those of transformers' own initialisation, and get the same clips.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mar_fast

from .case import Candidate, Prepared
from .jobs import CHECKED_CLIPS, Job, classifier, compiled_learner, learner, loss_and_gradients, timed

CLASSIFICATION, PRE_TRAINING = "VideoMAEForVideoClassification", "VideoMAEForPreTraining"
BEFORE, BY_HAND = "transformers", "transformers, masked by hand"

# Of a model, clips (B, T, C, H, W), bools (B, L) and classes (B,): the logits, or in training the loss.
Call = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
Change = Callable[[Any], Any]


def build(job: Job, kind: str = CLASSIFICATION) -> Any:
    """A model of transformers of the size of the job's encoder, and of its decoder in pre-training, with SDPA.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: transformers has no such model.
    """
    transformers = importlib.import_module("transformers")
    config = job.config
    if config.patch_size[1] != config.patch_size[2]:
        raise ValueError(f"VideoMAE of transformers has square patches, not {config.patch_size[1:]}")
    decoder = {}
    if kind == PRE_TRAINING:
        decoder = dict(
            decoder_num_hidden_layers=config.decoder_depth, decoder_hidden_size=config.decoder_embed_dim,
            decoder_num_attention_heads=config.decoder_num_heads,
            decoder_intermediate_size=4 * config.decoder_embed_dim,
        )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, kind)(
        transformers.VideoMAEConfig(
            image_size=config.image_size, num_frames=config.num_frames, patch_size=config.patch_size[1],
            tubelet_size=config.patch_size[0], num_channels=config.channels, hidden_size=config.embed_dim,
            num_hidden_layers=config.depth, num_attention_heads=config.num_heads,
            intermediate_size=round(config.embed_dim * config.mlp_ratio), num_labels=config.num_classes,
            layer_norm_eps=config.encoder_eps, attn_implementation="sdpa", **decoder,
        )
    )  # fmt: skip
    return model.to(job.device).train(job.training)


def dense_logits(model: Any, clips: Tensor, bools: Tensor, target: Tensor) -> Tensor:
    """Of a classifier's own call: from all tokens, or from those that ``keep`` of `mar_fast.accelerate` leaves."""
    logits: Tensor = model(clips).logits
    return logits


def masked_logits(model: Any, clips: Tensor, bools: Tensor, target: Tensor) -> Tensor:
    """From visible tokens, by calling the parts of a classifier: what can be had from transformers alone."""
    tokens = model.videomae(clips, bool_masked_pos=bools).last_hidden_state
    logits: Tensor = model.classifier(model.fc_norm(tokens.mean(1)))
    return logits


def classification_loss(model: Any, clips: Tensor, bools: Tensor, target: Tensor) -> Tensor:
    """From all tokens."""
    logits = dense_logits(model, clips, bools, target)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)


def reconstruction_loss(model: Any, clips: Tensor, bools: Tensor, target: Tensor) -> Tensor:
    """Of VideoMAEForPreTraining."""
    loss: Tensor = model(clips, bool_masked_pos=bools).loss
    return loss


def operands(model: Any, job: Job) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The model and what it is called with, clips in its dtype: transformers' own code takes no other."""
    return model, job.clips.to(model.dtype).transpose(1, 2), job.mask.bool_masked(), job.target


def truth(job: Job, call: Call, kind: str = CLASSIFICATION) -> list[Tensor]:
    """transformers' own code in float64: logits, or with training the loss and all gradients in one."""
    few, model = job.few(), build(job, kind).double()
    if job.training:
        return loss_and_gradients(call(*operands(model, few)), model)
    with torch.inference_mode():
        return [call(*operands(model, few))]


def as_it_is(model: Any) -> Any:
    """The `Change` that changes nothing."""
    return model


def accelerated(model: Any, **options: Any) -> Any:
    """By `mar_fast.accelerate`, without its warning that accuracy may drop: no accuracy is measured here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="keep=")
        return mar_fast.accelerate(model, **options)


def eager(job: Job, call: Call, kind: str = CLASSIFICATION, change: Change = as_it_is) -> Prepared:
    """Without a compiler; ``change`` is done to the model first."""
    model = _made(job, kind, change)
    if job.training:
        return learner(job, model, lambda job: call(*operands(model, job)))
    return classifier(job, lambda job: call(*operands(model, job)))


def compiled(job: Job, call: Call, kind: str = CLASSIFICATION, change: Change = as_it_is) -> Prepared:
    """Under torch.compile; where transformers chooses tokens by bools the graph breaks."""
    model = _made(job, kind, change)
    run = torch.compile(call, dynamic=False)
    if job.training:
        return compiled_learner(job, model, lambda job: run(*operands(model, job)))
    found = classifier(job, lambda job: run(*operands(model, job)))
    return replace(found, compile_seconds=timed(found.run))


def frozen(job: Job, change: Change) -> Prepared:
    """A classifier through `mar_fast.compile_for_inference`."""
    model = _made(job, CLASSIFICATION, change)
    clips = operands(model, job)[1]
    run = mar_fast.compile_for_inference(model, clips)
    return Prepared(lambda: run(clips).logits, lambda: [run(clips).logits[:CHECKED_CLIPS]], run.compile_seconds)


def _made(job: Job, kind: str, change: Change) -> Any:
    model = build(job, kind)
    return change(model if job.training else model.to(job.dtype))


def hugging_face(job: Job) -> Candidate:
    """The dense classifier, for the suites that measure our own model."""
    call = classification_loss if job.training else dense_logits
    own_truth = functools.partial(truth, job, call)
    return Candidate("Hugging Face VideoMAE, dense", functools.partial(eager, job, call), truth=own_truth)


def before_and_after(job: Job, *, with_compiled: bool) -> tuple[Candidate, ...]:
    """A classifier's logits: transformers' own ways to them, and ours.

    With a mask transformers' own call is of another function, the dense one: its logits from visible tokens take calls
    of the model's parts.
    """
    keep = 1 - job.config.mask_ratio
    ours = functools.partial(accelerated, keep=keep)
    dense_truth = functools.partial(truth, job, dense_logits)
    found = [
        Candidate(BEFORE, functools.partial(eager, job, dense_logits), truth=None if keep == 1 else dense_truth),
        Candidate("mar_fast", functools.partial(eager, job, dense_logits, change=ours)),
    ]
    name, call = BEFORE, dense_logits
    if keep < 1:
        name, call = BY_HAND, masked_logits
        found.insert(1, Candidate(name, functools.partial(eager, job, call)))
    if with_compiled:
        found.insert(-1, Candidate(f"{name}, compiled", functools.partial(compiled, job, call)))
        found.append(Candidate("mar_fast, compiled", functools.partial(frozen, job, ours)))
    return tuple(found)


def step_before_and_after(job: Job, kind: str, *, with_compiled: bool) -> tuple[Candidate, ...]:
    """A training step of a dense classifier or of pre-training: transformers' own, and the same model accelerated."""
    call, ours = classification_loss, accelerated
    if kind == PRE_TRAINING:
        call, ours = reconstruction_loss, functools.partial(accelerated, num_visible=job.mask.num_visible)
    ways = [("", eager)] + ([(", compiled", compiled)] if with_compiled else [])
    return tuple(
        Candidate(name + how, functools.partial(way, job, call, kind, change))
        for name, change in ((BEFORE, as_it_is), ("mar_fast", ours))
        for how, way in ways
    )
