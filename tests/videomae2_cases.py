"""VideoMAE v2 as the hub has it, written from its papers and files: the same names, plain PyTorch, nothing of mar_fast.

Blocks are VideoMAE's (arXiv 2203.12602); the model averages its tokens and normalises the mean (fc_norm); ``head`` is
none without classes. Clips are (B, C, T, H, W), and a shell, what AutoModel gives, has the model under ``model``.
"""

import json
import math
from types import SimpleNamespace

import torch
from checkpoint_cases import FRAMES, SIZE, random_weights
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

SMALL_CONFIG = dict(
    img_size=list(SIZE),
    patch_size=16,
    in_chans=3,
    num_classes=0,
    embed_dim=96,
    depth=2,
    num_heads=3,
    mlp_ratio=4,
    qkv_bias=True,
    qk_scale=None,
    drop_rate=0.0,
    attn_drop_rate=0.0,
    drop_path_rate=0.0,
    norm_layer="nn.LayerNorm",
    layer_norm_eps=1e-6,
    init_values=0.0,
    use_learnable_pos_emb=False,
    tubelet_size=2,
    use_mean_pooling=True,
    with_cp=False,
    num_frames=FRAMES,
    cos_attn=False,
)


def hub_config(**changes):
    """config.json, as OpenGVLab/VideoMAEv2-Base has it."""
    return {
        "_name_or_path": "./",
        "model_type": "VideoMAEv2_Base",
        "architectures": ["VideoMAEv2_Base"],
        "auto_map": {
            "AutoModel": "modeling_videomaev2.VideoMAEv2",
            "AutoConfig": "modeling_config.VideoMAEv2Config",
        },
        "model_config": {**SMALL_CONFIG, **changes},
        "transformers_version": "4.38.0",
        "use_cache": True,
    }


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        weights = self.qkv.weight.chunk(3)
        biases = (self.q_bias, None, self.v_bias)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for weight, bias in zip(weights, biases, strict=True)
        )
        scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, hidden, eps):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, channels, dim, patch):
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).mT


class VisionTransformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        dim, eps = c["embed_dim"], c["layer_norm_eps"]
        patch = (c["tubelet_size"], c["patch_size"], c["patch_size"])
        height, width = c["img_size"]
        tokens = c["num_frames"] // patch[0] * (height // patch[1]) * (width // patch[2])
        self.patch_embed = PatchEmbed(c["in_chans"], dim, patch)
        angle = [[p / 10000 ** (i // 2 * 2 / dim) for i in range(dim)] for p in range(tokens)]
        table = [[(math.cos if i % 2 else math.sin)(value) for i, value in enumerate(row)] for row in angle]
        self.pos_embed = torch.tensor([table])
        hidden = int(dim * c["mlp_ratio"])
        self.blocks = nn.ModuleList(Block(dim, c["num_heads"], hidden, eps) for _ in range(c["depth"]))
        pooled = c["use_mean_pooling"]
        self.norm = nn.Identity() if pooled else nn.LayerNorm(dim, eps=eps)
        self.fc_norm = nn.LayerNorm(dim, eps=eps) if pooled else None
        self.head = nn.Linear(dim, c["num_classes"]) if c["num_classes"] else nn.Identity()

    def forward(self, x):
        x = self.patch_embed(x)
        x = x + self.pos_embed.to(x)
        for block in self.blocks:
            x = block(x)
        if self.fc_norm is None:
            return self.head(self.norm(x)[:, 0])
        return self.head(self.fc_norm(x.mean(1)))


class VideoMAEv2(nn.Module):
    """The shell."""

    def __init__(self, **changes):
        super().__init__()
        self.config = SimpleNamespace(**hub_config(**changes))
        self.model = VisionTransformer(self.config.model_config)

    def forward(self, pixel_values):
        return self.model(pixel_values)


def v2_model(seed=1, **changes):
    return random_weights(VideoMAEv2(**changes), seed)


def v2_state(prefix="model.", **changes):
    """The weights of a folder."""
    state = v2_model(**changes).state_dict()
    return {prefix + name.removeprefix("model."): tensor.clone() for name, tensor in state.items()}


def v2_folder(folder, prefix="model.", preprocessor=None, state=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hub_config(**changes)))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    save_file(v2_state(prefix, **changes) if state is None else state, folder / "model.safetensors")
    return folder
