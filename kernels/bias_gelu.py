"""bias_gelu: bias and exact GELU in one pass; backward also sums the bias gradient."""

import torch.nn.functional as F
from torch import Tensor

from . import checks
from .device import HAS_TRITON, takes_triton
from .plan import Plans

if HAS_TRITON:
    from .jit import bias_gelu as jit

_plans = Plans()


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
        checks.tensor("x", x, None, checks.FLOATS, "(..., D)")
        checks.tensor("bias", bias, 1, checks.FLOATS, "(D,)")
        if x.ndim == 0:
            raise checks.bad("x", "a scalar", "shape (..., D)")
        checks.size("bias", bias, x.shape[-1:], "(D,), x's last dimension")
        checks.same_device("x", x.device, bias=bias)
        if not takes_triton("bias_gelu", x):
            return eager_bias_gelu(x, bias)
        run = _plans.keep(key, jit.bias_gelu.plan(x, bias))
    out: Tensor = run(x, bias)
    return out


def eager_bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu` in plain PyTorch."""
    return F.gelu(x + bias).to(x.dtype)
