"""quantize: a model with its large matrix products in fp8, for inference.

fp8 is e4m3 of the OCP 8-bit floating point specification (Micikevicius et al., arXiv 2209.05433): 4 bits of exponent, 3
of mantissa, up to 448. The products ``attn.qkv``, ``mlp.fc1`` and ``mlp.fc2`` of each block are in it: 11/12 of the
multiply-adds of the block's linear layers at an MLP ratio of 4. Weights have a scale for each output channel, computed
once; activations have one for each token, computed in each call from its largest magnitude, so that nothing is
calibrated. ``attn.proj``, attention, norms, embedding and heads stay as they are.
"""

import copy
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from torch import nn

from .fallbacks import untouched
from .kernels import checks, quantize_rows
from .kernels.scaled_linear import MULTIPLE, need_fp8
from .layers import Block
from .model import MAR
from .scaled_linear import ScaledLinear, scaled_layers

Kind = Literal["fp8"]
LAYERS = ("attn.qkv", "mlp.fc1", "mlp.fc2")


def quantize(model: MAR, kind: Kind, *, keep: str | Sequence[str] = (), emulate: bool = False) -> MAR:
    """A copy of ``model`` with products in fp8; the model itself is left as it is.

    Weights may be float32 or 16-bit. Run what is not quantised in bfloat16: call ``.to(torch.bfloat16)`` before or
    after, which does not change fp8 weights. `save_pretrained` and `save_checkpoint` write such a model in mar_fast's
    own layout, and `from_pretrained` reads it.

    Args:
        model: The model. If it is quantised already, only ``emulate`` changes.
        kind: "fp8".
        keep: Parts or blocks whose products stay as they are: "decoder", "encoder.blocks.0".
        emulate: Compute the same in plain PyTorch, on any device: slow, for tests and to measure what fp8 costs in
            accuracy. Values and scales are those of a GPU; sums may differ in their last bits.

    Returns:
        The copy, in eval mode, without gradients.

    Raises:
        ValueError: without ``emulate``, the model's device has no fp8 products (sm_89, sm_90 and later have); an
            unknown kind or name; names for a model that is quantised already; a layer that is no plain ``nn.Linear``,
            or whose sizes are no multiples of 16.
        TypeError: not a `mar_fast.MAR`.
    """
    if not isinstance(model, MAR):
        raise checks.bad_type("model", type(model).__name__, "a mar_fast.MAR")
    if kind != "fp8":
        raise checks.bad("kind", repr(kind), "'fp8'")
    if keep and any(scaled_layers(model)):
        raise checks.bad("keep", repr(keep), "none, for a model that is quantised already")
    kept = {keep} if isinstance(keep, str) else set(keep)
    blocks = [name for name, module in model.named_modules() if isinstance(module, Block)]
    parts = {part: list(its) for part, its in groupby(blocks, _part)}
    for name in sorted(kept.difference(parts, blocks)):
        known = "; ".join(f"{part}, {its[0]} to {its[-1]}" for part, its in parts.items())
        raise checks.bad("keep", repr(name), f"parts and blocks of this model: {known}")
    if not emulate:
        need_fp8("model", next(model.parameters()))
    quantised = copy.deepcopy(model).eval().requires_grad_(False)
    if not any(scaled_layers(model)):
        for block in (block for block in blocks if kept.isdisjoint((block, _part(block)))):
            for layer in (f"{block}.{path}" for path in LAYERS):
                quantised.set_submodule(layer, _scaled(layer, quantised.get_submodule(layer)))
    for _, scaled in scaled_layers(quantised):
        scaled.emulate = emulate
    return quantised


def _part(block: str) -> str:
    """The "encoder" of "encoder.blocks.0"."""
    return block.partition(".")[0]


def _scaled(name: str, layer: nn.Module) -> ScaledLinear:
    """A layer in fp8, with the weights of ``layer``."""
    if not untouched(layer, nn.Linear):
        accepted = "a plain nn.Linear (merge adapters, remove hooks), or its block in keep="
        raise checks.bad(f"model, {name}", type(layer).__name__, accepted)
    assert isinstance(layer, nn.Linear)
    if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
        got = f"{layer.in_features} -> {layer.out_features} features"
        raise checks.bad(f"model, {name}", got, f"multiples of {MULTIPLE}, or its block in keep=")
    rows = quantize_rows(layer.weight.detach())
    return ScaledLinear(rows.values, rows.scale, layer.bias)
