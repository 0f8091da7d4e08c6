"""extraction: features of windows that slide over a film, against a loop that reads each window anew.

The first case reads the first windows of the film and runs no model. Others take a few through the encoder: ours, the
loop with the same model and mask, and the loop as it is copied from examples, dense, with transformers. The last ones
compute the features of one batch in each dtype, without reading.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mar_fast
from mar_fast import machine, reference
from mar_fast.data import read_clip
from mar_fast.data.video import open_film
from mar_fast.data.windows import Sliding, Window, film_windows
from mar_fast.eval import extract
from mar_fast.eval.extraction import Extractor

from .. import transformers_peers
from ..case import Case, Prepared, Provider, RunOptions
from ..workloads import Workload, built
from .common import LETTERS, TOLERANCE, film, model_case, model_config

OURS, LOOP, COPIED = "mar_fast", "each window anew", "each window anew, transformers, dense"
STRIDE = FRAME_STRIDE = 4
READ = 24  # windows of the case without a model
WINDOWS = 8  # of the cases with a model, which take one batch


def cases(options: RunOptions) -> Iterator[Case]:
    """Reading alone; then half of the tokens, and all of them."""
    size = options.sizes[0]
    yield reading_case(options, size)
    kept = (0.5,) if options.quick else (0.5, 1.0)
    for make in (features_case, dtype_case):
        for keep in kept:
            yield make(options, size, keep)


def _workload(options: RunOptions, size: str, keep: float, dtype: torch.dtype) -> Workload:
    return Workload(replace(model_config(size, 1.0), mask_ratio=1 - keep), WINDOWS, options.device, dtype)


@torch.inference_mode()
def _expected(workload: Workload, windows: Callable[[], Iterable[Tensor]]) -> list[Tensor]:
    """Pooled features of windows (C, T, H, W) uint8, by the reference in float64."""
    model = built(workload, reference.MAR, torch.float64)
    clips = (window[None].to(workload.device) for window in windows())
    return [torch.cat([model(clip).features.mean(1) for clip in clips]).cpu()]


def dtype_case(options: RunOptions, size: str, keep: float) -> Case:
    """Pooled features of one batch of windows, in float32 and in 16 bits."""
    workload = _workload(options, size, keep, torch.float32)
    config = workload.config
    shape = (WINDOWS, config.num_frames, *config.image_size, config.channels)

    def pixels() -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def prepared(dtype: torch.dtype) -> Prepared:
        take = Extractor(built(workload, mar_fast.MAR, dtype), batch=WINDOWS)
        windows = [Window(number, (0, 0), None, list(clip)) for number, clip in enumerate(pixels().numpy())]
        return Prepared(lambda: take(windows), lambda: [take(windows)[config.depth][:1]])

    exact = partial(_expected, workload, lambda: pixels()[:1].permute(0, 4, 1, 2, 3))
    # Each has its own expected outputs, or 16 bits would be held to twice the error of float32, the baseline.
    providers = tuple(
        Provider(f"{OURS}, {name}", partial(prepared, dtype), expected=exact) for name, dtype in machine.DTYPES.items()
    )
    more: dict[str, Any] = dict(tolerance=TOLERANCE[torch.bfloat16], baseline=f"{OURS}, fp32", floor=None)
    name = f"ViT-{LETTERS[size]}, {WINDOWS} windows, by dtype"
    return model_case("extraction", name, workload, providers, expected=exact, **more)


def reading_case(options: RunOptions, size: str) -> Case:
    """Windows of a film, as a model would get them."""
    path, config = film(options), model_config(size, 1.0)
    sliding = Sliding(config.num_frames, STRIDE, FRAME_STRIDE, tail="drop")
    with open_film(path) as opened:
        count = min(READ, sliding.count(opened.total))

    def ours() -> Iterator[Tensor]:
        with open_film(path) as opened:
            for window in islice(film_windows(opened, sliding, config.image_size)[1], count):
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
        providers=(Provider(LOOP, partial(prepared, loop)), Provider(OURS, partial(prepared, ours))),
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
    """Pooled features of a few windows on the CPU, from the film on."""
    path, workload = film(options), _workload(options, size, keep, options.dtype)
    config = workload.config
    windows, model = partial(_anew, path, config, range(WINDOWS)), partial(built, workload, mar_fast.MAR)

    def peer(dtype: torch.dtype = options.dtype) -> Any:
        return transformers_peers.build(workload, dtype).videomae

    @torch.inference_mode()
    def loop(model: Any) -> Tensor:
        found = [model(window[None].to(options.device), reconstruct=False).features for window in windows()]
        return torch.cat([tokens.float().mean(1) for tokens in found]).cpu()

    def ours(model: Any) -> Tensor:
        found = extract(model, path, stride=STRIDE, frame_stride=FRAME_STRIDE, batch=WINDOWS, tail="drop")
        return torch.stack([window.layers[config.depth] for window in islice(found, WINDOWS)])

    @torch.inference_mode()
    def copied(model: Any) -> Tensor:
        mean, std = (torch.tensor(value, dtype=model.dtype).view(-1, 1, 1, 1) for value in (config.mean, config.std))
        clips = (((window[None].to(model.dtype) / 255 - mean) / std).transpose(1, 2) for window in windows())
        found = [model(clip.to(options.device)).last_hidden_state for clip in clips]
        return torch.cat([tokens.mean(1) for tokens in found]).cpu()

    def prepared(run: Callable[[Any], Tensor], make: Callable[[], Any]) -> Prepared:
        made = make()
        return Prepared(lambda: run(made), lambda: [run(made)])

    providers = (
        Provider(LOOP, partial(prepared, loop, model)),
        Provider(OURS, partial(prepared, ours, model)),
        Provider(COPIED, partial(prepared, copied, peer), expected=lambda: [copied(peer(torch.float64))]),
    )
    name, expected = f"ViT-{LETTERS[size]}, {path.name}", partial(_expected, workload, windows)
    return model_case("extraction", name, workload, providers, expected=expected, baseline=LOOP, floor=None)
