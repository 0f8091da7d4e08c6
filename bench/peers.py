"""Whole models that classify the same clips or learn from them: ours, and what one would otherwise use.

A peer is a function of a `Workload` that gives `Prepared`, in inference the logits and in training a step (float32
weights under autocast, AdamW). All start from the same weights, the reference's, and get the same normalised clips.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mar_fast
from mar_fast import reference
from mar_fast.inference import Backend

from .case import Prepared, Provider
from .plain import PlainMAR, patch_loss
from .transformers_peers import hugging_face
from .workloads import WEIGHT, Workload, built, first_call_timed, frozen, of_reference, ready

REFERENCE, BASELINE = "reference, autocast", "PyTorch SDPA"
Prepare = Callable[[Workload], Prepared]
Compiler = Callable[[Any], Any]


def one_graph(peer: Callable[..., Prepared], workload: Workload, mode: str | None = None) -> Prepared:
    """A peer under torch.compile, of fixed shapes."""
    compiler = partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)
    return first_call_timed(peer(workload, compiler=compiler))


def ours(workload: Workload, *, compiler: Compiler | None = None) -> Prepared:
    """mar_fast.MAR; in training its loss straight from the clip."""
    model = built(workload, mar_fast.MAR)
    run = compiler(model) if compiler else model

    def call(workload: Workload) -> Tensor:
        if not workload.training:
            return run(workload.clips).logits
        return mar_fast.mar_loss(run(workload.clips, workload.mask), workload.target, reconstruction_weight=WEIGHT)

    return ready(workload, model, call)


def ours_compiled(workload: Workload, backend: Backend = "inductor") -> Prepared:
    """The same through compile_for_inference, in training under torch.compile."""
    if workload.training:
        return one_graph(ours, workload)
    return frozen(built(workload, mar_fast.MAR), (workload.clips,), lambda out: out.logits, backend)


def ours_plain_loss(workload: Workload) -> Prepared:
    """Training of our model with the reconstruction's target written out: the step before the fused loss."""
    model = built(workload, mar_fast.MAR)

    def loss(workload: Workload) -> Tensor:
        mask = workload.mask
        features = model.encoder(workload.clips, mask.keep_idx)
        logits = model.classifier(features)
        visible = model.encoder_to_decoder(features).to(model.mask_token.dtype)
        pixels = model.decoder(visible, model.mask_token.flatten(), mask)
        reconstruction = patch_loss(pixels, workload.clips, mask.drop_idx.long(), workload.config)
        return sum_of_losses(logits, reconstruction, workload.target)

    return ready(workload, model, loss)


def original(workload: Workload) -> Prepared:
    """reference.MAR as the original runs it: all tubelets embedded, attention written out, float32 under autocast."""
    model = built(workload, reference.MAR, torch.float32)
    return ready(workload, model, partial(of_reference, model), autocast=True)


def plain(
    workload: Workload, *, sdpa: bool = True, autocast: bool = False, compiler: Compiler | None = None
) -> Prepared:
    """PlainMAR, in training with its losses; in inference its weights in the workload's dtype, or under autocast."""
    model = built(workload, partial(PlainMAR, sdpa=sdpa), torch.float32 if autocast else None)
    function: Any = plain_loss if workload.training else model
    run, operands = compiler(function) if compiler else function, _operands(workload)

    def call(workload: Workload) -> Tensor:
        return run(model, *_operands(workload)) if workload.training else run(*operands[:2])[0]

    return ready(workload, model, call, autocast=autocast)


def plain_frozen(workload: Workload, backend: Backend = "inductor") -> Prepared:
    """PlainMAR through compile_for_inference: what is left between this and ours is the model."""
    return frozen(built(workload, PlainMAR), _operands(workload)[:2], lambda out: out[0], backend)


def _operands(workload: Workload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return workload.clips, workload.mask.keep_idx.long(), workload.mask.drop_idx.long(), workload.target


def plain_loss(model: PlainMAR, clips: Tensor, keep_idx: Tensor, drop_idx: Tensor, target: Tensor) -> Tensor:
    """Classification and reconstruction, both in plain PyTorch."""
    logits, features = model(clips, keep_idx)
    pixels = model.pixels(features, keep_idx, drop_idx)
    return sum_of_losses(logits, patch_loss(pixels, clips, drop_idx, model.config), target)


def sum_of_losses(logits: Tensor, reconstruction: Tensor, target: Tensor) -> Tensor:
    """Of classification, and of reconstruction by its weight."""
    return F.cross_entropy(logits.float(), target) + WEIGHT * reconstruction


def providers(workload: Workload, *, compiled: bool = True) -> tuple[Provider, ...]:
    """Every way to the logits or to a step, without or with those that compile for a minute; CUDA graphs on a GPU."""
    graphs = workload.device.type == "cuda" and not workload.training
    every: list[tuple[str, Prepare, bool]] = [
        (REFERENCE, original, True),
        (BASELINE, plain, True),
        (f"{BASELINE}, CUDA graph", partial(plain_frozen, backend="graph"), graphs),
        (f"{BASELINE}, compiled", partial(one_graph, plain), compiled),
        (f"{BASELINE}, max-autotune", partial(one_graph, plain, mode="max-autotune"), compiled),
        (f"{BASELINE}, frozen", plain_frozen, compiled and not workload.training),
        ("mar_fast", ours, True),
        ("mar_fast, CUDA graph", partial(ours_compiled, backend="graph"), graphs),
        ("mar_fast, compiled", ours_compiled, compiled),
    ]
    found = (Provider(name, partial(prepare, workload)) for name, prepare, wanted in every if wanted)
    return (*found, hugging_face(workload))
