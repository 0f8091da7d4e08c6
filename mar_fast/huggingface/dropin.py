"""The drop-in for transformers: VideoMAE models that run on the ops of mar_fast.kernels.

``accelerate(model)`` changes no parameter and no name: calls, outputs, state dict, gradients and checkpoints stay as
transformers has them. The forward passes are in `mar_fast.huggingface.forward`.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import Lock
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn

from ..kernels import attention, checks
from .forward import accelerated_class, acceptable, grid_of, is_accelerated, swap_class
from .layers import State
from .videomae2 import VideoMAE2State, build, is_videomae2, kinds_in, same_outputs

_NAMES = ("VideoMAEModel", "VideoMAEForVideoClassification", "VideoMAEForPreTraining")
_KEEP = (0.25, 0.5, 0.75, 1.0)
# The first and the last version that read the hub's VideoMAE files without the biases of queries and values, silently.
_LOSES_BIASES = ((5, 5), (5, 17))

M = TypeVar("M", bound=nn.Module)


def accelerate(model: M, *, keep: float | None = None, num_visible: int | None = None) -> M:
    """Make a VideoMAE model of transformers run on visible tokens only, on the ops of mar_fast, in place.

    Calls, output classes, parameters, state dict and gradients stay the same; `restore` undoes it. Calls with
    ``bool_masked_pos`` compute nothing for masked tokens. The weights of query, key and value stay separate parameters;
    they are packed in each call, or once in eval mode without gradients.

    Some things fall back to transformers' own code, with one warning: calls with ``output_hidden_states`` or
    ``output_attentions``, and layers with hooks, with replaced parts (adapters, quantised or sharded weights) or with
    attention dropout in training. ``attn_implementation`` in the model's config applies to that code only. Dropout by
    ``hidden_dropout_prob`` draws what transformers draws from the same seed, except in the decoder of pre-training,
    where the tokens are in another order and the last layer returns masked ones only.

    Args:
        model: A VideoMAEModel, VideoMAEForVideoClassification or VideoMAEForPreTraining. One that is accelerated
            already gets the new options. Also a VideoMAEv2 as the hub has it (trust_remote_code), if it averages its
            tokens: since that code is not known here, one random clip has to give the same with it and with mar_fast.
        keep: For VideoMAEForVideoClassification with mean pooling, and VideoMAEv2: the share of tokens that stay
            visible under cell running masking (MAR, arXiv 2207.11660), 0.25, 0.5 or 0.75; its test form in eval mode,
            in training a random phase for each clip and temporal shuffle. None and 1 mask nothing.
        num_visible: Visible tokens of each clip in calls with ``bool_masked_pos``, for graphs without a break; None
            counts them in each mask. A call's own argument ``num_visible`` takes precedence.

    Returns:
        The same model.

    Raises:
        TypeError: model is not one of these.
        ValueError: keep or num_visible does not fit the model, or its forward was replaced by another one.
        ImportError: transformers is missing or older than 5.0.
    """
    videomae2 = is_videomae2(model)
    if not (videomae2 or is_accelerated(model) or type(model) in _classes()):
        accepted = f"{' or '.join(_NAMES)} of transformers itself, not a subclass or wrapper"
        raise checks.bad_type("model", type(model).__name__, accepted)
    for part in _parts(model):
        if not is_accelerated(part) and not acceptable(part):
            kind = type(part)
            got = f"a {kind.__name__} with another forward"
            if not videomae2 and kind not in _classes():
                got = f"a {kind.__module__}.{kind.__qualname__} in place of VideoMAEModel"
            accepted = "the original: call mar_fast.accelerate first, then what replaces it"
            if hasattr(part, "_hf_hook"):  # the forward of accelerate, the library
                accepted = "the original: device_map has replaced it, so load within mar_fast.patch_transformers()"
            raise checks.bad("model", got, accepted)
    if isinstance(keep, bool) or keep not in (None, *_KEEP):
        raise checks.bad("keep", repr(keep), f"None or one of {', '.join(map(str, _KEEP))}")
    state = (_videomae2_state if videomae2 else _videomae_state)(model, None if keep == 1 else keep, num_visible)
    if state.keep is not None:
        warnings.warn(
            f"keep={keep}: cell running masking hides {1 - state.keep:.0%} of every clip; accuracy drops unless the "
            "model was fine-tuned with this masking",
            stacklevel=2,
        )
    if not videomae2:
        _warn_of_lost_biases(_encoder(model))
    _swap(model, state)
    return model


def _videomae_state(model: Any, keep: float | None, num_visible: int | None) -> State:
    """The state for a model of transformers, if these options fit it."""
    encoder = _encoder(model)
    tokens = encoder.embeddings.position_embeddings.shape[1]
    if num_visible is not None and (type(num_visible) is not int or not 0 < num_visible <= tokens):
        raise checks.bad("num_visible", repr(num_visible), f"None or a whole number from 1 to {tokens}")
    if keep is not None:
        if not hasattr(model, "classifier") or not model.config.use_mean_pooling:
            accepted = "None: running masking is for VideoMAEForVideoClassification with use_mean_pooling"
            raise checks.bad("keep", f"{keep!r} for {type(model).__name__}", accepted)
        _, height, width = grid_of(encoder, model.config.num_frames)
        if height % 2 or width % 2:
            accepted = f"None: cells of 2 x 2 patches do not fill a grid of {height} x {width}"
            raise checks.bad("keep", repr(keep), accepted)
    return State(keep, num_visible)


def _videomae2_state(model: Any, keep: float | None, num_visible: int | None) -> State:
    """The same for VideoMAE v2's own class, whose outputs are checked here."""
    if num_visible is not None:
        raise checks.bad("num_visible", num_visible, "None: a VideoMAEv2 takes no masks")
    restore(model)
    build(model, keep)  # whether cells fill the grid
    same_outputs(model)
    return VideoMAE2State(keep, kinds_in(model))


