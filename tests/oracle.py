"""Naive definitions of the ops and the one error bound: what the fast paths are held to.

Written from the tables of the README alone: loops over clips and tokens, explicit softmax, no code of mar_fast. They
work in the dtype of their operands and are differentiable, so that with float64 operands they give the truth, and
with operands in a lower precision what a plain program would make of them.

B clips, L tokens in the grid, N of them visible, M dropped, D width, H heads of size d.
"""

import itertools
import math

import torch


def _stack(parts, shape, like):
    """torch.stack, which does not take an empty list."""
    return torch.stack(parts).view(shape) if parts else like.new_zeros(shape)


def _tubelet(video, clip, index, patch):
    """(B, C, T, H, W) -> (C, t, h, w): the one at a flat index into the grid (T/t, H/h, W/w)."""
    t, h, w = patch
    rows, columns = video.shape[3] // h, video.shape[4] // w
    frame, row, column = index // (rows * columns), index // columns % rows, index % columns
    return video[clip, :, frame * t : (frame + 1) * t, row * h : (row + 1) * h, column * w : (column + 1) * w]


def _channels(values, like):
    """One number a channel, against (C, t, h, w)."""
    return torch.tensor(values, dtype=like.dtype).view(-1, 1, 1, 1)


def _tokens(index, clip_idx):
    """(B, N), or (total,) with the clip of each: (clip, flat index) of every token in order."""
    if clip_idx is not None:
        return list(zip(clip_idx.tolist(), index.tolist(), strict=True))
    return [(clip, entry) for clip, row in enumerate(index.tolist()) for entry in row]


def gather_patch_embed(video, keep_idx, weight, bias, pos_embed, clip_idx=None, *, mean=None, std=None):
    """One dot product for each visible token and output channel."""
    tokens = []
    for clip, index in _tokens(keep_idx, clip_idx):
        cells = _tubelet(video, clip, index, weight.shape[2:]).to(weight.dtype)
        if video.dtype == torch.uint8:
            cells = cells / 255
            if mean is not None:
                cells = (cells - _channels(mean, cells)) / _channels(std, cells)
        tokens.append((weight * cells).sum(dim=(1, 2, 3, 4)) + bias + pos_embed[index])
    return _stack(tokens, (*keep_idx.shape, len(bias)), weight)


def attention(qkv, *, scale=None, return_lse=False):
    """softmax(scale * q k^T) v for each clip and head, and log(sum(exp(scores)))."""
    batch, count, _, heads, size = qkv.shape
    scale = size**-0.5 if scale is None else scale
    out, lse = [], []
    for clip in range(batch):
        for head in range(heads):
            query, key, value = (qkv[clip, :, part, head] for part in range(3))  # (N, d)
            scores = query @ key.T * scale
            highest = scores.detach().amax(1, keepdim=True) if count else scores
            powers = (scores - highest).exp()
            total = powers.sum(1, keepdim=True)
            out.append(powers / total @ value)
            lse.append((highest + total.log())[:, 0] if count else scores.sum(1))
    out = _stack(out, (batch, heads, count, size), qkv).transpose(1, 2).reshape(batch, count, heads * size)
    return (out, _stack(lse, (batch, heads, count), qkv)) if return_lse else out


def attention_varlen(qkv, cu_seqlens, max_seqlen, *, scale=None):
    """The same for each sequence on its own."""
    offsets = cu_seqlens.tolist()
    out = [attention(qkv[None, start:end], scale=scale)[0] for start, end in itertools.pairwise(offsets)]
    return torch.cat([qkv.new_zeros(0, qkv.shape[2] * qkv.shape[3]), *out])


def add_layer_norm(x, residual, weight, bias, *, eps=1e-6, layer_scale=None, row_scale=None, x_bias=None):
    """(sum - mean) / sqrt(biased variance + eps) * weight + bias, and the sum: of x alone without a residual."""
    total = x
    if residual is not None:
        scale = 1 if layer_scale is None else layer_scale
        if row_scale is not None:
            scale = row_scale.view(-1, *[1] * (x.ndim - 1)) * scale
        total = residual + scale * (x if x_bias is None else x + x_bias)
    centred = total - total.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weight + bias, total


def bias_gelu(x, bias):
    """v * P(Z < v) for a standard normal Z. erfc, for 1 + erf has no digits left in the lower tail."""
    value = x + bias
    return value * 0.5 * torch.erfc(-value / math.sqrt(2))


def linear_gelu(x, weight, bias):
    """The same of a product with each row of weight."""
    return bias_gelu((x[..., None, :] * weight).sum(-1), bias)


def scatter_tokens(visible, keep_idx, mask_token, pos_embed, cu_seqlens=None):
    """Token by token: the visible one that belongs there, or the mask token."""
    clips, tokens = list(zip(visible, keep_idx.tolist(), strict=True)), []
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
        clips = list(zip(visible.split(lengths), map(torch.Tensor.tolist, keep_idx.split(lengths)), strict=True))
        clips = clips if lengths else []  # split gives one part at least
    for values, row in clips:
        for index in range(len(pos_embed)):
            token = values[row.index(index)] if index in row else mask_token
            tokens.append(token + pos_embed[index])
    return _stack(tokens, (len(clips), *pos_embed.shape), visible)


