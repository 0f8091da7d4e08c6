"""Settings of transformers' image and video processors, read and written: what they make of pixels, as mean and std.

The files, which of them counts, and the defaults of what it leaves out are those of transformers 5.23.
"""

import math
from typing import Any

from ..config import MARConfig
from ..kernels import checks
from .report import Said, say

# Has an object for each kind of processor, which goes before the file that is for this kind alone.
NESTED = "processor_config.json"
FILES = (NESTED, "preprocessor_config.json", "video_preprocessor_config.json")
_KINDS = {
    "image_processor": ("preprocessor_config.json",),
    "video_processor": ("video_preprocessor_config.json", "preprocessor_config.json"),
}
# What counts where a file leaves a setting out: for all processors, and for those of VideoMAE.
_DEFAULTS = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_VIDEOMAE = {"image_mean": 0.5, "image_std": 0.5}
# Switches that leave the values of pixels alone.
_HARMLESS = {
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
    "do_pad",
    "do_sample_frames",
}
_WAY_OUT = "; or give mean= and std=, for pixels in [0, 1]"


def found(where: str, configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """File -> settings that it gives, of the image and of the video processor, as transformers looks for them."""
    files: dict[str, dict[str, Any]] = {}
    for kind, names in _KINDS.items():
        settings, name = configs.get(NESTED, {}).get(kind), f"{NESTED}, {kind}"
        if settings is None:
            name = next((name for name in names if name in configs), "")
            settings = configs.get(name, {})
        if not isinstance(settings, dict):
            raise checks.bad(f"{where}, {name}", type(settings).__name__, "an object")
        if name:
            files[name] = settings
    return files


def normalisation(where: str, files: dict[str, dict[str, Any]], channels: int) -> Said:
    """Mean and std of pixels in [0, 1] for each channel, by the settings that `found` gives; none without files.

    A processor makes (value * rescale_factor - image_mean) / image_std of values in 0 to 255, or leaves out one of the
    steps: with mean and std of another scale, that is (value / 255 - mean) / std.

    Raises:
        ValueError: a setting that is no good or that mean and std cannot express, or two files that do not agree.
    """
    given = {name: _mean_std(f"{where}, {name}", settings, channels) for name, settings in files.items()}
    if len({(mean, std) for mean, std, _ in given.values()}) > 1:
        got = " but ".join(f"mean {mean} and std {std} by {name}" for name, (mean, std, _) in given.items())
        raise checks.bad(f"{where}, image_mean and image_std", got, f"the same{_WAY_OUT}")
    for name, (mean, std, odd) in given.items():
        return say(", ".join([name, *odd]), mean=mean, std=std)
    return {}


def _mean_std(where: str, given: dict[str, Any], channels: int) -> tuple[Any, Any, list[str]]:
    """Mean, std, and what is unusual about them."""
    kinds = ("image_processor_type", "video_processor_type", "feature_extractor_type")
    kind = str(next((given[key] for key in kinds if given.get(key)), "VideoMAE"))
    # Vivit's moves pixels to [-1, 1] where its file does not say.
    more = _VIDEOMAE if kind.startswith("VideoMAE") else {"offset": kind.startswith("Vivit")}
    settings = {**_DEFAULTS, **more, **given}
    if more is not _VIDEOMAE:
        for name in sorted(settings):
            if settings[name] and (name == "offset" or (name.startswith("do_") and name not in _HARMLESS)):
                raise checks.bad(f"{where}, {name}", settings[name], f"false, for a {kind}{_WAY_OUT}")
    for name in ("do_rescale", "do_normalize"):
        if settings[name] not in (True, False, None):
            raise checks.bad(f"{where}, {name}", repr(settings[name]), f"true or false{_WAY_OUT}")
    odd, scale, mean, std = [], 255.0, (0.0,) * channels, (1.0,) * channels
    if settings["do_rescale"]:  # null is false, for transformers too
        (factor,) = _numbers(where, settings, "rescale_factor", 1)
        scale *= factor
        odd += [f"rescale_factor {factor}"] if factor != 1 / 255 else []
    else:
        odd.append("do_rescale false")
    if settings["do_normalize"]:
        mean, std = (_numbers(where, settings, name, channels) for name in ("image_mean", "image_std"))
        odd += [f"{name} by default" for name in ("image_mean", "image_std") if name not in given]
    else:
        odd.append("do_normalize false")
    return tuple(value / scale for value in mean), tuple(value / scale for value in std), odd


def _numbers(where: str, settings: dict[str, Any], name: str, count: int) -> tuple[float, ...]:
    """As many numbers; above 0, the mean apart."""
    value = settings.get(name)
    values: tuple[Any, ...] = tuple(value) if isinstance(value, list) else (value,) * count
    numbers = all(isinstance(it, int | float) and not isinstance(it, bool) and math.isfinite(it) for it in values)
    if len(values) != count or not numbers or (name != "image_mean" and min(values) <= 0):
        above = "" if name == "image_mean" else " above 0"
        raise checks.bad(f"{where}, {name}", repr(value), f"a number{above}, or a list of {count}{_WAY_OUT}")
    return values


def other_frames(files: dict[str, dict[str, Any]], image_size: tuple[int, int]) -> list[str]:
    """Remarks on settings that make other pictures of a film than mar_fast's reader of videos does."""
    ours = {**_geometry(image_size), "resample": 2, "do_pad": False, "do_sample_frames": False}
    ways = {"size": lambda side: {"shortest_edge": side}, "crop_size": lambda side: {"height": side, "width": side}}
    height, width = image_size
    reader = f"the reader of videos covers {height} x {width} by resizing bilinearly, and cuts out the centre"
    remarks = []
    for name, settings in files.items():
        # What a file leaves out is as for clips of the usual size.
        its = {**_geometry((224, 224)), **{key: value for key, value in settings.items() if key in ours}}
        its |= {key: way(its[key]) for key, way in ways.items() if isinstance(its[key], int)}
        if others := [f"{key} {value}" for key, value in its.items() if value != ours[key]]:
            remarks.append(f"not carried over, by {name}: {', '.join(others)}; {reader}")
    return remarks


def _geometry(image_size: tuple[int, int]) -> dict[str, Any]:
    height, width = image_size
    return {
        "do_resize": True,
        "size": {"shortest_edge": min(height, width)},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }


def preprocessor_json(config: MARConfig) -> dict[str, Any]:
    """preprocessor_config.json, which keeps mean, std and size."""
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        **_geometry(config.image_size),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
