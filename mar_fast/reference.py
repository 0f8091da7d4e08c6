"""MAR in plain PyTorch, one file, read top to bottom: what everything else is checked against.

It computes what the original computes: it embeds all tubelets and discards the dropped ones, forms the whole attention
matrix, and normalises the target of every tubelet. It shares no code with model.py or kernels/, only the parameter
names, so ``model.load_state_dict(reference.state_dict())`` works.

Sources: MAR, arXiv 2207.11660; VideoMAE, arXiv 2203.12602.

In comments: B clips, L tokens, N visible, M dropped, D embed_dim, H heads, d head size.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MARConfig


def position_table(tokens: int, dim: int) -> Tensor:
    """(L, D) float32: sin (even columns i) or cos (odd ones) of p / 10000^(2 * (i // 2) / D), computed in float64."""
    table = torch.zeros(tokens, dim, dtype=torch.float64, device="cpu")
    for i in range(dim):
        angle = torch.arange(tokens, dtype=torch.float64, device="cpu") / math.pow(10000, 2 * (i // 2) / dim)
        table[:, i] = torch.sin(angle) if i % 2 == 0 else torch.cos(angle)
    return table.float()


def resized_table(config: MARConfig, dim: int) -> Tensor:
    """(L, D): the table of the config's position_grid, resampled linearly along time, height and width in turn."""
    if config.position_grid is None:
        return position_table(config.num_tokens, dim)
    table = position_table(math.prod(config.position_grid), dim).double()
    table = table.reshape(*config.position_grid, dim)
    for axis, (old, new) in enumerate(zip(config.position_grid, config.grid, strict=True)):
        slices = []
        for i in range(new):
            # The centre of the new tubelet i as an index into the old grid, clamped to its outermost centres.
            centre = min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1.0)
            low = int(centre)
            high = min(low + 1, old - 1)
            slices.append(table.select(axis, low) * (1 - (centre - low)) + table.select(axis, high) * (centre - low))
        table = torch.stack(slices, dim=axis)
    return table.reshape(-1, dim).float()


def running_mask(config: MARConfig, batch: int, train: bool, generator: torch.Generator | None) -> Tensor:
    """(B, L) bool, True = masked: masked(t, s) = ((s - t - phase) mod S) < d, for slot s of the S in a cell."""
    frames, height, width = config.grid
    ct, cy, cx = config.cell
    slots = ct * cy * cx
    count = round(config.mask_ratio * slots)
    masked = torch.zeros(batch, frames, height, width, dtype=torch.bool)
    for b in range(batch):
        phase, order = 0, list(range(frames // ct))
        if train:
            phase = int(torch.randint(slots, (1,), generator=generator))
            order = torch.randperm(frames // ct, generator=generator).tolist()
        for t in range(frames):
            for y in range(height):
                for x in range(width):
                    slot = (t % ct * cy + y % cy) * cx + x % cx
                    masked[b, t, y, x] = (slot - order[t // ct] - phase) % slots < count
    return masked.flatten(1)


class Attention(nn.Module):
    """Naive multi-head attention, with all (B, H, N, N) scores in memory."""

    def __init__(self, dim: int, heads: int, key_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim * 3, bias=key_bias)
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        b, n, dim = x.shape
        qkv = self.qkv(x)
        if self.qkv.bias is None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = qkv.reshape(b, n, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        scores = (q * (dim // self.heads) ** -0.5) @ k.transpose(-2, -1)
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, dim))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: drops x (B, N, D), the output of a sub-layer, for each clip with probability ``rate``."""
    if not training or rate == 0:
        return x
    alive = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate
    return x * alive / (1 - rate)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        eps: float,
        drop_path_rate: float = 0.0,
        dropout: float = 0.0,
        key_bias: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, key_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), dropout)
        self.drop = nn.Dropout(dropout)
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + drop_path(self.drop(self.attn(self.norm1(x))), self.drop_path_rate, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, self.training)


class Encoder(nn.Module):
    """ViT that embeds every tubelet and keeps the visible ones."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        dim, depth = config.embed_dim, config.depth
        conv = nn.Conv3d(config.channels, dim, config.patch_size, stride=config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        # Not a buffer: .bfloat16() would round it.
        self.table = resized_table(config, dim)
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        shape = (dim, config.num_heads, config.mlp_ratio, config.encoder_eps)
        self.blocks = nn.ModuleList(Block(*shape, drop_path_rate=rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=config.final_norm_eps) if config.final_norm else nn.Identity()

    def forward(self, clip: Tensor, masked: Tensor) -> Tensor:
        """Normalised (B, C, T, H, W), (B, L) bool -> (B, N, D)."""
        x = self.patch_embed["proj"](clip).flatten(2).transpose(1, 2)  # (B, L, D)
        x = (x + self.table.to(x.device)).to(clip.dtype)
        x = x[~masked].reshape(x.shape[0], -1, x.shape[-1])  # (B, N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """ViT over all positions that predicts the pixels of every tubelet."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        dim = config.decoder_embed_dim
        self.table = resized_table(config, dim)
        shape = (dim, config.decoder_num_heads, config.decoder_mlp_ratio, config.decoder_eps)
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(dim, eps=config.decoder_norm_eps)
        self.head = nn.Linear(dim, config.patch_values)

    def forward(self, visible: Tensor, mask_token: Tensor, masked: Tensor, chosen: Tensor | None = None) -> Tensor:
        """(B, N, decoder_embed_dim) -> (B, L, t * h * w * C), or (B, K, ...) for the K ``chosen`` (B, L) bool."""
        table = self.table.to(visible.device)
        if chosen is None:
            x = mask_token.expand(*masked.shape, -1).clone()
            x[~masked] = visible.reshape(-1, visible.shape[-1]).to(x.dtype)
            x = x + table
        else:
            clips = []
            for b in range(masked.shape[0]):
                clips.append(torch.cat([visible[b] + table[~masked[b]], mask_token[0] + table[chosen[b]]]))
            x = torch.stack(clips)
        x = x.to(mask_token.dtype)
        for block in self.blocks:
            x = block(x)
        if chosen is not None:
            x = x[:, visible.shape[1] :]
        return self.head(self.norm(x))


class Classifier(nn.Module):
    """Bridging classifier (projection and blocks first) or linear classifier: mean over tokens, norm, head."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        if config.classifier == "bridging":
            dim = config.bridge_embed_dim
            self.proj = nn.Linear(config.embed_dim, dim, bias=False)
            shape = (dim, config.bridge_num_heads, config.bridge_mlp_ratio, config.bridge_eps)
            self.blocks = nn.ModuleList(
                Block(*shape, dropout=config.bridge_dropout, key_bias=True) for _ in range(config.bridge_depth)
            )
        self.norm = nn.LayerNorm(dim, eps=config.classifier_norm_eps)
        self.drop = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(dim, config.num_classes) if config.num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, classes)."""
        if hasattr(self, "proj"):
            x = self.proj(x)
            for block in self.blocks:
                x = block(x)
        return self.head(self.drop(self.norm(x.mean(dim=1))))


def patch_targets(pixels: Tensor, config: MARConfig) -> Tensor:
    """Clip in [0, 1] (B, C, T, H, W) -> (B, L, t * h * w * C), each tubelet and channel normalised."""
    (t, h, w), (frames, height, width) = config.patch_size, config.grid
    b, c = pixels.shape[:2]
    tubes = pixels.reshape(b, c, frames, t, height, h, width, w).permute(0, 2, 4, 6, 3, 5, 7, 1)
    tubes = tubes.reshape(b, config.num_tokens, t * h * w, c)
    if config.norm_pix_loss:
        deviation = tubes.var(dim=2, unbiased=True, keepdim=True).sqrt()
        tubes = (tubes - tubes.mean(dim=2, keepdim=True)) / (deviation + 1e-6)
    return tubes.reshape(b, config.num_tokens, -1)


class MAR(nn.Module):
    """The whole model, with the parameters, names and call of `mar_fast.MAR`."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.classifier = Classifier(config) if config.classifier else None
        self.decoder = Decoder(config) if config.decoder_depth else None
        if self.decoder is not None:
            self.encoder_to_decoder = nn.Linear(config.embed_dim, config.decoder_embed_dim, bias=False)
            self.mask_token = nn.Parameter(torch.randn(1, 1, config.decoder_embed_dim) * 0.02)

    def forward(
        self,
        video: Tensor,
        mask: Any = None,
        *,
        reconstruct: bool | None = None,
        generator: torch.Generator | None = None,
        decoder_mask: Any = None,
    ) -> Any:
        """`mar_fast.MAR.forward`; the result has one more field, ``targets``, of the shape of ``pixels``."""
        config = self.config
        if mask is None:
            masked = running_mask(config, video.shape[0], self.training, generator).to(video.device)
        else:
            masked = torch.ones(video.shape[0], config.num_tokens, dtype=torch.bool, device=video.device)
            for b in range(video.shape[0]):
                masked[b, mask.keep_idx[b].long()] = False

        weight = next(self.encoder.patch_embed.parameters())
        mean = torch.tensor(config.mean, device=video.device).view(-1, 1, 1, 1)
        std = torch.tensor(config.std, device=video.device).view(-1, 1, 1, 1)
        clip = video
        if video.dtype == torch.uint8:
            clip = (wide(video.to(weight.dtype)) / 255 - mean) / std
        clip = clip.to(weight.dtype)

        features = self.encoder(clip, masked)
        logits = self.classifier(features) if self.classifier is not None else None
        out = SimpleNamespace(logits=logits, features=features, reconstruction_loss=None, pixels=None, targets=None)
        if reconstruct or (reconstruct is None and self.training and self.decoder is not None):
            assert self.decoder is not None, "this model has no decoder"
            visible = self.encoder_to_decoder(features)
            targets = patch_targets(clip * std + mean, config)
            batch, size = video.shape[0], config.patch_values
            if decoder_mask is None:
                out.pixels = self.decoder(visible, self.mask_token, masked)[masked].reshape(batch, -1, size)
                out.targets = targets[masked].reshape(batch, -1, size)
                counted = torch.ones(out.pixels.shape[:2], dtype=torch.bool, device=video.device)
            else:
                chosen = torch.zeros_like(masked)
                for b in range(batch):
                    chosen[b, decoder_mask.keep_idx[b].long()] = True
                out.pixels = self.decoder(visible, self.mask_token, masked, chosen)
                out.targets = targets[chosen].reshape(batch, -1, size)
                counted = masked[chosen].reshape(batch, -1)
            error = (wide(out.pixels) - wide(out.targets)) ** 2
            out.reconstruction_loss = error[counted].mean() if counted.any() else error.sum() * 0
        return out


def wide(x: Tensor) -> Tensor:
    """In float32 at least; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def loss(out: Any, target: Tensor, reconstruction_weight: float = 0.1) -> Tensor:
    """-sum(soft target * log softmax(logits)), mean over the batch, plus the weighted reconstruction loss."""
    if not target.is_floating_point():
        target = F.one_hot(target, out.logits.shape[1])
    classification = -(target * wide(out.logits).log_softmax(dim=-1)).sum(dim=-1).mean()
    return classification + reconstruction_weight * out.reconstruction_loss
