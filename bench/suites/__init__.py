"""The suites by name: what each measures, as cases, and what it concludes from them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..case import Case, Setting
from ..runner import Finding, Outcome, findings_text
from . import dropin, encoder, flops, kernels, pipeline, scaling, training, waterfall


@dataclass(frozen=True)
class Suite:
    """A suite: its cases, one after the other, findings from all of their outcomes together, and these in words.

    ``needs`` is a package without which it has nothing to measure.
    """

    about: str
    cases: Callable[[Setting], Iterator[Case]]
    conclude: Callable[[Setting, list[Outcome]], list[Finding]] = lambda setting, outcomes: []
    describe: Callable[[list[Finding]], str] = findings_text
    needs: str = ""


SUITES = {
    "flops": Suite(
        "multiply-adds and parameters against the paper; nothing is run", flops.cases, flops.conclude, flops.table
    ),
    "encoder": Suite("clips to logits, against every peer", encoder.cases),
    "training": Suite("forward, backward and optimizer, against every peer", training.cases),
    "waterfall": Suite("from the dense model to ours, one step at a time", waterfall.cases),
    "dropin": Suite("models of transformers, before and after mar_fast.accelerate", dropin.cases, needs="transformers"),
    "kernels": Suite("each op against its peers, forward and backward", kernels.cases),
    "scaling": Suite("cost against tokens, batch, frames, resolution, keep ratio", scaling.cases, scaling.conclude),
    "pipeline": Suite("video file to logits: bound by data or by compute?", pipeline.cases, pipeline.conclude),
}
