"""How a model runs on packed tokens, those of one clip after those of another, each clip with its own number of them.

Nothing is padded and nothing waits for the device. Tokens are (total, 1, D), each a sample of its own to whatever works
on single tokens; attention and the mean over tokens are told where clips begin.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .ragged import RaggedMask


class Segments(NamedTuple):
    """Where the clips lie among packed tokens.

    Attributes:
        cu_seqlens: (B + 1,) int32; clip i is [cu_seqlens[i], cu_seqlens[i + 1]).
        max_seqlen: The longest clip, or more.
        clip_idx: (total,) int32, the clip of each token.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    clip_idx: Tensor

    @classmethod
    def of(cls, mask: RaggedMask) -> "Segments":
        """Those of the visible tokens."""
        return cls(mask.cu_seqlens, mask.max_seqlen, mask.clip_idx)

    @property
    def batch(self) -> int:
        """B, the number of clips."""
        return self.cu_seqlens.shape[0] - 1


class OneClip(NamedTuple):
    """A batch of clips seen as one long clip, so that one row of indices reaches tubelets of all of them.

    Attributes:
        video: (1, C, F, H, W); some of its frames may belong to no clip.
        tokens: From a clip's first token to that of the next clip.
    """

    video: Tensor
    tokens: int

    @classmethod
    def of(cls, video: Tensor, patch: tuple[int, int, int]) -> "OneClip":
        """From (B, C, T, H, W), which is copied only where its images do not lie at equal distances.

        In planar memory the batch is B * C * T images. Any of them and those T, 2T, ... after it make a frame of C
        channels; those that begin in a clip's first channel are its frames, and no index reaches the others.
        """
        batch, channels, frames, height, width = video.shape
        if not batch:
            return cls(video.new_zeros(1, channels, frames, height, width), 0)
        if video.stride(4) == 1:
            apart = channels * frames
            images = video.flatten(0, 2)
            long = images.unfold(0, apart - frames + 1, 1)[..., ::frames].permute(3, 0, 1, 2)  # (C, F, H, W), a view
        else:
            apart = frames
            long = video.transpose(0, 1).flatten(1, 2)  # (C, B * T, H, W)
        t, h, w = patch
        return cls(long[None], apart // t * (height // h) * (width // w))

    def places(self, index: Tensor, clip_idx: Tensor) -> Tensor:
        """(total,) flat indices within their clips -> (1, total) within this one."""
        return (clip_idx * self.tokens + index)[None]


def segment_mean(x: Tensor, segments: Segments) -> Tensor:
    """(total, 1, D) -> (B, D), the mean over each clip's own tokens, in float32 at least and in a fixed order."""
    wide = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))
    total = torch.segment_reduce(wide, "sum", offsets=segments.cu_seqlens, axis=0, unsafe=True)
    return total / segments.cu_seqlens.diff()[:, None]
