"""MAR on the ops of mar_fast.kernels: encoder on visible tokens, classifier, pixel decoder in training.

Only what is needed is computed: no dropped tubelet is embedded, and the pixel head, the last decoder block's queries
and its MLP run on dropped tokens only. The numbers are those of `mar_fast.reference`.

Parameters carry VideoMAE's pre-training names (``encoder.*``, ``decoder.*``, ``mask_token``, ``encoder_to_decoder``),
plus ``classifier.*``. In comments: B clips, L tokens in the grid, N visible, M = L - N dropped, D channels of a token.

One forward serves equal and ragged masks. With a ragged one tokens are packed, (total, D) and not (B, N, D), and
`Segments` say where each clip begins and ends; they are None for an equal mask.
"""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MARConfig, named_config
from .fallbacks import Fallbacks, Fused, plain_projection
from .kernels import checks, gather_patch_embed, masked_patch_loss, scatter_tokens
from .kernels.gather_patch_embed import per_channel
from .kernels.masked_patch_loss import patch_targets
from .layers import (
    Attention,
    Block,
    Constant,
    Stream,
    like_weight,
    mean_of_tokens,
    norm,
    position_table,
    run_blocks,
    take,
    total,
)
from .masking import cell_running
from .token_mask import Segments, TokenMask

if TYPE_CHECKING:
    from .checkpoint import LoadReport


class MAROutput(NamedTuple):
    """What a forward pass gives; None where it was not asked for.

    Attributes:
        logits: (B, classes), or (B, D) pooled features if ``num_classes`` is 0.
        features: (B, N, D), visible tokens after the encoder's last norm; (total, D) for a ragged mask.
        reconstruction_loss: float32 scalar, mean squared error over the dropped tubelets (of all clips together).
        pixels: (B, L - N, t * h * w * C), predicted for the dropped tubelets, in flat-index order;
            (B * L - total, t * h * w * C) for a ragged mask, whose ``drop_cu_seqlens`` say where clips begin;
            (B, K, t * h * w * C) for the visible positions of a decoder_mask.
        cu_seqlens: (B + 1,) int32 for a ragged mask: the features of clip i are [cu_seqlens[i], cu_seqlens[i + 1]).
            None for any other mask.
    """

    logits: Tensor | None
    features: Tensor
    reconstruction_loss: Tensor | None
    pixels: Tensor | None
    cu_seqlens: Tensor | None = None


class PatchEmbed(Fused):
    """The tubelet embedding, named as VideoMAE's convolution: gather_patch_embed with its weight and bias."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Conv3d(
            config.channels, config.embed_dim, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, video: Tensor, keep_idx: Tensor, pos_embed: Tensor, segments: Segments | None = None) -> Tensor:
        """(B, C, T, H, W), (B, N), positions (L, D) -> (B, N, D), or packed (total,) -> (total, D)."""
        proj, mean, std = self.proj, self.config.mean, self.config.std
        clip_idx = None if segments is None else segments.clip_idx
        if plain_projection(proj):
            assert proj.bias is not None
            return gather_patch_embed(video, keep_idx, proj.weight, proj.bias, pos_embed, clip_idx, mean=mean, std=std)
        self.fallbacks.warn_once("a patch embedding with hooks or changed parts")
        if video.dtype == torch.uint8:
            centre, spread = (per_channel(values, video.device).view(-1, 1, 1, 1) for values in (mean, std))
            video = (video.float() / 255 - centre) / spread
        tokens = proj(like_weight(video, proj)).flatten(2).transpose(1, 2)  # (B, L, D)
        index = keep_idx.long()
        tokens = take(tokens, index) if clip_idx is None else tokens[clip_idx.long(), index]
        return (tokens + pos_embed[index]).to(tokens.dtype)


class Encoder(Fused):
    """A plain ViT on visible tubelets (VideoMAE, arXiv 2203.12602)."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = Constant(partial(position_table, config.grid, config.position_grid, config.embed_dim))
        rates = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
        shape = (config.embed_dim, config.num_heads, config.mlp_ratio, config.encoder_eps)
        self.blocks = nn.ModuleList(Block(*shape, drop_path_rate=rate) for rate in rates)
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.final_norm_eps) if config.final_norm else None

    def forward(self, video: Tensor, keep_idx: Tensor, segments: Segments | None = None) -> Tensor:
        """(B, C, T, H, W), (B, N) -> (B, N, D), or packed (total,) -> (total, D)."""
        x = self.patch_embed(video, keep_idx, self.pos_embed.value, segments)  # (B, N, D)
        stream = run_blocks(self.blocks, x, self.config.gradient_checkpointing, segments=segments)
        return total(stream) if self.norm is None else norm(self.fallbacks, self.norm, stream)[0]

    def layers(self, video: Tensor, keep_idx: Tensor, numbers: Collection[int]) -> dict[int, Tensor]:
        """The residual stream after some blocks, numbered from 1; after the last one it is the encoder's output.

        (B, C, T, H, W), (B, N) -> (B, N, D) for each. Blocks that no number needs are not run.
        """
        stream = Stream(self.patch_embed(video, keep_idx, self.pos_embed.value))
        found = {}
        for number, block in enumerate(self.blocks[: max(numbers)], 1):
            stream = block(stream)
            if number == len(self.blocks) and self.norm is not None:
                found[number] = norm(self.fallbacks, self.norm, stream)[0]
            elif number in numbers:
                found[number] = total(stream)
        return found


