"""config.json of transformers' VideoMAE and of VideoMAE v2's folders on the hub, read and written.

transformers: where LayerNorms get their eps from was read off version 5.23: layer_norm_eps for all but fc_norm and
decoder.norm, which have PyTorch's default whatever the configuration says.

VideoMAE v2 (OpenGVLab/VideoMAEv2-Base, -Large, -Huge, -giant) runs on code of its own (trust_remote_code). Its
config.json says "VideoMAEv2_Base" whatever the size, and has the arguments of that code's encoder under model_config.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import not_, truediv
from typing import Any

from ..config import MARConfig
from ..kernels import checks
from .layouts import Checkpoint
from .report import Said

FIXED_EPS = 1e-5
FIXED_EPS_FIELDS = ("classifier_norm_eps", "decoder_norm_eps")
# VideoMAEConfig's own defaults: config.json may leave out what has them.
_DEFAULTS: dict[str, Any] = {
    "image_size": 224, "patch_size": 16, "num_channels": 3, "num_frames": 16, "tubelet_size": 2, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "use_mean_pooling": True, "decoder_num_attention_heads": 6, "decoder_hidden_size": 384,
    "decoder_num_hidden_layers": 4, "decoder_intermediate_size": 1536, "norm_pix_loss": True,
}  # fmt: skip
_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
# Our fields, and what config.json calls them.
_KEYS = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "channels": "num_channels",
    "num_frames": "num_frames",
}
_DECODER_KEYS = {
    "decoder_embed_dim": "decoder_hidden_size",
    "decoder_depth": "decoder_num_hidden_layers",
    "decoder_num_heads": "decoder_num_attention_heads",
    "norm_pix_loss": "norm_pix_loss",
}

V2_KEY = "model_config"
_V2_TYPE = "VideoMAEv2_Base"
_V2_CODE = "OpenGVLab/VideoMAEv2-Base"
"""Where transformers finds the code that such a folder runs on; it is asked for trust_remote_code."""
_V2_KEYS = {
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "channels": "in_chans",
    "num_frames": "num_frames",
    "num_classes": "num_classes",
    "drop_path_rate": "drop_path_rate",
    "head_dropout": "head_drop_rate",
}
# Arguments that may have this value only, or null: mar_fast computes no other.
_V2_FIXED = {
    "norm_layer": "nn.LayerNorm",
    "cos_attn": False,
    "use_learnable_pos_emb": False,
    "init_values": 0,
    "qk_scale": None,
}
_V2_DROPOUT = ("drop_rate", "attn_drop_rate")
_V2_OTHERS = {"layer_norm_eps", "qkv_bias", "with_cp", "init_scale"}
"""Beside the fields: the last two are for training only (recomputing blocks, and how a new head begins)."""


def _pair(value: Any) -> tuple[int, int]:
    """Height and width, of one number for both or of two."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def _one_or_pair(height: int, width: int) -> int | list[int]:
    """The way back: one number where they are equal."""
    return height if height == width else [height, width]


def _patch(tubelet: Any, size: Any) -> tuple[int, int, int]:
    return int(tubelet), *_pair(size)


def _whole_ratio(width: Any, ratio: Any) -> float:
    """The MLP ratio that its hidden features, a whole number, have: a file may round it."""
    return round(width * ratio) / width


# Fields made of several keys or converted from one; transformers' last norm is there unless it pools by the mean.
_Made = dict[str, tuple[Callable[..., Any], *tuple[str, ...]]]
_MADE: _Made = {
    "mlp_ratio": (truediv, "intermediate_size", "hidden_size"),
    "patch_size": (_patch, "tubelet_size", "patch_size"),
    "image_size": (_pair, "image_size"),
    "final_norm": (not_, "use_mean_pooling"),
}
_DECODER_MADE: _Made = {"decoder_mlp_ratio": (truediv, "decoder_intermediate_size", "decoder_hidden_size")}
_V2_MADE: _Made = {
    **_MADE,
    "mlp_ratio": (_whole_ratio, "embed_dim", "mlp_ratio"),
    "image_size": (_pair, "img_size"),
}


