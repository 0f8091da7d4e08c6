"""compile_for_inference: a model compiled once for one shape, with its weights as constants.

On a CPU inductor freezes the weights (packs them for its matrix products); on a GPU it tunes these products and records
CUDA graphs, so that a call costs one launch on the host. Its settings apply to this model only.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .kernels import checks

# A first call compiles, a second one records CUDA graphs, a third one replays them.
_WARM_CALLS = 3


@dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __repr__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape} on {self.device}"


class CompiledModel:
    """A model compiled for the shapes of one example: call it with arguments like that example.

    It keeps the weights that the model had when it was compiled; later changes of the model do not reach it.

    Attributes:
        compile_seconds: How long compiling took. Inductor keeps generated code and what it tuned on disk, so the next
            process takes less.
        settings: Inductor's settings that it was compiled with.
    """

    def __init__(
        self, run: Callable[..., Any], arguments: tuple[Any, ...], compile_seconds: float, settings: dict[str, Any]
    ) -> None:
        self.compile_seconds = compile_seconds
        self.settings = settings
        self._run = run
        self._accepted = _described(arguments)
        self._graphs = bool(settings.get("triton.cudagraphs"))

    def __call__(self, *arguments: Any) -> Any:
        """What the model returns for ``arguments``, without gradients.

        Raises:
            ValueError: an argument has another shape, dtype or device than the example.
        """
        got = _described(arguments)
        if got != self._accepted:
            raise checks.bad("arguments", _words(got), f"{_words(self._accepted)}, which it was compiled for")
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        # The state that it was compiled in; another one would compile again, and then without constant weights.
        with torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
            result = self._run(*arguments)
        # The next replay of a CUDA graph writes over its outputs.
        return pytree.tree_map_only(Tensor, Tensor.clone, result) if self._graphs else result


def compile_for_inference(
    model: nn.Module, example: Tensor | tuple[Any, ...], *, autotune: bool | None = None
) -> CompiledModel:
    """Compile ``model`` for calls like ``model(*example)``: fixed shapes, constant weights, no gradients.

    Any module will do that torch.compile takes in one graph; of ours, give the video, or (video, mask). A mask that is
    not given is the test form, and then part of the compiled code.

    Args:
        model: In eval mode, in the dtype and on the device that it will run in.
        example: The video (B, C, T, H, W), or a tuple of all positional arguments. Only shapes, dtypes, devices count.
        autotune: Whether inductor tries several implementations of every matrix product and keeps the fastest one. None
            means on a GPU only. On a CPU it tries templates of its own against oneDNN: measured on a Zen 4 that took
            minutes for 0 to 3 %, and with torch 2.13 the trial itself has ended the process now and then.

    Raises:
        ValueError: the model is in training mode.
        TypeError: ``example`` is neither a tensor nor a tuple.
        RuntimeError: torch.compile has no C++ compiler (CPU) or no Triton (GPU) here.
    """
    if not isinstance(model, nn.Module):
        raise checks.bad_type("model", type(model).__name__, "a torch.nn.Module")
    if model.training:
        raise checks.bad("model", "a model in training mode", "one in eval mode: model.eval()")
    if not isinstance(example, Tensor | tuple):
        raise checks.bad_type("example", type(example).__name__, "a tensor or a tuple of arguments")
    arguments = example if isinstance(example, tuple) else (example,)
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    on_gpu = any(tensor.is_cuda for tensor in tensors)
    if not on_gpu:
        _need_compiler()
    settings: dict[str, Any] = {"max_autotune": on_gpu if autotune is None else autotune}
    if on_gpu:
        settings["triton.cudagraphs"] = True
    else:
        settings |= {"freezing": True, "freezing_discard_parameters": True}
    # A copy: weights that are packed are constants, but others stay shared with the model that they came from, and
    # would follow its changes. What is packed is then let go in the copy.
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=False)
    begin = time.perf_counter()
    # Patched around the calls and not given to torch.compile as options: what makes weights constants is read while
    # the model is traced, where options do not hold yet.
    with torch.inference_mode(False), torch.no_grad(), inductor.patch(settings):
        for _ in range(_WARM_CALLS if on_gpu else 1):
            compiled(*arguments)
    if on_gpu:
        torch.cuda.synchronize()
    return CompiledModel(compiled, arguments, time.perf_counter() - begin, settings)


def _need_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # inductor raises an error of its own where its search finds none
        raise RuntimeError(
            "compile_for_inference needs a C++ compiler on a CPU and found none; expected g++ or clang++"
        ) from error


def _described(value: Any) -> Any:
    """What a call must have in common with the example: shapes, dtypes and devices, and all other values."""
    if isinstance(value, Tensor):
        return _Shape(tuple(value.shape), value.dtype, value.device)
    if is_dataclass(value):
        return [type(value), *(_described(getattr(value, item.name)) for item in fields(value))]
    if isinstance(value, tuple | list):
        return [type(value), *(_described(part) for part in value)]
    return value


def _words(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0].__name__}({', '.join(_words(part) for part in value[1:])})"
    return repr(value)
