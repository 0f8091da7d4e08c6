"""training: a whole step, forward, backward and AdamW, classification and reconstruction, by every peer."""

import functools
from collections.abc import Iterator

from mar_fast import cost

from ..case import Case, Floor, Setting
from ..jobs import Job, truth
from ..peers import YARDSTICK, training_candidates
from .common import ABSOLUTE_BOUND, case_name, model_config


def cases(setting: Setting) -> Iterator[Case]:
    """Every size and batch at 50 % and, where time is not short, 75 % masking."""
    for size in setting.sizes:
        for batch in setting.batches if setting.on_gpu else setting.batches[:1]:
            for keep in (0.5,) if setting.quick else (0.5, 0.25):
                compiled = setting.on_gpu or (not setting.quick and keep == 0.5)
                yield training_case(setting, size, batch, keep, compiled)


def training_case(setting: Setting, size: str, batch: int, keep: float, compiled: bool) -> Case:
    """One size, batch and keep ratio."""
    job = Job(model_config(size, keep, decoder=True), batch, setting.device, setting.dtype, training=True)
    return Case(
        "training", case_name(size, batch), "training step", keep, setting.dtype, batch,
        training_candidates(job, compiled=compiled), functools.partial(truth, job),
        ABSOLUTE_BOUND[setting.dtype], YARDSTICK, step_floor(job),
    )  # fmt: skip


def step_floor(job: Job) -> Floor:
    """Forward and backward, and the optimizer's reading and writing: gradient, weight and two moments in float32."""
    count = cost.count(
        job.config, batch=job.batch, reconstruct=job.config.decoder_depth > 0, training=True,
        bytes_per_value=job.dtype.itemsize, bytes_per_pixel=4,
    )  # fmt: skip
    optimizer = 7 * 4 * count.parameters
    return Floor(
        count.multiply_adds, count.bytes_moved + optimizer,
        lambda flops, bandwidth: count.floor_seconds(flops, bandwidth) + optimizer / bandwidth,
    )  # fmt: skip
