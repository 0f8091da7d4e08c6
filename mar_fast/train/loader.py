"""The loader: worker processes that decode and augment while the device computes."""

import multiprocessing
import os
import threading
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from .dataset import Batch, Item, Videos, collate
from .sampler import StepSampler


def make_loader(dataset: Videos, sampler: StepSampler, *, workers: int) -> "DataLoader[Item]":
    """A loader of `Batch`es, to be iterated over by `batches`; ``sampler.set_epoch`` chooses the next ones.

    Its ``workers`` are processes that stay from epoch to epoch; 0 reads in this one.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),  # for copies to it that do not block
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        multiprocessing_context=_context() if workers else None,
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


def _context() -> multiprocessing.context.BaseContext:
    """Workers are forked off a process with one thread: locks of the trainer's threads might never open in a fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


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
