"""Operands for the ops, their layouts, and PyTorch's own computation of each op: what tests of several files share."""

import functools
import math
import os

import oracle
import pytest
import torch
import torch.nn.functional as F

from mar_fast import kernels

PATCH, GRID, TOKENS = (2, 3, 5), (2, 7, 11), 154  # nothing even, nothing a power of two
MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.25, 0.3)

ON_GPU = os.environ.get("MAR_FAST_TEST_DEVICE") == "cuda"
DEVICE = "cuda" if ON_GPU else "cpu"

# bfloat16 is left out where kernels are interpreted, by conftest.py.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# Floors of the error bound, in eps of float32; in 16 bits nothing of all this shows.
# A GPU's exp, erf and division are off by an ulp or two.
ELEMENTWISE = {torch.float32: 2 if ON_GPU else 0.5}
# Its kernels multiply float32 as three products of TF32, which lose some 2**-21 (4 eps) of each, as in test_gpu.py.
PRODUCTS = {torch.float32: 32 if ON_GPU else 0.5}
# A fused backward recomputes the softmax as exp(score - lse), off by a score's rounding, and forms differences that a
# plain softmax gets exactly (zero, for a token alone): some eps of float32 remain.
FUSED = {torch.float32: 32 if ON_GPU else 8}


# Operands. The seed is set for every test.


def poison(dtype):
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max


def cropped(value):
    """In the middle of a larger tensor that is NaN all around: misaligned, and reading outside shows."""
    buffer = torch.full([extent + 2 for extent in value.shape], poison(value.dtype), dtype=value.dtype)
    view = buffer[tuple(slice(1, extent + 1) for extent in value.shape)]
    return view.copy_(value)


def strided(value):
    """Every second element in every dimension of a tensor that is NaN elsewhere."""
    buffer = torch.full([2 * extent for extent in value.shape], poison(value.dtype), dtype=value.dtype)
    return buffer[(slice(None, None, 2),) * value.ndim].copy_(value)


def rows_apart(value):
    """Rows 3 elements further apart than they are long, after an odd offset."""
    buffer = torch.full((*value.shape[:-1], value.shape[-1] + 3), poison(value.dtype), dtype=value.dtype)
    return buffer[..., 1:-2].copy_(value)


def tokens_first(value):
    """(B, N, ...) in the memory of (N, B, ...): no single row stride describes it."""
    return value.transpose(0, 1).contiguous().transpose(0, 1)


def width_first(value):
    """Unit stride in the last dimension but one."""
    return value.mT.contiguous().mT


def expanded(value):
    """All elements one element, as the gradient of a sum."""
    return value[(slice(1),) * value.ndim].expand(value.shape)


def expanded_rows(value):
    """All rows one row, as the gradient of a mean over tokens and clips."""
    return value[(slice(1),) * (value.ndim - 1)].expand(value.shape)


def channels_last(video):
    """As decoders give it: (B, T, H, W, C), permuted."""
    return video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "cropped": cropped,
    "channels_last": channels_last,
    "strided": strided,
}


def make_clip(batch, dtype, layout="contiguous", patch=PATCH, grid=GRID):
    shape = (batch, 3, *(step * count for step, count in zip(patch, grid, strict=True)))
    clip = torch.randint(256, shape, dtype=dtype) if dtype == torch.uint8 else torch.randn(shape).to(dtype)
    return LAYOUTS[layout](clip)


def make_index(batch, count, dtype=torch.int32, tokens=TOKENS):
    """Sorted, and another choice in every clip."""
    return torch.rand(batch, tokens).argsort(1)[:, :count].sort(1).values.to(dtype)


def packed(name, lengths, dtype=torch.int32, tokens=TOKENS):
    """Indices of clips with so many tokens, and the clip of each: both (total,), in any order."""
    rows = [make_index(1, length, dtype, tokens)[0] for length in lengths]
    clips = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long)).to(dtype)
    order = torch.randperm(len(clips))
    return {name: torch.cat([clips[:0], *rows])[order], "clip_idx": clips[order]}


def gather_operands(
    dtype, batch=2, count=17, video=None, layout="contiguous", patch=PATCH, grid=GRID, width=33, index=torch.int32,
    lengths=None,
):  # fmt: skip
    """With ``lengths`` a ragged batch of so many clips, its tokens in any order."""
    if lengths is not None:
        equal = gather_operands(dtype, len(lengths), 0, video, layout, patch, grid, width)
        return equal | packed("keep_idx", lengths, index, math.prod(grid))
    tokens = math.prod(grid)
    return dict(
        video=make_clip(batch, video or dtype, layout, patch, grid),
        keep_idx=make_index(batch, count, index, tokens),
        weight=(torch.randn(width, 3, *patch) / 9).to(dtype),
        bias=torch.randn(width).to(dtype),
        pos_embed=torch.randn(tokens, width),
    )


