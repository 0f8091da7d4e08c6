"""add_layer_norm: residual add, layer scale, drop path and LayerNorm."""

from torch import Tensor

from . import checks, eager
from .device import eager_only


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    gamma: Tensor | None = None,
    drop_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum = x + drop_scale[:, None, None] * gamma * branch`` and ``normed = LayerNorm(sum)``.

    Args:
        x: (B, N, D), the residual stream.
        branch: (B, N, D), what a sub-layer adds to it, or None for nothing (then sum is x).
        weight: (D,), LayerNorm's.
        bias: (D,), LayerNorm's.
        eps: Added to the variance.
        gamma: (D,), layer scale (CaiT, arXiv 2103.17239, section 2.1).
        drop_scale: (B,), stochastic depth (arXiv 1603.09382): 0 for a dropped sample, 1 / keep probability else.

    Returns:
        ``sum`` in x's dtype and ``normed`` in the dtype of the next matrix product: autocast's where it is on,
        else x's. Statistics are in float32. Gradients flow to every floating-point input.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    checks.tensor("x", x, 3, checks.FLOATS, "(B, N, D)")
    width = x.shape[2]
    if branch is not None:
        checks.tensor("branch", branch, 3, checks.FLOATS, "(B, N, D)")
        checks.size("branch", branch, x.shape, "x's (B, N, D)")
    vectors = {"weight": weight, "bias": bias} | ({} if gamma is None else {"gamma": gamma})
    for argument, vector in vectors.items():
        checks.tensor(argument, vector, 1, checks.FLOATS, "(D,)")
        checks.size(argument, vector, (width,), "(D,)")
    if drop_scale is not None:
        checks.tensor("drop_scale", drop_scale, 1, checks.FLOATS, "(B,)")
        checks.size("drop_scale", drop_scale, x.shape[:1], "(B,)")
    for argument, value in (("gamma", gamma), ("drop_scale", drop_scale)):
        if value is not None and branch is None:
            raise checks.bad(argument, "a tensor", "None, since branch is None")
    checks.positive("eps", eps)
    checks.same_device("x", x.device, branch=branch, weight=weight, bias=bias, gamma=gamma, drop_scale=drop_scale)
    eager_only("add_layer_norm", x)
    return eager.add_layer_norm(x, branch, weight, bias, eps, gamma, drop_scale)
