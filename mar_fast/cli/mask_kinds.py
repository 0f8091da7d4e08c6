"""What masks and reconstruct share: the kinds of mask, and how each is drawn for one clip."""

from enum import StrEnum

import torch
from torch import Tensor

from .. import MARConfig, TokenMask, masking

Kind = StrEnum("Kind", ["running", "random", "tube", "frame", "content"])


def check_seed(seed: int) -> None:
    """Check that torch takes this seed.

    Raises:
        ValueError: it does not.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed: got {seed}, expected a whole number from 0 to 2^63 - 1")


def drawn(kind: Kind, config: MARConfig, ratio: float, seed: int, train: bool = False) -> TokenMask | None:
    """The mask, or None for the one that goes by the clip: `by_content`.

    Raises:
        ValueError: a ratio that the kind does not allow, or ``train`` for another kind than running.
    """
    if train and kind != Kind.running:
        raise ValueError(f"--train: got it with --kind {kind}, expected --kind running")
    if kind == Kind.content:
        if not 0 <= ratio < 1:
            raise ValueError(f"--ratio: got {ratio}, expected a number in [0, 1)")
        return None
    generator = torch.Generator().manual_seed(seed)
    if kind == Kind.running:
        phase = None if train else 0
        return masking.cell_running(
            1, config.grid, ratio, cell=config.cell, phase=phase, temporal_shuffle=train, generator=generator
        )
    draw = {Kind.random: masking.random, Kind.tube: masking.tube, Kind.frame: masking.frame}[kind]
    return draw(1, config.grid, ratio, generator=generator)


def by_content(clip: Tensor, config: MARConfig, ratio: float) -> TokenMask:
    """Keep what changes most in a clip (C, T, H, W)."""
    masked = masking.content(clip[None], config.grid, budget=1 - ratio).bool_masked()
    return TokenMask.from_bool_masked(masked.view(1, *config.grid))
