"""Training clips from a list of videos: each is a function of seed, epoch and its place in the list, and of no state.

So a run that is resumed reads what it would have read, whatever workers had read ahead, in whatever order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.annotations import Sample, check_samples
from ..data.framing import Image, picture, pictures
from ..data.torchcodec_video import import_decoder
from ..data.video import Decoder, Film, Sampling, open_film
from ..kernels import checks
from .augment import Box, ClipAugment
from .recipe import Recipe
from .sampler import Key

# Films whose short side is longer than that of the clip times this are resized to it as they are decoded: 320 for 224,
# as the originals store Kinetics.
SPARE_SIZE = 10 / 7
TRIES = 10  # videos tried for one item before the run ends
NO_BOX = (0, 0, 0, 0)


class Broken(NamedTuple):
    """A video that could not be read, and why."""

    path: str
    error: str


class Item(NamedTuple):
    """Clips of one video.

    Attributes:
        video: (repeats, T, H, W, C) uint8.
        label: Of the list.
        video_index: Of the video read, in the order of the list.
        boxes: (repeats, 4), what is erased.
        counts: Whether it is to be counted in a validation.
        broken: Videos that should have been read, and could not be.
    """

    video: Image
    label: int
    video_index: int
    boxes: list[Box]
    counts: bool
    broken: list[Broken]


class Batch(NamedTuple):
    """Items joined, the clips of a video side by side; B = videos x repeats.

    Attributes:
        video: (B, C, T, H, W) uint8, a view of channels-last memory.
        labels: (B,) int64.
        video_index: (B,) int64, those of the videos read.
        boxes: (B, 4) int64: top, left, height, width; `Mixing` erases them.
        counts: (B,) bool.
        broken: Of all items.
    """

    video: Tensor
    labels: Tensor
    video_index: Tensor
    boxes: Tensor
    counts: Tensor
    broken: list[Broken]


class Videos(Dataset[Item]):
    """What a run reads: items by `sampler.Key`.

    Attributes:
        paths: Of all videos, for messages.
    """

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)


class ClipDataset(Videos):
    """Clips of the videos of a list, indexed by `Key`.

    A broken video is replaced by another one in training, drawn by seed, epoch and index, so that batches stay equal
    on all processes; in validation by a black clip that does not count. Both are told in ``Item.broken``.

    Args:
        samples: The list.
        recipe: What is sampled and augmented, and the sizes of the model.
        training: Random clips, augmented. Else the clip in the middle, cropped in the centre, once.

    Raises:
        ValueError: an empty list, a label that the model does not have, a class without a video in a list to train
            on, or none of the videos found.
        ModuleNotFoundError: ``recipe.data.decoder`` is torchcodec, and it is not installed.
    """

    def __init__(self, samples: Sequence[Sample], recipe: Recipe, *, training: bool = True) -> None:
        config = recipe.config()
        classes = config.num_classes if recipe.task == "finetune" else None
        if not samples:
            raise checks.bad("list", "no video", "at least one")
        check_samples(samples, classes)
        if classes is not None and training:
            missing = sorted(set(range(classes)) - {sample.label for sample in samples})
            if missing:
                got = f"no video of {len(missing)} of {classes} classes, the first {missing[0]}"
                raise checks.bad("list", got, "videos of every class (or a smaller model.num_classes)")
        # Strings and an array: workers get a copy.
        self.paths = [str(sample.path) for sample in samples]
        self.labels = np.array([sample.label for sample in samples])
        self.data, self.seed, self.training = recipe.data, recipe.seed, training
        self.decoder: Decoder = recipe.data.decoder if training else "pyav"
        if self.decoder == "torchcodec":
            import_decoder()  # else each video would be broken for the want of it
        self.num_frames, self.size = config.num_frames, config.image_size
        self.augment = ClipAugment(recipe.augment, self.size, config.mean)

    def __getitem__(self, key: Key) -> Item:
        repeats = self.data.repeats if self.training else 1
        rngs = [np.random.default_rng([self.seed, key.epoch, key.video_index, repeat]) for repeat in range(repeats)]
        index, broken = key.video_index, list[Broken]()
        while len(broken) < TRIES:
            try:
                clips = self._read(index, rngs)
            except (ValueError, OSError) as error:
                broken.append(Broken(self.paths[index], str(error)))
            else:
                return self._item(clips, rngs, index, key.counts, broken)
            if not self.training:
                black = np.zeros((self.num_frames, *self.size, 3), np.uint8)
                return self._item([list(black)], rngs, index, False, broken)
            entropy = [self.seed, key.epoch, key.video_index, repeats + len(broken)]
            index = int(np.random.default_rng(entropy).integers(len(self)))
        got = f"{TRIES} unreadable videos one after the other, the last {broken[-1].path} ({broken[-1].error})"
        raise checks.bad("list", got, "videos that can be read")

    def _read(self, index: int, rngs: Sequence[np.random.Generator]) -> list[list[Image]]:
        """The frames of each clip of a video."""
        resample = self.data.repeat == "resample"
        with open_film(self.paths[index], threads=1, decoder=self.decoder) as film:
            clips = [self._frames(film, rng if self.training else None) for rng in (rngs if resample else rngs[:1])]
            found = {}
            for number, frame in film.frames(sorted({number for clip in clips for number in clip})):
                if self.training:
                    found[number] = picture(frame, film.aspect, round(SPARE_SIZE * min(self.size)))
                else:
                    found[number] = pictures(frame, film.aspect, self.size)[0]
        shapes = sorted({frame.shape for frame in found.values()})
        if len(shapes) > 1:
            raise checks.bad(
                "path", f"{film.name} with pictures of {shapes[0]} and {shapes[-1]}", "pictures of one size"
            )
        return [[found[number] for number in clip] for clip in (clips if resample else clips * len(rngs))]

    def _frames(self, film: Film, rng: np.random.Generator | None) -> list[int]:
        step = float(self.data.stride)
        if self.data.fps and film.rate:
            step *= float(film.rate) / self.data.fps
        return draw_frames(film.total, self.num_frames, self.data.sampling, step, rng)

    def _item(
        self,
        clips: Sequence[Sequence[Image]],
        rngs: Sequence[np.random.Generator],
        index: int,
        counts: bool,
        broken: list[Broken],
    ) -> Item:
        if self.training:
            pairs = [self.augment(frames, rng) for frames, rng in zip(clips, rngs, strict=True)]
        else:
            pairs = [(np.stack(frames), NO_BOX) for frames in clips]
        video, boxes = np.stack([clip for clip, _ in pairs]), [box for _, box in pairs]
        return Item(video, int(self.labels[index]), index, boxes, counts, broken)


def draw_frames(
    total: int, num_frames: int, sampling: Sampling, step: float, rng: np.random.Generator | None
) -> list[int]:
    """The numbers of the frames that make a training clip, of a film with ``total`` frames.

    Args:
        total: Frames of the film.
        num_frames: T.
        sampling: "stride" begins anywhere, and repeats the last frame of a film that is too short; "uniform" takes any
            frame of each of ``num_frames`` equal segments (TSN, arXiv 1608.00859).
        step: Frames of the film from one to the next; only for "stride". Frame numbers are rounded down.
        rng: Source of all draws; None takes the middle of the film, or of each segment.
    """
    slots = np.arange(num_frames)
    numbers: np.ndarray[Any, np.dtype[Any]]
    if sampling == "uniform":
        numbers = (slots + (0.5 if rng is None else rng.random(num_frames))) * total / num_frames
    else:
        spare = max(int(total - 1 - (num_frames - 1) * step), 0)
        numbers = slots * step + (spare // 2 if rng is None else rng.integers(spare + 1))
    return [min(int(number), total - 1) for number in numbers]


def collate(items: Sequence[Item]) -> Batch:
    """Join items."""
    repeats = len(items[0].video)
    labels, index, counts = (
        torch.tensor(values).repeat_interleave(repeats)
        for values in zip(*((item.label, item.video_index, item.counts) for item in items), strict=True)
    )
    video = torch.from_numpy(np.concatenate([item.video for item in items])).permute(0, 4, 1, 2, 3)
    boxes = torch.tensor([box for item in items for box in item.boxes])
    return Batch(video, labels, index, boxes, counts, [broken for item in items for broken in item.broken])


class BrokenVideos:
    """The broken videos of a run so far.

    Args:
        videos: Of the list.
        allowed: Share of them that may be broken.

    Attributes:
        errors: From path to error; to be kept in checkpoints.
    """

    def __init__(self, videos: int, allowed: float) -> None:
        self.videos, self.allowed = videos, allowed
        self.errors: dict[str, str] = {}

    def add(self, broken: Sequence[Broken]) -> list[Broken]:
        """Count those of a batch, and return the ones that are new.

        Raises:
            ValueError: there are more than allowed; the message names three.
        """
        new = {path: error for path, error in broken if path not in self.errors}
        self.errors |= new
        if len(self.errors) > self.allowed * self.videos:
            some = "; ".join(f"{path} ({error})" for path, error in list(self.errors.items())[-3:])
            got = f"{len(self.errors)} unreadable videos of {self.videos}, the last {some}"
            raise checks.bad("list", got, f"at most {self.allowed:.2%} of them (data.max_broken)")
        return [Broken(*pair) for pair in new.items()]
