"""transformers' VideoMAE, as it is and as `mar_fast.accelerate` makes it: the drop-in, and what it is measured against.

All models of a workload have the same random weights, by transformers' own initialisation, and get the same clips.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mar_fast
from mar_fast import reference
from mar_fast.checkpoint.config_json import for_transformers

from .case import Prepared, Provider
from .workloads import Workload, first_call_timed, frozen, of_few, ready

BASELINE, BY_HAND = "transformers", "transformers, masked by hand"

# Of a model, clips (B, T, C, H, W), bools (B, L) and classes (B,): the logits, or in training the loss.
Call = Callable[[Any, Tensor, Tensor, Tensor], Any]
Change = Callable[[Any], Any]


def build(workload: Workload, dtype: torch.dtype | None = None) -> Any:
    """transformers' model of the workload's size, with SDPA: a classifier, or for pre-training if the config has none.

    ``dtype`` is as in `workloads.built`.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: transformers has no such model.
    """
    transformers = importlib.import_module("transformers")
    config = replace(workload.config, final_norm=False)
    if config.patch_size[1] != config.patch_size[2]:
        raise ValueError(f"VideoMAE of transformers has square patches, not {config.patch_size[1:]}")
    torch.manual_seed(0)
    theirs = transformers.VideoMAEConfig(**for_transformers(config, "float32"), attn_implementation="sdpa")
    kind = transformers.VideoMAEForVideoClassification if config.classifier else transformers.VideoMAEForPreTraining
    dtype = dtype or (torch.float32 if workload.training else workload.dtype)
    return kind(theirs).to(workload.device, dtype).train(workload.training)


def dense_logits(model: Any, clips: Tensor, bools: Tensor, target: Tensor) -> Any:
    """Of a classifier's own call: from all tokens, or from those that ``keep`` of `mar_fast.accelerate` leaves."""
    return model(clips).logits


def masked_logits(model: Any, clips: Tensor, bools: Tensor, target: Tensor) -> Any:
    """From visible tokens, by calling the parts of a classifier: what can be had from transformers alone."""
    tokens = model.videomae(clips, bool_masked_pos=bools).last_hidden_state
    return model.classifier(model.fc_norm(tokens.mean(1)))


def classification_loss(model: Any, clips: Tensor, bools: Tensor, target: Tensor) -> Tensor:
    """From all tokens."""
    return F.cross_entropy(reference.wide(model(clips).logits), target)


def reconstruction_loss(model: Any, clips: Tensor, bools: Tensor, target: Tensor) -> Any:
    """Of VideoMAEForPreTraining."""
    return model(clips, bool_masked_pos=bools).loss


def operands(model: Any, workload: Workload) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The model and what it is called with, clips in its dtype: transformers' own code takes no other."""
    return model, workload.clips.to(model.dtype).transpose(1, 2), workload.mask.bool_masked(), workload.target


def expected(workload: Workload, call: Call) -> list[Tensor]:
    """transformers' own code in float64: logits, or in training the loss and all gradients in one."""
    model = build(workload, torch.float64)
    return of_few(workload, model, lambda few: call(*operands(model, few)))


def accelerated(model: Any, **options: Any) -> Any:
    """By `mar_fast.accelerate`, without its warning that accuracy may drop: no accuracy is measured here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="keep=")
        return mar_fast.accelerate(model, **options)


def eager(workload: Workload, call: Call, change: Change | None = None) -> Prepared:
    """Without a compiler; ``change`` is done to the model first."""
    model = build(workload)
    model = change(model) if change else model
    return ready(workload, model, lambda workload: call(*operands(model, workload)))


def compiled(workload: Workload, call: Call, change: Change | None = None) -> Prepared:
    """Under torch.compile; where transformers chooses tokens by bools the graph breaks."""
    return first_call_timed(eager(workload, torch.compile(call, dynamic=False), change))


def accelerated_and_compiled(workload: Workload, change: Change) -> Prepared:
    """A classifier that was accelerated, through `mar_fast.compile_for_inference`."""
    model = change(build(workload))
    return frozen(model, operands(model, workload)[1:2], lambda out: out.logits, "inductor")


def hugging_face(workload: Workload) -> Provider:
    """The dense classifier, for the suites that measure our own model."""
    call = classification_loss if workload.training else dense_logits
    prepare = partial(eager, workload, call)
    return Provider("Hugging Face VideoMAE, dense", prepare, expected=partial(expected, workload, call))
