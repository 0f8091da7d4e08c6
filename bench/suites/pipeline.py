"""pipeline: a video file to logits. Which takes longer, decoding a clip or classifying it, and how long do both take?

Decoding and the model are each timed alone, and then one after the other. A loader that decodes the next clip while the
model works on this one runs at the pace of the slower of the two, which the verdict names.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import mar_fast
from mar_fast.data import read_clip

from .. import records
from ..case import Case, Prepared, Provider, RunOptions
from ..records import Record
from ..workloads import Workload, built, expected
from .common import LETTERS, film, model_case, model_config

DECODE, MODEL, BOTH = "decode", "mar_fast", "mar_fast, decode and model"


def cases(options: RunOptions) -> Iterator[Case]:
    """50 % and 75 % masking, and the dense model, on one clip."""
    size = options.sizes[0]
    for keep in (0.5,) if options.quick else (0.5, 0.25, 1.0):
        yield pipeline_case(options, size, keep)


def pipeline_case(options: RunOptions, size: str, keep: float) -> Case:
    """One keep ratio: decoding, the model on the decoded uint8 clip, and both."""
    path, config = film(options), model_config(size, keep)
    workload = Workload(config, 1, options.device, options.dtype)

    def read() -> Tensor:
        return read_clip(path, config.num_frames, size=config.image_size)[None]

    model = functools.cache(partial(built, workload, mar_fast.MAR))
    decoded = functools.cache(lambda: read().to(options.device))

    @torch.inference_mode()
    def classify(clip: Callable[[], Tensor]) -> Tensor:
        return model()(clip().to(options.device)).logits

    def exact() -> list[Tensor]:
        with_clip = workload.few()
        vars(with_clip)["clips"] = decoded()
        return expected(with_clip)

    def prepared(clip: Callable[[], Tensor]) -> Prepared:
        model(), decoded()  # outside of inference mode
        return Prepared(lambda: classify(clip), lambda: [classify(clip)])

    providers = (
        Provider(DECODE, lambda: Prepared(read, list), checked=False),
        Provider(MODEL, partial(prepared, decoded)),
        Provider(BOTH, partial(prepared, read)),
    )
    name = f"ViT-{LETTERS[size]}, {path.name}"
    return model_case("pipeline", name, workload, providers, expected=exact, baseline=DECODE, floor=None, share=0.5)


def conclude(options: RunOptions, found: list[Record]) -> list[Record]:
    """The share of decoding in the time of both, by keep ratio; the note says what bounds the pipeline."""
    shares = []
    for own in records.grouped(found, lambda record: record.workload).values():
        times = {record.provider: record for record in own if record.metric == "time"}
        if DECODE not in times or MODEL not in times:
            continue
        decode, model = times[DECODE].p50, times[MODEL].p50
        verdict = "data-bound" if decode > model else "compute-bound"
        note = f"{verdict}: decoding takes {decode / model:.2f} of the model's time"
        share = decode / (decode + model)
        shares.append(replace(times[DECODE], metric="share", unit="1", p20=share, p50=share, p80=share, n=1, note=note))
    return shares
