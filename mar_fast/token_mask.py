"""TokenMask: which tubelets of each clip stay visible, where clips keep equally many of them and where they do not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import checks
from .kernels.varlen import check_offsets, clip_index


class Segments(NamedTuple):
    """Where clips begin and end among packed tokens.

    Attributes:
        cu_seqlens: (B + 1,) int32; the tokens of clip i are [cu_seqlens[i], cu_seqlens[i + 1]).
        max_seqlen: The tokens of the longest clip, or more.
        clip_idx: (total,) int32, the clip of each token.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    clip_idx: Tensor


@dataclass(frozen=True, eq=False)
class TokenMask:
    """The visible and the dropped tokens of a batch of clips, as flat indices t * H' * W' + y * W' + x.

    In a ragged mask each clip keeps its own number of tokens, at least one: its tokens are packed, those of one clip
    after those of another.

    Attributes:
        keep_idx: (B, N) int32, the visible tokens of each clip in ascending order; (total,) in a ragged mask.
        drop_idx: (B, L - N) int32, all others; (B * L - total,) in a ragged mask.
        grid: (T', H', W'), or (L,) where only the flat form was known.
        cu_seqlens: (B + 1,) int32 in a ragged mask: the visible tokens of clip i are keep_idx[cu_seqlens[i] :
            cu_seqlens[i + 1]]. None where all clips keep N tokens.
        max_seqlen: With cu_seqlens: the visible tokens of the clip that has most, or more. It is a number of the host,
            so that nothing that runs on the mask waits for the device.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit; on a CPU also if an offset does not, or if keep_idx and
            drop_idx are not a partition of every clip's grid.
    """

    keep_idx: Tensor
    drop_idx: Tensor
    grid: tuple[int, ...]
    # Strict export of torch 2.11 cannot return the default of a field, but what a factory makes.
    cu_seqlens: Tensor | None = field(default_factory=lambda: None)
    max_seqlen: int | None = None

    def __post_init__(self) -> None:
        check_grid(self.grid)
        ndim, shape = (2, "(B, tokens), or (tokens,) with cu_seqlens") if self.cu_seqlens is None else (1, "(tokens,)")
        for name in ("keep_idx", "drop_idx"):
            checks.tensor(name, getattr(self, name), ndim, (torch.int32,), shape)
        checks.same_device("keep_idx", self.keep_idx.device, drop_idx=self.drop_idx)
        if self.cu_seqlens is not None:
            self._check_offsets(self.cu_seqlens)
        elif self.drop_idx.shape[0] != self.batch:  # len() would make an exported batch size a constant
            raise checks.bad("drop_idx", f"{self.drop_idx.shape[0]} rows", f"{self.batch}, as keep_idx has")
        elif self.max_seqlen is not None:
            raise checks.bad("max_seqlen", self.max_seqlen, "None, since cu_seqlens is None")
        kept, dropped, every = self.keep_idx.numel(), self.drop_idx.numel(), self.batch * self.num_tokens
        if kept + dropped != every:
            accepted = f"{every} together: {self.batch} clips of grid {self.grid}"
            raise checks.bad("keep_idx and drop_idx", f"{kept} and {dropped} values", accepted)
        if checks.may_read(self.keep_idx) or checks.may_read(self.drop_idx):
            rows = []
            for name, clip_idx in (("keep_idx", self.clip_idx), ("drop_idx", self.drop_clip_idx)):
                index: Tensor = getattr(self, name)
                checks.index_range(name, index, self.num_tokens)
                rows.append(self._rows(index, clip_idx))
                checks.strictly_ascending(name, rows[-1][None])
            checks.strictly_ascending("keep_idx and drop_idx together", torch.cat(rows).sort().values[None])

    def _check_offsets(self, cu_seqlens: Tensor) -> None:
        checks.tensor("cu_seqlens", cu_seqlens, 1, (torch.int32,), "(B + 1,)")
        if cu_seqlens.shape[0] == 0:
            raise checks.bad("cu_seqlens", "no values", "B + 1 offsets that begin with 0")
        checks.same_device("keep_idx", self.keep_idx.device, cu_seqlens=cu_seqlens)
        longest = -(-self.total_visible // self.batch) if self.batch else 0  # at least
        if checks.may_read(cu_seqlens):
            lengths = check_offsets("cu_seqlens", cu_seqlens, self.total_visible).tolist()
            if 0 in lengths:
                raise checks.bad("cu_seqlens", f"no visible token in clip {lengths.index(0)}", "at least one")
            longest = max(lengths, default=0)
        if not isinstance(self.max_seqlen, int) or not longest <= self.max_seqlen <= self.num_tokens:
            accepted = f"a whole number from {longest} to {self.num_tokens}, and no less than the longest clip has"
            raise checks.bad("max_seqlen", repr(self.max_seqlen), accepted)

    def _rows(self, index: Tensor, clip_idx: Tensor | None) -> Tensor:
        """Indices (B, N), or packed ones with the clip of each -> (total,) rows among the B * L tokens of all clips."""
        clip = torch.arange(self.batch, device=index.device)[:, None] if clip_idx is None else clip_idx.long()
        return (clip * self.num_tokens + index).flatten()

    @classmethod
    def from_bool_masked(cls, masked: Tensor, *, num_visible: int | None = None) -> "TokenMask":
        """From a bool mask, **True = masked**, as in VideoMAE and Hugging Face.

        Args:
            masked: (B, L) or (B, T', H', W') bool.
            num_visible: Visible tokens of every clip. None reads them from the mask, which waits for the device, and
                which exporters cannot do.

        Raises:
            ValueError, TypeError: a wrong shape or dtype, clips with unequal counts, or a count other than given.
        """
        if not isinstance(masked, Tensor) or masked.dtype != torch.bool:
            got = masked.dtype if isinstance(masked, Tensor) else type(masked).__name__
            raise checks.bad_type("masked", got, "a bool tensor, True = masked")
        if masked.ndim not in (2, 4):
            raise checks.bad("masked", f"shape {tuple(masked.shape)}", "(B, L) or (B, T', H', W')")
        flat = masked.flatten(1)
        grid = tuple(map(int, masked.shape[1:]))  # symbols or tensors while a call is exported or traced
        tokens = math.prod(grid)
        if num_visible is None:
            check_may_count()
        if num_visible is None or checks.may_read(flat):
            counts = (~flat).sum(1).unique().tolist() or [tokens]
            if len(counts) > 1:
                accepted = "the same number in every clip (TokenMask.ragged takes others)"
                raise checks.bad("masked", f"clips with {counts} visible tokens", accepted)
            if num_visible is None:
                num_visible = counts[0]
            elif num_visible != counts[0]:
                raise checks.bad("num_visible", num_visible, f"{counts[0]}, the number of False in masked")
        if not isinstance(num_visible, int) or not 0 <= num_visible <= tokens:
            raise checks.bad("num_visible", repr(num_visible), f"a whole number from 0 to {tokens}")
        # Visible tokens first, and both groups in ascending order. ONNX has no stable sort, so that all keys differ.
        keys = flat.to(torch.int32) * tokens + torch.arange(tokens, dtype=torch.int32, device=flat.device)
        order = keys.sort(dim=1).indices.to(torch.int32)
        return cls(order[:, :num_visible], order[:, num_visible:], grid)

    @classmethod
    def ragged(cls, clips: Sequence[Tensor] | Tensor, grid: tuple[int, ...] | None = None) -> "TokenMask":
        """A mask in which each clip keeps its own number of tokens.

        Args:
            clips: For each clip a 1-D tensor of int32 or int64 indices of its visible tokens, in any order; or its bool
                mask, **True = masked**, (L,) or (T', H', W'). Bool masks also as one tensor (B, L) or (B, T', H', W').
            grid: (T', H', W') or (L,), needed for indices; bool masks have their own.

        Returns:
            The mask on the clips' device. Indices are packed without waiting for it, bools are counted first.

        Raises:
            ValueError, TypeError: kinds, shapes, dtypes or devices do not fit, an index is out of the grid or twice in
                a clip (on a CPU), or a clip has no visible token.
        """
        device = None
        if grid is not None:
            check_grid(grid)
        if isinstance(clips, Tensor):
            device = clips.device
            if clips.dtype != torch.bool or clips.ndim not in (2, 4):
                got = f"{clips.dtype} of shape {tuple(clips.shape)}"
                raise checks.bad("clips", got, "a list of tensors, or bool (B, L) or (B, T', H', W')")
            grid = tuple(clips.shape[1:]) if grid is None else grid
        elif not isinstance(clips, list | tuple) or not all(isinstance(clip, Tensor) for clip in clips):
            raise checks.bad_type("clips", type(clips).__name__, "a list of tensors, one for each clip")
        elif grid is None and clips and clips[0].dtype == torch.bool:
            grid = tuple(clips[0].shape)
        if grid is None:
            raise checks.bad("grid", None, "(T', H', W') or (L,): indices do not tell how many tokens there are")
        tokens = math.prod(grid)
        rows = [_masked(f"clips[{number}]", clip, clips[0], tokens) for number, clip in enumerate(clips)]
        masked = torch.stack(rows) if rows else torch.ones(0, tokens, dtype=torch.bool, device=device)
        counted = rows and clips[0].dtype == torch.bool
        lengths = (~masked).sum(1).tolist() if counted else [len(clip) for clip in clips]
        if 0 in lengths:
            raise checks.bad(f"clips[{lengths.index(0)}]", "no visible token", "at least one in every clip")
        # Visible tokens first, as in from_bool_masked, of all clips at once.
        order = (masked.flatten().to(torch.uint8).argsort(stable=True) % masked.shape[1]).to(torch.int32)
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(masked.device)
        total = sum(lengths)
        return cls(order[:total], order[total:], grid, cu_seqlens, max(lengths, default=0))

    def bool_masked(self) -> Tensor:
        """(B, L) bool, True = masked."""
        masked = torch.ones(self.batch, self.num_tokens, dtype=torch.bool, device=self.keep_idx.device)
        rows = self._rows(self.keep_idx, self.clip_idx)
        return masked.flatten().scatter(0, rows, False).view_as(masked)

    def to(self, device: torch.device | str) -> "TokenMask":
        """The same mask on another device."""
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return TokenMask(self.keep_idx.to(device), self.drop_idx.to(device), self.grid, cu_seqlens, self.max_seqlen)

    def take(self, clips: Tensor | slice) -> "TokenMask":
        """The mask of some of the clips, each of which must keep equally many tokens."""
        if self.cu_seqlens is not None:
            raise checks.bad("mask", "a ragged mask", "one whose clips keep equally many tokens")
        return TokenMask(self.keep_idx[clips], self.drop_idx[clips], self.grid)

    @property
    def batch(self) -> int:
        """B, the number of clips."""
        return self.keep_idx.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        """L, all tokens of each clip."""
        return math.prod(self.grid)

    @property
    def num_visible(self) -> int:
        """N, the visible tokens of each clip; an error if the mask is ragged."""
        if self.cu_seqlens is not None:
            raise checks.bad("num_visible", "a ragged mask", "one whose clips keep equally many tokens (total_visible)")
        return self.keep_idx.shape[1]

    @property
    def total_visible(self) -> int:
        """The visible tokens of all clips together."""
        return self.keep_idx.numel()

    @property
    def drop_cu_seqlens(self) -> Tensor | None:
        """(B + 1,) int32; the dropped tokens of clip i are [drop_cu_seqlens[i], drop_cu_seqlens[i + 1]), if ragged."""
        if self.cu_seqlens is None:
            return None
        clips = torch.arange(self.batch + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        return clips * self.num_tokens - self.cu_seqlens

    @property
    def clip_idx(self) -> Tensor | None:
        """(total,) int32, the clip of each visible token of a ragged mask; None for any other."""
        return None if self.cu_seqlens is None else clip_index(self.cu_seqlens, self.keep_idx.shape[0])

    @property
    def drop_clip_idx(self) -> Tensor | None:
        """(B * L - total,) int32, the clip of each dropped token of a ragged mask; None for any other."""
        offsets = self.drop_cu_seqlens
        return None if offsets is None else clip_index(offsets, self.drop_idx.shape[0])

    @property
    def segments(self) -> Segments | None:
        """Where the visible tokens of each clip of a ragged mask lie; None for any other."""
        if self.cu_seqlens is None or self.max_seqlen is None:
            return None
        return Segments(self.cu_seqlens, self.max_seqlen, clip_index(self.cu_seqlens, self.keep_idx.shape[0]))


def check_may_count(how: str = "") -> None:
    """Check that a mask's visible tokens can be counted now; ``how`` else to give ``num_visible``."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        accepted = f"the visible tokens of each clip: a graph cannot count them in a mask{how}"
        raise checks.bad("num_visible", "None in a call that is exported or traced", accepted)


def check_grid(grid: object, dimensions: tuple[int, ...] = (1, 3)) -> None:
    """Check that ``grid`` is (T', H', W'), or (L,) where one dimension is accepted, whole numbers above 0."""
    sides = grid if isinstance(grid, tuple) else ()
    if len(sides) not in dimensions or not all(isinstance(side, int) and side > 0 for side in sides):
        accepted = "(T', H', W') or (L,)" if 1 in dimensions else "(T', H', W')"
        raise checks.bad("grid", repr(grid), f"a tuple {accepted} of whole numbers above 0")


def _masked(name: str, clip: Tensor, first: Tensor, tokens: int) -> Tensor:
    """(L,) bool, True = masked, of a clip's visible indices or of its bool mask, whichever ``first`` is."""
    checks.same_device("clips[0]", first.device, **{name: clip})
    if first.dtype == torch.bool:
        checks.tensor(name, clip, None, (torch.bool,), "(L,) or (T', H', W'), a bool mask like clips[0]")
        if clip.ndim not in (1, 3):
            raise checks.bad(name, f"shape {tuple(clip.shape)}", "(L,) or (T', H', W')")
        checks.size(name, clip, first.shape, "the shape of clips[0]")
        if clip.numel() != tokens:
            raise checks.bad("grid", f"one of {tokens} tokens", f"{clip.numel()} tokens, as the masks have")
        return clip.flatten()
    checks.tensor(name, clip, 1, checks.INDICES, "(visible tokens,), indices like clips[0]")
    if len(clip) > tokens:
        raise checks.bad(name, f"{len(clip)} visible tokens", f"from 1 to {tokens}")
    checks.index_range(name, clip, tokens)
    checks.unique_rows(name, clip[None])
    return torch.ones(tokens, dtype=torch.bool, device=clip.device).scatter(0, clip.long(), False)
