"""Launchers whose outputs are NaN before a kernel writes them: an element that no program writes shows."""

import importlib
import pkgutil
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import is_fake

from mar_fast.kernels import device, plan

# Modules of kernels/jit that allocate nothing: all others are poisoned.
NO_LAUNCHERS = ("compile_check", "launch", "op")


class Poisoning:
    """torch for a launcher, but what ``empty`` gives is NaN, or a huge integer."""

    def __init__(self):
        self.allocated = 0

    def __getattr__(self, name):
        return getattr(torch, name)

    def _fill(self, tensor):
        if tensor.is_meta or is_fake(tensor):
            return tensor
        self.allocated += 1
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    def empty(self, *args, **kwargs):
        return self._fill(torch.empty(*args, **kwargs))

    def empty_like(self, *args, **kwargs):
        return self._fill(torch.empty_like(*args, **kwargs))


def launching():
    """The modules whose functions allocate what kernels write."""
    from mar_fast.kernels import jit

    names = [module.name for module in pkgutil.iter_modules(jit.__path__) if module.name not in NO_LAUNCHERS]
    modules = [importlib.import_module(f"{jit.__name__}.{name}") for name in names]
    return [module for module in modules if hasattr(module, "torch")]


@contextmanager
def launchers():
    """Within this context every launcher allocates through one `Poisoning`, and its op is forced onto this path.

    Plans look ``torch`` up in their module when they run, so old ones would be poisoned too; they are forgotten since
    a test may change what they are made from.
    """
    poisoning, modules = Poisoning(), launching()
    plan.forget()
    for module in modules:
        module.torch = poisoning
    before, device._forced = device._forced, "triton"
    try:
        yield poisoning
    finally:
        device._forced = before
        for module in modules:
            module.torch = torch
        plan.forget()
