"""How far apart two models are, layer by layer, on the same random clip."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..kernels import checks
from ..layers import Block
from ..masking import random
from ..model import MAR


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        layers: By layer, "encoder.blocks.3", "features", "classifier.norm", "logits", "pixels", ..., in the order of
            computation, how far the second model's values are from the first one's, as `relative` has it.
        only_first: Layers that the second model lacks.
        only_second: Layers that the first one lacks.
    """

    layers: dict[str, float]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    def within(self, tolerance: float) -> bool:
        """Whether no layer differs by more, and none is only in one of the models."""
        alike = not self.only_first and not self.only_second
        return alike and all(difference <= tolerance for difference in self.layers.values())


@torch.no_grad()
def compare(first: MAR, second: MAR, *, ratio: float = 0.5, seed: int = 0) -> Comparison:
    """Run one random clip through both models, in evaluation, and compare what every layer gives.

    Args:
        first: The model that differences are relative to; both are on the CPU.
        second: The other one; it takes clips of the same size, in patches of the same size.
        ratio: Share of tokens that are masked, the same ones for both; the pixel decoders predict them.
        seed: Of clip and mask.

    Raises:
        ValueError: the two do not take the same clips.
    """
    for name in ("num_frames", "image_size", "channels", "patch_size"):
        want, got = getattr(first.config, name), getattr(second.config, name)
        if got != want:
            raise checks.bad(f"second, {name}", got, f"{want}, as first")
    config = first.config
    generator = torch.Generator().manual_seed(seed)
    # Normalised pixels, so that a difference of mean and std is one of configuration and not of every layer.
    video = torch.randn(1, config.channels, config.num_frames, *config.image_size, generator=generator)
    mask = random(1, config.grid, ratio, generator=generator)
    left, right = (_layers(model, video, mask) for model in (first, second))
    return Comparison(
        {name: relative(right[name], left[name]) for name in left if name in right},
        tuple(name for name in left if name not in right),
        tuple(name for name in right if name not in left),
    )


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of ``want``, in float64; infinity for NaN or another shape."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.detach().double(), want.detach().double().to(got.device)
    difference = float((got - want).norm())
    ratio = 0.0 if difference == 0 else difference / max(float(want.norm()), torch.finfo(torch.float64).tiny)
    return ratio if ratio == ratio else float("inf")


def _layers(model: MAR, video: Tensor, mask: Any) -> dict[str, Tensor]:
    """Name -> what the layer gives, in the order of computation."""
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # A block leaves the sum with its residual to the next norm.
            seen[name] = output[0] + output[1] if isinstance(module, Block) else output

        return module.register_forward_hook(hook)

    watched = [it for it in model.named_modules() if isinstance(it[1], Block) or it[0] == "encoder_to_decoder"]
    hooks, training = [watch(*it) for it in watched], model.training
    try:
        out = model.eval()(video.to(next(model.parameters()).dtype), mask, reconstruct=model.decoder is not None)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    seen |= {name: value for name in ("features", "logits", "pixels") if (value := getattr(out, name)) is not None}
    order = ("encoder.", "features", "classifier.", "logits", "encoder_to_decoder", "decoder.", "pixels")
    return {name: seen[name] for begin in order for name in seen if name.startswith(begin)}
