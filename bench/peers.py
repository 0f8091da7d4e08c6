"""Whole models that classify the same clips, each behind one small interface: ours and what one would otherwise use.

A peer is a function of a `Job` that gives `Prepared`. All start from the same weights, the reference's, and get the
same normalised clips; Hugging Face's dense model has weights and a truth of its own, since it is another function.
"""

import copy
import functools
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mar_fast
from mar_fast import MARConfig, TokenMask, masking, reference

from .case import Candidate, Prepared
from .plain import PlainMAR, patch_loss

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
        vars(smaller).update(weights=self.weights, clips=self.clips[kept], target=self.target[kept], mask=mask)
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
    return _loss_and_gradients(_original_loss(model(few.clips.double(), few.mask), few), model)


def _loss_and_gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """The loss and, as one long vector, every gradient, in the order of the parameters' names."""
    named = sorted((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in named])
    return [loss.detach(), torch.cat([gradient.double().flatten() for gradient in gradients])]


# ---------------------------------------------------------------------------------------------------------------------
# Inference


def _classifier(
    job: Job, model: nn.Module, logits: Callable[[Job], Tensor], compile_seconds: float | None = None
) -> Prepared:
    @torch.inference_mode()
    def run() -> Tensor:
        return logits(job)

    _materialise(job)
    return Prepared(run, lambda: [run()[:CHECKED_CLIPS]], compile_seconds)


def _materialise(job: Job) -> None:
    """Make clips, mask and target now: a call does not make them."""
    assert len(job.clips) == len(job.target) == job.mask.batch


def ours(job: Job) -> Prepared:
    """mar_fast.MAR with weights in the job's dtype."""
    model = _ours(job).to(job.dtype)
    return _classifier(job, model, lambda job: model(job.clips).logits)


def ours_compiled(job: Job) -> Prepared:
    """The same through compile_for_inference."""
    _materialise(job)
    compiled = mar_fast.compile_for_inference(_ours(job).to(job.dtype), job.clips)
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

    return _classifier(job, model, logits)


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

    return _classifier(job, model, logits)


def _plain(job: Job, sdpa: bool = True) -> PlainMAR:
    model = PlainMAR(job.config, sdpa=sdpa).to(job.device).train(job.training)
    model.load_state_dict(job.weights)
    return model


def plain_compiled(job: Job, mode: str | None = None) -> Prepared:
    """PlainMAR under torch.compile, in one graph of fixed shapes."""
    _materialise(job)
    model, keep_idx = _plain(job).to(job.dtype), job.mask.keep_idx.long()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)

    @torch.inference_mode()
    def logits() -> Tensor:
        return compiled(job.clips, keep_idx)[0]

    return Prepared(logits, lambda: [logits()[:CHECKED_CLIPS]], _timed(logits))


def plain_frozen(job: Job) -> Prepared:
    """PlainMAR through compile_for_inference: what is left between this and ours is the model."""
    _materialise(job)
    example = (job.clips, job.mask.keep_idx.long())
    compiled = mar_fast.compile_for_inference(_plain(job).to(job.dtype), example)
    return Prepared(
        lambda: compiled(*example)[0], lambda: [compiled(*example)[0][:CHECKED_CLIPS]], compiled.compile_seconds
    )


def _timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class HuggingFace:
    """transformers' VideoMAEForVideoClassification of the config's encoder: all tokens, its SDPA attention."""

    def __init__(self, job: Job) -> None:
        transformers = importlib.import_module("transformers")
        config = job.config
        if config.patch[1] != config.patch[2]:
            raise ValueError(f"VideoMAE of transformers has square patches, not {config.patch[1:]}")
        torch.manual_seed(0)
        self.job = job
        self.model = transformers.VideoMAEForVideoClassification(
            transformers.VideoMAEConfig(
                image_size=config.image_size, num_frames=config.num_frames, patch_size=config.patch[1],
                tubelet_size=config.patch[0], num_channels=config.channels, hidden_size=config.width,
                num_hidden_layers=config.depth, num_attention_heads=config.num_heads,
                intermediate_size=round(config.width * config.mlp_ratio), num_labels=config.num_classes,
                layer_norm_eps=config.encoder_eps, attn_implementation="sdpa",
            )
        ).to(job.device).train(job.training)  # fmt: skip
        self.exact = copy.deepcopy(self.model)

    def truth(self) -> list[Tensor]:
        """The same model in float64."""
        few, model = self.job.few(), self.exact.double()
        if not self.job.training:
            with torch.inference_mode():
                return [model(few.clips.double().transpose(1, 2)).logits]
        logits = model(few.clips.double().transpose(1, 2)).logits
        return _loss_and_gradients(F.cross_entropy(logits, few.target), model)


