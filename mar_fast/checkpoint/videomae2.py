"""config.json of VideoMAE v2's folders on the hub, read and written.

These models (OpenGVLab/VideoMAEv2-Base, -Large, -Huge, -giant) run on code of their own (trust_remote_code). Their
config.json says "VideoMAEv2_Base" whatever the size, and has the arguments of that code's encoder under model_config.
"""

from collections.abc import Sequence
from typing import Any

from ..config import MARConfig
from ..kernels import checks
from .huggingface import one_or_pair, pair, with_labels

KEY = "model_config"
_TYPE = "VideoMAEv2_Base"
# Where transformers finds the code that such a folder runs on; it is asked for trust_remote_code.
_CODE = "OpenGVLab/VideoMAEv2-Base"
# Our fields, and what model_config calls them.
_FIELDS = {
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "channels": "in_chans",
    "num_frames": "num_frames",
    "num_classes": "num_classes",
    "drop_path_rate": "drop_path_rate",
    "head_dropout": "head_drop_rate",
}
# Arguments of which mar_fast computes one value only, or null.
_FIXED = {
    "norm_layer": "nn.LayerNorm",
    "cos_attn": False,
    "use_learnable_pos_emb": False,
    "init_values": 0,
    "qk_scale": None,
}
_READ = {*_FIELDS.values(), *_FIXED, "img_size", "patch_size", "tubelet_size", "mlp_ratio", "layer_norm_eps"}
_READ |= {"use_mean_pooling", "qkv_bias"}
_DROPOUT = ("drop_rate", "attn_drop_rate")
# For training only: recomputing blocks, and how a new head begins.
_WITHOUT_EFFECT = {"with_cp", "init_scale"}


def said(where: str, content: dict[str, Any]) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """Field of `MARConfig` -> (value, where it is said), and remarks.

    Args:
        where: The folder, for messages.
        content: Its config.json, which has model_config.

    Raises:
        ValueError: it asks for something that mar_fast does not compute.
    """
    where, config = f"{where}, config.json", content[KEY]
    if not str(content.get("model_type")).startswith("VideoMAEv2"):
        raise checks.bad(f"{where}, model_type", repr(content.get("model_type")), f"{_TYPE!r}, with {KEY}")
    if not isinstance(config, dict):
        raise checks.bad(f"{where}, {KEY}", type(config).__name__, "an object")
    for name, accepted in _FIXED.items():
        if config.get(name) not in (None, accepted):
            raise checks.bad(f"{where}, {KEY}.{name}", repr(config[name]), repr(accepted))
    values: dict[str, Any] = {ours: (config[key], key) for ours, key in _FIELDS.items() if key in config}
    try:
        if {"tubelet_size", "patch_size"} <= config.keys():
            patch = int(config["tubelet_size"]), *pair(config["patch_size"])
            values["patch_size"] = patch, "tubelet_size and patch_size"
        if "img_size" in config:
            values["image_size"] = pair(config["img_size"]), "img_size"
        if {"mlp_ratio", "embed_dim"} <= config.keys():
            hidden = round(config["embed_dim"] * config["mlp_ratio"])
            values["mlp_ratio"] = hidden / config["embed_dim"], "mlp_ratio"
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise checks.bad(f"{where}, {KEY}", f"a value that does not fit ({error})", "numbers") from error
    if "layer_norm_eps" in config:
        pooled = config.get("use_mean_pooling", True)
        eps = "encoder_eps", "classifier_norm_eps" if pooled else "final_norm_eps"
        values |= dict.fromkeys(eps, (config["layer_norm_eps"], "layer_norm_eps"))
    if "use_mean_pooling" in config:
        values["final_norm"] = not config["use_mean_pooling"], "use_mean_pooling"
    remarks = []
    if rates := [f"{name} {config[name]}" for name in _DROPOUT if config.get(name)]:
        remarks.append(f"not carried over, without effect in evaluation: {', '.join(rates)}")
    if unknown := sorted(set(config) - _READ - _WITHOUT_EFFECT - set(_DROPOUT)):
        remarks.append(f"not known in config.json, {KEY}, and not read: {', '.join(unknown)}")
    return {name: (value, f"config.json, {KEY}.{key}") for name, (value, key) in values.items()}, remarks


def config_json(config: MARConfig, dtype: str, labels: Sequence[str] | None = None) -> dict[str, Any]:
    """config.json for a model of this configuration, which has a linear classifier.

    auto_map names the code in the repository of the hub that has it: it is not ours to write.

    Args:
        config: The configuration.
        dtype: Of the weights, "float32" for example.
        labels: Names of the classes.
    """
    content: dict[str, Any] = {
        "architectures": ["VideoMAEv2"],
        "model_type": _TYPE,
        "auto_map": {
            "AutoModel": f"{_CODE}--modeling_videomaev2.VideoMAEv2",
            "AutoConfig": f"{_CODE}--modeling_config.VideoMAEv2Config",
        },
        "dtype": dtype,
        KEY: {
            **{key: getattr(config, ours) for ours, key in _FIELDS.items()},
            **_FIXED,
            "img_size": one_or_pair(*config.image_size),
            "patch_size": one_or_pair(*config.patch_size[1:]),
            "tubelet_size": config.patch_size[0],
            "mlp_ratio": config.mlp_ratio,
            "layer_norm_eps": config.encoder_eps,
            "use_mean_pooling": True,
            "qkv_bias": True,
            **dict.fromkeys(_DROPOUT, 0.0),
        },
    }
    return with_labels(content, labels)
