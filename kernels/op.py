"""The one way an op with a Triton kernel is declared.

From a forward, a backward and their shape functions `declare` makes
(a) a ``torch.autograd.Function``, which eager code calls directly: a custom op would add 8 to 15 us to each call;
(b) a ``torch.library`` custom op with fake and autograd registrations, used where something else than the device looks
    at the call: torch.compile, fake tensors, dispatch modes. Its backward is a custom op too, so that it stays opaque
    when autograd is traced.
The eager path of an op does not come here: plain PyTorch is traced straight through, and inductor fuses it.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

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
    saves: Callable[..., Sequence[Tensor | None]],
    gradients: Sequence[str],
    finish: Callable[[list[Tensor | None]], list[Tensor | None]] | None = None,
) -> Callable[..., Any]:
    """Declare an op and return the function that runs it.

    Args:
        name: The op becomes ``torch.ops.mar_fast.<name>``, its backward ``<name>_backward``.
        forward: ``forward(*inputs) -> output(s)``; fully annotated, since the schema is read from the annotations.
            Its inputs are tensors, ``Tensor | None``, and options (everything else).
        forward_shape: The same on fake tensors: empty outputs of the right shape, dtype and strides.
        backward: ``backward(*output_gradients, *saved, *options, needs)`` gives one tensor for each name in
            ``gradients``; annotated. An output gradient is None where nothing used that output. ``needs[i]`` says
            whether the i-th gradient is wanted; where it is not, any empty tensor will do.
        backward_shape: The same on fake tensors.
        saves: ``saves(inputs, outputs) -> tensors`` that backward needs; both are tuples.
        gradients: Names of those parameters of ``forward`` that get a gradient.
        finish: Rearranges backward's results, for gradients that share memory: outputs of a custom op may not.

    The op is once differentiable: a second derivative raises.
    """
    parameters = inspect.signature(forward).parameters
    places = [list(parameters).index(parameter) for parameter in gradients]
    options = [
        place for place, value in enumerate(parameters.values()) if value.annotation not in (Tensor, Tensor | None)
    ]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saves(inputs, output if isinstance(output, tuple) else (output,)))
        ctx.options = [inputs[place] for place in options]

    def gradients_by(run_backward: Callable[..., Any], ctx: Any, output_gradients: tuple[Tensor | None, ...]) -> Any:
        needs = [ctx.needs_input_grad[place] for place in places]
        every: list[Tensor | None] = [None] * len(parameters)
        if any(gradient is not None for gradient in output_gradients):
            result = run_backward(*output_gradients, *ctx.saved_tensors, *ctx.options, needs)
            results = list(result) if isinstance(result, tuple | list) else [result]
            results = finish(results) if finish else results
            for place, needed, result in zip(places, needs, results, strict=True):
                every[place] = result if needed else None
        return tuple(every)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *output_gradients: Tensor | None) -> Any:
            with torch.no_grad():
                results = gradients_by(backward, ctx, output_gradients)
            if not torch.is_grad_enabled():
                return results
            came_from = [value for value in (*output_gradients, *ctx.saved_tensors) if value is not None]
            return tuple(None if result is None else _Once.apply(name, result, *came_from) for result in results)

    Function.__name__ = Function.__qualname__ = name

    custom = torch.library.custom_op(f"{LIBRARY}::{name}", forward, mutates_args=())
    custom_backward = torch.library.custom_op(f"{LIBRARY}::{name}_backward", backward, mutates_args=())
    custom.register_fake(forward_shape)
    custom_backward.register_fake(backward_shape)

    def custom_gradient(ctx: Any, *output_gradients: Tensor | None) -> Any:
        return gradients_by(custom_backward, ctx, output_gradients)

    custom.register_autograd(custom_gradient, setup_context=save)

    def run(*inputs: Any) -> Any:
        # Fake tensors and dispatch modes (flop counters, selective checkpointing) must see an op, not a launch.
        opaque = torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or is_fake(inputs[0])
        return custom(*inputs) if opaque else Function.apply(*inputs)

    run.__name__ = run.__qualname__ = name
    return run
