"""gather_patch_embed: embedded tokens of visible tubelets, straight from the clip."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .derived import Derived
from .device import HAS_TRITON, takes_triton, working_dtype
from .plan import Plans

if HAS_TRITON:
    from .jit import gather_patch_embed as jit

_plans = Plans()
_folded = Derived()

Triple = tuple[int, int, int]


def gather_patch_embed(
    video: Tensor,
    keep_idx: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    clip_idx: Tensor | None = None,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Tensor:
    """Embed the visible tubelets of clips; no other pixel is read (MAR, arXiv 2207.11660, section 3.1).

    Equal to a convolution of stride and kernel (t, h, w) over the normalised clip, plus position, at ``keep_idx``.

    Args:
        video: (B, C, T, H, W), any strides. The kernels read a clip in place if its innermost dimension is W, or C and
            then W (decoded frames, permuted), and if its lines of w or w * C values can be loaded 16 bytes at a time,
            or by the greatest power of two that divides a line; otherwise they first copy it, dropped pixels too. uint8
            is divided by 255 and, where mean and std are given, normalised with them in float32; floating-point clips
            are taken as normalised.
        keep_idx: (B, N) int32 or int64, flat indices into the grid (T/t, H/h, W/w), in any order, unique in each clip;
            (total,) where clips keep different numbers of tubelets.
        weight: (D, C, t, h, w), the convolution's.
        bias: (D,), of the weight's dtype.
        pos_embed: (L, D), added in float32.
        clip_idx: (total,) int32 or int64, the clip of each tubelet in a ``keep_idx`` of that shape; None for (B, N).
        mean: one number a channel, for pixels in [0, 1].
        std: one number a channel, with mean.

    Returns:
        (B, N, D) or (total, D) in the weight's dtype, under autocast too, though the product then works in autocast's.
        Gradients flow to weight, bias, pos_embed and a floating-point video.

    Raises:
        ValueError, TypeError: a shape, dtype, device or index does not fit; the message names it.
    """
    key, run = _plans.find(video, keep_idx, weight, bias, pos_embed, clip_idx, mean, std)
    if run is None:
        checks.tensor("weight", weight, 5, checks.FLOATS, "(D, C, t, h, w)")
        columns, channels, t, h, w = weight.shape
        tokens = check_video("video", video, (t, h, w), channels)
        check_index("keep_idx", keep_idx, clip_idx, video, "N")
        checks.tensor("bias", bias, 1, (weight.dtype,), "(D,)")
        checks.size("bias", bias, (columns,), "(D,)")
        checks.tensor("pos_embed", pos_embed, 2, checks.FLOATS, "(L, D)")
        checks.size("pos_embed", pos_embed, (tokens, columns), "(L, D)")
        others = dict(keep_idx=keep_idx, weight=weight, bias=bias, pos_embed=pos_embed, clip_idx=clip_idx)
        checks.same_device("video", video.device, **others)
        mean, std = check_normalisation(mean, std, channels)
    if checks.may_read(keep_idx):
        checks.index_range("keep_idx", keep_idx, pos_embed.shape[0])
        if clip_idx is None:
            checks.unique_rows("keep_idx", keep_idx)
        else:
            checks.index_range("clip_idx", clip_idx, video.shape[0])
            checks.unique_rows("keep_idx", (clip_idx.long() * pos_embed.shape[0] + keep_idx)[None])
    training = torch.is_grad_enabled()
    if key is not None and training:
        _folded.forget(weight)  # an optimizer's step may follow
    if run is None:
        if not (takes_triton("gather_patch_embed", weight) and takes_triton("gather_patch_embed", video)):
            return eager_gather_patch_embed(video, keep_idx, weight, bias, pos_embed, clip_idx, mean, std)
        inputs = (video, keep_idx, weight, bias, pos_embed, clip_idx, mean, std, working_dtype(weight, weight.dtype))
        keeping = key is not None and not training
        run = jit.forward(*inputs, kept=_folded) if keeping else jit.gather_patch_embed.plan(*inputs)
        _plans.keep(key, run)
    return run(video, keep_idx, weight, bias, pos_embed, clip_idx)


def check_index(argument: str, index: Tensor, clip_idx: Tensor | None, video: Tensor, count: str) -> None:
    """Check the shapes of flat indices: a row for each clip of video, or packed with the clip of each in clip_idx."""
    if clip_idx is None:
        checks.tensor(argument, index, 2, checks.INDICES, f"(B, {count}), or (total,) with clip_idx")
        if index.shape[0] != video.shape[0]:
            raise checks.bad(argument, f"{index.shape[0]} rows", f"{video.shape[0]}, one for each clip of video")
    else:
        checks.tensor(argument, index, 1, checks.INDICES, "(total,), since clip_idx is given")
        checks.tensor("clip_idx", clip_idx, 1, checks.INDICES, "(total,)")
        checks.size("clip_idx", clip_idx, index.shape, f"{argument}'s (total,)")


def check_video(argument: str, video: Tensor, patch_size: Triple, channels: int) -> int:
    """Check a clip against a patch size; returns L, the number of tubelets in its grid."""
    checks.tensor(argument, video, 5, (torch.uint8, *checks.FLOATS), "(B, C, T, H, W)")
    if video.shape[1] != channels:
        raise checks.bad(argument, f"{video.shape[1]} channels", f"{channels}, in the shape (B, C, T, H, W)")
    tokens = 1
    for name, extent, step in zip(("frames", "height", "width"), video.shape[2:], patch_size, strict=True):
        if extent == 0 or extent % step:
            raise checks.bad(argument, f"{name} {extent}", f"a multiple of the patch's {step}")
        tokens *= extent // step
    return tokens


def check_normalisation(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Check mean and std: both or neither, one number a channel, std above zero."""
    if (mean is None) != (std is None):
        raise checks.bad("mean and std", f"mean={mean}, std={std}", "both or neither")
    if mean is None or std is None:
        return None, None
    for argument, values in (("mean", mean), ("std", std)):
        if not isinstance(values, tuple | list) or len(values) != channels:
            raise checks.bad(argument, repr(values), f"{channels} numbers, one for each channel")
    if min(std) <= 0:
        raise checks.bad("std", std, "values above 0")
    return tuple(mean), tuple(std)


