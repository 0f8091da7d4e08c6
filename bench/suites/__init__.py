"""The suites by name: the cases that each measures, and the conclusions it draws from them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..case import Case, RunOptions
from ..records import Record
from . import dropin, extraction, flops, kernels, models, pipeline, scaling, waterfall


@dataclass(frozen=True)
class Suite:
    """Cases to measure in turn, and the conclusions from all their records.

    ``needs`` is a package without which there is nothing to measure.
    """

    about: str
    cases: Callable[[RunOptions], Iterator[Case]]
    conclude: Callable[[RunOptions, list[Record]], list[Record]] = lambda *_: []
    needs: str = ""


SUITES = {
    "flops": Suite("multiply-adds and parameters against the paper; nothing is run", flops.cases, flops.conclude),
    "encoder": Suite("clips to logits, against every peer", models.encoder_cases),
    "training": Suite("forward, backward and optimizer, against every peer", models.training_cases),
    "waterfall": Suite("from the dense model to ours, one step at a time", waterfall.cases),
    "dropin": Suite("models of transformers, before and after mar_fast.accelerate", dropin.cases, needs="transformers"),
    "kernels": Suite("each op against its peers, forward and backward", kernels.cases),
    "scaling": Suite("cost against tokens, batch, frames, resolution, keep ratio", scaling.cases, scaling.conclude),
    "pipeline": Suite("video file to logits: bound by data or by compute?", pipeline.cases, pipeline.conclude),
    "extraction": Suite("sliding windows of a film to features, against reading each window anew", extraction.cases),
}
