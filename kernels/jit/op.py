"""The one way an op with Triton kernels is declared.

`Op.plan` gives a function of a call's tensors, worked out once for all calls like it:
(a) where nothing but the device looks at the call, the launches themselves, within a ``torch.autograd.Function`` only
    if a gradient can be asked for;
(b) for torch.compile, fake tensors and dispatch modes a ``torch.library`` op. Its kernels are shown to inductor
    (``triton_op``), which launches them itself, but where they are interpreted. Its backward is such an op too.
Plain PyTorch does not come here: it is traced straight through, and inductor fuses it.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import plan
from ..device import INTERPRETING

LIBRARY = "mar_fast"
Run = Callable[..., Any]
Results = Sequence[Tensor | None]


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


class _Planned:
    """One plan of a call with gradients: the forward launches, and the backward ones by the gradients' layouts."""

    __slots__ = ("backward", "forward", "options")

    def __init__(self, forward: Run, options: tuple[Any, ...]) -> None:
        self.forward, self.options = forward, options
        self.backward: dict[Any, Run] = {}


class Op:
    """An op with Triton kernels; ``torch.ops.mar_fast.<name>`` and ``<name>_backward`` come with it."""

    def __init__(
        self,
        name: str,
        *,
        outputs: Callable[..., Any],
        forward: Callable[..., Run],
        gradients: Callable[..., Results],
        backward: Callable[..., Run],
        saves: Callable[..., Results],
        differentiable: Sequence[str],
        public: int = 1,
        finish: Callable[[list[Tensor | None]], list[Tensor | None]] | None = None,
        flops: Sequence[Callable[..., int] | None] = (None, None),
        raw_flops: bool = False,
        opaque: Sequence[str] = (),
    ) -> None:
        """Declare an op.

        Args:
            name: The op's name.
            outputs: ``outputs(*tensors, *options) -> output(s)``: their memory, also for fake tensors, None for one
                that these options leave out. Fully annotated: its signature is the op's. Tensors come first, then the
                options.
            forward: ``forward(*tensors, *options) -> run``, worked out once; ``run(*tensors)`` gives what ``outputs``
                allocates, written.
            gradients: ``gradients(*output_gradients, *saved, *options, needs)``: memory for one gradient for each name
                in ``differentiable``, None for one that is not written. An output gradient is None where nothing used
                that output; ``needs[i]`` says whether the i-th gradient is wanted.
            backward: The same arguments ``-> run``; ``run(*output_gradients, *saved)`` gives what ``gradients``
                allocates, written.
            saves: ``saves(tensors, outputs)``: what backward needs.
            differentiable: Names of the tensors that get a gradient.
            public: How many of the outputs have gradients; the others are for backward. An op with such outputs has a
                last option ``save``, whether to write them, which is True wherever a gradient can be asked for.
            finish: Rearranges backward's results, for gradients that share memory: outputs of an op may not.
            flops: Formulas of forward and backward for PyTorch's flop counter.
            raw_flops: Whether these take tensors, not shapes.
            opaque: "forward", "backward": what inductor is not shown. It would take a tensor of indices for written
                where these say at which address something is stored.

        The op is once differentiable: a second derivative raises.
        """
        self.name, self.public = name, public
        self.forward, self._backward, self._gradients, self._saves = forward, backward, gradients, saves
        self._finish = finish
        parameters = inspect.signature(outputs).parameters
        self._names = list(parameters)
        self._tensors = sum(value.annotation in (Tensor, Tensor | None) for value in parameters.values())
        self._positions = [self._names.index(parameter) for parameter in differentiable]
        self._saving = self._names[-1] == "save"
        self.function = self._autograd_function()
        self.custom, self._custom_backward = self._library_ops(outputs, len(differentiable), opaque)
        for formula, op in zip(flops, (name, f"{name}_backward"), strict=True):
            if formula is not None:
                register_flop_formula(getattr(torch.ops.mar_fast, op), get_raw=raw_flops)(formula)

    def plan(self, *inputs: Any) -> Run:
        """A function of the tensors of ``inputs`` that runs this call and every other one with the same key.

        Args:
            *inputs: Tensors, then options.

        Raises:
            RuntimeError: torch.func or forward-mode differentiation is at work.
        """
        tensors, options = inputs[: self._tensors], inputs[self._tensors :]
        training = torch.is_grad_enabled() and any(
            tensors[position] is not None and tensors[position].requires_grad for position in self._positions
        )
        if self._saving and training:
            options = (*options[:-1], True)
        if not torch.compiler.is_compiling() and plan.transformed():
            raise self._untransformed()
        if plan.watched(*tensors):
            return lambda *tensors: self.custom(*tensors, *options)
        forward = self.forward(*tensors, *options)
        if not training:
            return forward
        # Without what Function.apply asks first: torch.func is not at work, or there would be no plan.
        apply: Any = super(torch.autograd.Function, self.function).apply  # type: ignore[misc]
        planned = _Planned(forward, options)
        return lambda *tensors: apply(planned, *tensors)

    def _untransformed(self) -> RuntimeError:
        return RuntimeError(
            f"{self.name}: got a call under torch.func (vmap, grad, jvp, ...) or forward-mode differentiation, "
            "which no kernel takes part in; expected autograd, or use_backend('eager')"
        )

    def opaque(self, *inputs: Any) -> Any:
        """The forward pass planned and run at once: what the library's op does."""
        return _filled(self.forward(*inputs)(*inputs[: self._tensors]))

    def _autograd_function(self) -> type[torch.autograd.Function]:
        op = self

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, planned: _Planned, *tensors: Tensor | None) -> Any:
                ctx.set_materialize_grads(False)
                result = planned.forward(*tensors)
                results = result if type(result) is tuple else (result,)
                ctx.save_for_backward(*op._saves(tensors, results))
                ctx.planned = planned
                return result if op.public == len(results) else results[: op.public]

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor | None) -> Any:
                needed = ctx.needs_input_grad
                needs = [needed[position + 1] for position in op._positions]
                operands = (*gradients, *ctx.saved_tensors)
                if not torch.is_grad_enabled():
                    return (None, *op._run_backward(ctx.planned, operands, needs, len(gradients)))
                with torch.no_grad():
                    results = op._run_backward(ctx.planned, operands, needs, len(gradients))
                came_from = [value for value in operands if value is not None]
                once = (None if result is None else _Once.apply(op.name, result, *came_from) for result in results)
                return (None, *once)

        Function.__name__ = Function.__qualname__ = self.name
        return Function

    def _run_backward(
        self, planned: _Planned, operands: tuple[Tensor | None, ...], needs: list[bool], given: int
    ) -> list[Tensor | None]:
        for gradient in operands[:given]:
            if gradient is not None:
                break
        else:
            return [None] * self._tensors
        if plan.transformed():
            raise self._untransformed()
        # Sizes, dtypes and devices are those of the forward pass: autograd sees to that.
        key: list[Any] = needs.copy()
        try:
            for value in operands:
                if value is None:
                    key.append(None)
                else:
                    key += value.is_contiguous() or value.stride(), value.data_ptr() & 15
        except RuntimeError as error:  # without memory: gradients in a batch, of is_grads_batched
            raise self._untransformed() from error
        run = planned.backward.get(laid := tuple(key))
        if run is None:
            if len(planned.backward) >= plan.LIMIT:
                planned.backward.clear()
            run = planned.backward[laid] = self._backward(*operands, *planned.options, needs)
        return self._placed(run(*operands), needs)

    def _placed(self, results: Results, needs: Sequence[bool]) -> list[Tensor | None]:
        """Results of a backward pass in the places of the tensors that they are gradients of."""
        results = self._finish(list(results)) if self._finish else results
        every: list[Tensor | None] = [None] * self._tensors
        for position, needed, result in zip(self._positions, needs, results, strict=True):
            if needed:
                every[position] = result
        return every

    def _library_ops(self, outputs: Callable[..., Any], gradients: int, opaque: Sequence[str]) -> tuple[Any, Any]:
        tensors, public = self._tensors, self.public

        def with_tangents_an_error() -> None:
            # A library's op loses them in silence.
            if plan.dual():
                raise self._untransformed()

        def forward(*inputs: Any) -> Any:
            with_tangents_an_error()
            return self.opaque(*inputs)

        def forward_fake(*inputs: Any) -> Any:
            with_tangents_an_error()
            return _filled(outputs(*inputs))

        def backward(*inputs: Any) -> tuple[Tensor, ...]:
            with_tangents_an_error()
            return _filled(tuple(self._backward(*inputs)(*inputs[: -1 - options])))

        def backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
            with_tangents_an_error()
            return _filled(tuple(self._gradients(*inputs)))

        signature = inspect.signature(outputs)
        options = len(signature.parameters) - tensors
        forward.__signature__ = signature  # type: ignore[attr-defined]
        saved = inspect.signature(self._gradients).parameters
        annotations = [value.annotation for value in list(signature.parameters.values())[tensors:]]
        kinds = [Tensor | None] * (len(saved) - options - 1) + annotations + [list[bool]]
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        backward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, positional, annotation=kind) for name, kind in zip(saved, kinds, strict=True)],
            return_annotation=tuple[(Tensor,) * max(gradients, 2)],  # type: ignore[misc]
        )
        custom: Any
        custom_backward: Any
        custom, custom_backward = (
            (torch.library.custom_op if INTERPRETING or which in opaque else torch.library.triton_op)(
                f"{LIBRARY}::{self.name}{'' if which == 'forward' else '_backward'}", run, mutates_args=()
            )
            for which, run in (("forward", forward), ("backward", backward))
        )
        custom.register_fake(forward_fake)
        custom_backward.register_fake(backward_fake)

        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*self._saves(inputs, output if isinstance(output, tuple) else (output,)))
            ctx.options = inputs[tensors:]

        def gradient(ctx: Any, *given: Tensor | None) -> Any:
            needs = [ctx.needs_input_grad[position] for position in self._positions]
            nothing: list[Tensor | None] = [None] * options
            given = given[:public]
            if public > 1:  # the empty tensor in place of an output that is left out may have been used all the same
                given = tuple(map(_read, given))
            if all(value is None for value in given):
                return (*[None] * tensors, *nothing)
            results = custom_backward(*given, *ctx.saved_tensors, *ctx.options, needs)
            read = [_read(result) for result in results[:gradients]]
            return (*self._placed(read, needs), *nothing)

        custom.register_autograd(gradient, setup_context=save)
        return custom, custom_backward


def _filled(results: Any) -> Any:
    """A library's op returns no None: an empty tensor in its place. More than one result stays more than one."""
    if not isinstance(results, tuple):
        return results
    like = next(result for result in results if result is not None)
    filled = tuple(like.new_empty((0,)) if result is None else result for result in results)
    return filled if len(filled) > 1 else (*filled, like.new_empty((0,)))


def _read(result: Tensor | None) -> Tensor | None:
    """None again for an empty tensor in its place."""
    return None if result is None or (result.ndim == 1 and not result.numel()) else result
