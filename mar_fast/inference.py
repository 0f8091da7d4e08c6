"""compile_for_inference: a model compiled once for one shape, with its weights as constants.

Inductor freezes the weights on a CPU (packs them for its matrix products); on a GPU it tunes the products and records
CUDA graphs, so that a call costs the host one launch. Its settings apply to this model only. The other backend, on a
GPU, records the model's own calls in a CUDA graph, without a compiler.
"""

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from .kernels import checks, derived

Result = TypeVar("Result")
Backend = Literal["inductor", "graph"]

# The first call compiles and loads kernels, the second records inductor's CUDA graphs, the third replays them.
_WARM_CALLS = 3
_GRAPH_DEVICES = ("cuda",)


class CompiledModel:
    """A model compiled for the shapes of one example: call it with arguments like that example.

    It keeps the weights that the model had when it was compiled; later changes of the model do not affect it. Results
    are not overwritten by later calls. With CUDA graphs all calls use the same memory, so calls from several threads or
    streams have to wait for each other.

    Attributes:
        compile_seconds: How long compiling took. Inductor caches generated code and tuning results on disk, so the next
            process takes less.
        settings: The settings of inductor; none with backend "graph".
    """

    def __init__(
        self, run: Callable[..., Any], arguments: tuple[Any, ...], compile_seconds: float, settings: dict[str, Any]
    ) -> None:
        self.compile_seconds = compile_seconds
        self.settings = settings
        self._run = run
        self._accepted = _described(arguments)

    def __call__(self, *arguments: Any) -> Any:
        """What the model returns for ``arguments``, without gradients.

        Raises:
            ValueError: an argument has another shape, dtype or device than the example, or, with backend "graph",
                autocast is not what it was.
        """
        got = _described(arguments)
        if got != self._accepted:
            raise checks.bad("arguments", _text(got), f"{_text(self._accepted)}, which it was compiled for")
        # As it was compiled.
        with torch.inference_mode(False), torch.no_grad():
            return self._run(*arguments)


def compile_for_inference(
    model: nn.Module, example: Tensor | tuple[Any, ...], *, backend: Backend = "inductor", autotune: bool | None = None
) -> CompiledModel:
    """Compile ``model`` for calls like ``model(*example)``: fixed shapes, constant weights, no gradients.

    The model may be any module that torch.compile takes as one graph, or for "graph" one that never waits for the
    device. The examples of a `MAR` are a video, or (video, mask); without a mask the test form of its own masking
    becomes part of the compiled code.

    Args:
        model: In eval mode, with its final dtype and device.
        example: The video (B, C, T, H, W), or a tuple of all positional arguments, which may hold tensors in tuples,
            lists, dicts and dataclasses. Values of tensors do not matter.
        backend: "inductor" compiles the model. "graph" records the model's calls in a CUDA graph, with the current
            autocast: nothing is compiled or fused, and results have the same bits as the model's own.
        autotune: Whether inductor tries several implementations of each matrix product and keeps the fastest. None
            means on a GPU only. On a CPU it tries its own templates against oneDNN: on a Zen 4 that took minutes for 0
            to 3 %, and with torch 2.13 the trial itself has sometimes killed the process.

    Raises:
        ValueError: the model is in training mode, the backend is unknown, or it is "graph" with ``autotune`` or with
            arguments that are not all on one GPU.
        TypeError: ``example`` is neither a tensor nor a tuple.
        RuntimeError: torch.compile finds no C++ compiler (CPU) or no Triton (GPU), or the model waits for the device
            while it is recorded.
    """
    if not isinstance(model, nn.Module):
        raise checks.bad_type("model", type(model).__name__, "a torch.nn.Module")
    if model.training:
        raise checks.bad("model", "a model in training mode", "one in eval mode: model.eval()")
    if not isinstance(example, Tensor | tuple):
        raise checks.bad_type("example", type(example).__name__, "a tensor or a tuple of arguments")
    if backend not in get_args(Backend):
        raise checks.bad("backend", repr(backend), " or ".join(map(repr, get_args(Backend))))
    arguments = example if isinstance(example, tuple) else (example,)
    devices = {tensor.device for tensor in _tensors(arguments)}
    settings: dict[str, Any] = {}
    compiler: Callable[[nn.Module, tuple[Any, ...]], Callable[..., Any]]
    if backend == "graph":
        if autotune is not None:
            raise checks.bad("autotune", f"{autotune} with backend 'graph'", "None: only inductor tunes")
        if len(devices) != 1 or not all(device.type in _GRAPH_DEVICES for device in devices):
            got = " and ".join(sorted(map(str, devices))) or "no device"
            raise checks.bad("backend", f"'graph' for tensors on {got}", "'inductor', or all on one CUDA device")
        compiler = _Graph
    else:
        on_gpu = any(device.type == "cuda" for device in devices)
        settings["max_autotune"] = on_gpu if autotune is None else autotune
        if on_gpu:
            settings["triton.cudagraphs"] = True
        else:
            if not has_cpp_compiler():
                raise RuntimeError(
                    "compile_for_inference needs a C++ compiler on a CPU and found none; expected g++ or clang++"
                )
            # Freed parameters fail the guard that dynamo sets on one that two modules share.
            parameters = list(model.named_parameters(remove_duplicate=False))
            shared = len(parameters) > len(list(model.parameters()))
            settings |= {"freezing": True, "freezing_discard_parameters": not shared}
        compiler = functools.partial(_by_inductor, settings)
    begin = time.perf_counter()
    with torch.inference_mode(False), torch.no_grad():
        # A copy, because weights that inductor does not pack would stay shared with the model and follow its changes.
        # Those that it packs are then freed in the copy.
        run = compiler(copy.deepcopy(model), arguments)
    return CompiledModel(run, arguments, time.perf_counter() - begin, settings)


