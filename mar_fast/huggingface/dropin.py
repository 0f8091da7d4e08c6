"""The drop-in for transformers: VideoMAE models made to run on the ops of mar_fast.kernels, where they stand.

``accelerate(model)`` changes no parameter and no name: calls, outputs, state dict, gradients and checkpoints stay those
of transformers. `mar_fast.huggingface.forward` has the forward passes.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..kernels import attention, checks
from .forward import Options, accelerated_class, is_accelerated, stand_in
from .layers import own_forward

_NAMES = ("VideoMAEModel", "VideoMAEForVideoClassification", "VideoMAEForPreTraining")
_KEEP = (0.25, 0.5, 0.75, 1.0)
# Versions that read hub files of VideoMAE without the biases of queries and values, and say nothing.
_LOSES_BIASES = ((5, 5), (5, 17))

M = TypeVar("M", bound=nn.Module)


def accelerate(model: M, *, keep: float | None = None, num_visible: int | None = None) -> M:
    """Make a VideoMAE model of transformers run on visible tokens only and on the ops of mar_fast, in place.

    The call, the classes of its results, parameters, state dict and gradients stay as they are; `restore` undoes it.
    Calls with ``bool_masked_pos`` compute nothing for masked tokens. Separate weights of query, key and value stay the
    parameters; they are packed in each call, or once while gradients are off in eval mode.

    transformers' own code runs, with one warning, what is not done here: calls with ``output_hidden_states`` or
    ``output_attentions``, and layers with hooks, with replaced parts (adapters, quantised or sharded weights) or with
    attention dropout in training. `VideoMAEConfig`'s ``attn_implementation`` counts for that code only. Dropout with
    ``hidden_dropout_prob`` draws what transformers draws from the same seed, but not in the decoder of pre-training,
    where tokens stand in another order and masked ones alone come out of the last layer.

    Args:
        model: A VideoMAEModel, VideoMAEForVideoClassification or VideoMAEForPreTraining. One that is accelerated
            already gets the new options.
        keep: For VideoMAEForVideoClassification with mean pooling: the share of tokens that stay visible under cell
            running masking (MAR, arXiv 2207.11660), 0.25, 0.5 or 0.75; in eval mode its test form, in training a random
            phase for each clip and temporal shuffle. None and 1 leave calls dense.
        num_visible: Visible tokens of each clip in calls with ``bool_masked_pos``, for graphs without a break; None
            reads it from each mask. The keyword ``num_visible`` of a call goes before it.

    Returns:
        The model that was given.

    Raises:
        TypeError: model is something else.
        ValueError: keep or num_visible does not fit the model, or its forward was replaced by another one.
        ImportError: transformers is missing or older than 5.0.
    """
    classes = _classes()
    if type(model) not in classes and not is_accelerated(model):
        accepted = f"{' or '.join(_NAMES)} of transformers itself, not a subclass or wrapper"
        raise checks.bad_type("model", type(model).__name__, accepted)
    inner = _inner(model)
    for part in _parts(model):
        if not is_accelerated(part) and not own_forward(part):
            accepted = "transformers' own: call mar_fast.accelerate first, then what replaces it"
            raise checks.bad("model", f"a {type(part).__name__} with another forward", accepted)
    tokens = inner.embeddings.position_embeddings.shape[1]
    if num_visible is not None and (type(num_visible) is not int or not 0 < num_visible <= tokens):
        raise checks.bad("num_visible", repr(num_visible), f"None or a whole number from 1 to {tokens}")
    if keep is not None:
        _check_keep(model, keep)
    if keep == 1:
        keep = None
    if keep is not None:
        warnings.warn(
            f"keep={keep}: cell running masking hides {1 - keep:.0%} of every clip; accuracy drops unless the model "
            "was fine-tuned with this masking",
            stacklevel=2,
        )
    _warn_of_lost_biases(inner)
    _swap(model, Options(keep, num_visible))
    return model


def restore(model: M) -> M:
    """Undo `accelerate`: the model gets back its class, and nothing of mar_fast is left in it.

    A model that is not accelerated stays as it is.

    Raises:
        TypeError: model is not a module.
        ValueError: since then something else has changed its class or its forward, which would be lost.
    """
    if not isinstance(model, nn.Module):
        raise checks.bad_type("model", type(model).__name__, "a model that mar_fast.accelerate was called with")
    accelerated = [module for module in model.modules() if is_accelerated(module)]
    for module in accelerated:
        kind: Any = module._mar_fast_from
        if type(module) is not accelerated_class(kind) or "forward" in vars(module):
            got = f"a {type(module).__name__} whose class or forward was changed after mar_fast.accelerate"
            raise checks.bad("model", got, "one without that change: undo it first, such as a parametrization")
    for module in accelerated:
        del module._mar_fast
        module.__class__ = module._mar_fast_from  # type: ignore[assignment]
    return model


@contextmanager
def patch_transformers() -> Iterator[None]:
    """Within this context VideoMAE models come out accelerated, from ``from_pretrained`` and from constructors.

    Afterwards transformers is as it was; models that were built inside stay accelerated. The context holds for the
    whole process, other threads included; of contexts that overlap the last to be left ends it.

    Raises:
        ImportError: transformers is missing or older than 5.0.
    """
    _patches.enter()
    try:
        yield
    finally:
        _patches.leave()


def register_attention() -> None:
    """Make ``attn_implementation="mar_fast"`` known to transformers, for any of its models.

    Attention alone, through transformers' AttentionInterface: query, key and value are copied into packed form, which
    `accelerate` does without. It is self-attention over all tokens, without mask, without dropout in training, with as
    many key heads as query heads; anything else is an error in the call that asks for it.

    Raises:
        ImportError: transformers is missing or older than 5.0.
    """
    transformers = _transformers()
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    transformers.AttentionInterface.register("mar_fast", _attention)
    # Without a function for masks transformers would drop a padding mask unseen; with it, one arrives and is refused.
    AttentionMaskInterface.register("mar_fast", sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: three of (B, H, N, d) -> (B, N, H, d)."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    refused = {
        "attention_mask": (attention_mask is not None, "a mask", "None"),
        "dropout": (bool(dropout), dropout, "0"),
        "is_causal": (bool(is_causal) and query.shape[2] > 1, True, "False"),
        "key": (key.shape != query.shape or value.shape != query.shape, tuple(key.shape), f"{tuple(query.shape)}"),
    }
    for name in ("output_attentions", "softcap", "sliding_window", "position_bias", "head_mask", "s_aux", "cache"):
        given = kwargs.get(name)
        refused[name] = (isinstance(given, Tensor) or given not in (None, False), "a value", "None")
    for name, (is_refused, got, accepted) in refused.items():
        if is_refused:
            raise checks.bad(f"attn_implementation='mar_fast': {name}", got, accepted)
    qkv = torch.stack([part.transpose(1, 2) for part in (query, key, value)], 2)  # (B, N, 3, H, d)
    return attention(qkv, scale=scaling).unflatten(-1, (query.shape[1], -1)), None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("transformers: not installed, expected 5.0 or newer: pip install 'mar-fast[hf]'") from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"transformers: got {transformers.__version__}, expected 5.0 or newer")
    return transformers


def _classes() -> list[type[nn.Module]]:
    transformers = _transformers()
    return [getattr(transformers, name) for name in _NAMES]


def _inner(model: Any) -> Any:
    """The VideoMAEModel of a model."""
    return model if hasattr(model, "embeddings") else model.videomae


def _parts(model: Any) -> list[Any]:
    """What of a model is accelerated: a classifier's own code is pooling and a head, around a VideoMAEModel."""
    return [_inner(model)] if hasattr(model, "classifier") else [_inner(model), model]


