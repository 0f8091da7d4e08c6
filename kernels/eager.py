"""What every op means, in plain PyTorch: the CPU path, traced straight through by autograd, torch.compile and export.

Arguments are checked by the caller, the file of the op. B clips, L tokens in the grid, N of them visible, M dropped,
D width, P = t * h * w * C values in a tubelet.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu_attention

Triple = tuple[int, int, int]


def without_autocast(operand: Tensor) -> AbstractContextManager[object]:
    """A context in which products keep the dtype of their operands."""
    kind = operand.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def working_dtype(operand: Tensor, default: torch.dtype) -> torch.dtype:
    """The dtype that matrix products on this device work in: autocast's where it is on, else ``default``."""
    kind = operand.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return default


def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C,) float32 without a copy from the host, which on a GPU would wait and could not be captured in a graph."""
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


def tubelets(video: Tensor, patch: Triple) -> Tensor:
    """(B, C, T, H, W) -> (B, T', H', W', C, t, h, w), a view."""
    t, h, w = patch
    rows, columns = video.shape[3] // h, video.shape[4] // w
    grid = video.unflatten(4, (columns, w)).unflatten(3, (rows, h)).unflatten(2, (-1, t))
    return grid.permute(0, 2, 4, 6, 1, 3, 5, 7)


def gather_tubelets(video: Tensor, index: Tensor, patch: Triple) -> Tensor:
    """(B, C, T, H, W), (B, N) -> (B, N, C, t, h, w): only the pixels of the indexed tubelets are read."""
    grid = tubelets(video, patch)
    rows, columns = grid.shape[2:4]
    clip = torch.arange(video.shape[0], device=video.device)[:, None]
    return grid[clip, index // (rows * columns), index // columns % rows, index % columns]


def gather_patch_embed(
    video: Tensor,
    keep_idx: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Tensor:
    """See `mar_fast.kernels.gather_patch_embed`."""
    t, h, w = weight.shape[2:]
    patches = gather_tubelets(video, keep_idx, (t, h, w))  # (B, N, C, t, h, w)
    if video.dtype == torch.uint8:
        patches = patches.float() / 255
        if mean is not None and std is not None:
            centre, spread = (per_channel(values, video.device).view(-1, 1, 1, 1) for values in (mean, std))
            patches = (patches - centre) / spread
    patches = patches.flatten(2).to(weight.dtype)
    # Embedding and position are added in float32 at least, whatever the dtype of the weights.
    return (F.linear(patches, weight.flatten(1), bias) + pos_embed[keep_idx]).to(weight.dtype)


def attention(qkv: Tensor, scale: float) -> Tensor:
    """See `mar_fast.kernels.attention`."""
    dtype = working_dtype(qkv, qkv.dtype)
    if cpu_attention.takes(qkv, dtype):
        return cpu_attention.attention(qkv.to(dtype), scale)
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, N, d)
    out = F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)
    return out.to(dtype)  # without tokens autocast leaves it as it is


def attention_lse(qkv: Tensor, scale: float) -> Tensor:
    """The natural log of the softmax denominators: (B, N, 3, H, d) -> (B, H, N) float32."""
    query, key, _ = (part.transpose(1, 2) for part in qkv.unbind(2))
    wide = torch.promote_types(qkv.dtype, torch.float32)
    with without_autocast(qkv):  # a score rounded to 16 bits is off by whole units
        return (query.to(wide) @ key.to(wide).transpose(2, 3)).mul(scale).logsumexp(-1)


def attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """See `mar_fast.kernels.attention_varlen`. Pads to ``max_seqlen``, so that no shape depends on the data."""
    total, device = qkv.shape[0], qkv.device
    starts, lengths = cu_seqlens[:-1, None], cu_seqlens.diff()[:, None]  # (B, 1)
    slot = torch.arange(max_seqlen, device=device)[None]  # (1, S)
    # Padding repeats a clip's own last token: a neighbour's NaN would get past the mask.
    source = (starts + slot.minimum((lengths - 1).clamp(min=0))).clamp(max=total - 1)
    padded = qkv[source]  # (B, S, 3, H, d)
    query, key, value = (part.transpose(1, 2) for part in padded.unbind(2))
    # A row without any key would be NaN, and its gradient too: slot 0 is always a key, and padded rows are not read.
    is_key = (slot < lengths) | (slot == 0)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=is_key[:, None, None], scale=scale)
    token = torch.arange(total, device=device)
    clip = torch.searchsorted(cu_seqlens[1:].contiguous(), token.to(cu_seqlens.dtype), right=True)
    return out.transpose(1, 2)[clip, token - cu_seqlens[clip]].flatten(1)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `mar_fast.kernels.add_layer_norm`."""
    total = x
    if branch is not None:
        if gamma is not None:
            branch = gamma * branch
        if drop_scale is not None:
            branch = drop_scale[:, None, None] * branch
        total = (x + branch).to(x.dtype)
    # layer_norm keeps its statistics in float32, but takes only operands of one dtype.
    common = torch.promote_types(total.dtype, weight.dtype)
    normed = F.layer_norm(total.to(common), weight.shape, weight.to(common), bias.to(common), eps)
    return total, normed.to(working_dtype(x, x.dtype))


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """See `mar_fast.kernels.bias_gelu`."""
    return F.gelu(x + bias).to(x.dtype)


def scatter_tokens(visible: Tensor, keep_idx: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    """See `mar_fast.kernels.scatter_tokens`."""
    batch, _, width = visible.shape
    tokens = mask_token.to(visible.dtype).expand(batch, pos_embed.shape[0], width)
    tokens = tokens.scatter(1, keep_idx.long()[..., None].expand(-1, -1, width), visible)
    return (tokens + pos_embed).to(visible.dtype)


def masked_patch_loss(
    pixels: Tensor,
    video: Tensor,
    drop_idx: Tensor,
    patch: Triple,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    normalize: bool,
) -> Tensor:
    """See `mar_fast.kernels.masked_patch_loss`."""
    if pixels.numel() == 0:
        return pixels.to(torch.promote_types(pixels.dtype, torch.float32)).sum()  # 0, still connected to pixels
    target = gather_tubelets(video.detach(), drop_idx, patch).permute(0, 1, 3, 4, 5, 2)  # (B, M, t, h, w, C)
    target = target.to(torch.promote_types(pixels.dtype, torch.float32))
    if video.dtype == torch.uint8:
        target = target / 255
    elif mean is not None and std is not None:
        target = target * per_channel(std, video.device) + per_channel(mean, video.device)
    if normalize:
        variance, average = torch.var_mean(target, dim=(2, 3, 4), keepdim=True, correction=1)
        target = (target - average) / (variance.sqrt() + 1e-6)
    return (pixels.to(target.dtype) - target.flatten(2)).square().mean()
