"""Packed tokens of clips that differ in length: offsets (``cu_seqlens``), and the clip of each token."""

import torch
from torch import Tensor

from . import checks


def check_offsets(argument: str, offsets: Tensor, total: int) -> Tensor:
    """Check that offsets (B + 1,) rise from 0 to ``total``; returns the B lengths. Reads values: see `may_read`."""
    lengths, first, last = offsets.diff(), int(offsets[0]), int(offsets[-1])
    if first != 0 or last != total or bool((lengths < 0).any()):
        raise checks.bad(argument, f"offsets from {first} to {last}", f"rising offsets from 0 to total = {total}")
    return lengths


def clip_index(offsets: Tensor, total: int) -> Tensor:
    """(B + 1,) offsets -> (total,) int32, the clip of each token, without waiting for the device."""
    token = torch.arange(total, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), token, right=True, out_int32=True)
