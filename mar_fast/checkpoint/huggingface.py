"""config.json and preprocessor_config.json of transformers' VideoMAE, read and written.

Where LayerNorms get their eps from was read off transformers 5.23: layer_norm_eps for all but fc_norm and decoder.norm,
which have PyTorch's default whatever the configuration says.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import MARConfig
from ..kernels import checks
from .layouts import Layout
from .read import Checkpoint

if TYPE_CHECKING:
    from .facts import Facts

FIXED_EPS = 1e-5
# VideoMAEConfig's own defaults: config.json may leave out what has them.
_DEFAULTS: dict[str, Any] = {
    "image_size": 224, "patch_size": 16, "num_channels": 3, "num_frames": 16, "tubelet_size": 2, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "use_mean_pooling": True, "decoder_num_attention_heads": 6, "decoder_hidden_size": 384,
    "decoder_num_hidden_layers": 4, "decoder_intermediate_size": 1536, "norm_pix_loss": True,
}  # fmt: skip


def state(facts: "Facts", checkpoint: Checkpoint, layout: Layout) -> None:
    """Add to ``facts``, which has what shapes say, what the configuration files say.

    Raises:
        ValueError: they contradict the shapes, or ask for something that mar_fast does not compute.
    """
    given = checkpoint.configs.get("config.json")
    decoder = ("decoder_eps",) if facts.value("decoder_depth") else ()
    fixed = (("classifier_norm_eps", "classifier"), ("decoder_norm_eps", "decoder_depth"))
    facts.state("transformers: fixed for this norm", **{name: FIXED_EPS for name, part in fixed if facts.value(part)})
    if given is None:
        final = ("final_norm_eps",) if facts.value("final_norm") else ()
        eps = dict.fromkeys(("encoder_eps", *final, *decoder), _DEFAULTS["layer_norm_eps"])
        facts.state("transformers' default: there is no config.json", **eps)
        return
    where = f"{checkpoint.where}, config.json"
    if given.get("model_type") != "videomae":
        raise checks.bad(f"{where}, model_type", repr(given.get("model_type")), "'videomae'")
    config = {**_DEFAULTS, **given}
    if config["hidden_act"] != "gelu":
        raise checks.bad(f"{where}, hidden_act", repr(config["hidden_act"]), "'gelu', the exact one")
    kinds = [kind for kind in given.get("architectures") or () if str(kind).startswith("VideoMAE")]
    if kinds and not any(layout.title.endswith(kind) for kind in kinds):
        raise checks.bad(checkpoint.where, f"the tensors of a {layout.title}", f"those of {kinds[0]}, by config.json")

    said = _said(where, config)
    for name in ("embed_dim", "channels", "patch_size", "depth", "mlp_ratio", *_DECODER_FIELDS):
        # Of a decoder that the caller leaves out, the shapes have not been looked at.
        is_part = name not in _DECODER_FIELDS or (facts.value("decoder_depth") and name in facts)
        if is_part and said[name] != facts.value(name):
            shapes = f"{facts.value(name)}, by the {facts[name][1]}"
            raise checks.bad(f"{where}, {_KEYS[name]}", said[name], shapes)
    # transformers has the norm before pooling or, for mean pooling, none: with the file, this says what must be in it.
    facts["final_norm"] = (not config["use_mean_pooling"], "config.json, use_mean_pooling")
    final = ("final_norm_eps",) if facts.value("final_norm") else ()
    facts.state(
        "config.json",
        **{name: said[name] for name in ("num_frames", "image_size", "num_heads")},
        **dict.fromkeys(("encoder_eps", *final, *decoder), config["layer_norm_eps"]),
    )
    if decoder:
        facts.state(
            "config.json", decoder_num_heads=said["decoder_num_heads"], norm_pix_loss=bool(config["norm_pix_loss"])
        )
    facts.grid_known = True
    processor = checkpoint.configs.get("preprocessor_config.json", {})
    for name, key in (("mean", "image_mean"), ("std", "image_std")):
        if key in processor:
            facts.state("preprocessor_config.json", **{name: tuple(processor[key])})


_DECODER_FIELDS = ("decoder_embed_dim", "decoder_depth", "decoder_mlp_ratio")
_KEYS = {
    "embed_dim": "hidden_size", "channels": "num_channels", "patch_size": "tubelet_size and patch_size",
    "depth": "num_hidden_layers", "mlp_ratio": "intermediate_size / hidden_size",
    "decoder_embed_dim": "decoder_hidden_size", "decoder_depth": "decoder_num_hidden_layers",
    "decoder_mlp_ratio": "decoder_intermediate_size / decoder_hidden_size",
}  # fmt: skip


def _said(where: str, config: dict[str, Any]) -> dict[str, Any]:
    """Our fields, as config.json has them."""
    try:
        return {
            "embed_dim": config["hidden_size"],
            "channels": config["num_channels"],
            "patch_size": (int(config["tubelet_size"]), *_pair(config["patch_size"])),
            "depth": config["num_hidden_layers"],
            "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
            "num_heads": config["num_attention_heads"],
            "num_frames": config["num_frames"],
            "image_size": _pair(config["image_size"]),
            "decoder_embed_dim": config["decoder_hidden_size"],
            "decoder_depth": config["decoder_num_hidden_layers"],
            "decoder_num_heads": config["decoder_num_attention_heads"],
            "decoder_mlp_ratio": config["decoder_intermediate_size"] / config["decoder_hidden_size"],
        }
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise checks.bad(where, f"a value that does not fit ({error})", "VideoMAEConfig's fields") from error


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def lacks_biases(checkpoint: Checkpoint) -> bool:
    """Whether config.json says that query and value have no bias, which is a bias of zeros."""
    config = checkpoint.configs.get("config.json", {})
    return not config.get("qv_bias", config.get("qkv_bias", True))


def kind_for(config: MARConfig) -> str:
    """The transformers class that computes what a model of this configuration computes.

    Raises:
        ValueError: there is none; the message says what stands in the way.
    """

    def refuse(field: str, accepted: str) -> ValueError:
        return checks.bad(f"{field}, for Hugging Face's layout", repr(getattr(config, field)), accepted)

    if config.classifier == "bridging":
        raise refuse("classifier", "'linear' or None: transformers' VideoMAE has no bridging classifier")
    if config.classifier and config.decoder_depth:
        raise refuse("decoder_depth", "0: transformers' classifier has no pixel decoder (load with decoder_depth=0)")
    if config.classifier and config.final_norm:
        raise refuse("final_norm", "False: transformers' mean-pooling classifier has no norm before the mean")
    if config.position_grid not in (None, config.grid):
        raise refuse("position_grid", "None: transformers makes the table for the clip's own grid")
    fixed = {"classifier_norm_eps": bool(config.classifier), "decoder_norm_eps": bool(config.decoder_depth)}
    for field, matters in fixed.items():
        if matters and getattr(config, field) != FIXED_EPS:
            raise refuse(field, f"{FIXED_EPS}, which transformers fixes (load with {field}={FIXED_EPS} to change it)")
    shared = {"final_norm_eps": config.final_norm, "decoder_eps": bool(config.decoder_depth)}
    for field, matters in shared.items():
        if matters and getattr(config, field) != config.encoder_eps:
            raise refuse(field, f"{config.encoder_eps}, as encoder_eps: transformers has one layer_norm_eps for both")
    if config.decoder_depth and config.patch_size[1] != config.patch_size[2]:
        raise refuse("patch_size", "a square one: transformers' pixel decoder takes no other")
    if config.classifier:
        return "VideoMAEForVideoClassification"
    return "VideoMAEForPreTraining" if config.decoder_depth else "VideoMAEModel"


def labels(checkpoint: Checkpoint, config: MARConfig) -> tuple[str, ...] | None:
    """Names of the classes in config.json, one for each; None where there are none but transformers' LABEL_0, ..."""
    said = checkpoint.configs.get("config.json", {}).get("id2label")
    if not config.classifier or not isinstance(said, dict):
        return None
    names = [name for place in range(config.num_classes) if isinstance(name := said.get(str(place)), str)]
    if not len(names) == len(said) == config.num_classes or names == _unnamed(config):
        return None
    return tuple(names)


def _unnamed(config: MARConfig) -> list[str]:
    return [f"LABEL_{place}" for place in range(config.num_classes)]


def config_json(config: MARConfig, dtype: str, labels: Sequence[str] | None = None) -> dict[str, Any]:
    """config.json for `kind_for` this configuration.

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
        "image_size": config.image_size[0] if len(set(config.image_size)) == 1 else list(config.image_size),
        "patch_size": height if height == width else [height, width],
        "num_channels": config.channels,
        "num_frames": config.num_frames,
        "tubelet_size": t,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
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
        content |= {
            "decoder_hidden_size": config.decoder_embed_dim,
            "decoder_num_hidden_layers": config.decoder_depth,
            "decoder_num_attention_heads": config.decoder_num_heads,
            "decoder_intermediate_size": round(config.decoder_embed_dim * config.decoder_mlp_ratio),
        }
    if config.classifier:
        names = labels or _unnamed(config)
        content["id2label"] = {str(place): name for place, name in enumerate(names)}
        content["label2id"] = {name: place for place, name in enumerate(names)}
    return content


def preprocessor_json(config: MARConfig) -> dict[str, Any]:
    """preprocessor_config.json, which keeps mean, std and size."""
    height, width = config.image_size
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": min(height, width)},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