def hugging_face(job: Job) -> Candidate:
    """Its candidate, with a truth of its own."""
    made: list[HuggingFace] = []

    def prepare() -> Prepared:
        made.append(HuggingFace(job))
        model = made[0].model
        if job.training:
            return _learner(job, model, lambda job: F.cross_entropy(
                model(job.clips.transpose(1, 2)).logits.float(), job.target))  # fmt: skip
        model.to(job.dtype)
        return _classifier(job, model, lambda job: model(job.clips.to(job.dtype).transpose(1, 2)).logits)

    return Candidate("Hugging Face VideoMAE, dense", prepare, truth=lambda: made[0].truth())


# ---------------------------------------------------------------------------------------------------------------------
# Training steps: float32 weights under autocast, AdamW


def _learner(job: Job, model: nn.Module, loss: Losses, compile_seconds: float | None = None) -> Prepared:
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
        return _loss_and_gradients(value, model)

    _materialise(job)
    return Prepared(step, outputs, compile_seconds)


def ours_training(job: Job) -> Prepared:
    """mar_fast.MAR, its loss straight from the clip."""
    model = _ours(job)
    return _learner(job, model, lambda job: _our_loss(model, job))


def ours_training_compiled(job: Job) -> Prepared:
    """The same under torch.compile."""
    model = _ours(job)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    return _compiled_learner(job, model, lambda job: _our_loss(compiled, job))


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
        return _sum_of_losses(logits, patch_loss(pixels, job.clips, job.mask.drop_idx.long(), job.config), job.target)

    return _learner(job, model, loss)


def _sum_of_losses(logits: Tensor, reconstruction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target) + WEIGHT * reconstruction


def original_training(job: Job) -> Prepared:
    """reference.MAR as the original trains."""
    model = _reference(job)
    return _learner(job, model, lambda job: _original_loss(model(job.clips, job.mask), job))


def _original_loss(out: Any, job: Job) -> Tensor:
    """The classifier's loss alone, where nothing is masked and so nothing predicted."""
    if not job.config.mask_ratio:
        return F.cross_entropy(out.logits.to(torch.promote_types(out.logits.dtype, torch.float32)), job.target)
    return reference.loss(out, job.target, WEIGHT)


def plain_training(job: Job, *, sdpa: bool = True) -> Prepared:
    """PlainMAR."""
    model = _plain(job, sdpa)
    return _learner(job, model, lambda job: plain_loss(model, *_operands(job)))


def plain_training_compiled(job: Job, mode: str | None = None) -> Prepared:
    """PlainMAR and its losses under torch.compile."""
    model = _plain(job)
    compiled = torch.compile(plain_loss, fullgraph=True, dynamic=False, mode=mode)
    return _compiled_learner(job, model, lambda job: compiled(model, *_operands(job)))


def _operands(job: Job) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return job.clips, job.mask.keep_idx.long(), job.mask.drop_idx.long(), job.target


def plain_loss(model: PlainMAR, clips: Tensor, keep_idx: Tensor, drop_idx: Tensor, target: Tensor) -> Tensor:
    """Classification and reconstruction, both in plain PyTorch."""
    logits, features = model(clips, keep_idx)
    pixels = model.pixels(features, keep_idx, drop_idx)
    return _sum_of_losses(logits, patch_loss(pixels, clips, drop_idx, model.config), target)


def _compiled_learner(job: Job, model: nn.Module, loss: Losses) -> Prepared:
    """With the time of compiling, which the first call takes: forward and backward."""
    prepared = _learner(job, model, loss)
    return replace(prepared, compile_seconds=_timed(prepared.run))


# ---------------------------------------------------------------------------------------------------------------------

YARDSTICK = "reference, autocast"


def inference_candidates(job: Job, *, compiled: bool = True) -> tuple[Candidate, ...]:
    """Every way to the logits, without or with those that compile for a minute."""
    found: list[tuple[str, Callable[[Job], Prepared]]] = [(YARDSTICK, original), ("PyTorch SDPA", plain)]
    if compiled:
        found += [
            ("PyTorch SDPA, compiled", plain_compiled),
            ("PyTorch SDPA, max-autotune", functools.partial(plain_compiled, mode="max-autotune")),
            ("PyTorch SDPA, frozen", plain_frozen),
        ]
    found.append(("mar_fast", ours))
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