def masked_patch_loss(pixels, video, drop_idx, clip_idx=None, *, patch_size, mean=None, std=None, normalize=True):
    """The sum of squared errors patch by patch, over the number of values. The clip gets no gradient."""
    total = (pixels * 0).sum()
    for prediction, (clip, index) in zip(pixels.flatten(0, -2), _tokens(drop_idx, clip_idx), strict=True):
        cells = _tubelet(video.detach(), clip, index, patch_size).to(pixels.dtype)
        if video.dtype == torch.uint8:
            cells = cells / 255
        elif mean is not None:
            cells = cells * _channels(std, cells) + _channels(mean, cells)
        if normalize:
            count = math.prod(patch_size)
            cells = cells - cells.sum(dim=(1, 2, 3), keepdim=True) / count
            variance = (cells * cells).sum(dim=(1, 2, 3), keepdim=True) / (count - 1)
            cells = cells / (variance.sqrt() + 1e-6)
        target = torch.stack([channel.flatten() for channel in cells], dim=1).flatten()  # (t, h, w, C)
        total = total + ((prediction - target) ** 2).sum()
    return total / max(pixels.numel(), 1)


def _floating(value):
    return torch.is_tensor(value) and value.is_floating_point()


def outcome(function, operands, cotangents=None):
    """Run ``function(**operands)``: its outputs, their gradients' seeds, and {operand: gradient or None}.

    Operands keep their strides. Without ``cotangents`` random ones are drawn in the outputs' dtypes, with a mean of 1,
    so that no lone sum cancels to a number without digits.
    """
    leaves = {name: value.detach().requires_grad_() if _floating(value) else value for name, value in operands.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if cotangents is None:
        cotangents = [(torch.randn(out.shape, device=out.device) + 1).to(out.dtype) for out in outputs]
    wanted = {name: leaf for name, leaf in leaves.items() if torch.is_tensor(leaf) and leaf.requires_grad}
    pairs = [(out, seed.to(out.dtype)) for out, seed in zip(outputs, cotangents, strict=True) if out.requires_grad]
    gradients = [None] * len(wanted)
    if pairs:
        results, seeds = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(results, [*wanted.values()], seeds, allow_unused=True)
    return outputs, cotangents, dict(zip(wanted, gradients, strict=True))


def _distance(got, exact):
    return float((got.detach().double() - exact.detach()).norm())


def assert_as_good(label, got, plain, exact, *, coarsest=0.0, floor=0.5):
    """At most twice as far from the truth as PyTorch's own computation, plus ``floor`` times eps of got's dtype.

    One rounding of every element is half an eps of the norm at most. The plain computation must itself be near the
    truth, for the ``coarsest`` eps that went in: else a mistake made in both would excuse itself.
    """
    assert got.shape == exact.shape, f"{label}: shape {tuple(got.shape)} for {tuple(exact.shape)}"
    size = float(exact.detach().norm())
    error, plain_error = _distance(got, exact), _distance(plain, exact)
    sane = 16 * max(coarsest, torch.finfo(plain.dtype).eps) * size
    assert plain_error <= sane, f"{label}: the plain computation is off by {plain_error:.2e} of {size:.2e}"
    if got.numel() < 32:
        floor *= 4  # too few to average their luck
    bound = 2 * plain_error + floor * torch.finfo(got.dtype).eps * size
    assert error <= bound, f"{label}: error {error:.2e} above {bound:.2e} (plain {plain_error:.2e}, norm {size:.2e})"


def compare(op, naive, plain, operands, *, no_gradient=(), floor=0.5):
    """Every output and gradient of ``op`` against ``naive`` in float64, bounded by what ``plain`` reaches."""
    outputs, cotangents, gradients = outcome(op, operands)
    assert all(out.requires_grad for out in outputs)
    exact, _, exact_gradients = outcome(
        naive,
        {name: value.double() if _floating(value) else value for name, value in operands.items()},
        [seed.double() for seed in cotangents],
    )
    other, _, plain_gradients = outcome(plain, operands, cotangents)
    limits = dict(coarsest=max(torch.finfo(value.dtype).eps for value in operands.values() if _floating(value)))
    limits["floor"] = floor
    for place, (got, mine, truth) in enumerate(zip(outputs, other, exact, strict=True)):
        assert_as_good(f"output {place}", got, mine, truth, **limits)
    for name, gradient in gradients.items():
        if name in no_gradient:
            assert gradient is None, f"{name} has a gradient"
            continue
        assert gradient is not None, f"{name} has no gradient"
        # An empty sum leaves nothing of the operand in a naive graph: its gradient is zero.
        zero = torch.zeros_like(operands[name])
        mine, truth = (zero if part[name] is None else part[name] for part in (plain_gradients, exact_gradients))
        assert_as_good(f"gradient of {name}", gradient, mine, truth, **limits)
    return outputs
