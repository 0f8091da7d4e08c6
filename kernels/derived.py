"""What depends on weights alone, kept until they change: weights folded for uint8 pixels, packed weights and biases."""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import plan

try:
    from torch._C import _cuda_getCurrentRawStream as current_stream
except ImportError:  # PyTorch without CUDA

    def current_stream(index: int) -> int:  # type: ignore[misc]
        """No stream."""
        return 0


# First sources of one cache, and ways of one first source: only what never comes again can be so many.
SOURCES, WAYS = 1024, 16


class _Kept(NamedTuple):
    state: tuple[Any, ...]
    stream: int | None
    sources: tuple[Any, ...]  # weak references
    aliases: tuple[Tensor | None, ...]
    result: Any


class Derived:
    """Results of functions of weights, each made once as long as gradients are off and its sources stay as they are.

    A source has changed when it is another tensor, has other memory, another dtype, shape or stride, or another
    version: after ``load_state_dict``, ``.to()``, and every in-place change that PyTorch counts. Fused optimizers count
    nothing, so the step of any ``torch.optim.Optimizer`` forgets everything, and a call with gradients on forgets what
    came of its first source. **Writing through** ``.data``, **or from another library, is not counted**: call
    `forget` after it.

    Nothing is kept of inference tensors, which count no versions, of memory shared with other processes and while
    something else than the device looks on (torch.compile, dispatch modes, torch.func). Results are made for one stream
    and served on that alone. A CUDA graph that is captured makes its own, since it would read what is forgotten here,
    but within `held`.

    It does not keep its sources alive, only their memory until the tensor dies or is next looked up: otherwise another
    one could come to lie at the same address. A copy or a pickle begins empty.
    """

    every: ClassVar["weakref.WeakSet[Derived]"] = weakref.WeakSet()

    def __init__(self) -> None:
        self._kept: dict[int, dict[Hashable, _Kept]] = {}
        Derived.every.add(self)

    def __len__(self) -> int:
        return sum(len(ways) for ways in list(self._kept.values()))

    def __reduce__(self) -> tuple[type["Derived"], tuple[()]]:
        return Derived, ()

    def get(self, sources: Sequence[Tensor | None], options: Hashable, make: Callable[..., Any]) -> Any:
        """``make(*sources)``, or what it gave the last time.

        Args:
            sources: All tensors that the result depends on; the first is not None.
            options: Everything else that it depends on, also which ``make`` it is.
            make: A function of the sources. With gradients on it is called every time, and differentiable if it is.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            if not torch.compiler.is_compiling():
                self.forget(sources[0])
            return make(*sources)
        state = _state(sources)
        if state is None:
            return make(*sources)
        ways = self._kept.get(id(sources[0]))
        if ways is not None:
            kept = ways.get(options)
            if kept is not None:
                if kept.state == state and all(
                    weak is None or weak() is source for weak, source in zip(kept.sources, sources, strict=True)
                ):
                    if _held is not None:
                        _held.append(kept.result)
                        return kept.result
                    if kept.stream is None:
                        return kept.result
                    if torch.cuda.is_current_stream_capturing():
                        return make(*sources)
                    if kept.stream == _stream(sources[0]):
                        return kept.result
                ways.pop(options, None)
        return self._make(sources, options, make, state)

    def forget(self, source: Tensor | None = None) -> None:
        """Forget what came of this first source, or everything."""
        if source is None:
            self._kept.clear()
        elif self._kept:
            self._kept.pop(id(source), None)

    def _make(
        self, sources: Sequence[Tensor | None], options: Hashable, make: Callable[..., Any], state: tuple[Any, ...]
    ) -> Any:
        if plan.transformed() or any(source is not None and _unkept(source) for source in sources):
            return make(*sources)
        with torch.inference_mode(False), torch.no_grad():  # what is kept is an ordinary tensor
            result = make(*sources)
            aliases = tuple(None if source is None else source.detach() for source in sources)
        first, this = id(sources[0]), weakref.ref(self)

        def died(_: Any) -> None:
            derived = this()
            if derived is not None:
                derived._kept.pop(first, None)

        weak = tuple(None if source is None else weakref.ref(source, died) for source in sources)
        if first not in self._kept and len(self._kept) >= SOURCES:
            self._kept.clear()
        ways = self._kept.setdefault(first, {})
        if len(ways) >= WAYS:
            ways.clear()
        ways[options] = _Kept(state, _stream(sources[0]), weak, aliases, result)
        return result


_held: list[Any] | None = None


@contextmanager
def held() -> Iterator[list[Any]]:
    """Within this context results are served on any stream, and put into the list that this yields.

    For the capture of a CUDA graph, after warm-up calls that it waits for: the list is kept with the graph.
    """
    global _held
    before, _held = _held, []
    try:
        yield _held
    finally:
        _held = before


def _stream(source: Tensor | None) -> int | None:
    """The current stream of a source on a GPU."""
    return current_stream(source.get_device()) if source is not None and source.is_cuda else None


def _state(sources: Sequence[Tensor | None]) -> tuple[Any, ...] | None:
    """What tells these tensors from changed ones; None where nothing does."""
    parts: list[Any] = []
    try:
        for source in sources:
            if source is None:
                parts.append(None)
                continue
            kind = type(source)
            if kind is not Parameter and kind is not Tensor:
                return None
            # Inference tensors have no version; some tensors of torch.func have no memory of their own.
            parts += (source.data_ptr(), source._version, source.dtype, source.shape, source.stride(), source.device)
    except RuntimeError:
        return None
    return tuple(parts)


def _unkept(source: Tensor) -> bool:
    if source.is_cuda:
        return torch.cuda.is_current_stream_capturing()
    return source.device.type == "cpu" and source.is_shared()  # another process may write to it


def forget() -> None:
    """Forget everything that depends on weights."""
    for derived in list(Derived.every):
        derived.forget()


register_optimizer_step_post_hook(lambda *_: forget())
