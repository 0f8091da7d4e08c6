"""waterfall: from the usual dense model to ours, one step at a time, with the error and memory of each.

All steps of a case are timed in turn. Only the first one classifies from all tokens.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from ..case import Case, Provider, RunOptions
from ..peers import Prepare, original, ours, ours_compiled, ours_plain_loss, plain
from ..workloads import Workload, expected
from .common import case_name, model_case, model_config

Step = tuple[str, Prepare]
FIRST = "dense, eager"
INFERENCE: tuple[Step, ...] = (
    ("masked", original),
    ("visible-only embedding", partial(plain, sdpa=False, autocast=True)),
    ("SDPA", partial(plain, autocast=True)),
    ("low-precision weights", plain),
    ("our ops", ours),
    ("compiled", ours_compiled),
)
TRAINING: tuple[Step, ...] = (
    ("masked", original),
    ("visible-only embedding, dropped-only head", partial(plain, sdpa=False)),
    ("SDPA", plain),
    ("our ops", ours_plain_loss),
    ("fused loss", ours),
    ("compiled", ours_compiled),
)


def cases(options: RunOptions) -> Iterator[Case]:
    """Inference and training at 50 % masking; a quick run leaves training out, and does not compile."""
    size, batch = options.sizes[0], options.batches[-1] if options.on_gpu else options.batches[0]
    for training, steps in ((False, INFERENCE),) if options.quick else ((False, INFERENCE), (True, TRAINING)):
        masked = Workload(model_config(size, 0.5, decoder=training), batch, options.device, options.dtype, training)
        dense = replace(masked, config=model_config(size, 1.0))
        found = [Provider(FIRST, partial(original, dense), partial(expected, dense), x=0)]
        for number, (name, step) in enumerate(steps[:-1] if options.quick else steps, 1):
            found.append(Provider(name, partial(step, masked), x=number))
        name = f"{case_name(size, batch)}, 50 % masked"
        yield model_case("waterfall", name, masked, tuple(found), baseline=FIRST, x=0)
