"""The forward passes of accelerated models: transformers' VideoMAE on visible tokens only.

`accelerate` gives a model another class, made here from its own: same name, same parameters, another forward, which
calls the original one wherever it has to fall back. In comments: B clips, L tokens in the grid, N visible, M dropped,
D embed_dim.
"""

import inspect
import math
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..config import IMAGENET_MEAN, IMAGENET_STD
from ..fallbacks import own_forward, plain_projection, put_back, unhooked, untouched
from ..kernels import checks, gather_patch_embed, masked_patch_loss, scatter_tokens
from ..layers import Stream, norm, total
from ..masking import cell_running
from ..token_mask import TokenMask, check_may_count
from .layers import MODELING, State, own_code, run_layers
from .videomae2 import NAME, AcceleratedVideoMAE2, VideoMAE2State, is_videomae2

# Arguments that transformers passes to every model and that change nothing here.
_WITHOUT_EFFECT = ("return_dict", "num_items_in_batch", "use_cache")
_RECORDED = ("output_hidden_states", "output_attentions")


class _Accelerated(nn.Module):
    """What the accelerated classes share: copying, pickling, and caches that follow the weights."""

    _mar_fast: Any  # a State
    _mar_fast_from: type[nn.Module]
    _mar_fast_output: Any
    _mar_fast_state: type[State] = State

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # For type(model)(config) and type(model).from_pretrained; `accelerate` swaps the class of a finished model.
        self._mar_fast = self._mar_fast_state()
        super().__init__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pickle cannot find this class by its name: that is the original's.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_new, (self._mar_fast_from,), *reduced[2:])

    def train(self, mode: bool = True) -> Any:
        """Sets the mode, and drops what was cached."""
        self._mar_fast.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._mar_fast.clear()
        return super()._apply(fn, recurse)


class _Model(_Accelerated):
    """The accelerated VideoMAEModel, by itself and inside the other two."""

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        *,
        num_visible: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """VideoMAEModel's forward; masked tokens are not computed.

        Args:
            pixel_values: (B, T, C, H, W) floating point, normalised.
            bool_masked_pos: (B, L) bool, True = masked, with the same number in every clip. None is every token
                visible, or cell running masking if `mar_fast.accelerate` was given ``keep``.
            num_visible: Visible tokens of each clip. Without it they are counted in the mask, which waits for a GPU and
                breaks a compiled graph.
            **kwargs: Other arguments of transformers' forward.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        mask = _mask_of_call(self, self._mar_fast, pixel_values, bool_masked_pos, num_visible)
        if what := _fallback(self, kwargs):
            self._mar_fast.warn_once(what)
            bools = None if mask is None else mask.bool_masked()
            return super().forward(pixel_values, bool_masked_pos=bools, **kwargs)
        output = self._mar_fast_output(last_hidden_state=_encode(self, pixel_values, mask))
        return _as_asked(self, output, kwargs)


class _ForPreTraining(_Accelerated):
    """The accelerated VideoMAEForPreTraining."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if acceptable(self.videomae):
            swap_class(self.videomae, self._mar_fast)

    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor, *, num_visible: int | None = None, **kwargs: Any
    ) -> Any:
        """VideoMAEForPreTraining's forward; arguments and errors are VideoMAEModel's, and the mask is required.

        ``loss`` is float32 in 16-bit models too.
        """
        if bool_masked_pos is None:
            raise checks.bad_type("bool_masked_pos", "None", "a bool tensor of shape (B, L), True = masked")
        model: Any = self
        config, encoder, decoder, state = model.config, model.videomae, model.decoder, self._mar_fast
        mask = _mask_of_call(encoder, state, pixel_values, bool_masked_pos, num_visible)
        assert mask is not None
        if mask.num_visible == mask.num_tokens:
            raise checks.bad("bool_masked_pos", "no masked token", "at least one in every clip")
        what = _fallback(model, kwargs)
        if not (is_accelerated(encoder) and acceptable(encoder) and unhooked(encoder)):
            what = what or "a changed or hooked videomae"
        if not (own_code(decoder) and untouched(decoder.norm, nn.LayerNorm, True)):
            what = what or "a changed or hooked decoder"
        if config.num_channels != 3 and not config.norm_pix_loss:
            what = what or "clips without three colours where norm_pix_loss is off"
        if what:
            state.warn_once(what)
            return super().forward(pixel_values, bool_masked_pos=bool_masked_pos, **kwargs)
        features = _encode(encoder, pixel_values, mask)
        # Under autocast the residual stream starts in the weights' dtype.
        features = model.encoder_to_decoder(features).to(model.mask_token.dtype)
        pos_embed = state.table("decoder", model.position_embeddings, pixel_values.device)
        x = scatter_tokens(features, mask.keep_idx, model.mask_token.flatten(), pos_embed)
        stream = run_layers(decoder.decoder_layers, state, x, mask.drop_idx)
        logits = decoder.head(norm(state, decoder.norm, stream)[0])
        colours = config.num_channels == 3
        loss = masked_patch_loss(
            logits,
            pixel_values.transpose(1, 2),
            mask.drop_idx,
            patch_size=(config.tubelet_size, config.patch_size, config.patch_size),
            mean=IMAGENET_MEAN if colours else None,
            std=IMAGENET_STD if colours else None,
            normalize=config.norm_pix_loss,
        )
        return _as_asked(model, self._mar_fast_output(loss=loss, logits=logits), kwargs)


