"""waterfall: from the dense model as one finds it to ours, a step at a time, each with its error and memory.

All steps of a case are timed in turn. Only the first one classifies from all tokens.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

from ..case import Candidate, Case, Prepared, Setting
from ..jobs import Job, truth
from ..peers import (
    original,
    original_training,
    ours,
    ours_compiled,
    ours_training,
    ours_training_compiled,
    ours_training_plain_loss,
    plain,
    plain_training,
)
from .common import ABSOLUTE_BOUND, case_name, model_config
from .encoder import inference_floor
from .training import step_floor

Step = tuple[str, Callable[[Job], Prepared]]
INFERENCE: tuple[Step, ...] = (
    ("masked", original),
    ("visible-only embedding", functools.partial(plain, sdpa=False, autocast=True)),
    ("SDPA", functools.partial(plain, autocast=True)),
    ("low-precision weights", plain),
    ("our ops", ours),
    ("compiled", ours_compiled),
)
TRAINING: tuple[Step, ...] = (
    ("masked", original_training),
    ("visible-only embedding, dropped-only head", functools.partial(plain_training, sdpa=False)),
    ("SDPA", plain_training),
    ("our ops", ours_training_plain_loss),
    ("fused loss", ours_training),
    ("compiled", ours_training_compiled),
)
FIRST = "dense, eager"


def cases(setting: Setting) -> Iterator[Case]:
    """Inference and training at 50 % masking; a quick run leaves training out, and does not compile."""
    size, batch = setting.sizes[0], setting.batches[-1] if setting.on_gpu else setting.batches[0]
    for training, steps in ((False, INFERENCE),) if setting.quick else ((False, INFERENCE), (True, TRAINING)):
        masked = Job(model_config(size, 0.5, decoder=training), batch, setting.device, setting.dtype, training)
        dense = replace(masked, config=model_config(size, 1.0))
        first = original_training if training else original
        candidates = [Candidate(FIRST, functools.partial(first, dense), functools.partial(truth, dense), x=0)]
        for number, (name, step) in enumerate(steps[:-1] if setting.quick else steps, 1):
            candidates.append(Candidate(name, functools.partial(step, masked), x=number))
        yield Case(
            "waterfall", f"{case_name(size, batch)}, 50 % masked", "training step" if training else "inference", 0,
            setting.dtype, batch, tuple(candidates), functools.partial(truth, masked), ABSOLUTE_BOUND[setting.dtype],
            "masked", step_floor(masked) if training else inference_floor(masked), FIRST,
        )  # fmt: skip
