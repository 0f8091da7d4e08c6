"""linear_gelu: a linear layer and exact GELU; in one pass where the GPU and the dtype allow it."""

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
        checks.tensor("x", x, None, checks.FLOATS, "(..., K)")
        checks.tensor("weight", weight, 2, checks.FLOATS, "(D, K)")
        checks.tensor("bias", bias, 1, checks.FLOATS, "(D,)")
        if x.ndim == 0:
            raise checks.bad("x", "a scalar", "shape (..., K)")
        checks.size("weight", weight, (weight.shape[0], x.shape[-1]), "(D, K), K as x has")
        checks.size("bias", bias, weight.shape[:1], "(D,), as many as weight has rows")
        checks.same_device("x", x.device, weight=weight, bias=bias)
        dtype = working_dtype(x, x.dtype)
        for name, value in (("weight", weight), ("bias", bias)):
            if working_dtype(value, value.dtype) != dtype:
                raise checks.bad_type(name, value.dtype, f"{checks.names((dtype,))}, as x is")
        if not takes_triton("linear_gelu", x):
            return eager_linear_gelu(x, weight, bias)
        planned = jit.linear_gelu.plan(x.to(dtype), weight.to(dtype), bias, False)
        if x.dtype == weight.dtype == dtype:
            run = _plans.keep(key, planned)
        else:
            run = _plans.keep(key, lambda x, weight, bias: planned(x.to(dtype), weight.to(dtype), bias))
    out: Tensor = run(x, weight, bias)[0]
    return out


def eager_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear_gelu` in plain PyTorch: the matrix product adds the bias, which saves a pass over its output."""
    return F.gelu(F.linear(x, weight, bias))
