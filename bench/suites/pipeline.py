"""pipeline: a video file to logits. What takes longer, decoding a clip or classifying it, and what is both together?

Decoding and the model are timed alone and one after the other. A loader that decodes the next clip while the model
works on this one runs at the pace of the slower of the two: the verdict is that one.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import mar_fast
from mar_fast.data import sample_clip, video

from ..case import Candidate, Case, Prepared, Setting
from ..jobs import Job, truth
from ..runner import Finding, Outcome
from .common import ABSOLUTE_BOUND, LETTERS, model_config

DECODE, MODEL, BOTH = "decode", "mar_fast", "mar_fast, decode and model"


def cases(setting: Setting) -> Iterator[Case]:
    """50 % and 75 % masking, and the dense model, on one clip."""
    size = setting.sizes[0]
    for keep in (0.5,) if setting.quick else (0.5, 0.25, 1.0):
        yield pipeline_case(setting, size, keep)


def pipeline_case(setting: Setting, size: str, keep: float) -> Case:
    """One keep ratio: decoding, the model on the decoded uint8 clip, and both."""
    path = Path(setting.clip) if setting.clip else sample_clip()
    config = model_config(size, keep)
    job = Job(config, 1, setting.device, setting.dtype)

    def read() -> Tensor:
        return video.read_clip(path, config.num_frames, size=config.image_size)

    @functools.cache
    def decoded() -> Tensor:
        return read()[None].to(setting.device)

    @functools.cache
    def model() -> torch.nn.Module:
        fast = mar_fast.MAR(config).eval().to(setting.device)
        fast.load_state_dict(job.weights)
        return fast.to(setting.dtype)

    @torch.inference_mode()
    def classify(clip: Tensor) -> Tensor:
        return model()(clip.to(setting.device)).logits

    def exact() -> list[Tensor]:
        mean, std = (torch.tensor(value).view(3, 1, 1, 1) for value in (config.mean, config.std))
        with_clip = job.few()
        vars(with_clip)["clips"] = ((read()[None].double() / 255 - mean) / std).to(setting.device)
        return truth(with_clip)

    def prepared(run: functools.partial[Tensor]) -> Prepared:
        model(), decoded()
        return Prepared(run, lambda: [run()])

    return Case(
        "pipeline", f"ViT-{LETTERS[size]}, {path.name}", "inference", keep, setting.dtype, 1,
        (
            Candidate(DECODE, lambda: Prepared(read, list), checked=False),
            Candidate(MODEL, lambda: prepared(functools.partial(lambda: classify(decoded())))),
            Candidate(BOTH, lambda: prepared(functools.partial(lambda: classify(read()[None])))),
        ),
        exact, ABSOLUTE_BOUND[setting.dtype], baseline=BOTH, share=0.5,
    )  # fmt: skip


def conclude(setting: Setting, outcomes: list[Outcome]) -> list[Finding]:
    """For each keep ratio the share of decoding in both together, and in words what bounds the pipeline."""
    found = []
    for outcome in outcomes:
        times = {name: result.time for name in (DECODE, MODEL) if (result := outcome.of(name)) is not None}
        decode, model = times.get(DECODE), times.get(MODEL)
        if decode is None or model is None:
            continue
        verdict = "data-bound" if decode.p50 > model.p50 else "compute-bound"
        note = f"{verdict}: decoding takes {decode.p50 / model.p50:.2f} of the model's time"
        case = outcome.case
        found.append(
            Finding(case.name, DECODE, "share", "1", decode.p50 / (decode.p50 + model.p50), case.x, case.mode,
                    case.dtype_name, note)
        )  # fmt: skip
    return found
