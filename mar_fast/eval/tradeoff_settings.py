"""What mar-fast tradeoff compares: the dense model, single masks, and ensembles of complementary ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

import torch
from torch import Tensor

from .. import MARConfig, TokenMask, masking
from ..kernels import checks
from . import ensemble

KINDS = ("running", "random", "tube", "frame", "content")
DRAWN = {"random": masking.random, "tube": masking.tube, "frame": masking.frame}
DENSE = "dense"

KEEP = (0.75, 0.5, 0.25)
# Only cells of 8 slots, and others that 8 divides, can keep it.
KEEP_OF_LARGE_CELLS = 0.375

Mask = TokenMask | None


class Ensembles(StrEnum):
    """Which ensembles are measured."""

    ONCE = "once"
    ALL = "all"
    NONE = "none"


@dataclass(frozen=True)
class Setting:
    """A way to run the model: masks of one kind, in one pass or in those that together see everything.

    Attributes:
        kind: "dense" or one of `KINDS`.
        keep: Share of visible tokens in a pass; for content, of all clips of a pass together.
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
        if self.kind == "content":
            return [masking.content(video, config.grid, budget=self.keep)]
        batch, ratio = len(video), 1 - self.keep
        if self.passes > 1:
            kind = cast(ensemble.Kind, self.kind)
            options: dict[str, Any] = dict(cell=config.cell, generator=generator, device=video.device)
            return list[Mask](ensemble.complementary(kind, batch, config.grid, ratio, **options))
        if self.kind == "running":
            return [masking.cell_running(batch, config.grid, ratio, cell=config.cell, phase=0, device=video.device)]
        return [DRAWN[self.kind](batch, config.grid, ratio, generator=generator, device=video.device)]


def usual_keep(config: MARConfig) -> tuple[float, ...]:
    """The keep ratios that are measured where none are asked for: 3/8 is one of them if the running cell has it."""
    try:
        masking.cell_running(0, config.grid, 1 - KEEP_OF_LARGE_CELLS, cell=config.cell)
    except ValueError:
        return KEEP
    return tuple(sorted((*KEEP, KEEP_OF_LARGE_CELLS), reverse=True))


def choose(
    config: MARConfig, kinds: Sequence[str], keep: Sequence[float], ensembles: Ensembles
) -> tuple[list[Setting], dict[str, str]]:
    """The dense model, then all settings that a model allows.

    Args:
        config: The model's.
        kinds: Some of `KINDS`.
        keep: Shares of visible tokens in (0, 1]; 1 is the dense model, which is always there.
        ensembles: ONCE those that see each token exactly once, ALL also those that see it several times.

    Returns:
        The settings, and for each one that the grid or the cell does not allow why, by its label.

    Raises:
        ValueError: a kind or a share that is none, or nothing to compare with the dense model.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise checks.bad("kind", repr(kind), "one of " + ", ".join(KINDS))
    for share in keep:
        if not 0 < share <= 1:
            raise checks.bad("keep", share, "a share above 0, up to 1")
    found, absent = [Setting(DENSE, 1.0)], dict[str, str]()
    for kind in dict.fromkeys(kinds):
        for share in sorted({share for share in keep if share < 1}, reverse=True):
            for setting in _of(kind, share, ensembles, absent):
                why = _refused(setting, config)
                if why:
                    absent[setting.label] = why
                else:
                    found.append(setting)
    if len(found) == 1:
        reasons = "; ".join(f"{label}: {why}" for label, why in absent.items()) or "1 is the dense model"
        raise checks.bad("keep", ", ".join(map(str, keep)), f"a share that one of the masks can keep ({reasons})")
    return found, absent


def _of(kind: str, keep: float, ensembles: Ensembles, absent: dict[str, str]) -> list[Setting]:
    single = Setting(kind, keep)
    if ensembles == Ensembles.NONE or kind == "content":
        return [single]
    try:
        kept = ensemble.fraction(1 - keep)
    except ValueError as error:
        if ensembles == Ensembles.ALL:
            absent[f"{single.label}, complementary views"] = str(error)
        return [single]
    if kept.numerator > 1 and ensembles == Ensembles.ONCE:
        return [single]
    return [single, Setting(kind, keep, kept.denominator)]


def _refused(setting: Setting, config: MARConfig) -> str:
    """Why a setting cannot be; "" where it can. Content masks need a clip, and allow every share."""
    if setting.kind == "content":
        return ""
    try:
        setting.masks(torch.empty(1, 0), config, torch.Generator())
    except ValueError as error:
        return str(error)
    return ""
