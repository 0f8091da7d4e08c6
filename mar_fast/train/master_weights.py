"""16-bit copies of the weights of blocks, made in one launch a step; autocast launches a cast for each weight."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from .. import MAR
from ..layers import Block


class _Rounded(torch.autograd.Function):
    """The copy in place of its master weight; the gradient goes to the master, as through autocast's own cast."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].float(), None


class MasterWeights:
    """The float32 weights of a model's blocks, and copies of them in the dtype of its products.

    Results have the same bits as with autocast's casts. Nothing is copied without autocast, if FSDP2 shards the
    weights, or if the model is compiled, since inductor fuses the casts. Where gradient checkpointing recomputes a
    block, autocast casts its weights.
    """

    def __init__(self, model: MAR, dtype: torch.dtype | None) -> None:
        self._masters: dict[str, Tensor] = {}
        if dtype is not None and getattr(model, "_compiled_call_impl", None) is None:
            blocks = ((name, module) for name, module in model.named_modules() if isinstance(module, Block))
            self._masters = {
                f"{name}.{path}.weight": layer.weight
                for name, block in blocks
                for path, layer in block.named_modules()
                if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
            }
        self._copies = [torch.empty_like(master, dtype=dtype) for master in self._masters.values()]

    def refresh(self) -> None:
        """Make the copies anew: after every change of the weights, before `call`."""
        with torch.no_grad():
            if self._copies:
                torch._foreach_copy_(self._copies, list(self._masters.values()))

    def call(self, called: nn.Module, *inputs: Any, **options: Any) -> Any:
        """``called(*inputs, **options)`` with the copies as weights. ``called`` is the model, or DDP of it."""
        if not self._copies:
            return called(*inputs, **options)
        prefix = "module." if isinstance(called, DistributedDataParallel) else ""
        pairs = zip(self._masters.items(), self._copies, strict=True)
        weights = {prefix + name: _Rounded.apply(master, copy) for (name, master), copy in pairs}
        return functional_call(called, weights, inputs, options)