def _fields(where: str, config: Mapping[str, Any], keys: Mapping[str, str], made: _Made, under: str = "") -> Said:
    """The fields whose keys are in a config.json, or in the object ``under`` it."""
    said = {ours: (config[key], f"config.json, {under}{key}") for ours, key in keys.items() if key in config}
    try:
        for ours, (make, *names) in made.items():
            if config.keys() >= set(names):
                origin = " and ".join(f"{under}{name}" for name in names)
                said[ours] = make(*(config[name] for name in names)), f"config.json, {origin}"
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise checks.bad(where, f"a value that does not fit ({error})", "numbers") from error
    return said


def _without_effect(config: Mapping[str, Any], rates: Collection[str]) -> list[str]:
    """A remark on the rates of dropout that are not 0."""
    given = ", ".join(f"{rate} {config[rate]}" for rate in rates if config.get(rate))
    return [f"not carried over, without effect in evaluation: {given}"] if given else []


def said_by_transformers(checkpoint: Checkpoint, kind: str) -> tuple[Said, list[str]]:
    """The fields that a config.json of transformers, or none, says of tensors of the class ``kind``; and remarks.

    Raises:
        ValueError: it asks for something that mar_fast does not compute.
    """
    given, where, decoder = checkpoint.configs.get("config.json"), checkpoint.where, checkpoint.has("decoder")
    config, final_norm = {**_DEFAULTS, **(given or {})}, checkpoint.has("final_norm")
    origin, said = "transformers' default: there is no config.json", Said()
    if given is not None:
        origin, file = "config.json, layer_norm_eps", f"{where}, config.json"
        if given.get("model_type") != "videomae":
            raise checks.bad(f"{file}, model_type", repr(given.get("model_type")), "'videomae'")
        if config["hidden_act"] != "gelu":
            raise checks.bad(f"{file}, hidden_act", repr(config["hidden_act"]), "'gelu', the exact one")
        kinds = [str(name) for name in given.get("architectures") or () if str(name).startswith("VideoMAE")]
        if kinds and kind not in kinds:
            raise checks.bad(where, f"the tensors of a Hugging Face {kind}", f"those of {kinds[0]}, by config.json")
        keys, made = (_KEYS | _DECODER_KEYS, _MADE | _DECODER_MADE) if decoder else (_KEYS, _MADE)
        said = _fields(file, config, keys, made)
        final_norm = said["final_norm"][0]
    eps, fixed = (config["layer_norm_eps"], origin), (FIXED_EPS, "transformers: fixed for this norm")
    said["encoder_eps"] = eps
    if final_norm:
        said["final_norm_eps"] = eps
    if kind == "VideoMAEForVideoClassification":
        said["classifier_norm_eps"] = fixed
    if decoder:
        said |= {"decoder_eps": eps, "decoder_norm_eps": fixed}
    return said, _without_effect(config, _DROPOUT)


def said_by_videomae2(where: str, content: dict[str, Any]) -> tuple[Said, list[str]]:
    """The same for a config.json of VideoMAE v2, which has model_config."""
    where, config = f"{where}, config.json", content[V2_KEY]
    if not str(content.get("model_type")).startswith("VideoMAEv2"):
        raise checks.bad(f"{where}, model_type", repr(content.get("model_type")), f"{_V2_TYPE!r}, with {V2_KEY}")
    where = f"{where}, {V2_KEY}"
    if not isinstance(config, dict):
        raise checks.bad(where, type(config).__name__, "an object")
    for name, accepted in _V2_FIXED.items():
        if config.get(name) not in (None, accepted):
            raise checks.bad(f"{where}.{name}", repr(config[name]), repr(accepted))
    said = _fields(where, config, _V2_KEYS, _V2_MADE, f"{V2_KEY}.")
    if "layer_norm_eps" in config:
        norm = "classifier_norm_eps" if config.get("use_mean_pooling", True) else "final_norm_eps"
        eps = config["layer_norm_eps"], f"config.json, {V2_KEY}.layer_norm_eps"
        said |= {"encoder_eps": eps, norm: eps}
    remarks = _without_effect(config, _V2_DROPOUT)
    known = {*_V2_KEYS.values(), *_V2_FIXED, *_V2_DROPOUT, *_V2_OTHERS}
    known |= {name for _, *names in _V2_MADE.values() for name in names}
    if unknown := sorted(config.keys() - known):
        remarks.append(f"not known in config.json, {V2_KEY}, and not read: {', '.join(unknown)}")
    return said, remarks


def labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes in config.json; None where there are none but transformers' LABEL_0, ..."""
    said = config.get("id2label")
    if not isinstance(said, dict):
        return None
    names = [name for i in range(len(said)) if isinstance(name := said.get(str(i)), str)]
    return tuple(names) if len(names) == len(said) and names != _unnamed(len(names)) else None


def _unnamed(classes: int) -> list[str]:
    return [f"LABEL_{i}" for i in range(classes)]


def id2label(names: Sequence[str]) -> dict[str, Any]:
    """What config.json says of the names of classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def kind_for(config: MARConfig) -> str:
    """The transformers class for a model of this configuration."""
    if config.classifier:
        return "VideoMAEForVideoClassification"
    return "VideoMAEForPreTraining" if config.decoder_depth else "VideoMAEModel"


def for_transformers(config: MARConfig, dtype: str) -> dict[str, Any]:
    """config.json for a model of this configuration; the dtype is that of its weights, "float32" for example."""
    content: dict[str, Any] = {
        "architectures": [kind_for(config)],
        "model_type": "videomae",
        "dtype": dtype,
        **_arguments(config, _KEYS | _DECODER_KEYS if config.decoder_depth else _KEYS, _DROPOUT),
        "image_size": _one_or_pair(*config.image_size),
        "intermediate_size": round(config.embed_dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "qv_bias": True,  # as later versions of transformers call qkv_bias
        "norm_pix_loss": config.norm_pix_loss,
    }
    if config.decoder_depth:
        content["decoder_intermediate_size"] = round(config.decoder_embed_dim * config.decoder_mlp_ratio)
    return content | id2label(_unnamed(config.num_classes)) if config.classifier else content


def for_videomae2(config: MARConfig, dtype: str) -> dict[str, Any]:
    """The same for VideoMAE v2, if the model has a linear classifier.

    auto_map names the code in the repository of the hub that has it: it is not ours to write.
    """
    sizes = {"img_size": _one_or_pair(*config.image_size), "mlp_ratio": config.mlp_ratio}
    return {
        "architectures": ["VideoMAEv2"],
        "model_type": _V2_TYPE,
        "auto_map": {
            "AutoModel": f"{_V2_CODE}--modeling_videomaev2.VideoMAEv2",
            "AutoConfig": f"{_V2_CODE}--modeling_config.VideoMAEv2Config",
        },
        "dtype": dtype,
        V2_KEY: _arguments(config, _V2_KEYS, _V2_DROPOUT) | _V2_FIXED | sizes,
    }


def _arguments(config: MARConfig, keys: Mapping[str, str], rates: Collection[str]) -> dict[str, Any]:
    """What both write: fields that have a key of their own, and what they call the same."""
    return {
        **{key: getattr(config, ours) for ours, key in keys.items()},
        "patch_size": _one_or_pair(*config.patch_size[1:]),
        "tubelet_size": config.patch_size[0],
        "layer_norm_eps": config.encoder_eps,
        "use_mean_pooling": not config.final_norm,
        "qkv_bias": True,
        **dict.fromkeys(rates, 0.0),
    }