def restore(model: M) -> M:
    """Undo `accelerate`: the model gets its class back, and nothing of mar_fast is left in it.

    A model that is not accelerated stays as it is.

    Raises:
        TypeError: model is not a module.
        ValueError: its class or forward was changed after `accelerate`; that change would be lost.
    """
    if not isinstance(model, nn.Module):
        raise checks.bad_type("model", type(model).__name__, "a model that mar_fast.accelerate was called with")
    accelerated = [module for module in model.modules() if is_accelerated(module)]
    for module in accelerated:
        kind: Any = module._mar_fast_from
        if type(module) is not accelerated_class(kind) or not acceptable(module):
            got = f"a {type(module).__name__} whose class or forward was changed after mar_fast.accelerate"
            raise checks.bad("model", got, "one without that change: undo it first, such as a parametrization")
    for module in accelerated:
        vars(module).pop("forward", None)  # the class's own, put back
        del module._mar_fast
        module.__class__ = module._mar_fast_from  # type: ignore[assignment]
    return model


_patch_lock = Lock()
_open_contexts = 0
_undo = ExitStack()  # puts back what _patch replaced


@contextmanager
def patch_transformers() -> Iterator[None]:
    """Within this context ``from_pretrained`` and constructors return accelerated VideoMAE models.

    Afterwards transformers is unchanged again; models that were built inside stay accelerated. Subclasses, and models
    in which a class or a forward is not transformers' own, are left alone. The context applies to the whole process,
    other threads included; of overlapping contexts the last one to be left ends it.

    Raises:
        ImportError: transformers is missing or older than 5.0.
    """
    global _open_contexts
    classes = _classes()
    with _patch_lock:
        if not _open_contexts:
            for kind in classes:
                _patch(kind)
        _open_contexts += 1
    try:
        yield
    finally:
        with _patch_lock:
            _open_contexts -= 1
            if not _open_contexts:
                _undo.close()


def _patch(kind: Any) -> None:
    """Have ``kind`` accelerate the models that it builds."""
    build, load = kind.__init__, kind.from_pretrained.__func__

    @wraps(build)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        # Subclasses are not accelerated, nor what has replaced a class or a forward in transformers.
        if type(self) is kind and all(map(acceptable, _parts(self))):
            _swap(self, State())

    @wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(cls, *args, **kwargs)
        _warn_of_lost_biases(_encoder(result[0] if isinstance(result, tuple) else result))
        return result

    _undo.enter_context(mock.patch.object(kind, "__init__", init))
    _undo.enter_context(mock.patch.object(kind, "from_pretrained", classmethod(from_pretrained)))


def register_attention() -> None:
    """Register ``attn_implementation="mar_fast"`` with transformers, for any of its models.

    It replaces the attention only, through transformers' AttentionInterface: query, key and value are copied into
    packed form, which `accelerate` does without. It is self-attention over all tokens, without a mask, without dropout
    in training, with as many key heads as query heads; a call that needs anything else is an error.

    Raises:
        ImportError: transformers is missing or older than 5.0.
    """
    transformers = _transformers()
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    transformers.AttentionInterface.register("mar_fast", _attention)
    # Without a mask function transformers silently drops a padding mask; with one the mask arrives and is refused.
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
    """The attention function of transformers: query, key, value (B, H, N, d) -> (B, N, H, d)."""
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


def _encoder(model: Any) -> Any:
    """The VideoMAEModel of a model."""
    return model if hasattr(model, "embeddings") else model.videomae


def _parts(model: Any) -> list[Any]:
    """The modules that get another class. A classifier keeps its own: it pools and classifies after a VideoMAEModel."""
    if is_videomae2(model):
        return [model]
    return [_encoder(model)] if hasattr(model, "classifier") else [_encoder(model), model]


def _swap(model: Any, state: State) -> None:
    # A VideoMAEForPreTraining and its VideoMAEModel share the state, so that each warning is given once.
    for module in _parts(model):
        swap_class(module, state)


def _warn_of_lost_biases(encoder: Any) -> None:
    """Warn if this version of transformers seems to have read a VideoMAE checkpoint without its biases."""
    version = _transformers().__version__
    major, minor = map(int, version.split(".")[:2])
    origin = getattr(encoder.config, "_name_or_path", "")
    if not origin or not _LOSES_BIASES[0] <= (major, minor) <= _LOSES_BIASES[1]:
        return
    attentions = [layer.attention.attention for layer in encoder.encoder.layer]
    biases = [part.bias for attention in attentions for part in (attention.query, attention.value)]
    if biases and all(bias is not None and not bias.is_meta and not bias.any() for bias in biases):
        warnings.warn(
            f"{origin}: all biases of queries and values are 0; transformers {version} loses them if the file calls "
            "them q_bias and v_bias, as the hub's files do. Other versions read them",
            stacklevel=3,
        )