class _VideoMAE2(AcceleratedVideoMAE2, _Accelerated):
    """The accelerated VideoMAEv2."""

    _mar_fast_state = VideoMAE2State


# The accelerated class of each class, and the class of its output, where it is one of transformers'.
_ACCELERATED = {
    "VideoMAEModel": (_Model, "BaseModelOutput"),
    "VideoMAEForPreTraining": (_ForPreTraining, "VideoMAEForPreTrainingOutput"),
    NAME: (_VideoMAE2, ""),
}


@cache
def accelerated_class(kind: Any) -> type[nn.Module]:
    """The class that `accelerate` gives to instances of ``kind``: VideoMAEModel, VideoMAEForPreTraining, VideoMAEv2."""
    mixin, output = _ACCELERATED[kind.__name__]
    # transformers uses these names in save_pretrained, and to look up which hidden states to record.
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    parts = {"_mar_fast_from": kind, "_mar_fast_output": getattr(sys.modules[kind.__module__], output, None)}
    # And the annotation of kwargs, to look up which of these the forward takes.
    theirs, ours = inspect.signature(kind.forward), inspect.signature(mixin.forward).parameters
    known = {name: value.annotation for name, value in theirs.parameters.items() if name in ours}
    mixin.forward.__annotations__.update(known, **{"return": theirs.return_annotation})
    return type(kind.__name__, (mixin, kind), named | parts)


def is_accelerated(model: object) -> bool:
    """Whether this module itself, not one inside it, has an accelerated class."""
    return isinstance(model, _Accelerated)


def acceptable(module: Any) -> bool:
    """Whether class and forward of a VideoMAEModel or VideoMAEForPreTraining are transformers' own, or ours.

    Those of a VideoMAEv2 are its file's own.
    """
    if is_accelerated(module):
        return "forward" not in vars(module) or put_back(module, type(module), module._mar_fast_from)
    kind = type(module)
    known = is_videomae2(module) or (kind.__module__ == MODELING and kind.__name__ in _ACCELERATED)
    return known and own_forward(module)


def swap_class(module: Any, state: State) -> None:
    """Give an `acceptable` module its accelerated class and this state."""
    if acceptable(module):
        vars(module).pop("forward", None)  # it would go before the new class's
    module._mar_fast = state
    if not is_accelerated(module):
        kind: Any = type(module)
        module.__class__ = accelerated_class(kind)


def _new(kind: Any) -> nn.Module:
    fast = accelerated_class(kind)
    return fast.__new__(fast)


