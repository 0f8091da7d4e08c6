"""Which videos a process reads in each step: a function of seed and epoch, so that a run resumes at any step."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from ..kernels import checks


class Key(NamedTuple):
    """What `ClipDataset` takes as an index."""

    video_index: int  # the video, in the order of the list
    epoch: int = 0  # its draws differ from those of other epochs
    counts: bool = True  # False for one that only fills the last batch of a validation


class StepSampler(Sampler[list[Key]]):
    """Batches of one process, the one of ``rank`` among ``world``.

    A step takes the next ``batch`` videos of the epoch's order; of those, rank r takes the r-th, the (r + world)-th
    and so on, in ``accumulate`` batches, one after the other.

    In training the order follows from ``seed`` and the epoch, and the last step is left out if it is incomplete. Else
    it is the order of the list, and the last step is filled with videos that do not count.

    Attributes:
        steps: In an epoch.

    Raises:
        ValueError: a batch that cannot be shared out, or fewer videos than one step takes.
    """

    def __init__(
        self,
        videos: int,
        batch: int,
        *,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        training: bool = True,
    ) -> None:
        if not 0 <= rank < world:
            raise checks.bad("rank", rank, f"0 to {world - 1}, for {world} processes")
        if accumulate < 1 or batch < 1 or batch % (world * accumulate):
            accepted = f"a multiple of {world} processes x {accumulate} batches a step"
            raise checks.bad("data.batch", batch, accepted)
        least = batch if training else 1
        if videos < least:
            raise checks.bad("list", f"{videos} videos", f"at least {least}, those of a step (--set data.batch)")
        self.videos, self.batch, self.accumulate, self.seed = videos, batch, accumulate, seed
        self.rank, self.world, self.training = rank, world, training
        self.steps = videos // batch if training else -(-videos // batch)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the step in it with which the next iteration begins."""
        if not 0 <= start <= self.steps:
            raise checks.bad("start", start, f"a step from 0 to {self.steps}")
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.arange(self.videos)
        if self.training:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        keys = [Key(int(index), self.epoch) for index in order]
        keys += [Key(keys[-1].video_index, self.epoch, False)] * (self.steps * self.batch - len(keys))
        size = self.batch // (self.world * self.accumulate)
        for step in range(self.start, self.steps):
            mine = keys[step * self.batch : (step + 1) * self.batch][self.rank :: self.world]
            yield from (mine[first : first + size] for first in range(0, len(mine), size))
