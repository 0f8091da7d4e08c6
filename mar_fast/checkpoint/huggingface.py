"""config.json of transformers' VideoMAE, read and written.

Where LayerNorms get their eps from was read off transformers 5.23: layer_norm_eps for all but fc_norm and decoder.norm,
which have PyTorch's default whatever the configuration says.
"""

from collections.abc import Sequence
from typing import Any

from ..config import MARConfig
from ..kernels import checks
from .layouts import EPS, part_of
from .read import File

FIXED_EPS = 1e-5
FIXED_EPS_FIELDS = ("classifier_norm_eps", "decoder_norm_eps")
# VideoMAEConfig's own defaults: config.json may leave out what has them.
_DEFAULTS: dict[str, Any] = {
    "image_size": 224, "patch_size": 16, "num_channels": 3, "num_frames": 16, "tubelet_size": 2, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "use_mean_pooling": True, "decoder_num_attention_heads": 6, "decoder_hidden_size": 384,
    "decoder_num_hidden_layers": 4, "decoder_intermediate_size": 1536, "norm_pix_loss": True,
}  # fmt: skip
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


def said(file: File, kind: str, final_norm: bool, decoder: bool) -> dict[str, tuple[Any, str]]:
    """Field of `MARConfig` -> (value, where it is said), by config.json.

    Args:
        file: The file, with its configurations.
        kind: The class of transformers that its tensors are of.
        final_norm: Whether it has the norm after the last block, where config.json does not say.
        decoder: Whether it has a pixel decoder.

    Raises:
        ValueError: they ask for something that mar_fast does not compute.
    """
    given = file.configs.get("config.json")
    config = {**_DEFAULTS, **(given or {})}
    origin = "transformers' default: there is no config.json"
    values: dict[str, tuple[Any, str]] = {}
    if given is not None:
        origin = "config.json, layer_norm_eps"
        where = f"{file.where}, config.json"
        if given.get("model_type") != "videomae":
            raise checks.bad(f"{where}, model_type", repr(given.get("model_type")), "'videomae'")
        if config["hidden_act"] != "gelu":
            raise checks.bad(f"{where}, hidden_act", repr(config["hidden_act"]), "'gelu', the exact one")
        kinds = [str(name) for name in given.get("architectures") or () if str(name).startswith("VideoMAE")]
        if kinds and kind not in kinds:
            got = f"the tensors of a Hugging Face {kind}"
            raise checks.bad(file.where, got, f"those of {kinds[0]}, by config.json")
        try:
            values = _fields(config, decoder)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise checks.bad(where, f"a value that does not fit ({error})", "VideoMAEConfig's fields") from error
        final_norm = values["final_norm"][0]
    parts = {"final_norm": final_norm, "decoder": decoder, "classifier": kind == "VideoMAEForVideoClassification"}
    for name in EPS:
        if name in FIXED_EPS_FIELDS:
            eps = FIXED_EPS, "transformers: fixed for this norm"
        else:
            eps = config["layer_norm_eps"], origin
        if name != "bridge_eps" and parts.get(part_of(name) or "encoder", True):
            values[name] = eps
    return values


def _fields(config: dict[str, Any], decoder: bool) -> dict[str, tuple[Any, str]]:
    keys = _KEYS | (_DECODER_KEYS if decoder else {})
    values: dict[str, tuple[Any, str]] = {ours: (config[key], key) for ours, key in keys.items()}
    for prefix in ("", "decoder_") if decoder else ("",):
        width, hidden = f"{prefix}hidden_size", f"{prefix}intermediate_size"
        values[f"{prefix}mlp_ratio"] = config[hidden] / config[width], f"{hidden} / {width}"
    patch = int(config["tubelet_size"]), *pair(config["patch_size"])
    values["patch_size"] = patch, "tubelet_size and patch_size"
    values["image_size"] = pair(config["image_size"]), "image_size"
    # transformers has the norm before pooling or, for mean pooling, none: this says what must be in the file.
    values["final_norm"] = not config["use_mean_pooling"], "use_mean_pooling"
    return {name: (value, f"config.json, {key}") for name, (value, key) in values.items()}


def pair(value: Any) -> tuple[int, int]:
    """Height and width, of one number for both or of two."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def one_or_pair(height: int, width: int) -> int | list[int]:
    """The way back: one number where they are equal."""
    return height if height == width else [height, width]


def labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes in config.json; None where there are none but transformers' LABEL_0, ..."""
    said = config.get("id2label")
    if not isinstance(said, dict):
        return None
    names = [name for i in range(len(said)) if isinstance(name := said.get(str(i)), str)]
    return tuple(names) if len(names) == len(said) and names != _unnamed(len(names)) else None


def _unnamed(classes: int) -> list[str]:
    return [f"LABEL_{i}" for i in range(classes)]


def kind_for(config: MARConfig) -> str:
    """The transformers class for a model of this configuration."""
    if config.classifier:
        return "VideoMAEForVideoClassification"
    return "VideoMAEForPreTraining" if config.decoder_depth else "VideoMAEModel"


def config_json(config: MARConfig, dtype: str, labels: Sequence[str] | None = None) -> dict[str, Any]:
    """config.json for a model of this configuration.

    Args:
        config: The configuration.
        dtype: Of the weights, "float32" for example.
        labels: Names of the classes.
    """
    t, height, width = config.patch_size
    content: dict[str, Any] = {
        "architectures": [kind_for(config)],
        "model_type": "videomae",
        "dtype": dtype,
        **{
            key: getattr(config, ours)
            for ours, key in (_KEYS | (_DECODER_KEYS if config.decoder_depth else {})).items()
        },
        "image_size": one_or_pair(*config.image_size),
        "patch_size": one_or_pair(height, width),
        "tubelet_size": t,
        "intermediate_size": round(config.embed_dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.encoder_eps,
        "qv_bias": True,
        "qkv_bias": True,  # the same, as earlier versions of transformers call it
        "use_mean_pooling": not config.final_norm,
        "norm_pix_loss": config.norm_pix_loss,
    }
    if config.decoder_depth:
        content["decoder_intermediate_size"] = round(config.decoder_embed_dim * config.decoder_mlp_ratio)
    if config.classifier:
        with_labels(content, labels or _unnamed(config.num_classes))
    return content


def with_labels(content: dict[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """config.json with the names of classes, if there are any."""
    if names:
        content["id2label"] = {str(i): name for i, name in enumerate(names)}
        content["label2id"] = {name: i for i, name in enumerate(names)}
    return content
