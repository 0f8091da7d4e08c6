"""scaled_linear: a linear layer on e4m3 rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .device import has_fp8, without_autocast
from .quantize_rows import E4M3, QuantizedRows

MULTIPLE = 16
"""What both dimensions of a weight must be multiples of, for 16-byte loads."""


def scaled_linear(
    x: QuantizedRows, weight: QuantizedRows, bias: Tensor | None = None, *, emulate: bool = False
) -> Tensor:
    """``x @ weight.T + bias`` of e4m3 rows: products in 8 bits, sums in float32, the result rounded to bfloat16.

    This is ``torch._scaled_mm`` with a scale for each row of x and of weight. Its sums are those of the tensor cores,
    which keep fewer bits than float32 (22 on Hopper), but far more than the operands have.

    Args:
        x: Rows (..., M, K), at least two dimensions.
        weight: Rows (N, K); K and N are multiples of 16.
        bias: (N,), rounded to bfloat16.
        emulate: Compute the same in plain PyTorch, on any device: exact products, sums in float32.

    Returns:
        (..., M, N), rounded to bfloat16, which every device supports, then in ``x.dtype``. No gradients.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit, or the device has no fp8 products; the message says which.
    """
    _check(x, weight, bias)
    bias = None if bias is None else bias.to(torch.bfloat16)
    if emulate:
        with without_autocast(x.values):
            y = F.linear(x.values.float(), weight.values.float()) * x.scale * weight.scale.T
            y = y if bias is None else y + bias
        return y.to(torch.bfloat16).to(x.dtype)
    need_fp8("x", x.values)
    rows = x.values.flatten(0, -2)
    # Partial sums stay in the tensor cores: float32 registers would cost time, and gain less than e4m3 loses.
    y = torch._scaled_mm(
        rows, weight.values.T, x.scale.view(-1, 1), weight.scale.view(1, -1), bias,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return y.unflatten(0, x.values.shape[:-1]).to(x.dtype)


def need_fp8(argument: str, operand: Tensor) -> None:
    """Check that the operand's device has fp8 products.

    Raises:
        ValueError: it has none.
    """
    if not has_fp8(operand):
        accepted = "a GPU that has them (sm_89, sm_90 or later), or emulate=True, which is slow"
        raise checks.bad(argument, f"tensors on {operand.device}, without fp8 products", accepted)


def _check(x: QuantizedRows, weight: QuantizedRows, bias: Tensor | None) -> None:
    for argument, rows, shape in (("x", x, "(..., K)"), ("weight", weight, "(N, K)")):
        if not isinstance(rows, QuantizedRows):
            raise checks.bad_type(argument, type(rows).__name__, "QuantizedRows, as quantize_rows gives them")
        checks.tensor(f"{argument}.values", rows.values, 2 if argument == "weight" else None, (E4M3,), shape)
        checks.tensor(f"{argument}.scale", rows.scale, None, (torch.float32,), "(..., 1)")
        checks.size(f"{argument}.scale", rows.scale, (*rows.values.shape[:-1], 1), "a scale for each row")
    outputs, inputs = weight.values.shape
    if outputs % MULTIPLE or inputs % MULTIPLE:
        raise checks.bad("weight", f"shape {(outputs, inputs)}", f"multiples of {MULTIPLE}")
    if x.values.ndim < 2 or x.values.shape[-1] != inputs:
        raise checks.bad("x", f"shape {tuple(x.values.shape)}", f"(..., {inputs}), two dimensions or more")
    if bias is not None:
        checks.tensor("bias", bias, 1, checks.FLOATS, "(N,)")
        checks.size("bias", bias, (outputs,), "(N,), with N of weight (N, K)")
    device = x.values.device
    checks.same_device("x", device, weight=weight.values, bias=bias)
