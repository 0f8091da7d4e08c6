"""dropin: models of transformers before and after `mar_fast.accelerate`: the same call, time and memory of both."""

import functools
from collections.abc import Iterator
from dataclasses import replace

from ..case import Case, Setting
from ..jobs import Job
from ..transformers_peers import (
    BEFORE,
    BY_HAND,
    CLASSIFICATION,
    PRE_TRAINING,
    before_and_after,
    classification_loss,
    dense_logits,
    masked_logits,
    reconstruction_loss,
    step_before_and_after,
    truth,
)
from .common import ABSOLUTE_BOUND, case_name, model_config
from .encoder import inference_floor
from .training import step_floor


def cases(setting: Setting) -> Iterator[Case]:
    """Dense and at 50 %: a classifier's logits, a step of its dense fine-tuning, and one of pre-training at 50 %."""
    for size in setting.sizes:
        for batch in setting.batches if setting.on_gpu else setting.batches[:1]:
            with_compiled = setting.on_gpu or not setting.quick
            for keep in (1.0, 0.5):
                yield inference_case(setting, size, batch, keep, with_compiled)
            if not setting.quick:
                yield step_case(setting, size, batch, 1.0, with_compiled)
                yield step_case(setting, size, batch, 0.5, with_compiled)


def inference_case(setting: Setting, size: str, batch: int, keep: float, with_compiled: bool) -> Case:
    """A classifier's logits; kept tokens are those that ``keep`` of `mar_fast.accelerate` stands for."""
    config = replace(model_config(size, 1.0), mask_ratio=1 - keep)
    job = Job(config, batch, setting.device, setting.dtype)
    call, yardstick = (dense_logits, BEFORE) if keep == 1 else (masked_logits, BY_HAND)
    return Case(
        "dropin", f"classifier, {case_name(size, batch)}", "inference", keep, setting.dtype, batch,
        before_and_after(job, with_compiled=with_compiled), functools.partial(truth, job, call),
        ABSOLUTE_BOUND[setting.dtype], yardstick, inference_floor(job),
    )  # fmt: skip


def step_case(setting: Setting, size: str, batch: int, keep: float, with_compiled: bool) -> Case:
    """Forward, backward, AdamW: fine-tuning on all tokens, or pre-training where some are masked."""
    config = model_config(size, keep, decoder=keep < 1)
    job = Job(config, batch, setting.device, setting.dtype, training=True)
    kind, what, call, trained = CLASSIFICATION, "fine-tuning", classification_loss, config
    if keep < 1:
        kind, what, call, trained = PRE_TRAINING, "pre-training", reconstruction_loss, replace(config, classifier=None)
    return Case(
        "dropin", f"{what}, {case_name(size, batch)}", "training step", keep, setting.dtype, batch,
        step_before_and_after(job, kind, with_compiled=with_compiled), functools.partial(truth, job, call, kind),
        ABSOLUTE_BOUND[setting.dtype], BEFORE, step_floor(replace(job, config=trained)),
    )  # fmt: skip
