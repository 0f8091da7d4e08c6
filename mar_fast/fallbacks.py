"""Which layers a fused op can replace, and one warning for each kind that it cannot.

A fused op takes a layer's weight and bias, and does not call the layer. That is right only for layers as their class
was written: no hooks, adapters, parametrizations, other forwards, quantised or sharded weights. All others are called.
"""

import itertools
import warnings
from typing import ClassVar

import torch
import torch.nn.modules.module as hooks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

# Other types of weight (quantised, sharded) only work inside their own module. torch.export traces with fake tensors.
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)
# Hooks from these only record which modules run, or hidden states that transformers was once asked for.
_RECORDERS = ("transformers.utils.output_capturing", "torch.utils.module_tracker")
CHANGED = "layers with hooks or changed parts"

_numbers = itertools.count()
_warned: set[tuple[str, str]] = set()


class Fallbacks:
    """Warns once of each kind of layer that a fused op cannot replace. A copy or a pickle starts anew."""

    runner: ClassVar[str] = "each module's own code"

    def __init__(self) -> None:
        self._model = str(next(_numbers))  # a string: torch.compile may treat an int as dynamic

    def __reduce__(self) -> tuple[type["Fallbacks"], tuple[()]]:
        return type(self), ()

    def fuses(self, layer: nn.Module, kind: type[nn.Module], needs_bias: bool = True) -> bool:
        """Whether ``layer`` is `untouched`; if not, a warning says once that such layers run by their own code."""
        if untouched(layer, kind, needs_bias):
            return True
        self.warn_once(CHANGED)
        return False

    def warn_once(self, what: str) -> None:
        """Warn the first time that ``what`` runs by its own code."""
        _warn_once(self._model, f"mar_fast: {self.runner} runs {what}")


@torch.compiler.assume_constant_result
def _warn_once(model: str, text: str) -> bool:
    """Under torch.compile it runs during tracing, outside of the graph; torch 2.11 takes only constant arguments."""
    if (model, text) not in _warned:
        _warned.add((model, text))
        warnings.warn(text, stacklevel=4)
    return True


class Fused(nn.Module):
    """A module that gives the weights of its `untouched` layers to fused ops. All of a `MAR` share one Fallbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.fallbacks = Fallbacks()


def untouched(module: nn.Module, kind: type[nn.Module], needs_bias: bool = False) -> bool:
    """Whether ``module`` computes what ``kind`` does with its weight and bias, so that an op can use these instead.

    Every layer asks this in every call, so it only reads attributes.
    """
    if type(module) is not kind or not own_forward(module) or not unhooked(module):
        return False
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None and type(weight) not in _PLAIN_TENSORS:
        return False
    return not needs_bias if bias is None else type(bias) in _PLAIN_TENSORS


def plain_projection(module: nn.Module) -> bool:
    """Whether ``module`` is an `untouched` convolution over whole patches: what gather_patch_embed computes."""
    if not untouched(module, nn.Conv3d, True):
        return False
    sizes = module.stride, module.padding, module.dilation, module.groups
    return sizes == (module.kernel_size, (0, 0, 0), (1, 1, 1), 1)


def own_forward(module: nn.Module) -> bool:
    """Whether ``module`` has the forward that its class was written with."""
    kind = type(module)
    forward = kind.forward
    home = getattr(forward, "__globals__", {}).get("__name__", "")  # functools.wraps changes __module__, not this
    if home != kind.__module__:
        # A decorator of the library's own is part of the class.
        library = kind.__module__.partition(".")[0]
        if getattr(forward, "__module__", None) != kind.__module__ or home.partition(".")[0] != library:
            return False
    return "forward" not in module.__dict__ or put_back(module, kind)


def put_back(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the forward in the instance is that of one of ``kinds``, as ``model.forward = model.forward`` leaves it.

    Exporters and accelerate's ``unwrap_model`` leave it so after they have replaced it temporarily.
    """
    forward = module.__dict__.get("forward")
    own = any(getattr(forward, "__func__", None) is kind.forward for kind in kinds)
    return own and getattr(forward, "__self__", None) is module


def unhooked(module: nn.Module) -> bool:
    """Whether ``module`` has no hooks, its own or global ones, other than those that only record."""
    own = module.__dict__
    found = (
        *(own["_forward_pre_hooks"], own["_forward_hooks"], own["_backward_pre_hooks"], own["_backward_hooks"]),
        *(hooks._global_forward_pre_hooks, hooks._global_forward_hooks),
        *(hooks._global_backward_pre_hooks, hooks._global_backward_hooks),
    )
    if not any(found):
        return True
    return all(getattr(hook, "__module__", None) in _RECORDERS for some in found for hook in some.values())
