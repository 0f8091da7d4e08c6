"""`Op`: how an op with Triton kernels is declared.

`Op.plan` returns a function of a call's tensors that serves every call with the same key:
(a) normally the launches themselves, within a ``torch.autograd.Function`` only if a gradient can be asked for;
(b) under torch.compile, with fake tensors and under dispatch modes, a ``torch.library`` op with another one for its
    backward. Inductor sees their kernels (``triton_op``) and launches them itself, unless they are interpreted.
Calls that run in plain PyTorch do not come here: they are traced as they are, and inductor fuses them.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import plan
from ..checks import NoGradient
from ..device import INTERPRETING
from ..library import NAMESPACE

Run = Callable[..., Any]
Results = Sequence[Tensor | None]


@dataclass(slots=True)
class _Planned:
    """The plan of a call with gradients; ``backward`` has a run for each set of wanted gradients and layouts."""

    forward: Run
    options: tuple[Any, ...]
    backward: dict[Any, Run] = field(default_factory=dict)


class Op:
    """An op with Triton kernels; it also registers ``torch.ops.mar_fast.<name>`` and ``<name>_backward``."""

    def __init__(
        self,
        name: str,
        *,
        outputs: Callable[..., Any],
        forward: Callable[..., Run],
        gradients: Callable[..., Results] | None = None,
        backward: Callable[..., Run] | None = None,
        saves: Callable[..., Results] | None = None,
        differentiable: Sequence[str] = (),
        public: int = 1,
        finish: Callable[[list[Tensor | None]], list[Tensor | None]] | None = None,
        flops: Sequence[Callable[..., int]] = (),
        opaque: Sequence[str] = (),
    ) -> None:
        """Declare an op.

        Args:
            name: The op's name.
            outputs: ``outputs(*tensors, *options)`` allocates the output(s), for fake tensors too; None for one that
                the options leave out. Its annotated signature is the op's: tensors first, then options.
            forward: ``forward(*tensors, *options) -> run``, where ``run(*tensors)`` returns the outputs, written.
            gradients: ``gradients(*output_gradients, *saved, *options, needs)`` allocates a gradient for each name in
                ``differentiable``, None for one that is not written. Its parameters name the operands of backward. An
                output's gradient is None if that output was not used; ``needs[i]`` says whether gradient i is wanted.
            backward: The same arguments ``-> run``, where ``run(*output_gradients, *saved)`` returns the gradients,
                written.
            saves: ``saves(tensors, outputs)`` returns what backward needs; by default the tensors.
            differentiable: Names of the tensors that get a gradient; without any there is no backward pass to declare.
            public: How many of the outputs have gradients; the others are for backward. An op with such outputs has a
                last option ``save``, whether to write them, which becomes True if a gradient can be asked for.
            finish: Rearranges backward's results, for gradients that share memory, which a library op may not return.
            flops: Formulas of forward and backward for PyTorch's flop counter, which take tensors.
            opaque: The passes ("forward", "backward") whose kernels are hidden from inductor, which mistakes an index
                tensor for an output if a kernel computes store addresses from it.

        The op is once differentiable: a second derivative raises.
        """
        self.name, self.public = name, public
        self.forward = forward
        self._backward: Any = backward
        self._gradients: Any = gradients
        self._saves: Any = saves or (lambda tensors, outputs: tensors)
        self._finish = finish
        parameters = inspect.signature(outputs).parameters
        names = list(parameters)
        self._tensors = sum(value.annotation in (Tensor, Tensor | None) for value in parameters.values())
        self._positions = [names.index(parameter) for parameter in differentiable]
        self._results = [
            differentiable.index(name) if name in differentiable else -1 for name in names[: self._tensors]
        ]
        self._saving = names[-1] == "save"
        self.function = self._autograd_function()
        self.custom = self._library_op(outputs, opaque)
        for formula, op in zip(flops, (name, f"{name}_backward"), strict=False):
            register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), op), get_raw=True)(formula)

    def plan(self, *inputs: Any) -> Run:
        """A function of the tensors of ``inputs`` that runs this call and every other one with the same key.

        Args:
            *inputs: Tensors, then options.

        Raises:
            RuntimeError: torch.func or forward-mode differentiation is active.
        """
        tensors, options = inputs[: self._tensors], inputs[self._tensors :]
        training = torch.is_grad_enabled() and any(
            tensors[position] is not None and tensors[position].requires_grad for position in self._positions
        )
        if self._saving and training:
            options = (*options[:-1], True)
        if not torch.compiler.is_compiling() and plan.transformed():
            raise self._no_transforms()
        if plan.watched(*tensors):
            return lambda *tensors: self.custom(*tensors, *options)
        forward = self.forward(*tensors, *options)
        if not training:
            return forward
        # Skips the checks of Function.apply for torch.func, which is not active here.
        apply: Any = super(torch.autograd.Function, self.function).apply  # type: ignore[misc]
        planned = _Planned(forward, options)
        return lambda *tensors: apply(planned, *tensors)

    def _no_transforms(self) -> RuntimeError:
        return RuntimeError(
            f"{self.name}: got a call under torch.func (vmap, grad, jvp, ...) or forward-mode differentiation, "
            "which the kernels do not support; expected autograd, or use_backend('eager')"
        )

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
                # Not once_differentiable: it leaves out a second derivative if the incoming gradient is a constant.
                message = f"{op.name} is once_differentiable: got a second derivative, expected only a first"
                present = [value for value in operands if value is not None]
                once = (None if result is None else NoGradient.apply(message, result, *present) for result in results)
                return (None, *once)

        Function.__name__ = Function.__qualname__ = self.name
        return Function

    def _run_backward(
        self, planned: _Planned, operands: tuple[Tensor | None, ...], needs: list[bool], num_gradients: int
    ) -> list[Tensor | None]:
        for gradient in operands[:num_gradients]:
            if gradient is not None:
                break
        else:
            return [None] * self._tensors
        if plan.transformed():
            raise self._no_transforms()
        # autograd guarantees the sizes, dtypes and devices of the forward pass.
        parts: list[Any] = needs.copy()
        try:
            for value in operands:
                if value is None:
                    parts.append(None)
                else:
                    parts += value.is_contiguous() or value.stride(), value.data_ptr() & 15
        except RuntimeError as error:  # batched gradients (is_grads_batched) have no data_ptr
            raise self._no_transforms() from error
        run = planned.backward.get(key := tuple(parts))
        if run is None:
            if len(planned.backward) >= plan.LIMIT:
                planned.backward.clear()
            run = planned.backward[key] = self._backward(*operands, *planned.options, needs)
        return self._per_tensor(run(*operands), needs)

    def _per_tensor(self, results: Results, needs: Sequence[bool]) -> list[Tensor | None]:
        """Results of a backward pass as one gradient, or None, for each tensor of the op."""
        results = self._finish(list(results)) if self._finish else results
        assert len(results) == len(needs)
        return [None if i < 0 or not needs[i] else results[i] for i in self._results]

    def _library_op(self, outputs: Callable[..., Any], opaque: Sequence[str]) -> Any:
        tensors, public = self._tensors, self.public
        signature = inspect.signature(outputs)
        options = list(signature.parameters.values())[tensors:]
        num_options, num_gradients = len(options), len(self._positions)

        def run_forward(*inputs: Any) -> Any:
            return self.forward(*inputs)(*inputs[:tensors])

        def run_backward(*inputs: Any) -> Any:
            return tuple(self._backward(*inputs)(*inputs[: -1 - num_options]))

        def allocate_gradients(*inputs: Any) -> Any:
            return tuple(self._gradients(*inputs))

        forward = self._register(self.name, "forward" in opaque, signature, run_forward, outputs)
        if not num_gradients:
            return forward
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        not_operands = {option.name for option in options} | {"needs", "options"}
        operands = [name for name in inspect.signature(self._gradients).parameters if name not in not_operands]
        backward_signature = inspect.Signature(
            [inspect.Parameter(name, positional, annotation=Tensor | None) for name in operands]
            + [*options, inspect.Parameter("needs", positional, annotation=list[bool])],
            return_annotation=tuple[(Tensor,) * max(num_gradients, 2)],  # type: ignore[misc]
        )
        backward = self._register(
            f"{self.name}_backward", "backward" in opaque, backward_signature, run_backward, allocate_gradients
        )

        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            results = output if isinstance(output, tuple) else (output,)
            ctx.save_for_backward(*self._saves(inputs[:tensors], results))
            ctx.options = inputs[tensors:]

        def differentiate(ctx: Any, *given: Tensor | None) -> Any:
            needs = [ctx.needs_input_grad[position] for position in self._positions]
            given = given[:public]
            if public > 1:  # a caller may have differentiated through the empty tensor that stands for None
                given = tuple(map(_empty_as_none, given))
            if all(value is None for value in given):
                return (None,) * (tensors + num_options)
            results = backward(*given, *ctx.saved_tensors, *ctx.options, needs)
            gradients = [_empty_as_none(result) for result in results[:num_gradients]]
            return (*self._per_tensor(gradients, needs), *(None,) * num_options)

        forward.register_autograd(differentiate, setup_context=save)
        return forward

    def _register(
        self, name: str, opaque: bool, signature: inspect.Signature, run: Callable[..., Any], fake: Callable[..., Any]
    ) -> Any:
        """Register a library op with this signature; ``fake`` allocates its results for fake tensors."""

        def checked(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*inputs: Any) -> Any:
                if plan.dual():  # torch.library would silently drop the tangents
                    raise self._no_transforms()
                return _none_as_empty(function(*inputs))

            call.__signature__ = signature  # type: ignore[attr-defined]
            return call

        declare: Any = torch.library.custom_op if INTERPRETING or opaque else torch.library.triton_op
        op = declare(f"{NAMESPACE}::{name}", checked(run), mutates_args=())
        op.register_fake(checked(fake))
        return op


def _none_as_empty(results: Any) -> Any:
    """Replace None, which a library op cannot return, by an empty tensor, and pad tuples to the schema's two items."""
    if not isinstance(results, tuple):
        return results
    like = next(result for result in results if result is not None)
    filled = tuple(like.new_empty((0,)) if result is None else result for result in results)
    return filled if len(filled) > 1 else (*filled, like.new_empty((0,)))


def _empty_as_none(result: Tensor | None) -> Tensor | None:
    """The inverse of `_none_as_empty`."""
    return None if result is None or (result.ndim == 1 and not result.numel()) else result