def _by_inductor(settings: dict[str, Any], model: nn.Module, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    import torch._inductor.config as inductor  # takes a second

    graphs = "triton.cudagraphs" in settings
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    # Patched around the calls instead of passed to torch.compile as options: tracing reads the settings that make
    # weights constants, and options do not apply to it yet.
    with inductor.patch(settings):
        for _ in range(_WARM_CALLS if graphs else 1):
            compiled(*arguments)
    if graphs:
        torch.cuda.synchronize()

    def run(*arguments: Any) -> Any:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        # A recompilation would not have constant weights.
        with torch.compiler.set_stance("fail_on_recompile"):
            result = compiled(*arguments)
        # The next replay of a CUDA graph overwrites its outputs.
        return _cloned(result) if graphs else result

    return run


class _Graph:
    """The model's calls in a CUDA graph: arguments are copied into its inputs, and results from its outputs.

    A graph keeps no reference to what it reads, so weights and inputs are kept here.
    """

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._model, self._arguments = model, _cloned(arguments)
        self._inputs = _tensors(self._arguments)
        device = self._inputs[0].device
        self._device_type, self._autocast = device.type, _autocast(device.type)
        # Without autocast's cache of cast weights: they must be cast in the graph, since the cache is freed at its end.
        with torch.autocast(
            device.type,
            dtype=self._autocast or torch.get_autocast_dtype(device.type),
            enabled=self._autocast is not None,
            cache_enabled=False,
        ):
            self._replay = captured(functools.partial(model, *self._arguments), device)

    def __call__(self, *arguments: Any) -> Any:
        autocast = _autocast(self._device_type)
        if autocast != self._autocast:
            raise checks.bad("autocast", autocast or "off", f"{self._autocast or 'off'}, as when this was compiled")
        for own, given in zip(self._inputs, _tensors(arguments), strict=True):
            own.copy_(given)
        return _cloned(self._replay())


def captured(run: Callable[[], Result], device: torch.device | None = None) -> Callable[[], Result]:
    """Record ``run`` as a CUDA graph; returns a function that replays it on the current stream.

    Each replay overwrites the last result. The caller must keep alive what ``run`` reads: the graph does not. What the
    warm-up calls derived from weights is kept here.

    Args:
        run: A function that does not wait for the device.
        device: The device it runs on; None is the current one.
    """
    with torch.cuda.device(device):
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):  # compiling, loading and allocating cannot be recorded
            for _ in range(_WARM_CALLS):
                run()
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        # cuBLAS keeps a workspace for each stream: without this a graph could write to one that belongs to another
        # graph, or that is freed before the graph is. The one made during the recording is in the graph's own memory.
        torch._C._cuda_clearCublasWorkspaces()
        # thread_local: other threads, such as a data loader's, may use the device meanwhile.
        recorded = torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local")
        with recorded, derived.held() as kept:
            result = run()
        torch._C._cuda_clearCublasWorkspaces()

    def replay() -> Result:
        graph.replay()
        return result

    replay.kept = kept  # type: ignore[attr-defined]
    return replay


def _autocast(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def has_cpp_compiler() -> bool:
    """Whether inductor finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # inductor has its own type of error for this
        return False
    return True


def _parts(value: Any) -> list[Any] | None:
    """The items of a dataclass, tuple, list or dict; None for any other value."""
    if is_dataclass(value):
        return [getattr(value, item.name) for item in fields(value)]
    if isinstance(value, dict):
        return list(value.items())
    return list(value) if isinstance(value, tuple | list) else None


def _described(value: Any) -> Any:
    """What a call must share with the example: shapes, dtypes and devices of tensors, and all other values."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    parts = _parts(value)
    return value if parts is None else [type(value), *map(_described, parts)]


def _text(described: Any) -> str:
    if isinstance(described, list):
        return f"{described[0].__name__}({', '.join(map(_text, described[1:]))})"
    return str(described)


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in ``value``."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in _parts(value) or () for tensor in _tensors(part)]


def _cloned(value: Any) -> Any:
    """A copy of ``value``, with a clone of every tensor in it."""
    return copy.deepcopy(value, {id(tensor): tensor.clone() for tensor in _tensors(value)})
