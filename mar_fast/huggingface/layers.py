"""Layers of transformers' VideoMAE on the ops of kernels/: packed weights, and what is left to their own code.

In comments: B clips, L tokens in the grid, N visible, M dropped, D width.
"""

import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..kernels import linear_gelu
from ..kernels.derived import Derived
from ..layers import attend, attend_rows, norm, take

# Where transformers keeps its VideoMAE, in every version 5.
MODELING = "transformers.models.videomae.modeling_videomae"
# A weight of another type (quantised, sharded) needs what its module does with it. torch.export shows fake ones.
PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)

Packed = tuple[Tensor, Tensor | None]


class Caches:
    """What an accelerated module remembers between calls; a copy or a pickle of the module starts without it.

    Packed weights are kept in eval mode, while gradients are off and their sources stay as they are: see `Derived`.
    Writing through ``.data`` is not counted; `clear` runs at every ``train()`` and ``eval()`` for that.
    """

    def __init__(self) -> None:
        self._packed = Derived()
        self._tables: dict[tuple[str, torch.device], tuple[Tensor, int, Tensor]] = {}
        self._said: set[str] = set()

    def __reduce__(self) -> tuple[type["Caches"], tuple[()]]:
        return Caches, ()

    def clear(self) -> None:
        """Forget all tensors."""
        self._packed.forget()
        self._tables.clear()

    def warn_once(self, message: str) -> None:
        """A UserWarning, the first time that this module says it."""
        if not torch.compiler.is_compiling() and message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=3)

    def packed(self, attention: Any) -> Packed:
        """The qkv weight (3 * D, D) and bias (3 * D,) of a VideoMAESelfAttention, differentiable in training."""
        sources = _sources(attention)
        if attention.training:
            return _pack(*sources)
        packed: Packed = self._packed.get(sources, None, _pack)
        return packed

    def table(self, name: str, source: Tensor, device: torch.device) -> Tensor:
        """A position table (1, L, D), which transformers keeps on the CPU, as (L, D) on ``device``."""
        if source.device == device:
            return source.detach()[0]
        found = self._tables.get((name, device))
        if found is not None and found[0] is source and (torch.compiler.is_compiling() or found[1] == source._version):
            return found[2]
        moved = source.detach()[0].to(device)
        if not torch.compiler.is_compiling():
            self._tables[name, device] = source, source._version, moved
        return moved


def _sources(attention: Any) -> list[Tensor | None]:
    """Weights of q, k and v, then their biases: of linear layers, or parameters of their own in the oldest versions."""
    query, key, value = attention.query, attention.key, attention.value
    biases = [query.bias, key.bias, value.bias]
    if hasattr(attention, "q_bias"):
        biases = [attention.q_bias, None, attention.v_bias]
    return [query.weight, key.weight, value.weight, *biases]


def _pack(*sources: Tensor | None) -> Packed:
    weights, biases = [tensor for tensor in sources[:3] if tensor is not None], sources[3:]
    weight = torch.cat(weights)
    if all(bias is None for bias in biases):
        return weight, None
    filled = [
        part.new_zeros(part.shape[0]) if bias is None else bias for part, bias in zip(weights, biases, strict=True)
    ]
    return weight, torch.cat(filled)


def own_forward(module: nn.Module) -> bool:
    """Whether the forward of ``module`` is the one that its class was written with."""
    given, replaced = type(module).forward, module.__dict__.get("forward")
    if getattr(given, "__module__", None) != type(module).__module__:
        return False  # patched in the class, for all of its instances
    # transformers 5.0 leaves the method of the class behind in the instance after it has recorded hidden states.
    return replaced is None or getattr(replaced, "__func__", None) is given


