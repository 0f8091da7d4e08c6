"""mlp in Triton: linear_gelu and a product by cuBLAS; backward recomputes the output of GELU.

Of the two hidden activations (M, D) only fc1's product, without its bias, is kept. bias_gelu's backward reads it
anyway, and writes GELU's output besides the gradient: for ViT-B, 32 clips, 50 %, on an H200, 154 MB or 36 us a layer
by its copy rate, for 154 MB less kept a layer, 2.6 of 12.4 GB for MAR's step (``python -m mar_fast.bench kept``).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import flops
from . import bias_gelu, linear_gelu
from .op import Op, Results, Run


def outputs(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    """Both in x's dtype: the output (..., E), and for backward fc1's product without its bias (..., D)."""
    out, product = (
        torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
        for weight in (fc2_weight, fc1_weight)
    )
    return out, product if save else None  # type: ignore[return-value]


def forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, save: bool) -> Run:
    """Both layers."""
    first = linear_gelu.forward(x, fc1_weight, fc1_bias, save)

    def run(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> Results:
        hidden, product = first(x, fc1_weight, fc1_bias)
        return F.linear(hidden, fc2_weight, fc2_bias), product

    return run


def gradients(grad, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, product, save, needs) -> Results:
    """Memory for the gradients of x and the four parameters."""
    wanted = zip((x, fc1_weight, fc1_bias, fc2_weight, fc2_bias), needs, strict=True)
    return [
        torch.empty(one.shape, dtype=one.dtype, device=one.device) if one is not None and needed else None
        for one, needed in wanted
    ]


def backward(grad, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, product, save, needs) -> Run:
    """Products by cuBLAS, and bias_gelu's backward between them."""
    (columns, summed), count = fc1_weight.shape, math.prod(x.shape[:-1])
    hidden_grad = torch.empty((count, columns), dtype=x.dtype, device="meta")
    through_gelu = bias_gelu.backward_and_output(hidden_grad, product, fc1_bias, (True, needs[2]))

    def run(grad, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, product) -> Results:
        grad = grad.reshape(count, fc2_weight.shape[0])
        grad_product, grad_fc1_bias, hidden = through_gelu(grad @ fc2_weight, product, fc1_bias)
        grad_product, hidden = grad_product.view(count, columns), hidden.view(count, columns)
        return (
            (grad_product @ fc1_weight).view(x.shape) if needs[0] else None,
            grad_product.T @ x.reshape(count, summed) if needs[1] else None,
            grad_fc1_bias,
            grad.T @ hidden if needs[3] else None,
            grad.sum(0, dtype=fc2_bias.dtype) if fc2_bias is not None and needs[4] else None,
        )

    return run


mlp = Op(
    "mlp",
    outputs=outputs,
    forward=forward,
    gradients=gradients,
    backward=backward,
    saves=lambda tensors, outputs: (*tensors, outputs[1]),
    differentiable=("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
    flops=(flops.mlp, flops.mlp_backward),
)