def _fallback(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Which calls these are if transformers' own code must run them."""
    asked = {name: getattr(model.config, name, None) for name in _RECORDED}
    asked |= {name: value for name, value in kwargs.items() if value is not None and name not in _WITHOUT_EFFECT}
    for name, value in asked.items():
        # output_hidden_states=0 asks for the first one.
        if value is not None and not (name in _RECORDED and value is False):
            return f"calls with {name}"
    return None


def _as_asked(model: Any, output: Any, kwargs: dict[str, Any]) -> Any:
    as_dict = kwargs.get("return_dict")
    as_dict = getattr(model.config, "return_dict", True) if as_dict is None else as_dict
    return output if as_dict else output.to_tuple()


def grid_of(model: Any, frames: int) -> tuple[int, int, int]:
    """(T', H', W'), the tubelets along each axis of a clip of ``frames`` frames."""
    embeddings = model.embeddings.patch_embeddings
    height, width = embeddings.patch_size
    return frames // embeddings.tubelet_size, embeddings.image_size[0] // height, embeddings.image_size[1] // width


def _mask_of_call(
    model: Any, state: State, pixel_values: Tensor, bool_masked_pos: Tensor | None, num_visible: int | None
) -> TokenMask | None:
    """Check the arguments of a call of VideoMAEModel ``model``; its mask, or None for a dense call."""
    checks.tensor("pixel_values", pixel_values, 5, checks.FLOATS, "(B, T, C, H, W)")
    batch, frames = pixel_values.shape[:2]
    embeddings = model.embeddings.patch_embeddings
    shape = (batch, frames, embeddings.num_channels, *embeddings.image_size)
    checks.size("pixel_values", pixel_values, shape, "(B, T, C, H, W)")
    grid, tokens = grid_of(model, int(frames)), model.embeddings.position_embeddings.shape[1]
    if math.prod(grid) != tokens:
        got = f"{frames} frames, {math.prod(grid)} tokens"
        raise checks.bad("pixel_values", got, f"{tokens} tokens, as the position table has")
    if bool_masked_pos is None:
        if num_visible is not None:
            raise checks.bad("num_visible", num_visible, "None, since bool_masked_pos is None")
        if state.keep is None:
            return None
        # MAR's training form, or its test form.
        form: dict[str, Any] = {"temporal_shuffle": True} if model.training else {"phase": 0}
        return cell_running(batch, grid, 1 - state.keep, device=pixel_values.device, **form)
    checks.tensor("bool_masked_pos", bool_masked_pos, 2, (torch.bool,), "(B, L), True = masked")
    checks.size("bool_masked_pos", bool_masked_pos, (batch, tokens), "(B, L)")
    bools = bool_masked_pos.to(pixel_values.device)
    count = state.num_visible if num_visible is None else num_visible
    if count is None:
        check_may_count(", so pass num_visible with the call or to mar_fast.accelerate")
        counts = (~bools).sum(1)
        low, high = (int(counts.min()), int(counts.max())) if batch else (tokens, tokens)
        if low != high:
            raise checks.bad("bool_masked_pos", f"clips with {low} to {high} visible tokens", "the same in every clip")
        count = low
    mask = TokenMask.from_bool_masked(bools, num_visible=count)
    if mask.num_visible == 0:
        raise checks.bad("bool_masked_pos", "no visible token", "at least one in every clip")
    return mask


def _encode(model: Any, pixel_values: Tensor, mask: TokenMask | None) -> Tensor:
    """(B, T, C, H, W) -> (B, N, D), through VideoMAEModel ``model``."""
    state = model._mar_fast
    x = _embed(model, pixel_values, mask)
    if own_code(model.encoder):
        stream = run_layers(model.encoder.layer, state, x)
    else:
        state.warn_once("a changed or hooked encoder")
        stream = Stream(model.encoder(x).last_hidden_state)
    return total(stream) if model.layernorm is None else norm(state, model.layernorm, stream)[0]


def _embed(model: Any, pixel_values: Tensor, mask: TokenMask | None) -> Tensor:
    """(B, T, C, H, W) -> (B, N, D): the embedded visible tubelets, with positions."""
    embeddings = model.embeddings
    projection = embeddings.patch_embeddings.projection
    plain = own_code(embeddings) and own_code(embeddings.patch_embeddings) and plain_projection(projection)
    if plain:
        # A convolution ignores what is left over at the edges; gather_patch_embed takes whole patches only.
        sides = (pixel_values.shape[1], *pixel_values.shape[3:])
        plain = not any(side % step for side, step in zip(sides, projection.kernel_size, strict=True))
    if not plain:
        model._mar_fast.warn_once("changed or hooked embeddings, and odd sizes")
        embedded: Tensor = embeddings(pixel_values, None if mask is None else mask.bool_masked())
        return embedded
    video = pixel_values.transpose(1, 2)
    pos_embed = model._mar_fast.table("encoder", embeddings.position_embeddings, video.device)
    if mask is None:
        every = torch.arange(pos_embed.shape[0], dtype=torch.int32, device=video.device)
        keep_idx = every.expand(video.shape[0], -1)
    else:
        keep_idx = mask.keep_idx
    return gather_patch_embed(video, keep_idx, projection.weight, projection.bias, pos_embed)
