"""bias_gelu: bias and exact GELU in one pass, in backward with the bias gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, eager, op
from .device import takes_triton


def _forward(x: Tensor, bias: Tensor) -> Tensor:
    from .jit import bias_gelu as launch

    return launch.forward(x, bias)


def _forward_shape(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _backward(grad: Tensor, x: Tensor, bias: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    from .jit import bias_gelu as launch

    return launch.backward(grad, x, bias)


def _backward_shape(grad: Tensor, x: Tensor, bias: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(bias)


_triton_bias_gelu = op.declare(
    "bias_gelu",
    forward=_forward,
    forward_shape=_forward_shape,
    backward=_backward,
    backward_shape=_backward_shape,
    saves=lambda inputs, outputs: inputs,
    gradients=("x", "bias"),
)


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
    checks.tensor("x", x, None, checks.FLOATS, "(..., D)")
    checks.tensor("bias", bias, 1, checks.FLOATS, "(D,)")
    if x.ndim == 0:
        raise checks.bad("x", "a scalar", "shape (..., D)")
    checks.size("bias", bias, x.shape[-1:], "(D,), x's last dimension")
    checks.same_device("x", x.device, bias=bias)
    if takes_triton("bias_gelu", x):
        out: Tensor = _triton_bias_gelu(x, bias)
        return out
    return eager.bias_gelu(x, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x @ weight.T + bias): the first half of an MLP, its bias added where that is cheapest.

    The Triton path adds it together with the GELU; plain PyTorch leaves it to the matrix product, which saves a
    pass over the widest activation of the model.

    Args:
        x: (..., K).
        weight: (D, K).
        bias: (D,).

    Returns:
        (..., D).
    """
    if takes_triton("bias_gelu", x):
        return bias_gelu(F.linear(x, weight), bias)
    return F.gelu(F.linear(x, weight, bias))
