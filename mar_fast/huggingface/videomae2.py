"""accelerate for VideoMAE v2's class on the hub (trust_remote_code): its parameters, in a `mar_fast.MAR`.

That code is not part of transformers nor of this package, so that nobody here can vouch for it. It is recognised by its
name, its configuration and the names of its weights, and then has to prove itself: `same_outputs`.
"""

from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import config_json
from ..checkpoint.compare import relative
from ..checkpoint.layouts import VIDEOMAE2
from ..config import MARConfig
from ..fallbacks import CHANGED, put_back, unhooked
from ..kernels import checks
from ..layers import Constant
from ..model import MAR
from .layers import State

NAME = "VideoMAEv2"
_TOLERANCE, _TOLERANCE_16 = 1e-3, 5e-2
_DROPOUT = ("drop_rate", "attn_drop_rate", "drop_path_rate", "head_drop_rate")
_ELSE = "mar_fast.from_pretrained reads its folder"


def is_videomae2(model: object) -> bool:
    """Whether this calls itself VideoMAE v2, and has its configuration."""
    config = getattr(getattr(model, "config", None), config_json.V2_KEY, None)
    return isinstance(model, nn.Module) and type(model).__name__ == NAME and isinstance(config, dict)


class VideoMAE2State(State):
    """The options of an accelerated VideoMAEv2, and the `mar_fast.MAR` that has its parameters.

    Attributes:
        kinds: The classes of the modules in the model that has proved itself; None before.
    """

    runner = "the model's own code"

    def __init__(self, keep: float | None = None, kinds: tuple[type[nn.Module], ...] | None = None) -> None:
        super().__init__(keep)
        self.kinds = kinds
        self.clear()

    def __reduce__(self) -> tuple[type[State], tuple[Any, ...]]:
        return type(self), (self.keep, self.kinds)

    def clear(self) -> None:
        """Forget the MAR: it is made again, of the parameters that there are then."""
        super().clear()
        self._mar: MAR | None = None
        self._parameters: list[nn.Parameter | None] = []

    def mar(self, model: nn.Module) -> MAR | None:
        """The MAR of these parameters; None where a module inside was replaced, hooked or given another forward."""
        inner = list(model.modules())[1:]
        if kinds_in(model) != self.kinds or not all(map(_plain, inner)):
            return None
        parameters = [parameter for module in inner for parameter in module._parameters.values()]
        same = len(parameters) == len(self._parameters) and all(map(is_, parameters, self._parameters))
        if self._mar is None or not same:
            self._mar, self._parameters = build(model, self.keep), parameters
        if self._mar.training != model.training:
            self._mar.train(model.training)
        return self._mar


def kinds_in(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """The classes of the modules inside a model, in order."""
    return tuple(map(type, list(model.modules())[1:]))


def _plain(module: nn.Module) -> bool:
    return unhooked(module) and ("forward" not in vars(module) or put_back(module, type(module)))


def build(model: Any, keep: float | None) -> MAR:
    """A `mar_fast.MAR` whose parameters are those of ``model``, the same objects.

    Raises:
        ValueError: the model is not what its configuration says, or mar_fast does not compute it.
    """
    content = {"model_type": NAME, config_json.V2_KEY: model.config.model_config}
    said, _ = config_json.said_by_videomae2("model", content)
    values = {name: value for name, (value, _) in said.items()}
    if values.pop("final_norm", False):
        raise checks.bad("model", f"a {NAME} without mean pooling", f"one with use_mean_pooling; {_ELSE}")
    ratio = 0.0 if keep is None else 1 - keep
    config = MARConfig(**values, classifier="linear", final_norm=False, decoder_depth=0, mask_ratio=ratio)
    with torch.device("meta"):
        mar = MAR(config)
    theirs = dict(model.named_parameters())
    for ours, parameter in list(mar.named_parameters()):
        (name,) = VIDEOMAE2.theirs(ours)
        found = theirs.pop(name, None)
        if found is None or found.shape != parameter.shape:
            got = "none" if found is None else f"shape {tuple(found.shape)}"
            raise checks.bad(f"model, {name}", got, f"shape {tuple(parameter.shape)}, by its configuration; {_ELSE}")
        owner, _, leaf = ours.rpartition(".")
        mar.get_submodule(owner).register_parameter(leaf, found)
    if theirs:
        raise checks.bad("model", f"a {NAME} with {', '.join(sorted(theirs)[:3])}", f"one without; {_ELSE}")
    device = next(mar.parameters()).device
    for part in mar.modules():
        if isinstance(part, Constant):
            part.to_empty(device=device)
    return mar


@torch.no_grad()
def same_outputs(model: Any) -> None:
    """Run one random clip through the model's own code and through mar_fast, both dense and in eval mode.

    Raises:
        ValueError: they do not agree, or the model's code does not run.
    """
    training, mar = model.training, build(model, None)
    config, weight = mar.config, next(mar.parameters())
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(1, config.channels, config.num_frames, *config.image_size, generator=generator).to(weight)
    try:
        want = model.eval()(clip)
    except Exception as error:
        got = f"a {NAME} whose own code fails on a clip ({type(error).__name__}: {' '.join(str(error).split())})"
        raise checks.bad("model", got, f"one that runs; {_ELSE}") from error
    finally:
        model.train(training)
    got = mar.eval()(clip).logits
    assert got is not None
    bound = _TOLERANCE_16 if weight.dtype in (torch.float16, torch.bfloat16) else _TOLERANCE
    agrees = isinstance(want, Tensor) and want.shape == got.shape
    difference = relative(got, want) if agrees else float("nan")
    if not difference <= bound:
        what = f"relative difference {difference:.1e}" if agrees else "an output of another form"
        raise checks.bad("model", f"a {NAME} whose own code computes something else ({what})", f"at most {bound:.0e}")


class AcceleratedVideoMAE2(nn.Module):
    """The accelerated forward; `mar_fast.huggingface.forward` makes a class of it and of the model's own."""

    _mar_fast: Any

    def forward(self, pixel_values: Tensor, *arguments: Any, **kwargs: Any) -> Any:
        """VideoMAEv2's forward: (B, C, T, H, W), normalised -> logits (B, classes), or pooled features (B, D).

        With other arguments the model's own forward runs.
        """
        own = super().forward
        state: VideoMAE2State = self._mar_fast
        rates = getattr(self, "config").model_config  # noqa: B009
        if arguments or kwargs:
            state.warn_once("calls with other arguments")
        elif self.training and any(rates.get(name) for name in _DROPOUT):
            state.warn_once("training with dropout or stochastic depth")
        elif (mar := state.mar(self)) is None:
            state.warn_once(CHANGED)
        else:
            return mar(pixel_values).logits
        return own(pixel_values, *arguments, **kwargs)
