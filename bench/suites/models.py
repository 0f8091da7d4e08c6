"""encoder and training: the whole model by every peer, from clips to logits, or a step with backward and AdamW."""

from collections.abc import Iterator

from ..case import Case, RunOptions
from ..peers import providers
from ..workloads import Workload
from .common import KEPT, case_name, model_case, model_config


def encoder_cases(options: RunOptions) -> Iterator[Case]:
    """Every size, batch and keep ratio on a GPU: latency at batch 1, throughput at larger ones.

    On a CPU larger batches gain little, and are only run at 50 %.
    """
    for size in options.sizes:
        for batch in options.batches:
            latency = batch == options.batches[0]
            kept = KEPT if options.on_gpu or latency else KEPT[:1]
            for keep in KEPT[:2] if options.quick else kept:
                # On a CPU compiling takes far longer than measuring: only at the first batch, not for the dense model.
                compiled = options.on_gpu or (not options.quick and keep < 1 and latency)
                yield by_every_peer(options, size, batch, keep, compiled)


def training_cases(options: RunOptions) -> Iterator[Case]:
    """Every size and batch at 50 % masking, and at 75 % unless the run is quick."""
    for size in options.sizes:
        for batch in options.batches if options.on_gpu else options.batches[:1]:
            for keep in (0.5,) if options.quick else (0.5, 0.25):
                compiled = options.on_gpu or (not options.quick and keep == 0.5)
                yield by_every_peer(options, size, batch, keep, compiled, training=True)


def by_every_peer(
    options: RunOptions, size: str, batch: int, keep: float, compiled: bool, *, training: bool = False
) -> Case:
    """One size, batch and keep ratio; the dense model if all tokens are kept."""
    config = model_config(size, keep, decoder=training)
    workload = Workload(config, batch, options.device, options.dtype, training)
    suite = "training" if training else "encoder"
    return model_case(suite, case_name(size, batch), workload, providers(workload, compiled=compiled))