class PixelDecoder(Fused):
    """A light ViT over all tokens of the grid that predicts the pixels of the dropped ones. Training only."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.decoder_embed_dim
        self.pos_embed = Constant(partial(position_table, config.grid, config.position_grid, dim))
        shape = (dim, config.decoder_num_heads, config.decoder_mlp_ratio, config.decoder_eps)
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(dim, eps=config.decoder_norm_eps)
        self.head = nn.Linear(dim, config.patch_values)

    def forward(
        self, visible: Tensor, mask_token: Tensor, mask: TokenMask, decoder_mask: TokenMask | None = None
    ) -> Tensor:
        """(B, N, decoder_embed_dim) -> (B, M, t * h * w * C), or both packed: visible tokens in, dropped ones out.

        With ``decoder_mask`` its K visible positions come out, and no other mask token goes in.
        """
        table, drop_clip_idx = self.pos_embed.value, mask.drop_clip_idx
        if decoder_mask is None:
            x = scatter_tokens(visible, mask.keep_idx, mask_token, table, mask.cu_seqlens)  # (B, L, D)
            # Of the last block only dropped tokens are needed; where clips drop different numbers it runs on all.
            last_rows = mask.drop_idx if drop_clip_idx is None else None
        else:
            index = decoder_mask.keep_idx.long()
            tokens = torch.cat((visible + table[mask.keep_idx.long()], mask_token + table[index]), 1)  # (B, N + K, D)
            x = tokens.to(visible.dtype)
            last_rows = torch.arange(visible.shape[1], x.shape[1], device=x.device).expand_as(index)  # the last K
        stream = run_blocks(self.blocks, x, self.config.gradient_checkpointing, last_rows)  # (B, M, D)
        if drop_clip_idx is not None:
            assert stream.residual is not None
            rows = drop_clip_idx * mask.num_tokens + mask.drop_idx
            x, residual = (value.flatten(0, 1).index_select(0, rows) for value in (stream.x, stream.residual))
            stream = stream._replace(x=x, residual=residual)
        return self.head(norm(self.fallbacks, self.norm, stream)[0])


class Classifier(nn.Module):
    """Mean over tokens, LayerNorm, linear layer; no linear layer where ``num_classes`` is 0, as in timm.

    The bridging classifier (MAR, section 3.3) first has blocks that turn features good for reconstruction into features
    good for classification.
    """

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        if config.classifier == "bridging":
            dim = config.bridge_embed_dim
            self.proj = nn.Linear(config.embed_dim, dim, bias=False)
            shape = (dim, config.bridge_num_heads, config.bridge_mlp_ratio, config.bridge_eps)
            extra: dict[str, Any] = dict(dropout=config.bridge_dropout, key_bias=True)
            self.blocks = nn.ModuleList(Block(*shape, **extra) for _ in range(config.bridge_depth))
        self.norm = nn.LayerNorm(dim, eps=config.classifier_norm_eps)
        self.head = nn.Linear(dim, config.num_classes) if config.num_classes else nn.Identity()

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """(B, N, D), or packed (total, D) -> (B, classes)."""
        config = self.config
        if config.classifier == "bridging":
            # Back to the weights' dtype: under autocast the residual stream stays in float32.
            x = like_weight(self.proj(x), self.proj)  # (B, N, bridge_embed_dim)
            x = total(run_blocks(self.blocks, x, config.gradient_checkpointing, segments=segments))
        x = self.norm(like_weight(mean_of_tokens(x, segments), self.norm))  # (B, D)
        if config.head_dropout and self.training:
            x = F.dropout(x, config.head_dropout)
        return self.head(x)


class MAR(nn.Module):
    """Masked action recognition: a video transformer that sees, and computes, a part of the clip only.

    Layers with hooks, adapters (LoRA), parametrizations, quantised weights or another forward are called as they are,
    unfused, and one warning says so.
    """

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.load_report: LoadReport | None = None
        """What `from_pretrained` read into this model; None where the weights are random."""
        self.encoder = Encoder(config)
        self.classifier = None if config.classifier is None else Classifier(config)
        self.decoder = PixelDecoder(config) if config.decoder_depth else None
        if self.decoder is not None:
            self.encoder_to_decoder = nn.Linear(config.embed_dim, config.decoder_embed_dim, bias=False)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_embed_dim))
        # The test mask is the same for every clip, so it is made once.
        self.test_keep_idx = Constant(partial(_test_indices, config, "keep_idx"))
        self.test_drop_idx = Constant(partial(_test_indices, config, "drop_idx"))
        fallbacks = Fallbacks()  # one for all parts, so that each warning is given once
        for module in self.modules():
            if isinstance(module, Fused):
                module.fallbacks = fallbacks
        self.reset_parameters()

    @classmethod
    def from_pretrained(cls, source: Any, **options: Any) -> "MAR":
        """`mar_fast.from_pretrained`: of a hub id, a folder that `save_pretrained` wrote, or any other checkpoint."""
        from .checkpoint import from_pretrained

        return from_pretrained(source, **options)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Path:
        """Write a folder with config.json, weights and a model card: see `mar_fast.checkpoint.save_pretrained`."""
        from .checkpoint import save_pretrained

        return save_pretrained(self, save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload such a folder to the hub: see `mar_fast.checkpoint.push_to_hub`."""
        from .checkpoint import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices and zero biases, as MAE (arXiv 2111.06377) and VideoMAE begin."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, Attention):
                for bias in (module.q_bias, module.v_bias):
                    if bias is not None:
                        nn.init.zeros_(bias)
        if self.decoder is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        video: Tensor,
        mask: TokenMask | None = None,
        *,
        reconstruct: bool | None = None,
        generator: torch.Generator | None = None,
        decoder_mask: TokenMask | None = None,
    ) -> MAROutput:
        """Classify, and in training reconstruct, a batch of clips.

        Args:
            video: (B, C, T, H, W) of the config's size, any strides. uint8 is normalised on the fly; floating point
                counts as already normalised.
            mask: Which tokens are visible. None draws running masks of the config's mask_ratio: in eval the test form
                (phase 0), in training a random phase for each clip and temporal shuffle. With a ragged mask tokens
                stay packed from end to end: nothing is padded, and each clip gives what it gives alone.
            reconstruct: Whether to predict the dropped pixels. None means in training, if there is a decoder.
            generator: Source of the random masks; None is torch's default.
            decoder_mask: For dual masking (VideoMAE v2, arXiv 2303.16727): the decoder predicts its visible positions
                only, (B, K, t * h * w * C), and of those the dropped ones count in the loss. None predicts all that is
                dropped.

        Raises:
            ValueError, TypeError: an argument does not fit the model; the message names it.
        """
        self._check_video(video)
        if reconstruct is None:
            reconstruct = self.training and self.decoder is not None
        if reconstruct and self.decoder is None:
            raise checks.bad("reconstruct", reconstruct, "False: this model has no decoder (decoder_depth is 0)")
        mask = self._mask(video, mask, generator)
        if decoder_mask is not None:
            self._check_decoder_mask(decoder_mask, mask, video, reconstruct)
        segments = mask.segments
        features = self.encoder(video, mask.keep_idx, segments)  # (B, N, D) or (total, D)
        logits = None if self.classifier is None else self.classifier(features, segments)  # (B, classes)
        pixels = loss = None
        if reconstruct:
            assert self.decoder is not None
            # As in the classifier, the residual stream begins in the weights' dtype.
            visible = self.encoder_to_decoder(features).to(self.mask_token.dtype)  # (B, N, decoder_embed_dim)
            pixels = self.decoder(visible, self.mask_token.flatten(), mask, decoder_mask)  # (B, M, t * h * w * C)
            loss = self.reconstruction_loss(pixels, video, mask, decoder_mask)
        return MAROutput(logits, features, loss, pixels, mask.cu_seqlens)

    def reconstruction_loss(
        self, pixels: Tensor, video: Tensor, mask: TokenMask, decoder_mask: TokenMask | None = None
    ) -> Tensor:
        """`MAROutput.reconstruction_loss` of predicted pixels, for the clips and masks of the forward pass."""
        config = self.config
        sizes: dict[str, Any] = dict(patch_size=config.patch_size, mean=config.mean, std=config.std)
        sizes["normalize"] = config.norm_pix_loss
        if decoder_mask is None:
            return masked_patch_loss(pixels, video, mask.drop_idx, mask.drop_clip_idx, **sizes)
        # How many positions count depends on the masks; weights of 0 and 1 keep every shape fixed.
        counts = mask.bool_masked().gather(1, decoder_mask.keep_idx.long()).float()  # (B, K)
        target = patch_targets(video, decoder_mask.keep_idx, dtype=pixels.dtype, **sizes)
        error = (pixels.to(target.dtype) - target).square().mean(-1)  # (B, K)
        return (error * counts).sum() / counts.sum().clamp(min=1)

    def _mask(self, video: Tensor, mask: TokenMask | None, generator: torch.Generator | None) -> TokenMask:
        """The given mask, checked, or the model's own."""
        config, batch = self.config, video.shape[0]
        if mask is not None:
            self._check_mask("mask", mask, video)
            if mask.cu_seqlens is None and mask.num_visible == 0:
                raise checks.bad("mask", "no visible token", "at least one in every clip")
            return mask
        if self.training and config.mask_ratio:
            random: dict[str, Any] = dict(temporal_shuffle=True, generator=generator, device=video.device)
            return cell_running(batch, config.grid, config.mask_ratio, cell=config.cell, **random)
        keep_idx, drop_idx = (test.value.expand(batch, -1) for test in (self.test_keep_idx, self.test_drop_idx))
        return TokenMask(keep_idx, drop_idx, config.grid)

    def _check_mask(self, argument: str, mask: object, video: Tensor) -> None:
        config, batch = self.config, video.shape[0]
        if not isinstance(mask, TokenMask):
            raise checks.bad_type(argument, type(mask).__name__, "a TokenMask (TokenMask.from_bool_masked takes bools)")
        if mask.num_tokens != config.num_tokens or (len(mask.grid) == 3 and mask.grid != config.grid):
            raise checks.bad(argument, f"a grid {mask.grid}", f"{config.grid}, the model's, {config.num_tokens} tokens")
        if mask.batch != batch:
            raise checks.bad(argument, f"{mask.batch} clips", f"{batch}, as video has")
        checks.same_device("video", video.device, **{argument: mask.keep_idx})

    def _check_decoder_mask(self, decoder_mask: object, mask: TokenMask, video: Tensor, reconstruct: bool) -> None:
        self._check_mask("decoder_mask", decoder_mask, video)
        assert isinstance(decoder_mask, TokenMask)
        for argument, given in (("mask", mask), ("decoder_mask", decoder_mask)):
            if given.cu_seqlens is not None:
                accepted = "with decoder_mask one whose clips keep equally many tokens"
                raise checks.bad(argument, "a ragged mask", accepted)
        if not reconstruct:
            raise checks.bad("decoder_mask", "a mask without reconstruction", "None, or reconstruct=True")

    def _check_video(self, video: Tensor) -> None:
        config = self.config
        checks.tensor("video", video, 5, (torch.uint8, *checks.FLOATS), "(B, C, T, H, W)")
        expected = (video.shape[0], config.channels, config.num_frames, *config.image_size)
        checks.size("video", video, expected, "(B, C, T, H, W) of the model's config")
        checks.same_device("the model", self.encoder.pos_embed.value.device, video=video)


def _test_indices(config: MARConfig, which: str) -> Tensor:
    """(1, N) or (1, L - N): the test mask, running with phase 0."""
    cell = config.cell if config.mask_ratio else (1, 1, 1)  # where nothing is masked it need not divide the grid
    index: Tensor = getattr(cell_running(1, config.grid, config.mask_ratio, cell=cell, phase=0), which)
    return index


def create_model(name: str, **overrides: Any) -> MAR:
    """A named model with random weights: ``create_model("mar_vit_base", num_classes=174, mask_ratio=0.5)``.

    Args:
        name: One of `mar_fast.list_models`.
        **overrides: Fields of `MARConfig`.
    """
    return MAR(named_config(name, **overrides))