def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C,) float32 without a copy from the host, which on a GPU would wait and could not be captured in a graph."""
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


def tubelets(video: Tensor, patch_size: Triple) -> Tensor:
    """(B, C, T, H, W) -> (B, T', H', W', C, t, h, w), a view."""
    t, h, w = patch_size
    rows, columns = video.shape[3] // h, video.shape[4] // w
    grid = video.unflatten(4, (columns, w)).unflatten(3, (rows, h)).unflatten(2, (-1, t))
    return grid.permute(0, 2, 4, 6, 1, 3, 5, 7)


def gather_tubelets(video: Tensor, index: Tensor, patch_size: Triple, clip_idx: Tensor | None = None) -> Tensor:
    """(B, C, T, H, W), (B, N) -> (B, N, C, t, h, w): only the pixels of the indexed tubelets are read.

    With ``clip_idx`` (total,) and an index (total,) the result is (total, C, t, h, w).
    """
    grid, index = tubelets(video, patch_size), index.long()  # ONNX takes int64 only
    rows, columns = grid.shape[2:4]
    clip = torch.arange(video.shape[0], device=video.device)[:, None] if clip_idx is None else clip_idx.long()
    return grid[clip, index // (rows * columns), index // columns % rows, index % columns]


def eager_gather_patch_embed(
    video: Tensor,
    keep_idx: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    clip_idx: Tensor | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Tensor:
    """What `gather_patch_embed` means, in plain PyTorch."""
    t, h, w = weight.shape[2:]
    patches = gather_tubelets(video, keep_idx, (t, h, w), clip_idx)  # (B, N, C, t, h, w) or (total, C, t, h, w)
    if video.dtype == torch.uint8:
        patches = patches.to(torch.promote_types(weight.dtype, torch.float32)) / 255
        if mean is not None and std is not None:
            centre, spread = (per_channel(values, video.device).view(-1, 1, 1, 1) for values in (mean, std))
            patches = (patches - centre) / spread
    patches = patches.flatten(-4).to(weight.dtype)
    # Embedding and position are added in float32 at least, whatever the dtype of the weights.
    return (F.linear(patches, weight.flatten(1), bias) + pos_embed[keep_idx.long()]).to(weight.dtype)
