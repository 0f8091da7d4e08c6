"""dropin: models of transformers before and after `mar_fast.accelerate`: the same call, time and memory of both."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from .. import transformers_peers as theirs
from ..case import Case, RunOptions
from ..workloads import Workload
from .common import case_name, least_work, model_case, model_config


def cases(options: RunOptions) -> Iterator[Case]:
    """A classifier's logits, dense and at 50 %; a step of dense fine-tuning; a step of pre-training at 50 %."""
    for size in options.sizes:
        for batch in options.batches if options.on_gpu else options.batches[:1]:
            with_compiled = options.on_gpu or not options.quick
            for keep in (1.0, 0.5):
                yield inference_case(options, size, batch, keep, with_compiled)
            if not options.quick:
                yield step_case(options, size, batch, 1.0, with_compiled)
                yield step_case(options, size, batch, 0.5, with_compiled)


def inference_case(options: RunOptions, size: str, batch: int, keep: float, with_compiled: bool) -> Case:
    """A classifier's logits, from all tokens or from those that ``mar_fast.accelerate(..., keep=...)`` keeps."""
    config = replace(model_config(size, 1.0), mask_ratio=1 - keep)
    workload = Workload(config, batch, options.device, options.dtype)
    return model_case(
        "dropin",
        f"classifier, {case_name(size, batch)}",
        workload,
        theirs.inference_providers(workload, with_compiled=with_compiled),
        expected=partial(theirs.expected, workload, theirs.dense_logits if keep == 1 else theirs.masked_logits),
        baseline=theirs.BASELINE,
    )


def step_case(options: RunOptions, size: str, batch: int, keep: float, with_compiled: bool) -> Case:
    """Forward, backward, AdamW: fine-tuning on all tokens, or pre-training where some are masked."""
    config = model_config(size, keep, decoder=keep < 1)
    workload = Workload(config, batch, options.device, options.dtype, training=True)
    kind, what, call, trained = theirs.CLASSIFICATION, "fine-tuning", theirs.classification_loss, config
    if keep < 1:
        kind, what, call, trained = (
            theirs.PRE_TRAINING,
            "pre-training",
            theirs.reconstruction_loss,
            replace(config, classifier=None),
        )
    return model_case(
        "dropin",
        f"{what}, {case_name(size, batch)}",
        workload,
        theirs.step_providers(workload, kind, with_compiled=with_compiled),
        expected=partial(theirs.expected, workload, call, kind),
        baseline=theirs.BASELINE,
        floor=least_work(replace(workload, config=trained)),
    )
