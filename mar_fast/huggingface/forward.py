"""The forward passes of transformers' VideoMAE on visible tokens only, put in place by `mar_fast.accelerate`.

An accelerated model has got another class, made here from its own: same name, same parameters, another forward. What
that forward does not do it leaves to the class it was made from. In comments: B clips, L tokens in the grid, N visible,
M dropped, D width.
"""

import math
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..config import IMAGENET_MEAN, IMAGENET_STD
from ..kernels import checks, gather_patch_embed, masked_patch_loss, scatter_tokens
from ..layers import norm
from ..masking import TokenMask, cell_running
from .layers import PLAIN_TENSORS, Caches, plain_norm, run_layers, total, unhooked, untouched

# Arguments that transformers hands to every model, and that change nothing here.
_WITHOUT_EFFECT = ("return_dict", "num_items_in_batch", "use_cache")
_RECORDED = ("output_hidden_states", "output_attentions")


class Options:
    """What `mar_fast.accelerate` was asked for, and what a module remembers between calls.

    Attributes:
        keep: Share of tokens that stay visible in calls without a mask, or None for all of them.
        num_visible: Visible tokens of each clip in calls with a mask, or None to read it from the mask.
        caches: Packed weights and tables.
    """

    def __init__(self, keep: float | None = None, num_visible: int | None = None) -> None:
        self.keep = keep
        self.num_visible = num_visible
        self.caches = Caches()


class _Accelerated(nn.Module):
    """What the accelerated classes share: copies, pickles, and caches that follow the weights."""

    _mar_fast: Options
    _mar_fast_from: type[nn.Module]
    _mar_fast_output: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # ``type(model)(config)`` and ``type(model).from_pretrained``; `accelerate` does not come here.
        self._mar_fast = Options()
        super().__init__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class has no name to be found by; it is made again from the one that it was made from.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_new, (self._mar_fast_from,), *reduced[2:])

    def train(self, mode: bool = True) -> Any:
        """As always, and packed weights are forgotten."""
        self._mar_fast.caches.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._mar_fast.caches.clear()
        return super()._apply(fn, recurse)


class _Model(_Accelerated):
    """Stands in for VideoMAEModel, by itself and inside of the two others."""

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        *,
        num_visible: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As VideoMAEModel's, with nothing computed for masked tokens.

        Args:
            pixel_values: (B, T, C, H, W) floating point, normalised.
            bool_masked_pos: (B, L) bool, True = masked, the same number in every clip; None is every token visible, or
                running masking where `mar_fast.accelerate` was given ``keep``.
            num_visible: Visible tokens of each clip. Without it they are counted in the mask, which waits for a GPU and
                breaks a compiled graph.
            **kwargs: What transformers' own forward takes.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        mask = visible(self, self._mar_fast, pixel_values, bool_masked_pos, num_visible)
        reason = _why_own_code(self, kwargs)
        if reason is not None:
            self._mar_fast.caches.warn_once(f"mar_fast: {reason}")
            bools = None if mask is None else mask.bool_masked()
            return super().forward(pixel_values, bool_masked_pos=bools, **kwargs)
        output = self._mar_fast_output(last_hidden_state=encode(self, pixel_values, mask))
        return _as_asked(self, output, kwargs)


