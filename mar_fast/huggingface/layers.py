"""Layers of transformers' VideoMAE on the ops of mar_fast.kernels, and which layers fall back to transformers' code.

In comments: B clips, L tokens in the grid, N visible, M dropped, D embed_dim.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fallbacks import CHANGED, Fallbacks, untouched
from ..kernels import mlp
from ..kernels.derived import Derived
from ..layers import Stream, attend, deferred_bias, norm, take, total

# The module of transformers with its VideoMAE classes, in every version 5.
MODELING = "transformers.models.videomae.modeling_videomae"

Packed = tuple[Tensor, Tensor | None]


class State(Fallbacks):
    """The options of an accelerated module and what it caches; a copy or a pickle keeps the options only.

    Packed weights are cached in eval mode without gradients for as long as their sources do not change: see `Derived`.
    A write through ``.data`` goes unnoticed, so every ``train()`` and ``eval()`` calls `clear`.

    Attributes:
        keep: Share of tokens that stay visible in calls without a mask, or None for all of them.
        num_visible: Visible tokens of each clip in calls with a mask, or None to read it from the mask.
    """

    runner = "transformers' own code"

    def __init__(self, keep: float | None = None, num_visible: int | None = None) -> None:
        super().__init__()
        self.keep, self.num_visible = keep, num_visible
        self._packed = Derived()
        self._tables: dict[tuple[str, torch.device], tuple[Tensor, int, Tensor]] = {}

    def __reduce__(self) -> tuple[type["State"], tuple[Any, ...]]:
        return State, (self.keep, self.num_visible)

    def clear(self) -> None:
        """Drop all cached tensors."""
        self._packed.forget()
        self._tables.clear()

    def packed(self, attention: Any) -> Packed:
        """The qkv weight (3 * D, D) and bias (3 * D,) of a VideoMAESelfAttention, differentiable in training."""
        query, key, value = attention.query, attention.key, attention.value
        biases = [query.bias, key.bias, value.bias]
        if hasattr(attention, "q_bias"):  # the oldest versions: parameters of the attention, none for keys
            biases = [attention.q_bias, None, attention.v_bias]
        sources = [query.weight, key.weight, value.weight, *biases]
        if attention.training:
            return _pack(*sources)
        packed: Packed = self._packed.get(sources, None, _pack)
        return packed

    def table(self, name: str, source: Tensor, device: torch.device) -> Tensor:
        """A position table (1, L, D), which transformers keeps on the CPU, as (L, D) on ``device``."""
        if source.device == device:
            return source.detach()[0]
        cached = self._tables.get((name, device))
        compiling = torch.compiler.is_compiling()
        if cached is not None and cached[0] is source and (compiling or cached[1] == source._version):
            return cached[2]
        moved = source.detach()[0].to(device)
        if not compiling:
            self._tables[name, device] = source, source._version, moved
        return moved


def _pack(*sources: Tensor | None) -> Packed:
    """Weights of q, k and v, then their biases."""
    weights, biases = [tensor for tensor in sources[:3] if tensor is not None], sources[3:]
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    zeros = weights[0].new_zeros(weights[0].shape[0])
    return torch.cat(weights), torch.cat([zeros if bias is None else bias for bias in biases])


def own_code(module: nn.Module) -> bool:
    """Whether ``module`` is of a class of transformers' VideoMAE, without changes or hooks."""
    return type(module).__module__ == MODELING and untouched(module, type(module))


def fallback(layer: Any) -> str | None:
    """What sort of VideoMAELayer this is if transformers' own code must run it; None if `run_layer` does the same."""
    if not (own_code(layer) and own_code(layer.attention) and own_code(layer.intermediate)):
        return CHANGED
    attention, projection, mlp_out = layer.attention.attention, layer.attention.output, layer.output
    plain = (
        (own_code(attention) and own_code(projection) and own_code(mlp_out))
        and all(untouched(part, nn.Linear) for part in (attention.query, attention.key, attention.value))
        and all(untouched(part.dense, nn.Linear, True) for part in (projection, layer.intermediate, mlp_out))
        and all(untouched(part.dropout, nn.Dropout) for part in (projection, mlp_out))
        and all(untouched(part, nn.LayerNorm, True) for part in (layer.layernorm_before, layer.layernorm_after))
    )
    if not plain:
        return CHANGED
    if layer.training and attention.dropout_prob:
        return "layers with attention dropout (attention_probs_dropout_prob) in training"
    return None


def run_layer(layer: Any, state: State, rows: Tensor | None, defer: bool, *stream: Any) -> Stream:
    """One VideoMAELayer on the parts of a `Stream`; with ``rows`` (B, M) it returns only these tokens.

    ``defer``: whether the next norm may add the bias of its last linear layer.
    """
    y, residual = norm(state, layer.layernorm_before, Stream(*stream))
    attention = layer.attention.attention
    weight, bias = state.packed(attention)
    y = attend(y, weight, bias, attention.num_attention_heads, attention.scaling, rows=rows)
    residual = residual if rows is None else take(residual, rows)
    x, bias = _project(layer.attention.output, F.linear, y)
    y, residual = norm(state, layer.layernorm_after, Stream(x, residual, x_bias=bias))
    x, bias = _project(layer.output, partial(_mlp, layer.intermediate), y, defer)
    return Stream(x, residual, x_bias=bias)


def _project(part: Any, product: Any, y: Tensor, defer: bool = True) -> tuple[Tensor, Tensor | None]:
    """``product`` of y by the weight and bias of the part, and its `deferred_bias`."""
    dropout = part.dropout.p if part.dropout.training else 0.0
    bias = deferred_bias(part.dense, y) if defer and not dropout else None
    y = product(y, part.dense.weight, part.dense.bias if bias is None else None)
    return F.dropout(y, dropout) if dropout else y, bias


def _mlp(first: Any, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The intermediate layer, its activation, and the linear layer of these parameters."""
    act, dense = first.intermediate_act_fn, first.dense
    exact = type(act) is nn.GELU and act.approximate == "none"
    if exact or (type(act).__name__ == "GELUActivation" and act.act is F.gelu):
        return mlp(y, dense.weight, dense.bias, weight, bias)
    return F.linear(act(F.linear(y, dense.weight, dense.bias)), weight, bias)


def run_layers(layers: Any, state: State, x: Tensor, rows: Tensor | None = None) -> Stream:
    """x (B, N, D) through all layers; with ``rows`` (B, M) the last one returns only these tokens."""
    stream = Stream(x)
    for number, layer in enumerate(layers, 1):
        last_rows = rows if number == len(layers) else None
        if what := fallback(layer):
            state.warn_once(what)
            x = layer(total(stream))
            stream = Stream(x if last_rows is None else take(x, last_rows))
        elif layer.gradient_checkpointing and layer.training:
            # torch's reentrant form knows tensors only, and loses the gradient of a parameter that is returned.
            run = partial(run_layer, layer, state, last_rows, False)
            stream = Stream(*layer._gradient_checkpointing_func(run, *stream))
        else:
            stream = run_layer(layer, state, last_rows, True, *stream)
    return Stream(take(x, rows)) if rows is not None and not len(layers) else stream
