"""The masks of a batch, as the recipe says: what the encoder sees and what the decoder predicts."""

import hashlib
from typing import Any

import torch

from .. import masking
from ..config import MARConfig
from ..token_mask import TokenMask
from .recipe import Mask, Recipe

Masks = tuple[TokenMask | None, TokenMask | None]


def draw_mask(
    mask: Mask, batch: int, config: MARConfig, generator: torch.Generator, device: torch.device | None = None
) -> Masks:
    """Draw the masks of a batch, for the grid and the cell of ``config``, on ``device`` (None: the generator's).

    Returns:
        The tokens that the encoder sees (None: all of them), and a mask whose ``keep_idx`` are the positions that the
        decoder predicts (None: those that were dropped).

    Raises:
        ValueError: a ratio that the cell or the grid does not allow.
    """
    encoder, decoder, grid, cell = None, None, config.grid, config.cell
    if mask.kind == "cell_running":
        form: dict[str, Any] = dict(temporal_shuffle=mask.temporal_shuffle, spatial_repeat=mask.spatial_repeat)
        encoder = masking.cell_running(batch, grid, mask.ratio, cell=cell, **form, generator=generator)
    elif mask.kind != "none":
        draw = {"random": masking.random, "tube": masking.tube, "frame": masking.frame}[mask.kind]
        encoder = draw(batch, grid, mask.ratio, generator=generator)
    if mask.decoder == "cell_running":
        decoder = masking.cell_running(batch, grid, mask.decoder_ratio, cell=cell, direction=-1, generator=generator)
    where = device or generator.device
    return encoder and encoder.to(where), decoder and decoder.to(where)


def validation_masks(recipe: Recipe, config: MARConfig, batch: int, number: int, device: torch.device) -> Masks:
    """The masks of batch ``number`` of a validation, the same every time: MAR's own test form, or drawn."""
    generator = torch.Generator().manual_seed(seed_of(recipe.seed, number))
    mask, decoder_mask = draw_mask(recipe.mask, batch, config, generator, device)
    if recipe.mask.kind == "cell_running" and recipe.mask.ratio == config.mask_ratio:
        mask = masking.cell_running(batch, config.grid, config.mask_ratio, cell=config.cell, phase=0, device=device)
    return mask, decoder_mask


def seed_of(*numbers: int) -> int:
    """A seed of its own for each use, which the numbers tell apart."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1
