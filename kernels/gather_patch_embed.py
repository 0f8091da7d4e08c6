"""gather_patch_embed: visible tubelets straight from the clip to embedded tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, eager, op
from .device import takes_triton

Channels = list[float] | None
FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def memory_order(video: Tensor) -> str | None:
    """ "planar" where W has stride 1, "channels-last" where C has and W follows; None for anything else."""
    channels, width = video.shape[1], video.shape[4]
    if video.stride(4) == 1 or width == 1:
        return "planar"
    return "channels-last" if video.stride(1) == 1 and video.stride(4) == channels else None


def gradient_memory(video: Tensor) -> Tensor:
    """Memory for the clip's gradient: dense, in the clip's own order of dimensions where the kernels can write that."""
    memory = torch.empty_like(video)
    return memory if memory_order(memory) else torch.empty(video.shape, dtype=video.dtype, device=video.device)


def _forward(
    video: Tensor,
    keep_idx: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    mean: Channels,
    std: Channels,
    work: torch.dtype,
) -> Tensor:
    from .jit import gather_patch_embed as launch

    return launch.forward(video, keep_idx, weight, bias, pos_embed, mean, std, work)


def _forward_shape(
    video: Tensor,
    keep_idx: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    mean: Channels,
    std: Channels,
    work: torch.dtype,
) -> Tensor:
    return torch.empty((*keep_idx.shape, len(weight)), dtype=weight.dtype, device=weight.device)


def _backward(
    grad: Tensor,
    video: Tensor,
    keep_idx: Tensor,
    weight: Tensor,
    pos_embed: Tensor,
    mean: Channels,
    std: Channels,
    work: torch.dtype,
    needs: list[bool],
) -> FourTensors:
    from .jit import gather_patch_embed_backward as launch

    return launch.backward(grad, video, keep_idx, weight, pos_embed, mean, std, work, needs)


def _backward_shape(
    grad: Tensor,
    video: Tensor,
    keep_idx: Tensor,
    weight: Tensor,
    pos_embed: Tensor,
    mean: Channels,
    std: Channels,
    work: torch.dtype,
    needs: list[bool],
) -> FourTensors:
    return gradients(video, weight, pos_embed, needs)


def gradients(video: Tensor, weight: Tensor, pos_embed: Tensor, needs: list[bool]) -> FourTensors:
    """Memory for the gradients of video, weight, bias and pos_embed; nothing for one that is not needed."""

    def empty(place: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if needs[place] else (0,), dtype=dtype, device=weight.device)

    return (
        gradient_memory(video) if needs[0] else empty(0, (0,), video.dtype),
        empty(1, weight.shape, weight.dtype),
        empty(2, weight.shape[:1], weight.dtype),
        empty(3, pos_embed.shape, pos_embed.dtype),
    )


_triton_gather_patch_embed = op.declare(
    "gather_patch_embed",
    forward=_forward,
    forward_shape=_forward_shape,
    backward=_backward,
    backward_shape=_backward_shape,
    saves=lambda inputs, outputs: [inputs[place] for place in (0, 1, 2, 4)],
    gradients=("video", "weight", "bias", "pos_embed"),
)


def check_video(argument: str, video: Tensor, patch: tuple[int, int, int], channels: int) -> int:
    """Check a clip against a patch size; returns L, the number of tubelets in its grid."""
    checks.tensor(argument, video, 5, (torch.uint8, *checks.FLOATS), "(B, C, T, H, W)")
    if video.shape[1] != channels:
        raise checks.bad(argument, f"{video.shape[1]} channels", f"{channels}, in the shape (B, C, T, H, W)")
    tokens = 1
    for name, extent, step in zip(("frames", "height", "width"), video.shape[2:], patch, strict=True):
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


def gather_patch_embed(
    video: Tensor,
    keep_idx: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Tensor:
    """Embed the visible tubelets of a clip; no other pixel is read (MAR, arXiv 2207.11660, section 3.1).

    Equal to a convolution of stride and kernel (t, h, w) over the normalised clip, plus position, at ``keep_idx``.

    Args:
        video: (B, C, T, H, W), any strides. The kernels read a clip where it lies if its innermost dimension is W, or
            C and then W (as decoders give it, permuted), and its lines of w or w * C values begin at multiples of 16
            bytes, or of what divides such a line; otherwise they copy it first, dropped pixels too. uint8 is divided
            by 255 and, where mean and std are given, normalised with them in float32; floating point counts as
            already normalised.
        keep_idx: (B, N) int32 or int64, flat indices into the grid (T/t, H/h, W/w), in any order, in each row unique.
        weight: (D, C, t, h, w), the convolution's.
        bias: (D,), of the weight's dtype.
        pos_embed: (L, D), added in float32.
        mean: one number a channel, for pixels in [0, 1].
        std: one number a channel, with mean.

    Returns:
        (B, N, D) in the weight's dtype, also under autocast, where the product works in autocast's dtype. Gradients
        flow to weight, bias, pos_embed and a floating-point video.

    Raises:
        ValueError, TypeError: a shape, dtype, device or index does not fit; the message names it.
    """
    checks.tensor("weight", weight, 5, checks.FLOATS, "(D, C, t, h, w)")
    width, channels, t, h, w = weight.shape
    tokens = check_video("video", video, (t, h, w), channels)
    checks.tensor("keep_idx", keep_idx, 2, checks.INDICES, "(B, N)")
    if keep_idx.shape[0] != video.shape[0]:
        raise checks.bad("keep_idx", f"{keep_idx.shape[0]} rows", f"{video.shape[0]}, one for each clip of video")
    checks.tensor("bias", bias, 1, (weight.dtype,), "(D,)")
    checks.size("bias", bias, (width,), "(D,)")
    checks.tensor("pos_embed", pos_embed, 2, checks.FLOATS, "(L, D)")
    checks.size("pos_embed", pos_embed, (tokens, width), "(L, D)")
    mean, std = check_normalisation(mean, std, channels)
    checks.same_device("video", video.device, keep_idx=keep_idx, weight=weight, bias=bias, pos_embed=pos_embed)
    checks.index_range("keep_idx", keep_idx, tokens)
    checks.unique_rows("keep_idx", keep_idx)
    if takes_triton("gather_patch_embed", weight) and takes_triton("gather_patch_embed", video):
        options = [None if values is None else list(values) for values in (mean, std)]
        work = eager.working_dtype(weight, weight.dtype)
        out: Tensor = _triton_gather_patch_embed(video, keep_idx, weight, bias, pos_embed, *options, work)
        return out
    return eager.gather_patch_embed(video, keep_idx, weight, bias, pos_embed, mean, std)