def unhooked(module: nn.Module) -> bool:
    """Whether ``module`` has no hooks but those that record hidden states."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    # They stay on the model for good, once it was asked for hidden states. Calls that ask for them do not come here.
    recording = "transformers.utils.output_capturing"
    return all(getattr(hook, "__module__", None) == recording for hook in module._forward_hooks.values())


def untouched(module: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    """Whether calling ``module`` does what its class says: no hooks, no forward of its own, no other class.

    Args:
        module: A part of a model.
        kind: The class that it must have; None is any of transformers' VideoMAE.
    """
    right = type(module).__module__ == MODELING if kind is None else type(module) is kind
    return right and own_forward(module) and unhooked(module)


def _linear(module: nn.Module, bias: bool) -> bool:
    biased = type(module.bias) in PLAIN_TENSORS or (module.bias is None and not bias)
    return untouched(module, nn.Linear) and type(module.weight) in PLAIN_TENSORS and biased


def plain_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a LayerNorm that `norm` may stand in for."""
    if not untouched(module, nn.LayerNorm):
        return False
    return type(module.weight) in PLAIN_TENSORS and type(module.bias) in PLAIN_TENSORS


def why_own_code(layer: Any) -> str | None:
    """Why this VideoMAELayer must be called as it is; None if `run_layer` does the same."""
    if not untouched(layer) or not untouched(layer.attention) or not untouched(layer.intermediate):
        return "layers with hooks or changed parts run transformers' own code"
    attention, attention_out, out = layer.attention.attention, layer.attention.output, layer.output
    same = (
        (untouched(attention) and untouched(attention_out) and untouched(out))
        and all(_linear(part, False) for part in (attention.query, attention.key, attention.value))
        and all(_linear(part.dense, True) for part in (attention_out, layer.intermediate, out))
        and untouched(attention_out.dropout, nn.Dropout)
        and untouched(out.dropout, nn.Dropout)
        and plain_norm(layer.layernorm_before)
        and plain_norm(layer.layernorm_after)
    )
    if not same:
        return "layers with hooks or changed parts run transformers' own code"
    if layer.training and attention.dropout_prob:
        return "layers with attention dropout (attention_probs_dropout_prob) run transformers' own code in training"
    return None


def run_layer(
    layer: Any, caches: Caches, x: Tensor, residual: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One VideoMAELayer on x (B, N, D), the last sub-layer's output, and its ``residual``; the new pair.

    With ``rows`` (B, M) only these tokens come out.
    """
    y, residual = norm(layer.layernorm_before, x, residual)
    attention = layer.attention.attention
    weight, bias = caches.packed(attention)
    heads, scale = attention.num_attention_heads, attention.scaling
    if rows is None:
        y = attend(y, weight, bias, heads, scale)
    else:
        y, residual = attend_rows(y, take(y, rows), weight, bias, heads, scale), take(residual, rows)
    y, residual = norm(layer.layernorm_after, _project(layer.attention.output, y), residual)
    return _project(layer.output, _activated(layer.intermediate, y)), residual


def _project(part: Any, y: Tensor) -> Tensor:
    y = F.linear(y, part.dense.weight, part.dense.bias)
    return F.dropout(y, part.dropout.p, True) if part.dropout.training and part.dropout.p else y


def _activated(part: Any, y: Tensor) -> Tensor:
    act = part.intermediate_act_fn
    exact = type(act) is nn.GELU and act.approximate == "none"
    if exact or (type(act).__name__ == "GELUActivation" and act.act is F.gelu):
        return linear_gelu(y, part.dense.weight, part.dense.bias)
    return act(F.linear(y, part.dense.weight, part.dense.bias))


def run_layers(layers: Any, caches: Caches, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x (B, N, D) through all layers: the last sub-layer's output, and the residual that it is still to be added to.

    With ``rows`` (B, M) the last layer gives only these tokens.
    """
    residual: Tensor | None = None
    for number, layer in enumerate(layers):
        last = rows if number == len(layers) - 1 else None
        reason = why_own_code(layer)
        if reason is not None:
            caches.warn_once(f"mar_fast: {reason}")
            x, residual = layer(total(x, residual)), None
            x = x if last is None else take(x, last)
            continue
        run = partial(run_layer, layer, caches)
        if layer.gradient_checkpointing and layer.training:
            x, residual = layer._gradient_checkpointing_func(run, x, residual, last)
        else:
            x, residual = run(x, residual, last)
    return (take(x, rows) if rows is not None and not len(layers) else x), residual


def total(x: Tensor, residual: Tensor | None) -> Tensor:
    """The residual stream with nothing left to add, in its own dtype."""
    return x if residual is None else (residual + x).to(residual.dtype)