def attention_operands(dtype, batch=2, count=17, heads=2, size=32, bias=None):
    operands = dict(qkv=torch.randn(batch, count, 3, heads, size).to(dtype))
    return operands | attention_bias(bias, heads, size)


def varlen_operands(dtype, lengths=(5, 0, 12), spare=0, heads=2, size=32, index=torch.int32, bias=None):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(index)
    operands = dict(qkv=torch.randn(sum(lengths), 3, heads, size).to(dtype), cu_seqlens=cu_seqlens)
    return operands | dict(max_seqlen=max(lengths, default=0) + spare) | attention_bias(bias, heads, size)


def kvpacked_operands(dtype, batch=2, count=5, keys=17, heads=2, size=32, bias=None):
    q, kv = torch.randn(batch, count, heads, size), torch.randn(batch, keys, 2, heads, size)
    return dict(q=q.to(dtype), kv=kv.to(dtype)) | attention_bias(bias or dtype, heads, size)


def attention_bias(dtype, heads, size):
    """That of q, k and v; none for no dtype."""
    return {} if dtype is None else dict(bias=torch.randn(3, heads, size).to(dtype))


def norm_operands(dtype, batch=3, count=17, width=33, without=()):
    stream = torch.randn(batch, count, width).to(dtype) + 2  # a mean that a careless variance stumbles over
    x = torch.randn(batch, count, width).to(dtype) + 0.5
    operands = dict(
        x=stream if "residual" in without else x,
        residual=stream,
        weight=torch.randn(width).to(dtype),
        bias=torch.randn(width).to(dtype),
        layer_scale=torch.randn(width).to(dtype) + 0.5,  # with x's mean: row_scale's gradient does not cancel out
        row_scale=torch.tensor([1.25, 0.0, 2.5][:batch]).to(dtype),
        x_bias=torch.randn(width).to(dtype),
    )
    return operands | dict.fromkeys(without)


def gelu_operands(dtype, shape=(2, 17, 33)):
    x = 3 * torch.randn(shape)
    x[..., :1] = x[..., :1].abs() + 2  # a lone value far in the lower tail has no digits left, in PyTorch neither
    return dict(x=x.to(dtype), bias=torch.randn(shape[-1]).to(dtype))


def linear_operands(dtype, shape=(2, 17, 24), width=40):
    x, weight = torch.randn(shape), torch.randn(width, shape[-1]) / shape[-1] ** 0.5
    return dict(x=x.to(dtype), weight=weight.to(dtype), bias=torch.randn(width).to(dtype))


def scatter_operands(dtype, batch=2, count=17, width=33, index=torch.int32, lengths=None):
    if lengths is not None:
        rows = [make_index(1, length, index)[0] for length in lengths]
        return scatter_operands(dtype, 0, 0, width) | dict(
            visible=torch.randn(sum(lengths), width).to(dtype),
            keep_idx=torch.cat([torch.empty(0, dtype=index), *rows]),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(index),
        )
    return dict(
        visible=torch.randn(batch, count, width).to(dtype),
        keep_idx=make_index(batch, count, index),
        mask_token=torch.randn(width).to(dtype),
        pos_embed=torch.randn(TOKENS, width),
    )


def loss_operands(dtype, batch=2, count=17, video=None, layout="contiguous", index=torch.int32, lengths=None):
    if lengths is not None:
        equal = loss_operands(dtype, len(lengths), 0, video, layout)
        return equal | dict(pixels=torch.randn(sum(lengths), 90).to(dtype)) | packed("drop_idx", lengths, index)
    return dict(
        pixels=torch.randn(batch, count, 90).to(dtype),
        video=make_clip(batch, video or dtype, layout),
        drop_idx=make_index(batch, count, index),
    )


# PyTorch's own computation of the same, in the operands' dtype.


def clips_of(index, clip_idx):
    return torch.arange(len(index))[:, None] if clip_idx is None else clip_idx


def plain_gather(video, keep_idx, weight, bias, pos_embed, clip_idx=None, *, mean=None, std=None):
    if video.dtype == torch.uint8:
        video = video / 255
        if mean is not None:
            video = (video - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(3, 1, 1, 1)
    tokens = F.conv3d(video.to(weight.dtype), weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    tokens = tokens + pos_embed
    return tokens[clips_of(keep_idx, clip_idx), keep_idx].to(weight.dtype)


def plain_norm(x, residual, weight, bias, *, eps=1e-6, layer_scale=None, row_scale=None, x_bias=None):
    if residual is not None:
        x = x if x_bias is None else x + x_bias
        x = x if layer_scale is None else x * layer_scale
        x = residual + (x if row_scale is None else x * row_scale.view(-1, *[1] * (x.ndim - 1)))
    return F.layer_norm(x, weight.shape, weight, bias, eps), x


def plain_gelu(x, bias):
    return F.gelu(x + bias)


def plain_linear_gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias))


