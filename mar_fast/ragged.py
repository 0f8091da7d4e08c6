"""RaggedMask: which tubelets stay visible where every clip keeps its own number of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import checks


@dataclass(frozen=True, eq=False)
class RaggedMask:
    """The visible and the dropped tokens of clips that keep different numbers of them, packed one clip after another.

    Attributes:
        keep_idx: (total,) int32, flat indices t * H' * W' + y * W' + x of the visible tokens, sorted within each clip.
        drop_idx: (B * L - total,) int32, all others.
        cu_seqlens: (B + 1,) int32; the visible tokens of clip i are [cu_seqlens[i], cu_seqlens[i + 1]). At least one.
        max_seqlen: Visible tokens of the clip that has most, or more: a number of the host, so that nothing that runs
            on the mask waits for the device.
        grid: (T', H', W'), or (L,) where only the flat form was known.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit; on a CPU also if an offset does not, if a clip has no
            visible token or if keep_idx and drop_idx are not a partition of every clip's grid.
    """

    keep_idx: Tensor
    drop_idx: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    grid: tuple[int, ...]

    def __post_init__(self) -> None:
        check_grid(self.grid)
        for name in ("keep_idx", "drop_idx"):
            checks.tensor(name, getattr(self, name), 1, (torch.int32,), "(tokens,)")
        checks.tensor("cu_seqlens", self.cu_seqlens, 1, (torch.int32,), "(B + 1,)")
        if len(self.cu_seqlens) == 0:
            raise checks.bad("cu_seqlens", "no values", "B + 1 offsets that begin with 0")
        total, every = len(self.keep_idx), self.batch * self.num_tokens
        if total + len(self.drop_idx) != every:
            got = f"{total} and {len(self.drop_idx)} values"
            accepted = f"{every} together: {self.batch} clips of {self.num_tokens} tokens"
            raise checks.bad("keep_idx and drop_idx", got, accepted)
        least = -(-total // self.batch) if self.batch else 0
        if not isinstance(self.max_seqlen, int) or not least <= self.max_seqlen <= self.num_tokens:
            accepted = f"a whole number from {least} to {self.num_tokens}, since {self.batch} clips keep {total} tokens"
            raise checks.bad("max_seqlen", repr(self.max_seqlen), accepted)
        checks.same_device("keep_idx", self.keep_idx.device, drop_idx=self.drop_idx, cu_seqlens=self.cu_seqlens)
        if checks.may_read(self.cu_seqlens):
            self._check_values()

    def _check_values(self) -> None:
        first, last = self.cu_seqlens[[0, -1]].tolist()
        if first != 0 or last != len(self.keep_idx):
            accepted = f"offsets from 0 to {len(self.keep_idx)}, the tokens of keep_idx"
            raise checks.bad("cu_seqlens", f"offsets from {first} to {last}", accepted)
        lengths = self.cu_seqlens.diff().tolist()
        if lengths and min(lengths) < 1:
            accepted = "at least one in every clip"
            raise checks.bad(
                "cu_seqlens", f"{min(lengths)} visible tokens in clip {lengths.index(min(lengths))}", accepted
            )
        if max(lengths, default=0) > self.max_seqlen:
            raise checks.bad("max_seqlen", self.max_seqlen, f"at least {max(lengths)}, of the clip that has most")
        parts = []
        for name, offsets in (("keep_idx", self.cu_seqlens), ("drop_idx", self.drop_cu_seqlens)):
            index: Tensor = getattr(self, name)
            checks.index_range(name, index, self.num_tokens)
            parts.append(clip_of(offsets, len(index)).long() * self.num_tokens + index)
            checks.strictly_ascending(name, parts[-1][None])
        checks.strictly_ascending("keep_idx and drop_idx together", torch.cat(parts).sort().values[None])

    @classmethod
    def from_clips(cls, clips: Sequence[Tensor] | Tensor, grid: tuple[int, ...] | None = None) -> "RaggedMask":
        """From one tensor for each clip: its visible indices, or its bool mask, **True = masked**.

        Args:
            clips: 1-D int32 or int64 indices of the visible tokens, in any order; or bool masks, (L,) or (T', H', W'),
                also as one tensor (B, L) or (B, T', H', W').
            grid: (T', H', W') or (L,), needed for indices; bool masks have their own.

        Returns:
            The mask on the clips' device. Indices are packed without waiting for it, bools are counted first.

        Raises:
            ValueError, TypeError: kinds, shapes, dtypes or devices do not fit, an index is out of the grid or twice in
                a clip (on a CPU), or a clip has no visible token.
        """
        if grid is not None:
            check_grid(grid)
        if isinstance(clips, Tensor):
            if clips.dtype != torch.bool or clips.ndim not in (2, 4):
                got = f"{clips.dtype} of shape {tuple(clips.shape)}"
                raise checks.bad("clips", got, "a list of tensors, or bool (B, L) or (B, T', H', W')")
            return cls._from_bools(clips, grid)
        if not isinstance(clips, list | tuple) or not all(isinstance(clip, Tensor) for clip in clips):
            raise checks.bad_type("clips", type(clips).__name__, "a list of tensors, one for each clip")
        if clips and clips[0].dtype == torch.bool:
            for number, clip in enumerate(clips):
                name = f"clips[{number}]"
                checks.tensor(name, clip, None, (torch.bool,), "(L,) or (T', H', W'), a bool mask like clips[0]")
                if clip.ndim not in (1, 3):
                    raise checks.bad(name, f"shape {tuple(clip.shape)}", "(L,) or (T', H', W')")
                checks.size(name, clip, clips[0].shape, "the shape of clips[0]")
                checks.same_device("clips[0]", clips[0].device, **{name: clip})
            return cls._from_bools(torch.stack(list(clips)), grid)
        if grid is None:
            raise checks.bad("grid", None, "(T', H', W') or (L,): indices do not tell how many tokens there are")
        tokens = math.prod(grid)
        masked = torch.ones(len(clips), tokens, dtype=torch.bool, device=clips[0].device if clips else None)
        for number, clip in enumerate(clips):
            name = f"clips[{number}]"
            checks.tensor(name, clip, 1, checks.INDICES, "(visible tokens,), indices like clips[0]")
            checks.same_device("clips[0]", masked.device, **{name: clip})
            if not 0 < len(clip) <= tokens:
                raise checks.bad(name, f"{len(clip)} visible tokens", f"from 1 to {tokens}")
            checks.index_range(name, clip, tokens)
            checks.unique_rows(name, clip[None])
            masked[number].scatter_(0, clip.long(), False)
        return _pack(masked, [len(clip) for clip in clips], grid)

    @classmethod
    def _from_bools(cls, masked: Tensor, grid: tuple[int, ...] | None) -> "RaggedMask":
        """(B, L) or (B, T', H', W')."""
        grid = tuple(masked.shape[1:]) if grid is None else grid
        masked = masked.flatten(1)
        if masked.shape[1] != math.prod(grid):
            raise checks.bad("grid", grid, f"{masked.shape[1]} tokens, as the masks have")
        lengths = (~masked).sum(1).tolist()
        if 0 in lengths:
            raise checks.bad(f"clips[{lengths.index(0)}]", "no visible token", "at least one False in every clip")
        return _pack(masked, lengths, grid)

    def bool_masked(self) -> Tensor:
        """(B, L) bool, True = masked."""
        masked = torch.ones(self.batch * self.num_tokens, dtype=torch.bool, device=self.keep_idx.device)
        place = self.clip_idx.long() * self.num_tokens + self.keep_idx
        return masked.scatter(0, place, False).view(self.batch, self.num_tokens)

    def to(self, device: torch.device | str) -> "RaggedMask":
        """The same mask on another device."""
        keep_idx, drop_idx, cu_seqlens = (value.to(device) for value in (self.keep_idx, self.drop_idx, self.cu_seqlens))
        return RaggedMask(keep_idx, drop_idx, cu_seqlens, self.max_seqlen, self.grid)

    @property
    def batch(self) -> int:
        """B, the number of clips."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        """L, all tokens of each clip."""
        return math.prod(self.grid)

    @property
    def total_visible(self) -> int:
        """The visible tokens of all clips together."""
        return self.keep_idx.shape[0]

    @property
    def drop_cu_seqlens(self) -> Tensor:
        """(B + 1,) int32; the dropped tokens of clip i are [drop_cu_seqlens[i], drop_cu_seqlens[i + 1])."""
        clips = torch.arange(self.batch + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        return clips * self.num_tokens - self.cu_seqlens

    @property
    def clip_idx(self) -> Tensor:
        """(total,) int32, the clip of each visible token."""
        return clip_of(self.cu_seqlens, self.keep_idx.shape[0])

    @property
    def drop_clip_idx(self) -> Tensor:
        """(B * L - total,) int32, the clip of each dropped token."""
        return clip_of(self.drop_cu_seqlens, self.drop_idx.shape[0])


def clip_of(offsets: Tensor, total: int) -> Tensor:
    """(B + 1,) offsets of clips -> (total,) int32, the clip of each token, without waiting for the device."""
    token = torch.arange(total, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), token, right=True, out_int32=True)


def check_grid(grid: object) -> None:
    """Check that ``grid`` is (T', H', W') or (L,), whole numbers above 0."""
    if not isinstance(grid, tuple) or not all(isinstance(side, int) and side > 0 for side in grid):
        raise checks.bad_type("grid", repr(grid), "a tuple (T', H', W') or (L,) of whole numbers above 0")
    if len(grid) not in (1, 3):
        raise checks.bad("grid", grid, "(T', H', W') or (L,)")


def _pack(masked: Tensor, lengths: list[int], grid: tuple[int, ...]) -> RaggedMask:
    """(B, L) bool and the visible tokens of each clip, known to the host."""
    total, tokens = sum(lengths), masked.shape[1]
    # A stable sort of the bools puts visible tokens first and leaves both groups in order, clip after clip.
    order = (masked.flatten().to(torch.uint8).argsort(stable=True) % tokens).to(torch.int32)
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(masked.device)
    return RaggedMask(order[:total], order[total:], offsets, max(lengths, default=0), grid)
