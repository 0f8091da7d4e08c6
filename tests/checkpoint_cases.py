"""Models and files for the tests of checkpoints: sides that all differ, no weight at a special value."""

import torch
from helpers import small_config

import mar_fast

FRAMES, SIZE = 6, (32, 64)  # 3 x 2 x 4 tokens of 2 x 16 x 16
SMALL = dict(num_frames=FRAMES, image_size=SIZE)
# What a bare file of a small model does not say.
TOLD = dict(num_heads=3, position="formula", **SMALL)
LINEAR = dict(classifier="linear", final_norm=False, decoder_depth=0, mask_ratio=0.0)
PRETRAINING = dict(classifier=None, mask_ratio=0.0)
# A model that each layout can express.
LAYOUTS = {
    "mar_fast": {},
    "mar": {},
    "videomae": PRETRAINING,
    "videomae, fine-tuned": LINEAR,
    "videomae2": {**LINEAR, "num_classes": 0},
    "hf": {**LINEAR, "classifier_norm_eps": 1e-5},
}


def random_weights(model, seed=1, scores=1, dtype=torch.float32):
    """Every parameter at random by a seed or a generator; those of query and key ``scores`` times as large."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            if "norm" in name and name.endswith("weight"):
                noise = 1 + 0.3 * noise
            elif parameter.ndim > 1 and name != "mask_token":
                noise = noise * (scores if "query" in name or "key" in name else 1) / parameter[0].numel() ** 0.5
            else:
                noise = 0.5 * noise
            parameter.copy_(noise)
    return model.eval()


def small_model(seed=1, **overrides):
    return random_weights(mar_fast.MAR(small_config(**{**SMALL, **overrides})), seed)


def clip(batch=2, frames=FRAMES, size=SIZE, seed=3):
    return torch.randn(batch, 3, frames, *size, generator=torch.Generator().manual_seed(seed))


def fine_tuned_names(state):
    """VideoMAE's fine-tuned names, by hand."""
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("encoder.")
        name = name.replace("classifier.norm.", "fc_norm.").replace("classifier.head.", "head.")
        renamed[name] = tensor.clone()
    return renamed


def mar_names(state):
    """MAR's names, by hand, from ours."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("encoder."):
            name = "backbone." + name[len("encoder.") :]
        elif name == "classifier.proj.weight":
            name = "encoder_to_cls_decoder.weight"
        elif name.startswith("classifier."):
            name = name.replace("classifier.", "cls_head.", 1)
            for ours, theirs in (("norm1", "norm"), ("norm2", "norm_ffn"), ("attn.qkv", "attn.to_qkv")):
                name = name.replace(f".{ours}.", f".{theirs}.")
            name = name.replace(".mlp.fc1.", ".ffn.net.0.").replace(".mlp.fc2.", ".ffn.net.3.")
        renamed[name] = tensor.clone()
    return renamed


def same_weights(first, second):
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)
