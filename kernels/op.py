"""The one way an op with a Triton kernel is declared.

From a forward, a backward and their shape functions `declare` makes
(a) a ``torch.autograd.Function``, which eager code calls directly: a custom op would add 8 to 15 us to each call;
(b) a ``torch.library`` custom op with fake and autograd registrations, used under ``torch.compile``: dynamo cannot
    trace into a launch. Its backward is a custom op too, so that it stays opaque when autograd is traced.
The eager path of an op does not come here: plain PyTorch is traced straight through, and inductor fuses it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = "mar_fast"


class _Once(torch.autograd.Function):
    """The identity on a gradient made under create_graph, which cannot be differentiated again.

    ``once_differentiable`` would not do: where the incoming gradient is a constant it lets a second derivative be
    silently left out.
    """

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *came_from: Tensor) -> Tensor:
        ctx.name = name
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(f"{ctx.name} is once_differentiable: got a second derivative, expected only a first")


def declare(
    name: str,
    *,
    forward: Callable[..., Any],
    forward_shape: Callable[..., Any],
    backward: Callable[..., Any],
    backward_shape: Callable[..., Any],
    saves: Callable[..., Sequence[Tensor]],
) -> Callable[..., Any]:
    """Declare an op and return the function that runs it.

    Args:
        name: The op becomes ``torch.ops.mar_fast.<name>``, its backward ``<name>_backward``.
        forward: ``forward(*inputs) -> output(s)``; fully annotated, since the schema is read from the annotations.
        forward_shape: The same on fake tensors: empty outputs of the right shape, dtype and strides.
        backward: ``backward(*output_gradients, *saved) -> tuple of gradients``, one for each input; annotated.
        backward_shape: The same on fake tensors.
        saves: ``saves(inputs, output) -> tensors`` that backward needs.

    Every input is a tensor that gets a gradient. The op is once differentiable: a second derivative raises.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            ctx.save_for_backward(*saves(inputs, output))
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            saved = ctx.saved_tensors
            with torch.no_grad():
                results = backward(*gradients, *saved)
            if not torch.is_grad_enabled():
                return results
            return tuple(_Once.apply(name, result, *gradients, *saved) for result in results)

    Function.__name__ = Function.__qualname__ = name

    custom = torch.library.custom_op(f"{LIBRARY}::{name}", forward, mutates_args=())
    custom_backward = torch.library.custom_op(f"{LIBRARY}::{name}_backward", backward, mutates_args=())
    custom.register_fake(forward_shape)
    custom_backward.register_fake(backward_shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*saves(inputs, output))

    def custom_gradient(ctx: Any, *gradients: Tensor) -> Any:
        return custom_backward(*gradients, *ctx.saved_tensors)

    custom.register_autograd(custom_gradient, setup_context=setup_context)

    def run(*inputs: Any) -> Any:
        return custom(*inputs) if torch.compiler.is_compiling() else Function.apply(*inputs)

    run.__name__ = run.__qualname__ = name
    return run