def mlp_operands(dtype, shape=(2, 17, 24), width=40):
    first = linear_operands(dtype, shape, width)
    return dict(
        x=first["x"], fc1_weight=first["weight"], fc1_bias=first["bias"],
        fc2_weight=torch.randn(24, width).to(dtype) / 6, fc2_bias=torch.randn(24).to(dtype),
    )  # fmt: skip


def plain_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias=None):
    return F.linear(plain_linear_gelu(x, fc1_weight, fc1_bias), fc2_weight, fc2_bias)


def plain_scatter(visible, keep_idx, mask_token, pos_embed, cu_seqlens=None):
    lengths = None if cu_seqlens is None else cu_seqlens.diff()
    tokens = mask_token.repeat(len(visible if lengths is None else lengths), len(pos_embed), 1).to(visible.dtype)
    clips = clips_of(visible, None if lengths is None else torch.arange(len(lengths)).repeat_interleave(lengths))
    return (tokens.index_put((clips, keep_idx), visible) + pos_embed).to(visible.dtype)


def plain_loss(pixels, video, drop_idx, clip_idx=None, *, patch_size, mean=None, std=None, normalize=True):
    if pixels.numel() == 0:
        return pixels.float().sum()
    video = video.float().detach() / (255 if video.dtype == torch.uint8 else 1)
    for step, place in zip(patch_size, (2, 4, 6), strict=True):
        video = video.unflatten(place, (-1, step))
    cells = video.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4, 6).flatten(1, 3)  # (B, L, t*h*w, C)
    cells = cells[clips_of(drop_idx, clip_idx), drop_idx]
    if normalize:
        cells = (cells - cells.mean(-2, keepdim=True)) / (cells.std(-2, keepdim=True) + 1e-6)
    return F.mse_loss(pixels.float(), cells.flatten(-2))


RAGGED = (5, 0, 12)
ATTENTION = ("attention", "attention_varlen", "attention_kvpacked")
# Operands and options of one ordinary call: by the op's name, and by that and "ragged".
OPS = {
    "gather_patch_embed": (gather_operands, {}),
    "attention": (attention_operands, {}),
    "attention_varlen": (functools.partial(varlen_operands, bias=torch.float32), {}),
    "attention_kvpacked": (kvpacked_operands, {}),
    "add_layer_norm": (norm_operands, {}),
    "bias_gelu": (gelu_operands, {}),
    "linear_gelu": (linear_operands, {}),
    "mlp": (mlp_operands, {}),
    "scatter_tokens": (scatter_operands, {}),
    "masked_patch_loss": (loss_operands, dict(patch_size=PATCH)),
    "ragged gather_patch_embed": (functools.partial(gather_operands, lengths=RAGGED), {}),
    "ragged scatter_tokens": (functools.partial(scatter_operands, lengths=RAGGED), {}),
    "ragged masked_patch_loss": (functools.partial(loss_operands, lengths=RAGGED), dict(patch_size=PATCH)),
}


def call(name, dtype=torch.float32, **case):
    """The op with its options, and the operands for it."""
    operands, options = OPS[name]
    return functools.partial(getattr(kernels, name.split()[-1]), **options), operands(dtype, **case)


def leaves(operands, frozen=()):
    """The operands as leaves: those in floating point require a gradient, but for the frozen ones."""
    return {
        key: value.detach().requires_grad_(key not in frozen)
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for key, value in operands.items()
    }


def check(name, plain, operands, *, floor=None, **options):
    """The op, with its options, against oracle.py; where ``plain`` is None the oracle in the operands' dtype."""
    if floor is None:
        products = ("gather_patch_embed", "linear_gelu", "mlp")
        kinds = {**dict.fromkeys(products, PRODUCTS), **dict.fromkeys(ATTENTION, FUSED)}
        first = next(value for value in operands.values() if torch.is_tensor(value) and value.is_floating_point())
        floor = kinds.get(name, ELEMENTWISE).get(first.dtype, 0.5)
    functions = (getattr(kernels, name), getattr(oracle, name), plain or getattr(oracle, name))
    no_gradient = ("video",) if name == "masked_patch_loss" else ()
    return oracle.compare(
        *(functools.partial(f, **options) for f in functions), operands, no_gradient=no_gradient, floor=floor
    )
