"""linear_gelu: a linear layer and exact GELU; in one pass where the GPU and the dtype allow it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .device import HAS_TRITON, takes_triton, working_dtype
from .plan import Plans

if HAS_TRITON:
    from .jit import linear_gelu as jit

_plans = Plans()


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x @ weight.T + bias), the first half of an MLP; GELU in its exact form (arXiv 1606.08415).

    Under autocast it works in autocast's dtype, as ``F.linear`` does; gradients have the dtypes of the arguments.

    Args:
        x: (..., K), any strides.
        weight: (D, K), in x's dtype unless autocast is on.
        bias: (D,), likewise.

    Returns:
        (..., D), in x's or autocast's dtype. Gradients flow to x, weight and bias.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    key, run = _plans.find(x, weight, bias)
    if run is None:
        dtype = check_layers(x, weight=weight, bias=bias)
        if not takes_triton("linear_gelu", x):
            return eager_linear_gelu(x, weight, bias)
        planned = jit.linear_gelu.plan(x.to(dtype), weight.to(dtype), bias, False)
        if x.dtype == weight.dtype == dtype:
            run = _plans.keep(key, planned)
        else:
            run = _plans.keep(key, lambda x, weight, bias: planned(x.to(dtype), weight.to(dtype), bias))
    return run(x, weight, bias)[0]


def check_layers(x: Tensor, optional: str = "", **parameters: Tensor | None) -> torch.dtype:
    """Check x (..., K) and the weight (D, K) and bias (D,) of each layer after it; returns the dtype to compute in.

    ``optional`` names the bias that may be None.
    """
    checks.tensor("x", x, None, checks.FLOATS, "(..., K)")
    if x.ndim == 0:
        raise checks.bad("x", "a scalar", "shape (..., K)")
    dtype, columns = working_dtype(x, x.dtype), x.shape[-1]
    for number, (name, value) in enumerate(parameters.items()):
        if number % 2 == 0:
            checks.tensor(name, value, 2, checks.FLOATS, "(D, K)")
            assert value is not None
            checks.size(name, value, (value.shape[0], columns), "(D, K), with K of its input")
            columns = value.shape[0]
        elif value is not None or name != optional:
            checks.tensor(name, value, 1, checks.FLOATS, "(D,)")
            assert value is not None
            checks.size(name, value, (columns,), "(D,), with D of its weight")
        if value is not None and working_dtype(value, value.dtype) != dtype:
            raise checks.bad_type(name, value.dtype, f"{checks.names((dtype,))}, as x is")
    checks.same_device("x", x.device, **parameters)
    return dtype


def eager_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear_gelu` in plain PyTorch: the matrix product adds the bias, which saves a pass over its output."""
    return F.gelu(F.linear(x, weight, bias))
