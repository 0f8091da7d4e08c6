"""extract: features of the windows that slide over a film or a stream, from any layers of the encoder."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import MAR, MARConfig, TokenMask, masking
from ..data.decoding import Source
from ..data.windows import Sliding, Tail, Window, read_ahead, stream_windows
from ..kernels import checks
from . import ensemble


class WindowFeatures(NamedTuple):
    """What a window gives.

    Attributes:
        number, frames, seconds: As in `Window`.
        layers: By the number of the block, (D,) or (N, D), on the CPU.
    """

    number: int
    frames: tuple[int, int]
    seconds: tuple[float, float] | None
    layers: dict[int, Tensor]


class Extractor:
    """A model as a function from windows to features, that always runs on batches of one size.

    A batch that is not full is padded. So a window gives the same bits whatever the other windows of its batch are, and
    whichever is its own position there: matrix products choose their algorithm by the number of rows.

    Args:
        model: In eval mode.
        layers: Numbers of blocks from 1; the features are the residual stream after each, and after the last block the
            encoder's output, with its final norm if it has one. None is the last block.
        keep: Share of visible tokens, by cell running in the test form; 1 is dense. None is the model's own.
        complementary: Average over the complementary masks that together see every token equally often.
        pooled: The mean over tokens, (D,) float32. Otherwise every visible token, (N, D) in the model's dtype; with
            complementary masks every token of the grid, (L, D), averaged where it is seen several times.
        batch: Windows in a forward pass.

    Attributes:
        keep: Share of visible tokens.
        row_shape: Shape of one window's features.
        dtype: Of the features.
        token_idx: Flat indices of the tokens that are visible, where rows are tokens; None where these are all.

    Raises:
        ValueError: an argument does not fit the model.
    """

    def __init__(
        self,
        model: MAR,
        *,
        layers: Sequence[int] | None = None,
        keep: float | None = None,
        complementary: bool = False,
        pooled: bool = True,
        batch: int = 8,
    ) -> None:
        config = model.config
        if model.training:
            raise checks.bad("model", "one in training mode", "model.eval()")
        checks.whole("batch", batch)
        if keep is not None and not 0 < keep <= 1:
            raise checks.bad("keep", keep, "a share above 0, up to 1, or None")
        numbers = (config.depth,) if layers is None else tuple(layers)
        known = range(1, config.depth + 1)
        if not numbers or len(set(numbers)) < len(numbers) or not all(number in known for number in numbers):
            raise checks.bad("layers", repr(layers), f"different numbers of blocks, 1 to {config.depth}")
        self.model, self.batch, self.layers, self.pooled = model, batch, tuple(sorted(numbers)), pooled
        weight = next(model.parameters())
        self.device = weight.device
        ratio = config.mask_ratio if keep is None else 1 - keep
        self.keep = 1 - ratio
        masks = _masks(config, ratio, complementary)
        self._keep = [mask.keep_idx.expand(batch, -1).contiguous().to(self.device) for mask in masks]
        self._times = len(masks)
        self.row_shape: tuple[int, ...] = (config.embed_dim,)
        self.dtype, self.token_idx = torch.float32, None
        if not pooled:
            rows = masks[0].num_visible if len(masks) == 1 else config.num_tokens
            self.row_shape, self.dtype = (rows, config.embed_dim), weight.dtype
            # How often each token is seen, k where k / n of them are visible in each of n masks.
            self._times = max(1, sum(mask.num_visible for mask in masks) // config.num_tokens)
            if rows < config.num_tokens:
                self.token_idx = masks[0].keep_idx[0].tolist()

    def __call__(self, windows: Sequence[Window]) -> dict[int, Tensor]:
        """Features (n, *row_shape) of n windows on the CPU, for each layer; n is at most the batch."""
        return self.compute(len(windows), *self.gather(windows))

    def gather(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """The pictures of a batch of windows, each once, (F, H, W, 3) uint8; and which ones they show, (batch, T)."""
        images = {id(picture): picture for window in windows for picture in window.pictures}
        index = {key: number for number, key in enumerate(images)}
        rows = [[index[id(picture)] for picture in window.pictures] for window in windows]
        rows += rows[-1:] * (self.batch - len(rows))
        return torch.from_numpy(np.stack(list(images.values()))), torch.tensor(rows)

    @torch.inference_mode()
    def compute(self, count: int, pictures: Tensor, shown: Tensor) -> dict[int, Tensor]:
        """Features of the first ``count`` windows of a batch that `gather` made."""
        clips = pictures.to(self.device)[shown.to(self.device)].permute(0, 4, 1, 2, 3)  # (B, 3, T, H, W)
        sums: dict[int, Tensor] = {}
        for keep_idx in self._keep:
            for number, tokens in self.model.encoder.layers(clips, keep_idx, self.layers).items():  # (B, N, D)
                if self.pooled:
                    found = tokens.float().mean(1)
                elif len(self._keep) == 1:
                    found = tokens
                else:  # tokens of the grid in float32, zero where they are not seen
                    found = tokens.new_zeros(self.batch, *self.row_shape, dtype=torch.float32)
                    found[:, keep_idx[0].long()] = tokens.float()
                sums[number] = sums[number] + found if number in sums else found
        return {number: (total / self._times)[:count].to(self.dtype).cpu() for number, total in sums.items()}


def _masks(config: MARConfig, ratio: float, complementary: bool) -> list[TokenMask]:
    """One mask over one clip, or those that complement each other."""
    if complementary and not ratio:
        raise checks.bad("complementary", True, "False, where every token is visible (keep is 1)")
    try:
        if complementary:
            return ensemble.complementary("running", 1, config.grid, ratio, cell=config.cell)
        # Without a mask the cell does not matter, and need not divide the grid.
        cell = config.cell if ratio else (1, 1, 1)
        return [masking.cell_running(1, config.grid, ratio, cell=cell, phase=0)]
    except ValueError as error:
        raise ValueError(f"keep: got {1 - ratio:g}, a share of visible tokens that is not allowed. {error}") from error


def extract(
    model: MAR,
    video: Source | Iterable[Any],
    *,
    stride: int = 4,
    frame_stride: int = 4,
    fps: float | None = None,
    tail: Tail = "repeat",
    layers: Sequence[int] | None = None,
    keep: float | None = None,
    complementary: bool = False,
    pooled: bool = True,
    batch: int = 8,
) -> Iterator[WindowFeatures]:
    """Features of the windows that slide over a video, one after the other, in memory that does not grow.

    Args:
        model: In eval mode; a window has its config's num_frames.
        video: A file, its bytes, an open binary file or a folder of pictures, of which the next windows are decoded
            while the model runs. Or a stream: an iterable of frames (H, W, 3) uint8 RGB, arrays, tensors or PyAV's, or
            of (seconds, frame). A stream is asked for a frame when it is needed; windows come out in batches, so that
            ``batch=1`` delays them least.
        stride, frame_stride, fps, tail: Which windows, as in `mar_fast.data.windows.Sliding`.
        layers, keep, complementary, pooled, batch: As in `Extractor`.

    Yields:
        The features of a window, with its frames and times.

    Raises:
        ValueError, TypeError, OSError: an argument does not fit; or, while it is read, the video is broken or, with
            tail="drop", too short.
    """
    sliding = Sliding(model.config.num_frames, stride, frame_stride, fps, tail)
    options: dict[str, Any] = dict(layers=layers, keep=keep, complementary=complementary, pooled=pooled, batch=batch)
    return _features(Extractor(model, **options), video, sliding)


def _features(extractor: Extractor, video: Source | Iterable[Any], sliding: Sliding) -> Iterator[WindowFeatures]:
    windows = _windows(video, sliding, extractor.model.config.image_size, extractor.batch)
    while batch := list(islice(windows, extractor.batch)):
        found = extractor(batch)
        for row, window in enumerate(batch):
            yield WindowFeatures(*window[:3], {number: features[row] for number, features in found.items()})


def _windows(video: Any, sliding: Sliding, size: tuple[int, int], batch: int) -> Iterator[Window]:
    if not isinstance(video, str | os.PathLike | bytes) and not hasattr(video, "read"):
        yield from stream_windows(video, sliding, size)
        return
    for _, report in read_ahead([video], sliding, size, workers=1, depth=2 * batch):
        if isinstance(report, Exception):
            raise report
        if isinstance(report, Window):
            yield report
