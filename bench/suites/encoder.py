"""encoder: clips to logits, forward only, by every peer: latency at batch 1, throughput at larger ones."""

import functools
from collections.abc import Iterator

from mar_fast import cost

from ..case import Case, Floor, Setting
from ..jobs import Job, truth
from ..peers import YARDSTICK, inference_candidates
from .common import ABSOLUTE_BOUND, KEPT, case_name, model_config


def cases(setting: Setting) -> Iterator[Case]:
    """Every size, batch and keep ratio on a GPU. On a CPU larger batches, which gain little there, at 50 % only."""
    for size in setting.sizes:
        for batch in setting.batches:
            latency = batch == setting.batches[0]
            kept = KEPT if setting.on_gpu or latency else KEPT[:1]
            for keep in KEPT[:2] if setting.quick else kept:
                # Compiling takes far longer than measuring there: at the first batch and not for the dense model.
                compiled = setting.on_gpu or (not setting.quick and keep < 1 and latency)
                yield inference_case(setting, size, batch, keep, compiled)


def inference_case(setting: Setting, size: str, batch: int, keep: float, compiled: bool) -> Case:
    """One size, batch and keep ratio, the dense model where everything is kept."""
    job = Job(model_config(size, keep), batch, setting.device, setting.dtype)
    return Case(
        "encoder", case_name(size, batch), "inference", keep, setting.dtype, batch,
        inference_candidates(job, compiled=compiled), functools.partial(truth, job),
        ABSOLUTE_BOUND[setting.dtype], YARDSTICK, inference_floor(job),
    )  # fmt: skip


def inference_floor(job: Job) -> Floor:
    """The least work of a forward pass over float32 clips."""
    count = cost.count(job.config, batch=job.batch, bytes_per_value=job.dtype.itemsize, bytes_per_pixel=4)
    return Floor(count.multiply_adds, count.bytes_moved, count.floor_seconds)
