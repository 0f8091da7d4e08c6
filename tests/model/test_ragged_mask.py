"""Ragged masks: made from every form and back, and every check of them."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import small_clips as clips
from test_ragged import build, ragged

import mar_fast
from mar_fast import TokenMask
from mar_fast.kernels import debug_checks


def bool_rows(grid, batch, rng):
    rows = rng.random((batch, int(np.prod(grid)))) < rng.random((batch, 1))
    rows[np.arange(batch), rng.integers(rows.shape[1], size=batch)] = False
    return rows


@pytest.mark.parametrize("form", ["bools", "one tensor", "flat bools", "int32", "int64"])
@pytest.mark.parametrize("grid", [(7,), (30,), (1, 1, 1), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("batch", range(5))
def test_masks_go_round(grid, batch, form):
    rng = np.random.default_rng(batch)
    rows = bool_rows(grid, batch, rng)
    flat = torch.from_numpy(rows)
    shaped = flat.view(-1, *grid)
    visible = [torch.from_numpy(rng.permutation(np.flatnonzero(~row))) for row in rows]
    mask = {
        "bools": lambda: TokenMask.ragged(list(shaped), grid),
        "one tensor": lambda: TokenMask.ragged(shaped),
        "flat bools": lambda: TokenMask.ragged(list(flat), grid),
        "int32": lambda: TokenMask.ragged([index.int() for index in visible], grid),
        "int64": lambda: TokenMask.ragged(tuple(visible), grid),
    }[form]()
    lengths = (~rows).sum(1)
    assert (mask.batch, mask.num_tokens, mask.total_visible) == (len(rows), rows.shape[1], lengths.sum())
    assert mask.grid == grid and mask.max_seqlen == max(lengths, default=0)
    assert {value.dtype for value in (mask.keep_idx, mask.drop_idx, mask.cu_seqlens)} == {torch.int32}
    assert mask.keep_idx.tolist() == [i for row in rows for i in np.flatnonzero(~row)]  # True = masked
    assert mask.drop_idx.tolist() == [i for row in rows for i in np.flatnonzero(row)]
    assert mask.cu_seqlens.tolist() == [0, *np.cumsum(lengths)]
    assert mask.drop_cu_seqlens.tolist() == [0, *np.cumsum(rows.sum(1))]
    assert mask.clip_idx.tolist() == np.repeat(np.arange(len(rows)), lengths).tolist()
    assert mask.drop_clip_idx.tolist() == np.repeat(np.arange(len(rows)), rows.sum(1)).tolist()
    assert np.array_equal(mask.bool_masked().numpy(), rows)


i32 = partial(torch.tensor, dtype=torch.int32)
NONE = i32([]).int()


def three(keep, drop, offsets, longest, grid=(3,)):
    return TokenMask(i32(keep), i32(drop), grid, i32(offsets), longest)


REFUSED = {
    "rows": ("keep_idx", lambda: TokenMask(i32([[0]]), i32([1, 2]), (3,), i32([0, 1]), 1)),
    "dtype": ("drop_idx", lambda: TokenMask(i32([0]), torch.tensor([1, 2]), (3,), i32([0, 1]), 1)),
    "no longest": ("max_seqlen", lambda: three([0, 1], [2], [0, 2], None)),
    "longest without offsets": ("max_seqlen", lambda: TokenMask(i32([[0]]), i32([[1, 2]]), (3,), None, 1)),
    "rows without offsets": ("keep_idx", lambda: TokenMask(i32([0]), i32([1, 2]), (3,))),
    "the number of each clip": ("num_visible", lambda: ragged((3, 4)).num_visible),
    "no offsets": ("cu_seqlens", lambda: TokenMask(NONE, NONE, (3,), NONE, 0)),
    "offsets of floats": ("cu_seqlens", lambda: TokenMask(i32([0]), i32([1, 2]), (3,), torch.tensor([0.0, 1.0]), 1)),
    "too few tokens": ("keep_idx and drop_idx", lambda: three([0], [1], [0, 1], 1)),
    "grid of two": ("grid", lambda: three([0], [1, 2], [0, 1], 1, (3, 1))),
    "grid of floats": ("grid", lambda: three([0], [1, 2], [0, 1], 1, (3.0,))),
    "longest too short": ("max_seqlen", lambda: three([0, 1, 2, 0], [1, 2], [0, 3, 4], 2)),
    "longest beyond the grid": ("max_seqlen", lambda: three([0, 1], [2], [0, 2], 4)),
    "longest below the mean": ("max_seqlen", lambda: three([0, 1], [2], [0, 2], 1)),
    "longest of float": ("max_seqlen", lambda: three([0, 1], [2], [0, 2], 2.0)),
    "offsets begin late": ("cu_seqlens", lambda: three([0, 1], [2], [1, 2], 2)),
    "offsets end early": ("cu_seqlens", lambda: three([0, 1], [2], [0, 1], 2)),
    "a clip without tokens": ("cu_seqlens", lambda: three([0, 1], [2, 0, 1, 2], [0, 2, 2], 2)),
    "falling offsets": ("cu_seqlens", lambda: three([0, 1, 0], [2, 0, 1, 1, 2, 2], [0, 2, 1, 3], 2)),
    "beyond the grid": ("keep_idx", lambda: three([0, 3], [2], [0, 2], 2)),
    "below 0": ("drop_idx", lambda: three([0, 1], [-1], [0, 2], 2)),
    "unsorted": ("keep_idx", lambda: three([1, 0], [2], [0, 2], 2)),
    "twice": ("drop_idx", lambda: three([1], [2, 2], [0, 1], 1)),
    "kept and dropped": ("keep_idx and drop_idx together", lambda: three([0, 1], [1], [0, 2], 2)),
    "devices": ("cu_seqlens", lambda: TokenMask(i32([0]), i32([1]), (2,), i32([0, 1]).to("meta"), 1)),
    "clips of None": ("clips", lambda: TokenMask.ragged(None)),
    "clips of lists": ("clips", lambda: TokenMask.ragged([[0, 1]], (3,))),
    "a tensor of indices": ("clips", lambda: TokenMask.ragged(i32([[0, 1]]), (3,))),
    "no grid": ("grid", lambda: TokenMask.ragged([i32([0, 1])])),
    "grid of 0": ("grid", lambda: TokenMask.ragged([i32([0])], (0,))),
    "an index twice": (r"clips\[1\]", lambda: TokenMask.ragged([i32([0]), i32([1, 1])], (3,))),
    "an index beyond": (r"clips\[0\]", lambda: TokenMask.ragged([i32([3])], (3,))),
    "no index": (r"clips\[1\]", lambda: TokenMask.ragged([i32([0]), NONE], (3,))),
    "floats": (r"clips\[0\]", lambda: TokenMask.ragged([torch.zeros(2)], (3,))),
    "indices and bools": (r"clips\[1\]", lambda: TokenMask.ragged([i32([0]), torch.zeros(3, dtype=torch.bool)], (3,))),
    "bools and indices": (r"clips\[1\]", lambda: TokenMask.ragged([torch.zeros(3, dtype=torch.bool), i32([0])], (3,))),
    "bools of two sizes": (r"clips\[1\]", lambda: TokenMask.ragged([torch.zeros(n, dtype=torch.bool) for n in (3, 4)])),
    "bools of 2-D": (r"clips\[0\]", lambda: TokenMask.ragged([torch.zeros(3, 4, dtype=torch.bool)])),
    "bools off the grid": ("grid", lambda: TokenMask.ragged(torch.zeros(2, 3, dtype=torch.bool), (4,))),
    "nothing visible": (r"clips\[1\]", lambda: TokenMask.ragged(torch.tensor([[False], [True]]))),
    "mask of another batch": ("mask", lambda: build(mar_fast.MAR)(clips(2), ragged((3, 4, 5)))),
    "mask of another grid": ("mask", lambda: build(mar_fast.MAR)(clips(1), TokenMask.ragged([i32([0])], (4, 4, 2)))),
    "mask of another device": ("mask", lambda: build(mar_fast.MAR)(clips(1), ragged((3,)).to("meta"))),
    "no decoder": ("reconstruct", lambda: build(mar_fast.MAR, decoder_depth=0)(clips(1), ragged([3]), reconstruct=1)),
}


@pytest.mark.parametrize(("named", "call"), REFUSED.values(), ids=list(REFUSED))
def test_the_message_names_the_argument(named, call):
    with debug_checks(), pytest.raises((TypeError, ValueError), match=f"^{named}: got .*, expected "):
        call()