def _swap(model: Any, options: Options) -> None:
    # One object for the model and the VideoMAEModel in it, so that each warning is said once.
    for module in _parts(model):
        stand_in(module, options)


def _check_keep(model: Any, keep: float) -> None:
    if not hasattr(model, "classifier") or not model.config.use_mean_pooling:
        accepted = "None: running masking is for VideoMAEForVideoClassification with use_mean_pooling"
        raise checks.bad("keep", f"{keep!r} for {type(model).__name__}", accepted)
    if isinstance(keep, bool) or keep not in _KEEP:
        raise checks.bad("keep", repr(keep), f"None or one of {', '.join(map(str, _KEEP))}")
    part = _inner(model).embeddings.patch_embeddings
    _, height, width = part.projection.kernel_size
    rows, columns = part.image_size[0] // height, part.image_size[1] // width
    if keep < 1 and (rows % 2 or columns % 2):
        raise checks.bad("keep", repr(keep), f"None: cells of 2 x 2 patches do not fill a grid of {rows} x {columns}")


def _accelerating(kind: Any) -> dict[str, Any]:
    """Methods for ``kind`` that accelerate what they build."""
    build, load = kind.__init__, kind.from_pretrained.__func__

    @wraps(build)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if type(self) is kind:  # a subclass has plans of its own
            _swap(self, Options())

    @wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(cls, *args, **kwargs)
        _warn_of_lost_biases(_inner(result[0] if isinstance(result, tuple) else result))
        return result

    return {"__init__": init, "from_pretrained": classmethod(from_pretrained)}


class _Patches:
    """What `patch_transformers` has replaced: once, however many contexts are open, in whatever order they are left."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._contexts = 0
        self._undo = ExitStack()

    def enter(self) -> None:
        with self._lock:
            if not self._contexts:
                with ExitStack() as stack:
                    for kind in _classes():
                        for name, value in _accelerating(kind).items():
                            stack.enter_context(_replaced(kind, name, value))
                    self._undo = stack.pop_all()
            self._contexts += 1

    def leave(self) -> None:
        with self._lock:
            self._contexts -= 1
            if not self._contexts:
                self._undo.close()


_patches = _Patches()


@contextmanager
def _replaced(kind: type, name: str, value: Any) -> Iterator[None]:
    own = vars(kind).get(name)
    setattr(kind, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(kind, name)
        else:
            setattr(kind, name, own)


def _warn_of_lost_biases(model: Any) -> None:
    """Say so where this version of transformers has read a checkpoint of VideoMAE without its biases."""
    version = _transformers().__version__
    origin = getattr(model.config, "_name_or_path", "")
    if not origin or not _LOSES_BIASES[0] <= _minor(version) <= _LOSES_BIASES[1]:
        return
    attentions = [layer.attention.attention for layer in model.encoder.layer]
    biases = [part.bias for attention in attentions for part in (attention.query, attention.value)]
    if biases and all(bias is not None and not bias.is_meta and not bias.any() for bias in biases):
        warnings.warn(
            f"{origin}: all biases of queries and values are 0; transformers {version} loses them where a file names "
            "them q_bias and v_bias, as those of the hub do. Other versions read them",
            stacklevel=3,
        )


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
