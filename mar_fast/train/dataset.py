"""Training clips from a list of videos: each is a function of seed, epoch and its place in the list, and of no state.

So a run that is resumed reads what it would have read, whatever workers had read ahead, in whatever order.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.annotations import Sample, check_samples
from ..data.framing import Image, picture, pictures
from ..data.torchcodec_video import import_decoder
from ..data.video import Decoder, Sampling, open_film
from ..eval.accuracy import list_fingerprint
from ..kernels import checks
from .augment import NO_BOX, Box, ClipAugment
from .recipe import Recipe

# Films whose short side is longer than that of the clip times this are resized to it as they are decoded: 320 for 224,
# as the originals store Kinetics.
SPARE_SIZE = 10 / 7
TRIES = 10  # videos tried for one item before the run ends


class Key(NamedTuple):
    """What `ClipDataset` takes as an index."""

    video_index: int  # the video, in the order of the list
    epoch: int = 0  # its draws differ from those of other epochs
    counts: bool = True  # False for one that only fills the last batch of a validation


class Item(NamedTuple):
    """Clips of one video."""

    video: Image  # (repeats, T, H, W, C) uint8
    label: int
    video_index: int  # of the video read, in the order of the list
    boxes: list[Box]  # one for each clip: what is erased
    counts: bool  # whether it is to be counted in a validation
    broken: dict[str, str]  # videos that should have been read and could not be, and why


class Batch(NamedTuple):
    """Items joined, the clips of a video side by side; B = videos x repeats."""

    video: Tensor  # (B, C, T, H, W) uint8, a view of channels-last memory
    labels: Tensor  # (B,) int64
    video_index: Tensor  # (B,) int64, those of the videos read
    boxes: Tensor  # (B, 4) int64: top, left, height, width; `mix_batch` erases them
    counts: Tensor  # (B,) bool
    broken: dict[str, str]  # of all items


class Videos(Dataset[Item]):
    """What a run reads: items by `Key`.

    Attributes:
        paths: Of all videos, for messages.
        fingerprint: A run that is resumed must have the same one.
    """

    paths: list[str]
    fingerprint = ""

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
        self.fingerprint = list_fingerprint(samples)
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
        index, counts, broken = key.video_index, key.counts, dict[str, str]()
        for number in range(1, TRIES + 1):
            try:
                clips = self._read(index, rngs)
                break
            except (ValueError, OSError) as error:
                broken[self.paths[index]] = str(error)
            if not self.training:
                clips, counts = [list(np.zeros((self.num_frames, *self.size, 3), np.uint8))], False
                break
            entropy = [self.seed, key.epoch, key.video_index, repeats + number]
            index = int(np.random.default_rng(entropy).integers(len(self)))
        else:
            path, reason = broken.popitem()
            got = f"{TRIES} unreadable videos one after the other, such as {path} ({reason})"
            raise checks.bad("list", got, "videos that can be read")
        augmented = [
            self.augment(frames, rng) if self.training else (np.stack(frames), NO_BOX)
            for frames, rng in zip(clips, rngs, strict=True)
        ]
        video, boxes = np.stack([clip for clip, _ in augmented]), [box for _, box in augmented]
        return Item(video, int(self.labels[index]), index, boxes, counts, broken)

    def _read(self, index: int, rngs: Sequence[np.random.Generator]) -> list[list[Image]]:
        """The frames of each clip of a video."""
        data, resample = self.data, self.data.repeat == "resample"
        with open_film(self.paths[index], threads=1, decoder=self.decoder) as film:
            step = data.stride * (float(film.rate) / data.fps if data.fps and film.rate else 1.0)
            clips = [
                draw_frames(film.total, self.num_frames, data.sampling, step, rng if self.training else None)
                for rng in (rngs if resample else rngs[:1])
            ]
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
    return Batch(video, labels, index, boxes, counts, dict(broken for item in items for broken in item.broken.items()))


def add_broken(known: dict[str, str], broken: Mapping[str, str], videos: int, allowed: float) -> dict[str, str]:
    """Add broken videos to those ``known`` in a run, and return the ones that are new, each with its error.

    Raises:
        ValueError: they are more than the share ``allowed`` of all ``videos``; the message names three.
    """
    new = {path: error for path, error in broken.items() if path not in known}
    known.update(new)
    if len(known) > allowed * videos:
        some = "; ".join(f"{path} ({error})" for path, error in list(known.items())[-3:])
        got = f"{len(known)} unreadable videos of {videos}, the last {some}"
        raise checks.bad("list", got, f"at most {allowed:.2%} of them (data.max_broken)")
    return new
