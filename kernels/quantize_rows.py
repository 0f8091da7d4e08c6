"""quantize_rows: activations or weights as e4m3 rows, each with a scale of its own."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .device import HAS_TRITON, limit_of_e4m3, takes_triton, working_dtype
from .plan import Plans

if HAS_TRITON:
    from .jit import quantize_rows as jit

_plans = Plans()

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
LEAST = 2.0**-100  # so that rows of zeros have a scale above 0


class QuantizedRows(NamedTuple):
    """Rows in 8 bits: row i stands for ``values[i].float() * scale[i]``.

    Attributes:
        values: (..., D) float8_e4m3fn.
        scale: (..., 1) float32.
        dtype: The dtype of products of these rows: autocast's if it was on, else that of what was quantised.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Quantise each row to e4m3 (OCP OFP8; Micikevicius et al., arXiv 2209.05433) by its largest magnitude.

    The scale is max|x| / 448, which maps that magnitude to the largest of e4m3; rounding is to nearest, ties to even.
    So activations have a scale for each token, weights one for each output channel. A row with NaN or infinity gives
    NaN in every product.

    Args:
        x: (..., D), any strides.

    Returns:
        The rows, without gradients; products of them are in autocast's dtype if it is on, else in x's.

    Raises:
        ValueError, TypeError: x is no floating-point tensor (..., D), or needs a gradient, which this op lacks.
    """
    key, run = _plans.find(x)
    if run is None:
        checks.tensor("x", x, None, checks.FLOATS, "(..., D)")
        if x.ndim == 0 or x.shape[-1] == 0:
            raise checks.bad("x", f"shape {tuple(x.shape)}", "shape (..., D), D at least 1")
        without_gradients("x", x)
        if not takes_triton("quantize_rows", x, limit_of_e4m3(x)):
            return eager_quantize_rows(x, working_dtype(x, x.dtype))
        run = _plans.keep(key, jit.quantize_rows.plan(x))
    values, scale = run(x)
    return QuantizedRows(values, scale, working_dtype(x, x.dtype))


def eager_quantize_rows(x: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """`quantize_rows` in plain PyTorch, with the same bits."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp(min=LEAST)
    # Two roundings can take the largest magnitude just above 448, which e4m3 rounds to 448: nothing overflows.
    return QuantizedRows((x * (LARGEST / largest)).to(E4M3), largest * (1 / LARGEST), dtype)


def without_gradients(argument: str, *tensors: Tensor | None) -> None:
    """Check that no gradient can be asked for."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        accepted = "one that needs none, or torch.no_grad(): rows in 8 bits are for inference"
        raise checks.bad(argument, "a tensor that requires a gradient", accepted)
