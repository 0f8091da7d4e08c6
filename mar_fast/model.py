"""MAR on the ops of mar_fast.kernels: encoder on visible tokens, classifier, pixel decoder in training.

Only what is needed is computed: no dropped tubelet is embedded, and the pixel head, the last decoder block's queries
and its MLP run on dropped tokens only. The numbers are those of `mar_fast.reference`.

Parameters carry VideoMAE's pre-training names (``encoder.*``, ``decoder.*``, ``mask_token``, ``encoder_to_decoder``),
plus ``classifier.*``. In comments: B clips, L tokens in the grid, N visible, M = L - N dropped, D width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import MARConfig, named_config
from .kernels import add_layer_norm, attention, checks, gather_patch_embed, linear_gelu, masked_patch_loss, scatter_tokens
from .masking import TokenMask, cell_running


class MAROutput(NamedTuple):
    """What a forward pass gives; None where it was not asked for.

    Attributes:
        logits: (B, classes).
        features: (B, N, D), visible tokens after the encoder's last norm.
        reconstruction_loss: float32 scalar, mean squared error over the dropped tubelets.
        pixels: (B, L - N, t * h * w * C), predicted for the dropped tubelets, in flat-index order.
    """

    logits: Tensor | None
    features: Tensor
    reconstruction_loss: Tensor | None
    pixels: Tensor | None


def mar_loss(out: MAROutput, target: Tensor, reconstruction_weight: float = 0.1) -> Tensor:
    """Cross-entropy + ``reconstruction_weight`` * reconstruction loss (MAR, arXiv 2207.11660, section 3.4).

    Args:
        out: What the model returned, with logits.
        target: (B,) int64 class indices or (B, classes) soft targets.
        reconstruction_weight: 0.1 on Something-Something v2, 0.01 on Kinetics-400; 0 leaves the second term out.

    Raises:
        ValueError: out lacks the logits or the reconstruction loss, or target does not fit.
    """
    if out.logits is None:
        raise checks.bad("out", "no logits", "the output of a model with a classifier")
    batch, classes = out.logits.shape
    soft = isinstance(target, Tensor) and target.is_floating_point()
    if not isinstance(target, Tensor) or tuple(target.shape) != ((batch, classes) if soft else (batch,)):
        got = f"{target.dtype} of shape {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise checks.bad("target", got, f"({batch},) class indices or ({batch}, {classes}) floating-point soft targets")
    if not soft:
        checks.index_range("target", target, classes)
    if not reconstruction_weight >= 0:
        raise checks.bad("reconstruction_weight", reconstruction_weight, "0 or more")
    logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, target.to(logits.dtype) if soft else target.long())
    if reconstruction_weight:
        if out.reconstruction_loss is None:
            accepted = "0, or an output of a model with a decoder in training or with reconstruct=True"
            raise checks.bad("reconstruction_weight", f"{reconstruction_weight} without reconstruction_loss", accepted)
        loss = loss + reconstruction_weight * out.reconstruction_loss
    return loss


class Constant(nn.Module):
    """A tensor given by a formula: not in the state dict, not rounded by ``.bfloat16()``, right after ``to_empty``."""

    def __init__(self, formula: Callable[[], Tensor]) -> None:
        super().__init__()
        self.formula = formula
        self.value: Tensor
        self.register_buffer("value", formula(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Constant":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.value = self.formula().to(self.value.device)
        return self


def sinusoid_table(tokens: int, width: int) -> Tensor:
    """(L, D) float32: angle(p, i) = p / 10000 ** (2 * (i // 2) / D), even columns sin, odd cos; from float64."""
    position = torch.arange(tokens, dtype=torch.float64)[:, None]
    column = torch.arange(width)
    angle = position / 10000.0 ** (2 * (column // 2).double() / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, L, D), (B, M) -> (B, M, D)."""
    return tokens.gather(1, index.long()[..., None].expand(-1, -1, tokens.shape[-1]))


class Attention(nn.Module):
    """Multi-head self-attention. The qkv bias is (q_bias, 0, v_bias), or a full one with ``key_bias``."""

    def __init__(self, width: int, heads: int, key_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
        self.q_bias = None if key_bias else nn.Parameter(torch.zeros(width))
        self.v_bias = None if key_bias else nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def qkv_bias(self) -> Tensor:
        """(3 * D,)."""
        if self.q_bias is None or self.v_bias is None:
            return self.qkv.bias
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        qkv = F.linear(x, self.qkv.weight, self.qkv_bias()).unflatten(-1, (3, self.heads, -1))
        return self.proj(attention(qkv))

    def forward_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """Keys and values from all tokens x (B, L, D), queries only from ``rows`` (B, M, D) -> (B, M, D)."""
        width = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv_bias()
        query = F.linear(rows, weight[:width], bias[:width]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key_value = F.linear(x, weight[width:], bias[width:]).unflatten(-1, (2, self.heads, -1))
        key, value = (part.transpose(1, 2) for part in key_value.unbind(2))
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = F.dropout(linear_gelu(x, self.fc1.weight, self.fc1.bias), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


# The residual stream on its way between blocks: x, what the last sub-layer adds to it, and the drop path scale of that.
# The sum is left to the next norm, which does both in one pass.
Stream = tuple[Tensor, Tensor | None, Tensor | None]


class Block(nn.Module):
    """Pre-norm transformer block: x += attention(norm1(x)), x += mlp(norm2(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        eps: float,
        *,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        key_bias: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, key_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, round(width * mlp_ratio), dropout)
        self.drop_path = drop_path
        self.dropout = dropout

    def drop_scale(self, x: Tensor) -> Tensor | None:
        """(B,) 0 for the samples whose branch is dropped, 1 / keep probability for the others."""
        if not self.training or not self.drop_path:
            return None
        keep = 1 - self.drop_path
        return torch.empty(x.shape[0], dtype=torch.float32, device=x.device).bernoulli_(keep).div_(keep)

    def forward(
        self, x: Tensor, branch: Tensor | None, scale: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One block of the `Stream`; with ``rows`` (B, M) only these tokens come out of it."""
        x, y = norm(self.norm1, x, branch, scale)
        if rows is None:
            branch = self.attn(y)
        else:
            x, branch = take(x, rows), self.attn.forward_rows(y, take(y, rows))
        branch = F.dropout(branch, self.dropout, self.training)
        x, y = norm(self.norm2, x, branch, self.drop_scale(x))
        return x, self.mlp(y), self.drop_scale(x)


def norm(layer: nn.LayerNorm, x: Tensor, branch: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add the pending branch and normalise: (new x, its norm)."""
    return add_layer_norm(x, branch, layer.weight, layer.bias, eps=layer.eps, drop_scale=scale)


def run_blocks(blocks: nn.ModuleList, x: Tensor, checkpointing: bool, last_rows: Tensor | None = None) -> Stream:
    """x (B, N, D) through all blocks; the last one gives only ``last_rows`` (B, M), where they are given."""
    stream: Stream = (x, None, None)
    for number, block in enumerate(blocks, 1):
        rows = last_rows if number == len(blocks) else None
        if checkpointing and torch.is_grad_enabled():
            stream = checkpoint(block, *stream, rows, use_reentrant=False)
        else:
            stream = block(*stream, rows)
    return stream


class PatchEmbed(nn.Module):
    """The weight and bias of the tubelet embedding, named as VideoMAE's convolution; gather_patch_embed applies it."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.channels, config.width, kernel_size=config.patch, stride=config.patch)


class Encoder(nn.Module):
    """A plain ViT on visible tubelets (VideoMAE, arXiv 2203.12602)."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = Constant(partial(sinusoid_table, config.num_tokens, config.width))
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        shape = (config.width, config.num_heads, config.mlp_ratio, config.encoder_eps)
        self.blocks = nn.ModuleList(Block(*shape, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=config.final_norm_eps) if config.final_norm else None

    def forward(self, video: Tensor, keep_idx: Tensor) -> Tensor:
        """(B, C, T, H, W), (B, N) -> (B, N, D)."""
        proj, config = self.patch_embed.proj, self.config
        x = gather_patch_embed(
            video, keep_idx, proj.weight, proj.bias, self.pos_embed.value, mean=config.mean, std=config.std
        )
        x, branch, scale = run_blocks(self.blocks, x, config.gradient_checkpointing)
        if self.norm is not None:
            return norm(self.norm, x, branch, scale)[1]
        assert branch is not None
        return x + (branch if scale is None else scale[:, None, None] * branch).to(x.dtype)


class PixelDecoder(nn.Module):
    """A light ViT over all places that predicts the pixels of the dropped ones. Training only."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder_width
        self.pos_embed = Constant(partial(sinusoid_table, config.num_tokens, width))
        shape = (width, config.decoder_heads, config.decoder_mlp_ratio, config.decoder_eps)
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=config.decoder_norm_eps)
        self.head = nn.Linear(width, config.patch_values)

    def forward(self, visible: Tensor, mask_token: Tensor, keep_idx: Tensor, drop_idx: Tensor) -> Tensor:
        """(B, N, decoder width) -> (B, M, t * h * w * C), what only dropped tokens need computed only for them."""
        x = scatter_tokens(visible, keep_idx, mask_token, self.pos_embed.value)
        stream = run_blocks(self.blocks, x, self.config.gradient_checkpointing, last_rows=drop_idx)
        return self.head(norm(self.norm, *stream)[1])


class BridgingClassifier(nn.Module):
    """From features good for reconstruction to features good for classification (MAR, section 3.3)."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        width = config.bridge_width
        self.proj = nn.Linear(config.width, width, bias=False)
        shape = (width, config.bridge_heads, config.bridge_mlp_ratio, config.bridge_eps)
        extra: dict[str, Any] = dict(dropout=config.bridge_dropout, key_bias=True)
        self.blocks = nn.ModuleList(Block(*shape, **extra) for _ in range(config.bridge_depth))
        self.norm = nn.LayerNorm(width, eps=config.classifier_norm_eps)
        self.head = nn.Linear(width, config.num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, D) -> (B, classes)."""
        # Back to the weights' dtype: under autocast the residual stream stays in float32.
        x = self.proj(features).to(self.proj.weight.dtype)
        x, branch, _ = run_blocks(self.blocks, x, self.config.gradient_checkpointing)
        assert branch is not None
        return classify(self, (x + branch).mean(1), self.config.head_dropout)


class LinearClassifier(nn.Module):
    """Mean over tokens, LayerNorm, linear layer."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.width, eps=config.classifier_norm_eps)
        self.head = nn.Linear(config.width, config.num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, D) -> (B, classes)."""
        return classify(self, features.mean(1), self.config.head_dropout)


def classify(classifier: BridgingClassifier | LinearClassifier, pooled: Tensor, dropout: float) -> Tensor:
    """(B, D) pooled features through norm, dropout and head."""
    pooled = classifier.norm(pooled.to(classifier.norm.weight.dtype))
    return classifier.head(F.dropout(pooled, dropout, classifier.training))


class MAR(nn.Module):
    """Masked action recognition: a video transformer that sees, and computes, a part of the clip only."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.classifier: BridgingClassifier | LinearClassifier | None = None
        if config.classifier is not None:
            self.classifier = (BridgingClassifier if config.classifier == "bridging" else LinearClassifier)(config)
        self.decoder: PixelDecoder | None = None
        if config.decoder_depth:
            self.decoder = PixelDecoder(config)
            self.encoder_to_decoder = nn.Linear(config.width, config.decoder_width, bias=False)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_width))
        # The test mask is the same for every clip, so it is made once.
        self.test_keep_idx = Constant(partial(_test_indices, config, "keep_idx"))
        self.test_drop_idx = Constant(partial(_test_indices, config, "drop_idx"))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices and zero biases, as MAE (arXiv 2111.06377) and VideoMAE begin."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if self.decoder is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        video: Tensor,
        mask: TokenMask | None = None,
        *,
        reconstruct: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> MAROutput:
        """Classify, and in training reconstruct, a batch of clips.

        Args:
            video: (B, C, T, H, W) of the config's size, any strides. uint8 is normalised on the fly; floating point
                counts as already normalised.
            mask: Which tokens are visible. None draws running masks of the config's mask_ratio: in eval the test form
                (phase 0), in training a random phase for each clip and temporal shuffle.
            reconstruct: Whether to predict the dropped pixels. None means in training, if there is a decoder.
            generator: Source of the random masks; None is torch's default.

        Raises:
            ValueError, TypeError: an argument does not fit the model; the message names it.
        """
        self._check_video(video)
        if reconstruct is None:
            reconstruct = self.training and self.decoder is not None
        keep_idx, drop_idx = self._indices(video, mask, generator)
        features = self.encoder(video, keep_idx)
        logits = None if self.classifier is None else self.classifier(features)
        if not reconstruct:
            return MAROutput(logits, features, None, None)
        if self.decoder is None:
            raise checks.bad("reconstruct", reconstruct, "False: this model has no decoder (decoder_depth is 0)")
        # As in the classifier, the residual stream begins in the weights' dtype.
        visible = self.encoder_to_decoder(features).to(self.mask_token.dtype)
        pixels = self.decoder(visible, self.mask_token.flatten(), keep_idx, drop_idx)
        config = self.config
        loss = masked_patch_loss(
            pixels, video, drop_idx,
            patch=config.patch, mean=config.mean, std=config.std, normalize=config.normalize_target,
        )  # fmt: skip
        return MAROutput(logits, features, loss, pixels)

    def _indices(
        self, video: Tensor, mask: TokenMask | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        config, batch = self.config, video.shape[0]
        if mask is None:
            if not self.training or not config.mask_ratio:
                return self.test_keep_idx.value.expand(batch, -1), self.test_drop_idx.value.expand(batch, -1)
            mask = cell_running(
                batch, config.grid, config.mask_ratio,
                cell=config.cell, temporal_shuffle=True, generator=generator, device=video.device,
            )  # fmt: skip
        if not isinstance(mask, TokenMask):
            raise checks.bad_type("mask", type(mask).__name__, "a TokenMask (TokenMask.from_bool_masked takes bools)")
        if mask.num_tokens != config.num_tokens or (len(mask.grid) == 3 and mask.grid != config.grid):
            raise checks.bad("mask", f"a grid {mask.grid}", f"{config.grid}, the model's, {config.num_tokens} tokens")
        if mask.batch != batch:
            raise checks.bad("mask", f"{mask.batch} clips", f"{batch}, as video has")
        if mask.num_visible == 0:
            raise checks.bad("mask", "no visible token", "at least one in every clip")
        checks.same_device("video", video.device, mask=mask.keep_idx)
        return mask.keep_idx, mask.drop_idx

    def _check_video(self, video: Tensor) -> None:
        config = self.config
        checks.tensor("video", video, 5, (torch.uint8, *checks.FLOATS), "(B, C, T, H, W)")
        expected = (video.shape[0], config.channels, config.num_frames, *config.image_size)
        checks.size("video", video, expected, "(B, C, T, H, W) of the model's config")
        checks.same_device("the model", self.encoder.pos_embed.value.device, video=video)


def _test_indices(config: MARConfig, which: str) -> Tensor:
    """(1, N) or (1, L - N): the test mask of the config, running with phase 0, or everything where nothing is masked."""
    if not config.mask_ratio:
        everything = torch.arange(config.num_tokens, dtype=torch.int32)[None]
        return everything if which == "keep_idx" else everything[:, :0]
    index: Tensor = getattr(cell_running(1, config.grid, config.mask_ratio, cell=config.cell, phase=0), which)
    return index


def create_model(name: str, **overrides: Any) -> MAR:
    """A named model with random weights: ``create_model("mar_vit_base", num_classes=174, mask_ratio=0.5)``.

    Args:
        name: One of `mar_fast.list_models`.
        **overrides: Fields of `MARConfig`.
    """
    return MAR(named_config(name, **overrides))
