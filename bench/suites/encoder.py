"""encoder: clips to logits, forward only, by every peer: latency at batch 1, throughput at larger ones."""

from collections.abc import Iterator

from ..case import Case, RunOptions
from ..peers import providers
from ..workloads import Workload
from .common import KEPT, case_name, model_case, model_config


def cases(options: RunOptions) -> Iterator[Case]:
    """Every size, batch and keep ratio on a GPU; on a CPU larger batches gain little, and are only run at 50 %."""
    for size in options.sizes:
        for batch in options.batches:
            latency = batch == options.batches[0]
            kept = KEPT if options.on_gpu or latency else KEPT[:1]
            for keep in KEPT[:2] if options.quick else kept:
                # On a CPU compiling takes far longer than measuring: only at the first batch, not for the dense model.
                compiled = options.on_gpu or (not options.quick and keep < 1 and latency)
                yield inference_case(options, size, batch, keep, compiled)


def inference_case(options: RunOptions, size: str, batch: int, keep: float, compiled: bool) -> Case:
    """One size, batch and keep ratio; the dense model if all tokens are kept."""
    workload = Workload(model_config(size, keep), batch, options.device, options.dtype)
    return model_case("encoder", case_name(size, batch), workload, providers(workload, compiled=compiled))
