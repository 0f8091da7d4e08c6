"""ScaledLinear: the linear layer in fp8 that `mar_fast.quantize` puts into blocks."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from .kernels import QuantizedRows, quantize_rows, scaled_linear


class ScaledLinear(nn.Module):
    """``nn.Linear`` with an e4m3 weight that has a scale for each output channel; activations get one for each token.

    Attributes:
        weight: (out_features, in_features) float8_e4m3fn, a buffer.
        weight_scale: (out_features, 1) float32, a buffer: weight row i is ``weight[i].float() * weight_scale[i]``.
        bias: (out_features,), or None.
        emulate: Whether products are computed in plain PyTorch, for devices without fp8 products.
    """

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.weight_scale: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.bias = bias
        self.emulate = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScaledLinear":
        """Move the layer; ``.bfloat16()`` and the like change neither weight nor scale."""
        kept = self.weight, self.weight_scale
        super()._apply(fn, recurse)
        self.weight, self.weight_scale = (value.to(self.weight.device) for value in kept)
        return self

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """(..., in_features), or QuantizedRows of that shape, -> (..., out_features)."""
        return self.product(x, self.bias)

    def product(self, x: Tensor | QuantizedRows, bias: Tensor | None = None) -> Tensor:
        """`forward` with another bias, or with none."""
        rows = x if isinstance(x, QuantizedRows) else quantize_rows(x)
        weight = QuantizedRows(self.weight, self.weight_scale, rows.dtype)
        return scaled_linear(rows, weight, bias, emulate=self.emulate)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        (outputs, inputs), how = self.weight.shape, ", emulated" * self.emulate
        return f"in_features={inputs}, out_features={outputs}, bias={self.bias is not None}, e4m3{how}"


def scaled_layers(model: nn.Module) -> Iterator[tuple[str, ScaledLinear]]:
    """The fp8 layers of a model, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ScaledLinear))
