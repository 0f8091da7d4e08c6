"""What depends on weights alone, kept until they change: weights folded for uint8 pixels, packed weights and biases."""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import plan

# First sources of one cache, and ways of one first source: only what never comes again can be so many.
SOURCES, WAYS = 1024, 16


class _Kept:
    """One result: of each source a weak reference, its address, version, and its layout where that is compared."""

    __slots__ = ("__weakref__", "aliases", "result", "sources", "stream")

    def __init__(
        self, stream: int | None, sources: tuple[Any, ...], aliases: tuple[Tensor | None, ...], result: Any
    ) -> None:
        self.stream, self.sources, self.aliases, self.result = stream, sources, aliases, result


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
        if torch.compiler.is_compiling():
            return make(*sources)
        return self._get(sources, options, make, False)[0]

    def _get(
        self, sources: Sequence[Tensor | None], options: Hashable, make: Callable[..., Any], planned: bool
    ) -> tuple[Any, _Kept | None]:
        """The result, and where it is kept if it is."""
        if plan.grad_enabled():
            self.forget(sources[0])
            return make(*sources), None
        if plan.dispatch_modes():
            return make(*sources), None
        ways = self._kept.get(id(sources[0]))
        if ways is not None:
            kept = ways.get(options)
            if kept is not None:
                if _unchanged(kept.sources, sources):
                    if _held is not None:
                        _held.append(kept.result)
                        return kept.result, None
                    if _served(kept.stream, sources[0]):
                        return kept.result, kept
                    if torch.cuda.is_current_stream_capturing():
                        return make(*sources), None
                ways.pop(options, None)
        return self._make(sources, options, make, planned)

    def forget(self, source: Tensor | None = None) -> None:
        """Forget what came of this first source, or everything."""
        if source is None:
            self._kept.clear()
        elif self._kept:
            self._kept.pop(id(source), None)

    def _make(
        self, sources: Sequence[Tensor | None], options: Hashable, make: Callable[..., Any], planned: bool
    ) -> tuple[Any, _Kept | None]:
        states = [None if source is None else _state(source) for source in sources]
        if () in states or plan.transformed():
            return make(*sources), None
        with torch.inference_mode(False), torch.no_grad():  # what is kept is an ordinary tensor
            result = make(*sources)
            aliases = tuple(None if source is None else source.detach() for source in sources)
        first, this = id(sources[0]), weakref.ref(self)

        def died(_: Any) -> None:
            derived = this()
            if derived is not None:
                derived._kept.pop(first, None)

        known = tuple(
            None
            if source is None or state is None
            else (weakref.ref(source, died), *state[:2], *(() if planned else state[2:]))
            for source, state in zip(sources, states, strict=True)
        )
        if first not in self._kept and len(self._kept) >= SOURCES:
            self._kept.clear()
        ways = self._kept.setdefault(first, {})
        if len(ways) >= WAYS:
            ways.clear()
        kept = ways[options] = _Kept(_stream(sources[0]), known, aliases, result)
        return result, kept


class Slot:
    """`Derived.get` for a plan, whose key says what layouts its sources have: they are not compared."""

    __slots__ = ("_derived", "_last", "_make", "_options")

    def __init__(self, derived: Derived, options: Hashable, make: Callable[..., Any], *sources: Tensor) -> None:
        """See `Derived.get`.

        Args:
            derived: The cache.
            options: As there.
            make: As there.
            *sources: Some with the layouts that all others have, too.
        """
        layouts = tuple((source.dtype, source.shape, source.stride()) for source in sources)
        self._derived, self._options, self._make = derived, (options, layouts), make
        self._last: Callable[[], _Kept | None] = lambda: None

    def __call__(self, *sources: Tensor) -> Any:
        """``make(*sources)``, or what it gave the last time."""
        kept = self._last()  # only as long as it is kept there
        if kept is not None and _held is None and (kept.stream is None or _served(kept.stream, sources[0])):
            for (weak, address, version), source in zip(kept.sources, sources, strict=True):
                if weak() is not source or source.data_ptr() != address or source._version != version:
                    break
            else:
                return kept.result
        result, kept = self._derived._get(sources, self._options, self._make, True)
        if kept is not None:
            self._last = weakref.ref(kept)
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


def _served(stream: int | None, source: Tensor | None) -> bool:
    """Whether what was made on a stream may be read now."""
    return stream is None or (stream == _stream(source) and not torch.cuda.is_current_stream_capturing())


def _stream(source: Tensor | None) -> int | None:
    """The current stream of a source on a GPU."""
    if source is None or not source.is_cuda:
        return None
    return torch._C._cuda_getCurrentRawStream(source.get_device())


def _state(source: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from a changed one; () where nothing does.

    Not its device: addresses are of one space for all of them, and the memory of this one is not given to others.
    """
    if type(source) not in (Tensor, Parameter):
        return ()
    try:
        # Inference tensors have no version, and some tensors of torch.func no memory of their own.
        state = source.data_ptr(), source._version, source.dtype, source.shape, source.stride()
        if source.is_cuda:
            return () if torch.cuda.is_current_stream_capturing() else state  # written when the graph is replayed
        return () if source.device.type == "cpu" and source.is_shared() else state  # another process may write
    except RuntimeError:
        return ()


def _unchanged(known: Sequence[Any], sources: Sequence[Tensor | None]) -> bool:
    """Whether these are the tensors of which that is known."""
    for one, source in zip(known, sources, strict=True):
        if one is None or source is None:
            if one is not source:
                return False
            continue
        weak, address, version, *layout = one
        if weak() is not source or source.data_ptr() != address or source._version != version:
            return False
        if layout and layout != [source.dtype, source.shape, source.stride()]:
            return False
    return True


def forget() -> None:
    """Forget everything that depends on weights."""
    for derived in list(Derived.every):
        derived.forget()


register_optimizer_step_post_hook(lambda *_: forget())