class _ForPreTraining(_Accelerated):
    """Stands in for VideoMAEForPreTraining."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stand_in(self.videomae, self._mar_fast)

    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor, *, num_visible: int | None = None, **kwargs: Any
    ) -> Any:
        """As VideoMAEForPreTraining's; arguments and errors as in VideoMAEModel's, the mask is needed.

        ``loss`` is float32 in models of 16 bits, too.
        """
        if bool_masked_pos is None:
            raise checks.bad_type("bool_masked_pos", "None", "a bool tensor of shape (B, L), True = masked")
        mask = visible(self.videomae, self._mar_fast, pixel_values, bool_masked_pos, num_visible)
        assert mask is not None
        if mask.num_visible == mask.num_tokens:
            raise checks.bad("bool_masked_pos", "no masked token", "at least one in every clip")
        config: Any = self.config
        inner: Any = self.videomae
        decoder: Any = self.decoder
        projection: Any = self.encoder_to_decoder
        mask_token: Any = self.mask_token
        table: Any = self.position_embeddings
        reason = _why_own_code(self, kwargs)
        if reason is None and not (is_accelerated(inner) and "forward" not in vars(inner) and unhooked(inner)):
            reason = "a changed or hooked videomae runs transformers' own code"
        if reason is None and not (untouched(decoder) and plain_norm(decoder.norm)):
            reason = "a changed or hooked decoder runs transformers' own code"
        if reason is None and config.num_channels != 3 and not config.norm_pix_loss:
            reason = "clips without three colours and without norm_pix_loss are left to transformers"
        if reason is not None:
            self._mar_fast.caches.warn_once(f"mar_fast: {reason}")
            return super().forward(pixel_values, bool_masked_pos=bool_masked_pos, **kwargs)
        features = encode(inner, pixel_values, mask)
        # Under autocast the residual stream begins in the weights' dtype.
        features = projection(features).to(mask_token.dtype)
        caches = self._mar_fast.caches
        places = caches.table("decoder", table, pixel_values.device)
        x = scatter_tokens(features, mask.keep_idx, mask_token.flatten(), places)
        x, residual = run_layers(decoder.decoder_layers, caches, x, mask.drop_idx)
        logits = decoder.head(norm(decoder.norm, x, residual)[0])
        colours = config.num_channels == 3
        loss = masked_patch_loss(
            logits, pixel_values.transpose(1, 2), mask.drop_idx,
            patch_size=(config.tubelet_size, config.patch_size, config.patch_size),
            mean=IMAGENET_MEAN if colours else None, std=IMAGENET_STD if colours else None,
            normalize=config.norm_pix_loss,
        )  # fmt: skip
        return _as_asked(self, self._mar_fast_output(loss=loss, logits=logits), kwargs)


# Their class: the forward that stands in, and the class of what it returns.
_STANDS_IN = {
    "VideoMAEModel": (_Model, "BaseModelOutput"),
    "VideoMAEForPreTraining": (_ForPreTraining, "VideoMAEForPreTrainingOutput"),
}


@cache
def accelerated_class(kind: Any) -> type[nn.Module]:
    """The class that instances of ``kind`` get: VideoMAEModel or VideoMAEForPreTraining."""
    mixin, output = _STANDS_IN[kind.__name__]
    # transformers goes by these names, in save_pretrained and where it looks up what hidden states to record.
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    parts = {"_mar_fast_from": kind, "_mar_fast_output": getattr(sys.modules[kind.__module__], output)}
    return type(kind.__name__, (mixin, kind), named | parts)


def is_accelerated(model: object) -> bool:
    """Whether this very module, not one inside of it, has an accelerated class."""
    return isinstance(model, _Accelerated)


def stand_in(module: Any, options: Options) -> None:
    """Give a VideoMAEModel or a VideoMAEForPreTraining its accelerated class, and these options."""
    module._mar_fast = options
    if not is_accelerated(module):
        kind: Any = type(module)
        module.__class__ = accelerated_class(kind)


def _new(kind: Any) -> nn.Module:
    fast = accelerated_class(kind)
    return fast.__new__(fast)


def _why_own_code(model: Any, kwargs: dict[str, Any]) -> str | None:
    for name in _RECORDED:
        asked = kwargs.get(name)
        asked = getattr(model.config, name, None) if asked is None else asked
        if asked is not None and asked is not False:  # 0 asks for the first hidden state
            return f"calls with {name} run transformers' own code"
    for name, value in kwargs.items():
        if value is not None and name not in _WITHOUT_EFFECT and name not in _RECORDED:
            return f"calls with {name} run transformers' own code"
    return None


def _as_asked(model: Any, output: Any, kwargs: dict[str, Any]) -> Any:
    as_dict = kwargs.get("return_dict")
    as_dict = getattr(model.config, "return_dict", True) if as_dict is None else as_dict
    return output if as_dict else output.to_tuple()


def _grid(model: Any, frames: int) -> tuple[int, int, int]:
    """(T', H', W') for this many frames."""
    part = model.embeddings.patch_embeddings
    _, height, width = part.projection.kernel_size
    return frames // part.tubelet_size, part.image_size[0] // height, part.image_size[1] // width


def visible(
    model: Any, options: Options, pixel_values: Tensor, bool_masked_pos: Tensor | None, num_visible: int | None
) -> TokenMask | None:
    """Check the arguments of a call of VideoMAEModel ``model``; its mask, or None for a dense call."""
    checks.tensor("pixel_values", pixel_values, 5, checks.FLOATS, "(B, T, C, H, W)")
    batch, frames = pixel_values.shape[:2]
    part = model.embeddings.patch_embeddings
    checks.size(
        "pixel_values", pixel_values, (batch, frames, part.num_channels, *part.image_size), "(B, T, C, H, W)"
    )  # fmt: skip
    grid, tokens = _grid(model, frames), model.embeddings.position_embeddings.shape[1]
    if math.prod(grid) != tokens:
        raise checks.bad(
            "pixel_values", f"{frames} frames, {math.prod(grid)} tokens", f"{tokens} tokens, as the position table has"
        )
    if bool_masked_pos is None:
        if num_visible is not None:
            raise checks.bad("num_visible", num_visible, "None, since bool_masked_pos is None")
        return _running(model, options, batch, grid, pixel_values.device)
    checks.tensor("bool_masked_pos", bool_masked_pos, 2, (torch.bool,), "(B, L), True = masked")
    checks.size("bool_masked_pos", bool_masked_pos, (batch, tokens), "(B, L)")
    bools = bool_masked_pos.to(pixel_values.device)
    count = options.num_visible if num_visible is None else num_visible
    if count is None:
        counts = (~bools).sum(1)
        low, high = (int(counts.min()), int(counts.max())) if batch else (tokens, tokens)
        if low != high:
            raise checks.bad("bool_masked_pos", f"clips with {low} to {high} visible tokens", "the same in every clip")
        count = low
    mask = TokenMask.from_bool_masked(bools, num_visible=count)
    if mask.num_visible == 0:
        raise checks.bad("bool_masked_pos", "no visible token", "at least one in every clip")
    return mask


def _running(
    model: Any, options: Options, batch: int, grid: tuple[int, int, int], device: torch.device
) -> TokenMask | None:
    """The mask that ``keep`` stands for: in training MAR's training form, else its test form."""
    if options.keep is None:
        return None
    form: dict[str, Any] = {"temporal_shuffle": True} if model.training else {"phase": 0}
    return cell_running(batch, grid, 1 - options.keep, device=device, **form)


def encode(model: Any, pixel_values: Tensor, mask: TokenMask | None) -> Tensor:
    """(B, T, C, H, W) -> (B, N, D), through the parts of VideoMAEModel ``model``."""
    caches = model._mar_fast.caches
    x, residual = _embed(model, caches, pixel_values, mask), None
    if untouched(model.encoder):
        x, residual = run_layers(model.encoder.layer, caches, x)
    else:
        caches.warn_once("mar_fast: a changed or hooked encoder runs transformers' own code")
        x = model.encoder(x).last_hidden_state
    if model.layernorm is None:
        return total(x, residual)
    if plain_norm(model.layernorm):
        return norm(model.layernorm, x, residual)[0]
    normed: Tensor = model.layernorm(total(x, residual))
    return normed


def _embed(model: Any, caches: Caches, pixel_values: Tensor, mask: TokenMask | None) -> Tensor:
    embeddings = model.embeddings
    part = embeddings.patch_embeddings
    projection = part.projection
    same = untouched(embeddings) and untouched(part) and untouched(projection, nn.Conv3d)
    sides = (pixel_values.shape[1], *pixel_values.shape[3:])
    # A convolution leaves out what is over at the edges; gather_patch_embed takes whole patches only.
    whole = not any(side % step for side, step in zip(sides, projection.kernel_size, strict=True)) if same else False
    plain = same and all(type(value) in PLAIN_TENSORS for value in (projection.weight, projection.bias))
    if not (plain and whole):
        caches.warn_once("mar_fast: changed or hooked embeddings, and odd sizes, run transformers' own code")
        embedded: Tensor = embeddings(pixel_values, None if mask is None else mask.bool_masked())
        return embedded
    video, weight = pixel_values.transpose(1, 2), projection.weight
    places = caches.table("encoder", embeddings.position_embeddings, video.device)
    if mask is None:
        everything = torch.arange(places.shape[0], dtype=torch.int32, device=video.device)
        keep_idx = everything.expand(video.shape[0], -1)
    else:
        keep_idx = mask.keep_idx
    return gather_patch_embed(video, keep_idx, weight, projection.bias, places)
