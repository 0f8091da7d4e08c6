"""What mar-fast tradeoff compares: the dense model, single masks, and ensembles of complementary ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .. import MARConfig, TokenMask, masking
from ..kernels import checks
from . import ensemble
from .measured import Mask

MaskKind = StrEnum("MaskKind", ["running", "random", "tube", "frame", "content"])
Ensembles = Literal["once", "all", "none"]

DENSE = "dense"


def draw(
    kind: str, video: Tensor, config: MARConfig, ratio: float, generator: torch.Generator, *, train: bool = False
) -> TokenMask:
    """A mask over a batch of clips (B, C, T, H, W) that drops ``ratio``; for content, of all clips together.

    The running mask is the test form, or with ``train`` the training form: random phase, shuffled in time.

    Raises:
        ValueError: the grid or the cell does not allow this ratio.
    """
    batch, grid = len(video), config.grid
    if kind == "content":
        return masking.content(video, grid, budget=1 - ratio)
    if kind == "running":
        form: dict[str, Any] = dict(cell=config.cell, phase=None if train else 0, temporal_shuffle=train)
        return masking.cell_running(batch, grid, ratio, **form, generator=generator, device=video.device)
    drawn: TokenMask = getattr(masking, kind)(batch, grid, ratio, generator=generator, device=video.device)
    return drawn


@dataclass(frozen=True)
class MaskSetting:
    """A way to mask: one mask of a kind, or the complementary ones that together see everything.

    Attributes:
        kind: "dense" or a `MaskKind`.
        keep: Share of visible tokens in a pass.
        passes: 1, or the number of complementary masks.
    """

    kind: str
    keep: float
    passes: int = 1

    @property
    def label(self) -> str:
        """In words: "running 50 %, 2 views"."""
        if self.kind == DENSE:
            return DENSE
        views = f", {self.passes} views" if self.passes > 1 else ""
        return f"{self.kind} {self.keep * 100:g} %{views}"

    @property
    def fixed(self) -> bool:
        """Whether its masks are the same for all clips, so that they can be made once."""
        return self.kind in (DENSE, "running")

    def masks(self, video: Tensor, config: MARConfig, generator: torch.Generator) -> list[Mask]:
        """One mask for each pass over a batch of clips (B, C, T, H, W); None is the dense model's own.

        Raises:
            ValueError: the grid or the cell does not allow this setting.
        """
        if self.kind == DENSE:
            return [None]
        if self.passes == 1:
            return [draw(self.kind, video, config, 1 - self.keep, generator)]
        how: dict[str, Any] = dict(cell=config.cell, generator=generator, device=video.device)
        kind = cast(ensemble.Kind, self.kind)
        return [*ensemble.complementary(kind, len(video), config.grid, 1 - self.keep, **how)]


def usual_keep(config: MARConfig) -> tuple[float, ...]:
    """The keep ratios to measure if none are given; 3/8 is one of them where a running cell has eighths."""
    return (0.75, 0.5, 0.375, 0.25) if math.prod(config.cell) % 8 == 0 else (0.75, 0.5, 0.25)


def choose(
    config: MARConfig, kinds: Sequence[str], keep: Sequence[float], ensembles: Ensembles
) -> tuple[list[MaskSetting], dict[str, str]]:
    """The dense model, then all settings that a model allows.

    Args:
        config: The model's.
        kinds: Some of `MaskKind`.
        keep: Shares of visible tokens in (0, 1]; 1 is the dense model, which is always there.
        ensembles: "once" for those that see each token exactly once, "all" also for those that see it several times.

    Returns:
        The settings; and, by label, why the grid or the cell does not allow the others.

    Raises:
        ValueError: an unknown kind, a share out of range, or nothing to compare with the dense model.
    """
    for kind in kinds:
        if kind not in list(MaskKind):
            raise checks.bad("kind", repr(kind), "one of " + ", ".join(MaskKind))
    for share in keep:
        if not 0 < share <= 1:
            raise checks.bad("keep", share, "a share above 0, up to 1")
    found, refused = [MaskSetting(DENSE, 1.0)], dict[str, str]()
    for kind in dict.fromkeys(kinds):
        for share in sorted({share for share in keep if share < 1}, reverse=True):
            single = MaskSetting(kind, share)
            if kind == "content":  # which allows every share, and has no complement
                found.append(single)
                continue
            wanted = [single]
            if ensembles != "none":
                try:
                    kept = ensemble.fraction(1 - share)
                    if kept.numerator == 1 or ensembles == "all":
                        wanted.append(MaskSetting(kind, share, kept.denominator))
                except ValueError as error:
                    refused[f"{single.label}, complementary views"] = str(error)
            for setting in wanted:
                try:
                    setting.masks(torch.empty(1, 0), config, torch.Generator())
                    found.append(setting)
                except ValueError as error:
                    refused[setting.label] = str(error)
    if len(found) == 1:
        reasons = "; ".join(f"{label}: {why}" for label, why in refused.items()) or "1 is the dense model"
        raise checks.bad("keep", ", ".join(map(str, keep)), f"a share that one of the masks can keep ({reasons})")
    return found, refused
