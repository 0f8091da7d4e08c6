"""One process or many, started by torchrun: who am I, how is the model spread, and what do all ranks agree on."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from .. import MAR, machine

# Rank 0 alone runs the multi-view test, and the others wait for it.
TIMEOUT = timedelta(hours=12)
# Kept to the end of the process: a gloo group that is freed while one of its threads still frees the last sum waits for
# that thread, which waits for Python's lock, and so for ever.
_groups: list[dist.ProcessGroup | None] = []


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size``, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; on a GPU without waiting for it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def gather(self, values: list[Any]) -> list[Any]:
        """The values of all processes in one list, in each of them."""
        if self.size == 1:
            return values
        box: list[list[Any]] = [[]] * self.size
        dist.all_gather_object(box, values)
        return list(chain.from_iterable(box))


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """The processes that torchrun started, or this one alone.

    Args:
        device: "auto", "cpu" or "cuda"; with several processes on GPUs each takes the one of its local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = machine.device(device)
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    _groups.append(dist.group.WORLD)
    yield World(dist.get_rank(), size, chosen)
    dist.destroy_process_group()  # not after an error: other processes may be waiting within a sum


def leave(code: int) -> NoReturn:
    """End a process of many at once.

    gloo's threads are still there when the interpreter is taken apart, and now and then abort it after all is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def spread(model: MAR, world: World, *, shard: bool, compile: bool) -> nn.Module:
    """A model, on the device of its process, as it is called in training: with ``compile`` under torch.compile.

    Each process has the whole model (DDP), or with ``shard`` a share of it and of AdamW's states (FSDP2, in place).
    """
    if compile:
        model.compile()
    if world.size == 1:
        return model
    if not shard:
        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    # Blocks return views, but nothing here writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for part in (model.encoder, model.decoder, model.classifier):
        for block in getattr(part, "blocks", ()):
            fully_shard(block)
    # By default the root's weights stay gathered until the backward pass, which a validation does not have.
    fully_shard(model, reshard_after_forward=True)
    return model


def last_only(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Within it gradients are summed over the processes only in the ``last`` micro-batch of a step."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return nullcontext()


def to_host(values: Tensor) -> Callable[[], list[float]]:
    """A function that waits for ``values`` and returns them; until then the device goes on."""
    if values.device.type == "cpu":
        return values.tolist
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()

    def wait() -> list[float]:
        ready.synchronize()
        return copy.tolist()

    return wait
