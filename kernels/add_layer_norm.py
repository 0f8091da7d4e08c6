"""add_layer_norm: bias, layer scale, drop path, residual add and LayerNorm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .device import HAS_TRITON, limit_of_e4m3, takes_triton, working_dtype
from .plan import Plans
from .quantize_rows import QuantizedRows, eager_quantize_rows, without_gradients

if HAS_TRITON:
    from .jit import add_layer_norm as jit

_plans, _plans_of_rows = Plans(), Plans()


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``residual + row_scale[:, None, None] * layer_scale * (x + x_bias)``, and its LayerNorm: (normed, new residual).

    Args:
        x: (B, N, D), or packed (total, D), the output of a sub-layer.
        residual: Of x's shape, the stream that x is added to, or None at its start: the new residual is then x.
        weight: (D,), LayerNorm's.
        bias: (D,), LayerNorm's.
        eps: Added to the variance.
        layer_scale: (D,), layer scale (CaiT, arXiv 2103.17239, section 2.1).
        row_scale: (B,), or (total,) for packed tokens, stochastic depth (arXiv 1603.09382): 0 for a dropped sample,
            else 1 / keep probability.
        x_bias: (D,), the bias of the linear layer that made x, if that layer was called without it: its gradient is
            then a by-product of this op's backward, without another pass over x's gradient.

    Returns:
        ``normed`` in the dtype of the next matrix product (autocast's if it is on, else the residual's), and the new
        residual in the dtype of the old one. Statistics are in float32. Gradients flow to every floating-point input.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or layer_scale, row_scale or x_bias is given
            without a residual; the message names it.
    """
    key, run = _plans.find(x, residual, weight, bias, eps, layer_scale, row_scale, x_bias)
    if run is None:
        factors = dict(layer_scale=layer_scale, row_scale=row_scale, x_bias=x_bias)
        _check(x, eps, residual=residual, weight=weight, bias=bias, **factors)
        stream = x if residual is None else residual
        if not takes_triton("add_layer_norm", stream):
            return eager_add_layer_norm(x, residual, weight, bias, eps, **factors)
        options = (eps, working_dtype(stream, stream.dtype), x.dtype, False)
        tensors = (x, residual, weight, bias, layer_scale, row_scale, x_bias)
        run = _plans.keep(key, jit.add_layer_norm.plan(*tensors, *options))
    normed, new_residual = run(x, residual, weight, bias, layer_scale, row_scale, x_bias)[:2]
    return normed, x if residual is None else new_residual


def add_layer_norm_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float = 1e-6
) -> tuple[QuantizedRows, Tensor]:
    """`add_layer_norm` for a product in fp8, in one pass: (`quantize_rows` of the norm in float32, new residual).

    Arguments and errors are those of `add_layer_norm`; an argument that needs a gradient is a ValueError too.
    """
    key, run = _plans_of_rows.find(x, residual, weight, bias, eps)
    stream = x if residual is None else residual
    dtype = working_dtype(stream, stream.dtype)
    if run is None:
        others = dict(residual=residual, weight=weight, bias=bias)
        _check(x, eps, **others, layer_scale=None, row_scale=None, x_bias=None)
        without_gradients("x, residual, weight, bias", x, *others.values())
        if not takes_triton("add_layer_norm_rows", stream, limit_of_e4m3(stream)):
            new_residual = x if residual is None else (residual + x).to(residual.dtype)
            wide = new_residual.to(torch.promote_types(stream.dtype, torch.float32))
            normed = F.layer_norm(wide, weight.shape, weight.to(wide.dtype), bias.to(wide.dtype), eps)
            return eager_quantize_rows(normed, dtype), new_residual
        run = _plans_of_rows.keep(key, jit.add_layer_norm_rows.plan(x, residual, weight, bias, eps))
    values, scale, new_residual = run(x, residual, weight, bias)
    return QuantizedRows(values, scale, dtype), x if residual is None else new_residual


def _check(x: Tensor, eps: float, **others: Any) -> None:
    checks.tensor("x", x, None, checks.FLOATS, "(B, N, D) or (total, D)")
    if x.ndim not in (2, 3):
        raise checks.bad("x", f"shape {tuple(x.shape)}", "shape (B, N, D) or (total, D)")
    rows, whole = ("(B,)", "(B, N, D)") if x.ndim == 3 else ("(total,)", "(total, D)")
    shapes = {"residual": whole, "weight": "(D,)", "bias": "(D,)"}
    shapes |= {"layer_scale": "(D,)", "row_scale": rows, "x_bias": "(D,)"}
    sizes = {whole: x.shape, "(D,)": x.shape[-1:], rows: x.shape[:1]}
    for argument, shape in shapes.items():
        value = others[argument]
        if value is None and argument not in ("weight", "bias"):
            continue
        checks.tensor(argument, value, len(sizes[shape]), checks.FLOATS, shape)
        checks.size(argument, value, sizes[shape], f"x's {shape}")
        if others["residual"] is None and argument not in ("weight", "bias"):
            raise checks.bad(argument, "a tensor", "None, since residual is None and the stream is x")
    checks.positive("eps", eps)
    checks.same_device("x", x.device, **others)


def eager_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    x_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in plain PyTorch."""
    stream = x
    if residual is not None:
        if x_bias is not None:
            x = x + x_bias
        if layer_scale is not None:
            x = layer_scale * x
        if row_scale is not None:
            x = row_scale.view(-1, *[1] * (x.ndim - 1)) * x
        stream = (residual + x).to(residual.dtype)
    # F.layer_norm has float32 statistics, but requires operands of one dtype.
    common = torch.promote_types(stream.dtype, weight.dtype)
    normed = F.layer_norm(stream.to(common), weight.shape, weight.to(common), bias.to(common), eps)
    return normed.to(working_dtype(stream, stream.dtype)), stream
