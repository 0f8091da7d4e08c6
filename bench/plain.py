"""The strongest simple baseline: MAR as a careful user of plain PyTorch writes it, and the steps on the way there.

It takes reference.py's parts, so its parameters have the same names, and changes one thing at a time: it gathers
visible tubelets before it embeds them, attends by ``scaled_dot_product_attention``, and predicts pixels of dropped
tubelets only. No op of mar_fast.kernels is used.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mar_fast import MARConfig, reference
from mar_fast.layers import Constant


class SdpaAttention(reference.Attention):
    """The reference's attention without its matrix of scores."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        qkv_bias = self.qkv.bias
        if qkv_bias is None:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def tubelets(clip: Tensor, index: Tensor, patch: tuple[int, int, int], channels_last: bool) -> Tensor:
    """(B, C, T, H, W), (B, N) int64 -> (B, N, t * h * w * C), flattened as (C, t, h, w) or as (t, h, w, C)."""
    (t, h, w), (_, _, _, height, width) = patch, clip.shape
    cells = clip.unflatten(4, (width // w, w)).unflatten(3, (height // h, h)).unflatten(2, (-1, t))
    cells = cells.permute(0, 2, 4, 6, *((3, 5, 7, 1) if channels_last else (1, 3, 5, 7)))  # (B, T', H', W', tubelet)
    rows, columns = height // h, width // w
    batch = torch.arange(clip.shape[0], device=clip.device)[:, None]
    return cells[batch, index // (rows * columns), index // columns % rows, index % columns].flatten(2)


def patch_loss(pixels: Tensor, clip: Tensor, index: Tensor, config: MARConfig) -> Tensor:
    """Mean squared error to the normalised pixels of the indexed tubelets of a normalised clip, all written out."""
    mean, std = (torch.tensor(value, device=clip.device).view(-1, 1, 1, 1) for value in (config.mean, config.std))
    target = tubelets(clip.float() * std + mean, index, config.patch_size, channels_last=True)
    target = target.unflatten(2, (-1, config.channels))  # (B, M, t * h * w, C)
    deviation = target.var(dim=2, unbiased=True, keepdim=True).sqrt()
    target = (target - target.mean(dim=2, keepdim=True)) / (deviation + 1e-6)
    return F.mse_loss(pixels.float(), target.flatten(2))


class PlainMAR(reference.MAR):
    """MAR on visible tokens in plain PyTorch, with the reference's parameters.

    Args:
        config: The model.
        sdpa: Whether to attend by ``scaled_dot_product_attention``, or with the scores written out.
    """

    def __init__(self, config: MARConfig, *, sdpa: bool = True) -> None:
        super().__init__(config)
        for module in self.modules():
            if sdpa and isinstance(module, reference.Attention):
                module.__class__ = SdpaAttention
        self.table = Constant(partial(reference.resized_table, config, config.embed_dim))
        if self.decoder is not None:
            self.decoder_table = Constant(partial(reference.resized_table, config, config.decoder_embed_dim))

    def forward(self, clip: Tensor, keep_idx: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Normalised (B, C, T, H, W), (B, N) int64 -> logits (B, classes), features (B, N, D)."""
        encoder: Any = self.encoder
        classifier: Any = self.classifier
        proj = encoder.patch_embed["proj"]
        patches = tubelets(clip.to(proj.weight.dtype), keep_idx, self.config.patch_size, channels_last=False)
        x = F.linear(patches, proj.weight.flatten(1), proj.bias)
        x = (x + self.table.value[keep_idx]).to(proj.weight.dtype)
        for block in encoder.blocks:
            x = block(x)
        features = encoder.norm(x)
        return classifier(features), features

    def pixels(self, features: Tensor, keep_idx: Tensor, drop_idx: Tensor) -> Tensor:
        """(B, N, D), (B, N), (B, M) -> (B, M, t * h * w * C), of the dropped tubelets."""
        decoder: Any = self.decoder
        visible = self.encoder_to_decoder(features)
        batch, _, width = visible.shape
        x = self.mask_token.to(visible.dtype).expand(batch, self.config.num_tokens, width)
        x = x.scatter(1, keep_idx[..., None].expand(-1, -1, width), visible)
        x = x + self.decoder_table.value
        for block in decoder.blocks:
            x = block(x)
        return decoder.head(decoder.norm(x.gather(1, drop_idx[..., None].expand(-1, -1, width))))
