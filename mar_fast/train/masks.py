"""The masks of a training batch, as the recipe says: what the encoder sees and what the decoder predicts."""

import torch

from .. import masking
from ..masking import Grid
from ..token_mask import TokenMask
from .recipe import Mask


def draw_mask(
    mask: Mask, batch: int, grid: Grid, cell: tuple[int, int, int], generator: torch.Generator
) -> tuple[TokenMask | None, TokenMask | None]:
    """Draw the masks of a batch.

    Args:
        mask: Their kinds and ratios.
        batch: Clips.
        grid: (T', H', W') tubelets.
        cell: Of cell running masks.
        generator: Source of all draws, and the device of the masks.

    Returns:
        The tokens that the encoder sees (None: all of them), and a mask whose ``keep_idx`` are the positions that the
        decoder predicts (None: those that were dropped).

    Raises:
        ValueError: a ratio that the cell or the grid does not allow.
    """
    encoder = decoder = None
    if mask.kind == "cell_running":
        encoder = masking.cell_running(
            batch,
            grid,
            mask.ratio,
            cell=cell,
            temporal_shuffle=mask.temporal_shuffle,
            spatial_repeat=mask.spatial_repeat,
            generator=generator,
        )
    elif mask.kind != "none":
        draw = {"random": masking.random, "tube": masking.tube, "frame": masking.frame}[mask.kind]
        encoder = draw(batch, grid, mask.ratio, generator=generator)
    if mask.decoder == "cell_running":
        decoder = masking.cell_running(batch, grid, mask.decoder_ratio, cell=cell, direction=-1, generator=generator)
    return encoder, decoder
