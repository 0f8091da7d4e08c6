"""A cache for what depends on weights alone: weights folded for uint8 pixels, packed weights and biases."""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import plan

# Limits of one cache: first sources, and results for each of these. No ordinary model comes near them.
SOURCES, VARIANTS = 1024, 16


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Kept:
    """A result, and of each source a weak reference, its address, version and layout."""

    stream: int | None
    sources: tuple[Any, ...]
    aliases: tuple[Tensor | None, ...]
    result: Any


class Derived:
    """Results of functions of weights, each made once while gradients are off and its sources do not change.

    A source has changed if it is another tensor, or has another address, dtype, shape, stride or version: after
    ``load_state_dict``, ``.to()`` and every in-place change that PyTorch counts. Fused optimizers count nothing, so the
    step of any ``torch.optim.Optimizer`` drops all results, and a call with gradients on drops those of its first
    source. **Writing through** ``.data``, **or from another library, is not noticed**: call `forget` after it.

    Nothing is cached for inference tensors, which have no versions, for memory shared with other processes, or under
    torch.compile, dispatch modes and torch.func. A result is only used on the stream that it was made on. While a CUDA
    graph is captured results are made anew, since the graph would otherwise read memory that may be freed here; but see
    `held`.

    Sources are not kept alive; their memory is, until the tensor dies or is next looked up, so that no other tensor can
    get the same address. A copy or a pickle starts empty.
    """

    every: ClassVar["weakref.WeakSet[Derived]"] = weakref.WeakSet()

    def __init__(self) -> None:
        self._kept: dict[int, dict[Hashable, _Kept]] = {}
        Derived.every.add(self)

    def __len__(self) -> int:
        return sum(len(variants) for variants in list(self._kept.values()))

    def __reduce__(self) -> tuple[type["Derived"], tuple[()]]:
        return Derived, ()

    def get(self, sources: Sequence[Tensor | None], options: Hashable, make: Callable[..., Any]) -> Any:
        """``make(*sources)``, or its cached result.

        Args:
            sources: All tensors that the result depends on; the first is not None.
            options: Everything else that it depends on, including which function ``make`` is.
            make: A function of the sources. It is called every time while gradients are on.
        """
        return self._get(sources, options, make)[0]

    def _get(
        self, sources: Sequence[Tensor | None], options: Hashable, make: Callable[..., Any]
    ) -> tuple[Any, _Kept | None]:
        """The result, and its entry if it is cached."""
        if torch.compiler.is_compiling():
            return make(*sources), None
        if plan.grad_enabled():
            self.forget(sources[0])
            return make(*sources), None
        if plan.dispatch_modes():
            return make(*sources), None
        variants = self._kept.get(id(sources[0]))
        if variants is not None:
            kept = variants.get(options)
            if kept is not None:
                if _unchanged(kept.sources, sources):
                    if _held is not None:
                        _held.append(kept.result)
                        return kept.result, None
                    if _served(kept.stream, sources[0]):
                        return kept.result, kept
                    if torch.cuda.is_current_stream_capturing():
                        return make(*sources), None
                variants.pop(options, None)
        return self._make(sources, options, make)

    def forget(self, source: Tensor | None = None) -> None:
        """Drop the results of this first source, or all."""
        if source is None:
            self._kept.clear()
        elif self._kept:
            self._kept.pop(id(source), None)

    def _make(
        self, sources: Sequence[Tensor | None], options: Hashable, make: Callable[..., Any]
    ) -> tuple[Any, _Kept | None]:
        states = [None if source is None else _state(source) for source in sources]
        if () in states or plan.transformed():
            return make(*sources), None
        with torch.inference_mode(False), torch.no_grad():  # cached results must be ordinary tensors
            result = make(*sources)
            aliases = tuple(None if source is None else source.detach() for source in sources)
        first, this = id(sources[0]), weakref.ref(self)

        def died(_: Any) -> None:
            derived = this()
            if derived is not None:
                derived._kept.pop(first, None)

        known = tuple(
            None if source is None or state is None else (weakref.ref(source, died), *state)
            for source, state in zip(sources, states, strict=True)
        )
        if first not in self._kept and len(self._kept) >= SOURCES:
            self._kept.clear()
        variants = self._kept.setdefault(first, {})
        if len(variants) >= VARIANTS:
            variants.clear()
        kept = variants[options] = _Kept(_stream(sources[0]), known, aliases, result)
        return result, kept


class Slot:
    """`Derived.get` for one plan. The plan's key covers the layouts of the sources, so they are not compared again."""

    __slots__ = ("_derived", "_last", "_make", "_options")

    def __init__(self, derived: Derived, options: Hashable, make: Callable[..., Any]) -> None:
        """Arguments are those of `Derived.get`."""
        self._derived, self._options, self._make = derived, options, make
        self._last: Callable[[], _Kept | None] = lambda: None

    def __call__(self, *sources: Tensor) -> Any:
        """``make(*sources)``, or its cached result."""
        kept = self._last()  # None once the cache has dropped it
        if kept is not None and _held is None and (kept.stream is None or _served(kept.stream, sources[0])):
            for (weak, address, version, _), source in zip(kept.sources, sources, strict=True):
                if weak() is not source or source.data_ptr() != address or source._version != version:
                    break
            else:
                return kept.result
        result, kept = self._derived._get(sources, self._options, self._make)
        if kept is not None:
            self._last = weakref.ref(kept)
        return result


_held: list[Any] | None = None


@contextmanager
def held() -> Iterator[list[Any]]:
    """Within this context cached results are used on any stream, and appended to the list that this yields.

    For capturing a CUDA graph after warm-up calls have finished; the caller keeps the list as long as the graph.
    """
    global _held
    before, _held = _held, []
    try:
        yield _held
    finally:
        _held = before


def _served(stream: int | None, source: Tensor | None) -> bool:
    """Whether a result that was made on ``stream`` may be used now."""
    return stream is None or (stream == _stream(source) and not torch.cuda.is_current_stream_capturing())


def _stream(source: Tensor | None) -> int | None:
    """The current stream on a source's GPU, or None."""
    if source is None or not source.is_cuda:
        return None
    return torch._C._cuda_getCurrentRawStream(source.get_device())


def _state(source: Tensor) -> tuple[Any, ...]:
    """Address, version and layout of a tensor; () if they cannot show a change.

    The device is not needed: all devices share one address space, and the memory here is still in use.
    """
    if type(source) not in (Tensor, Parameter):
        return ()
    try:
        # RuntimeError: inference tensors have no version, and some tensors of torch.func no memory.
        state = source.data_ptr(), source._version, (source.dtype, source.shape, source.stride())
        if source.is_cuda:
            return () if torch.cuda.is_current_stream_capturing() else state  # results exist only once it is replayed
        return () if source.device.type == "cpu" and source.is_shared() else state  # another process may write
    except RuntimeError:
        return ()


def _unchanged(known: Sequence[Any], sources: Sequence[Tensor | None]) -> bool:
    """Whether these are the tensors of an entry, unchanged."""
    for one, source in zip(known, sources, strict=True):
        if one is None or source is None:
            if one is not source:
                return False
            continue
        weak, address, version, layout = one
        if weak() is not source or source.data_ptr() != address or source._version != version:
            return False
        if layout != (source.dtype, source.shape, source.stride()):
            return False
    return True


def forget() -> None:
    """Drop all results of all caches."""
    for derived in list(Derived.every):
        derived.forget()


register_optimizer_step_post_hook(lambda *_: forget())
