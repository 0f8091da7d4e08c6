"""extraction: features of windows that slide over a film, against a loop that reads each window anew.

The first case reads the first windows of the film and runs no model. Others take a few through the encoder: ours, the
loop with the same model and mask, and the loop as it is copied from examples, dense, with transformers. The last ones
compute the features of one batch in each dtype, without reading.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mar_fast
from mar_fast import machine, reference
from mar_fast.data import read_clip, sample_clip
from mar_fast.data.video import open_film
from mar_fast.data.windows import Sliding, Window, film_windows
from mar_fast.eval import extract
from mar_fast.eval.extraction import Extractor

from .. import transformers_peers
from ..case import Case, Prepared, Provider, RunOptions
from ..workloads import Workload
from .common import LETTERS, TOLERANCE, model_config

OURS, LOOP, COPIED = "mar_fast", "each window anew", "each window anew, transformers, dense"
STRIDE = FRAME_STRIDE = 4
READ = 24  # windows of the case without a model
WINDOWS = 8  # of the cases with a model, which take one batch


def cases(options: RunOptions) -> Iterator[Case]:
    """Reading alone; then half of the tokens, and all of them."""
    size = options.sizes[0]
    yield reading_case(options, size)
    kept = (0.5,) if options.quick else (0.5, 1.0)
    for keep in kept:
        yield features_case(options, size, keep)
    for keep in kept:
        yield dtype_case(options, size, keep)


def dtype_case(options: RunOptions, size: str, keep: float) -> Case:
    """Pooled features of one batch of windows, in float32 and in 16 bits."""
    config = replace(model_config(size, 1.0), mask_ratio=1 - keep)
    workload = Workload(config, WINDOWS, options.device, torch.float32)
    shape = (WINDOWS, config.num_frames, *config.image_size, config.channels)

    @cache
    def pixels() -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def prepared(dtype: torch.dtype) -> Prepared:
        model = mar_fast.MAR(config).eval().to(options.device)
        model.load_state_dict(workload.weights)
        take = Extractor(model.to(dtype), batch=WINDOWS)
        windows = [Window(number, (0, 0), None, list(clip)) for number, clip in enumerate(pixels().numpy())]
        return Prepared(lambda: take(windows), lambda: [take(windows)[config.depth][:1]])

    @torch.inference_mode()
    def exact() -> list[Tensor]:
        plain = reference.MAR(config).double().eval().to(options.device)
        plain.load_state_dict(workload.weights)
        mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1, 1) for value in (config.mean, config.std))
        clips = (pixels()[:1].permute(0, 4, 1, 2, 3).double() / 255 - mean) / std
        return [plain(clips.to(options.device)).features.mean(1).cpu()]

    return Case(
        suite="extraction",
        name=f"ViT-{LETTERS[size]}, {WINDOWS} windows, by dtype",
        mode="inference",
        x=keep,
        dtype=torch.float32,
        clips=WINDOWS,
        providers=tuple(
            Provider(f"{OURS}, {name}", partial(prepared, dtype), expected=exact)
            for name, dtype in machine.DTYPES.items()
        ),
        expected=exact,
        tolerance=TOLERANCE[torch.bfloat16],
        baseline=f"{OURS}, fp32",
    )


def _film(options: RunOptions) -> Path:
    return Path(options.clip) if options.clip else sample_clip()


def reading_case(options: RunOptions, size: str) -> Case:
    """Windows of a film, as a model would get them."""
    path, config = _film(options), model_config(size, 1.0)
    sliding = Sliding(config.num_frames, STRIDE, FRAME_STRIDE, tail="drop")
    with open_film(path) as film:
        count = min(READ, sliding.count(film.total))

    def ours() -> Iterator[Tensor]:
        with open_film(path) as film:
            for window in islice(film_windows(film, sliding, config.image_size)[1], count):
                yield torch.from_numpy(np.stack(window.pictures)).permute(3, 0, 1, 2)

    def prepared(windows: Callable[[], Iterator[Tensor]]) -> Prepared:
        return Prepared(lambda: [None for _ in windows()], lambda: [torch.stack(list(windows()))])

    loop = partial(_anew, path, config, range(count))
    return Case(
        suite="extraction",
        name=f"reading {path.name}",
        mode="inference",
        x=0.0,
        dtype=options.dtype,
        clips=count,
        providers=(Provider(LOOP, lambda: prepared(loop)), Provider(OURS, lambda: prepared(ours))),
        expected=lambda: [torch.stack(list(loop()))],
        tolerance=0.0,
        baseline=LOOP,
        share=0.5,
    )


def _anew(path: Path, config: mar_fast.MARConfig, numbers: range) -> Iterator[Tensor]:
    """Windows (C, T, H, W) uint8, each by opening the film, seeking and decoding."""
    how: dict[str, Any] = dict(size=config.image_size, stride=FRAME_STRIDE)
    return (read_clip(path, config.num_frames, start=STRIDE * number, **how) for number in numbers)


def features_case(options: RunOptions, size: str, keep: float) -> Case:
    """Pooled features of a few windows, from the film on."""
    path, config = _film(options), replace(model_config(size, 1.0), mask_ratio=1 - keep)
    workload = Workload(config, 1, options.device, options.dtype)

    @cache
    def model() -> mar_fast.MAR:
        fast = mar_fast.MAR(config).eval().to(options.device)
        fast.load_state_dict(workload.weights)
        return fast.to(options.dtype)

    @cache
    def peer() -> Any:
        built: Any = transformers_peers.build(workload).to(options.dtype)
        return built.videomae

    windows = partial(_anew, path, config, range(WINDOWS))

    @torch.inference_mode()
    def loop() -> Tensor:
        found = [model()(window[None].to(options.device), reconstruct=False).features for window in windows()]
        return torch.cat([tokens.float().mean(1) for tokens in found])

    def ours() -> Tensor:
        found = extract(model(), path, stride=STRIDE, frame_stride=FRAME_STRIDE, batch=WINDOWS, tail="drop")
        return torch.stack([window.layers[config.depth] for window in islice(found, WINDOWS)])

    def normalised(window: Tensor, dtype: torch.dtype) -> Tensor:
        """(1, T, C, H, W), as transformers takes it."""
        mean, std = (torch.tensor(value, dtype=dtype).view(3, 1, 1, 1) for value in (config.mean, config.std))
        return ((window.to(dtype) / 255 - mean) / std)[None].transpose(1, 2).to(options.device)

    @torch.inference_mode()
    def copied(model: Any, dtype: torch.dtype) -> Tensor:
        found = [model(normalised(window, dtype)).last_hidden_state for window in windows()]
        return torch.cat([tokens.mean(1) for tokens in found])

    @torch.inference_mode()
    def exact() -> list[Tensor]:
        plain = reference.MAR(config).double().eval().to(options.device)
        plain.load_state_dict(workload.weights)
        clips = (normalised(window, torch.float64).transpose(1, 2) for window in windows())
        return [torch.cat([plain(clip).features.mean(1) for clip in clips])]

    def prepared(run: Callable[[], Tensor], *needed: Callable[[], object]) -> Prepared:
        for make in needed:
            make()
        return Prepared(run, lambda: [run()])

    return Case(
        suite="extraction",
        name=f"ViT-{LETTERS[size]}, {path.name}",
        mode="inference",
        x=keep,
        dtype=options.dtype,
        clips=WINDOWS,
        providers=(
            Provider(LOOP, lambda: prepared(loop, model)),
            Provider(OURS, lambda: prepared(ours, model)),
            Provider(
                COPIED,
                lambda: prepared(lambda: copied(peer(), options.dtype), peer),
                expected=lambda: [copied(transformers_peers.build(workload).double().videomae, torch.float64)],
            ),
        ),
        expected=exact,
        tolerance=TOLERANCE[options.dtype],
        baseline=LOOP,
    )
