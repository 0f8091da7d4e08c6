"""mlp: two linear layers with exact GELU between, which save one hidden activation for backward instead of two."""

import torch.nn.functional as F
from torch import Tensor

from .device import HAS_TRITON, takes_triton
from .linear_gelu import check_layers
from .plan import Plans

if HAS_TRITON:
    from .jit import mlp as jit

_plans = Plans()


def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor | None = None) -> Tensor:
    """GELU(x @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias; GELU in its exact form (arXiv 1606.08415).

    On the Triton path only fc1's product is saved for backward, which recomputes the output of GELU in the pass that
    computes GELU's gradient. Under autocast it works in autocast's dtype; gradients have the dtypes of the arguments.

    Args:
        x: (..., K), any strides.
        fc1_weight: (D, K), like all parameters in x's dtype unless autocast is on.
        fc1_bias: (D,).
        fc2_weight: (E, D).
        fc2_bias: (E,), or None.

    Returns:
        (..., E), in x's or autocast's dtype. Gradients flow to every argument.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    key, run = _plans.find(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if run is None:
        weights = dict(fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias)
        dtype = check_layers(x, "fc2_bias", **weights)
        if not takes_triton("mlp", x):
            return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
        planned = jit.mlp.plan(x.to(dtype), fc1_weight.to(dtype), fc1_bias, fc2_weight.to(dtype), fc2_bias, False)
        if x.dtype == fc1_weight.dtype == fc2_weight.dtype == dtype:
            run = _plans.keep(key, planned)
        else:
            run = _plans.keep(key, lambda x, w1, b1, w2, b2: planned(x.to(dtype), w1.to(dtype), b1, w2.to(dtype), b2))
    return run(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)[0]
