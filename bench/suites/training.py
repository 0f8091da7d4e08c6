"""training: a whole step, forward, backward and AdamW, classification and reconstruction, by every peer."""

from collections.abc import Iterator

from ..case import Case, RunOptions
from ..peers import providers
from ..workloads import Workload
from .common import case_name, model_case, model_config


def cases(options: RunOptions) -> Iterator[Case]:
    """Every size and batch at 50 % masking, and at 75 % unless the run is quick."""
    for size in options.sizes:
        for batch in options.batches if options.on_gpu else options.batches[:1]:
            for keep in (0.5,) if options.quick else (0.5, 0.25):
                compiled = options.on_gpu or (not options.quick and keep == 0.5)
                yield training_case(options, size, batch, keep, compiled)


def training_case(options: RunOptions, size: str, batch: int, keep: float, compiled: bool) -> Case:
    """One size, batch and keep ratio."""
    config = model_config(size, keep, decoder=True)
    workload = Workload(config, batch, options.device, options.dtype, training=True)
    return model_case("training", case_name(size, batch), workload, providers(workload, compiled=compiled))
