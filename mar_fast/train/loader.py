"""Which videos a process reads in each step, and the workers that read them while the device computes."""

import multiprocessing
import os
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from ..kernels import checks
from .dataset import Batch, Item, Key, Videos, collate


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


def make_loader(dataset: Videos, sampler: StepSampler, *, workers: int) -> "DataLoader[Item]":
    """A loader for `batches`: ``workers`` lasting processes (0: this one) read what `StepSampler.set_epoch` chose."""
    # Workers are forked from a process with one thread: in a fork of the trainer a lock of its threads might stay shut.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),  # for copies to it that do not block
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        multiprocessing_context=context if workers else None,
        # Of its own: an iteration draws from it, and must not move the generator that the run keeps.
        generator=torch.Generator(),
    )


def batches(loader: "DataLoader[Item]") -> Iterator[Batch]:
    """The batches of an epoch.

    Raises:
        ChildProcessError: a worker died.
        Exception: what a worker raised, without its traceback.
    """
    try:
        yield from loader
    except Exception as error:
        text = str(error)
        if text.startswith("Caught "):  # in a worker, with its traceback; the last line is the error
            raise type(error)(text.strip().splitlines()[-1].partition(": ")[2]) from error
        if "DataLoader worker" in text or isinstance(error, OSError | EOFError):  # or a batch that went with its worker
            accepted = "workers that stay alive: is there enough memory for them, also in /dev/shm? (or fewer workers)"
            raise ChildProcessError(f"workers: got one that died ({text}), expected {accepted}") from error
        raise


def _start_worker(worker: int) -> None:
    os.setpgid(0, 0)  # Ctrl-C goes to a whole group, and the trainer still needs its workers to end the step
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the trainer has ended, even by SIGKILL: PyTorch only watches the process that forked it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
