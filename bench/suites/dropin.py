"""dropin: models of transformers before and after `mar_fast.accelerate`: the same call, time and memory of both."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from .. import transformers_peers as theirs
from ..case import Case, Provider, RunOptions
from ..records import OURS
from ..workloads import Workload
from .common import case_name, model_case, model_config


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
    """A classifier's logits, from all tokens or from those that ``mar_fast.accelerate(..., keep=...)`` keeps.

    transformers' own classifier takes no mask: for logits from visible tokens the model's parts are called.
    """
    config = replace(model_config(size, 1.0), mask_ratio=1 - keep)
    workload = Workload(config, batch, options.device, options.dtype)
    dense, masked, ours = theirs.dense_logits, theirs.masked_logits, partial(theirs.accelerated, keep=keep)
    name, call = (theirs.BASELINE, dense) if keep == 1 else (theirs.BY_HAND, masked)
    of_dense = None if keep == 1 else partial(theirs.expected, workload, dense)
    every = [
        (Provider(theirs.BASELINE, partial(theirs.eager, workload, dense), expected=of_dense), True),
        (Provider(theirs.BY_HAND, partial(theirs.eager, workload, masked)), keep < 1),
        (Provider(f"{name}, compiled", partial(theirs.compiled, workload, call)), with_compiled),
        (Provider(OURS, partial(theirs.eager, workload, dense, change=ours)), True),
        (Provider(f"{OURS}, compiled", partial(theirs.accelerated_and_compiled, workload, ours)), with_compiled),
    ]
    return model_case(
        "dropin",
        f"classifier, {case_name(size, batch)}",
        workload,
        tuple(provider for provider, wanted in every if wanted),
        expected=partial(theirs.expected, workload, call),
        baseline=theirs.BASELINE,
    )


def step_case(options: RunOptions, size: str, batch: int, keep: float, with_compiled: bool) -> Case:
    """Forward, backward, AdamW: fine-tuning on all tokens, or pre-training where some are masked."""
    config = model_config(size, keep, decoder=keep < 1)
    what, call, ours = "fine-tuning", theirs.classification_loss, theirs.accelerated
    if keep < 1:
        config = replace(config, classifier=None)
        what, call, ours = "pre-training", theirs.reconstruction_loss, partial(ours, num_visible=config.num_visible)
    workload = Workload(config, batch, options.device, options.dtype, training=True)
    ways = {"": theirs.eager, ", compiled": theirs.compiled} if with_compiled else {"": theirs.eager}
    return model_case(
        "dropin",
        f"{what}, {case_name(size, batch)}",
        workload,
        tuple(
            Provider(name + how, partial(way, workload, call, change))
            for name, change in ((theirs.BASELINE, None), (OURS, ours))
            for how, way in ways.items()
        ),
        expected=partial(theirs.expected, workload, call),
        baseline=theirs.BASELINE,
    )
