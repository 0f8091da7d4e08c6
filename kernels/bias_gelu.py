"""bias_gelu: bias and exact GELU in one pass; backward also sums the bias gradient."""

import torch.nn.functional as F
from torch import Tensor

from . import checks
from .device import HAS_TRITON, limit_of_e4m3, takes_triton, working_dtype
from .plan import Plans
from .quantize_rows import QuantizedRows, eager_quantize_rows, without_gradients

if HAS_TRITON:
    from .jit import bias_gelu as jit

_plans, _plans_of_rows = Plans(), Plans()


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias), the exact form with erf (arXiv 1606.08415).

    Args:
        x: (..., D), any strides.
        bias: (D,).

    Returns:
        Shape and dtype of x. Gradients flow to x and bias.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    key, run = _plans.find(x, bias)
    if run is None:
        _check(x, bias)
        if not takes_triton("bias_gelu", x):
            return eager_bias_gelu(x, bias)
        run = _plans.keep(key, jit.bias_gelu.plan(x, bias))
    return run(x, bias)


def _check(x: Tensor, bias: Tensor) -> None:
    checks.tensor("x", x, None, checks.FLOATS, "(..., D)")
    checks.tensor("bias", bias, 1, checks.FLOATS, "(D,)")
    if x.ndim == 0:
        raise checks.bad("x", "a scalar", "shape (..., D)")
    checks.size("bias", bias, x.shape[-1:], "(D,), x's last dimension")
    checks.same_device("x", x.device, bias=bias)


def bias_gelu_rows(x: Tensor, bias: Tensor) -> QuantizedRows:
    """`bias_gelu` for a product in fp8, in one pass: `quantize_rows` of GELU(x + bias) in float32.

    Arguments and errors are those of `bias_gelu`; an argument that needs a gradient is a ValueError too.
    """
    key, run = _plans_of_rows.find(x, bias)
    dtype = working_dtype(x, x.dtype)
    if run is None:
        _check(x, bias)
        without_gradients("x, bias", x, bias)
        if not takes_triton("bias_gelu_rows", x, limit_of_e4m3(x)):
            return eager_quantize_rows(F.gelu(x.float() + bias.float()), dtype)
        run = _plans_of_rows.keep(key, jit.bias_gelu_rows.plan(x, bias))
    values, scale = run(x, bias)
    return QuantizedRows(values, scale, dtype)


def eager_bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu` in plain PyTorch."""
    return F.gelu(x + bias).to(x.dtype)
