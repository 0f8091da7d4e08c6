"""add_layer_norm: residual add, layer scale, drop path and LayerNorm."""

from typing import Any

import torch
from torch import Tensor

from . import checks, eager, op
from .device import takes_triton

Four = tuple[Tensor, Tensor, Tensor, Tensor]
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> Four:
    from .jit import add_layer_norm as launch

    return launch.forward(x, branch, weight, bias, eps, gamma, drop_scale, dtype)


def _forward_shape(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> Four:
    statistic = torch.empty((x.shape[0] * x.shape[1],), dtype=torch.float32, device=x.device)
    total = torch.empty(x.shape if branch is not None else (0,), dtype=x.dtype, device=x.device)
    return total, torch.empty(x.shape, dtype=dtype, device=x.device), statistic, torch.empty_like(statistic)


def _saves(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    x, branch, weight, bias, _, gamma, drop_scale, _, _ = inputs
    total, _, mean, rstd = outputs
    scaled = any(scale is not None and scale.requires_grad for scale in (gamma, drop_scale))
    return (x if branch is None else total, mean, rstd, weight, bias, branch if scaled else None, gamma, drop_scale)


def _wanted(
    grad_normed: Tensor | None,
    total: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    branch_dtype: torch.dtype,
    needs: list[bool],
) -> list[bool]:
    """Which gradients backward computes. That of an unscaled branch is that of x: _finish hands it out twice."""
    shared = gamma is None and drop_scale is None and branch_dtype == total.dtype
    of_x, of_branch, of_weight, of_bias, of_gamma, of_drop_scale = needs
    normed = grad_normed is not None
    return [
        of_x or (of_branch and shared), of_branch and not shared, of_weight and normed, of_bias and normed,
        of_gamma, of_drop_scale,
    ]  # fmt: skip


def _backward(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    grad_mean: Tensor | None,
    grad_rstd: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    branch_dtype: torch.dtype,
    needs: list[bool],
) -> Six:
    from .jit import add_layer_norm as launch

    if grad_total is not None and grad_total.shape != total.shape:
        grad_total = None  # that of the empty tensor in place of a sum
    wanted = _wanted(grad_normed, total, gamma, drop_scale, branch_dtype, needs)
    operands = (grad_total, grad_normed, total, mean, rstd, weight, bias, branch, gamma, drop_scale)
    of_x, of_branch, of_weight, of_bias, of_gamma, of_drop_scale = launch.backward(*operands, branch_dtype, wanted)
    return of_x, of_branch, of_weight, of_bias, of_gamma, of_drop_scale


def _backward_shape(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    grad_mean: Tensor | None,
    grad_rstd: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    branch_dtype: torch.dtype,
    needs: list[bool],
) -> Six:
    wanted = _wanted(grad_normed, total, gamma, drop_scale, branch_dtype, needs)
    vectors = [torch.float32 if vector is None else vector.dtype for vector in (weight, bias, gamma, drop_scale)]
    shapes = (total.shape, total.shape, *(weight.shape,) * 3, total.shape[:1])
    x, branch_, weight_, bias_, gamma_, drop_scale_ = (
        torch.empty(shape if want else (0,), dtype=dtype, device=total.device)
        for want, shape, dtype in zip(wanted, shapes, (total.dtype, branch_dtype, *vectors), strict=True)
    )
    return x, branch_, weight_, bias_, gamma_, drop_scale_


def _finish(results: list[Tensor | None]) -> list[Tensor | None]:
    x, branch, weight, bias, gamma, drop_scale = results
    x, branch = (None if value is None or value.ndim == 1 else value for value in (x, branch))
    weight, bias = (None if value is None or not value.numel() else value for value in (weight, bias))
    return [x, x if branch is None else branch, weight, bias, gamma, drop_scale]


_triton_add_layer_norm = op.declare(
    "add_layer_norm",
    forward=_forward,
    forward_shape=_forward_shape,
    backward=_backward,
    backward_shape=_backward_shape,
    saves=_saves,
    gradients=("x", "branch", "weight", "bias", "gamma", "drop_scale"),
    finish=_finish,
)


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
    if takes_triton("add_layer_norm", x):
        dtypes = eager.working_dtype(x, x.dtype), x.dtype if branch is None else branch.dtype
        total, normed, _, _ = _triton_add_layer_norm(x, branch, weight, bias, eps, gamma, drop_scale, *dtypes)
        return x if branch is None else total, normed
    return eager.add_layer_norm(x, branch, weight, bias, eps, gamma, drop_scale)
