"""Recipe: every number of a training run, read strictly from TOML; the published ones are in recipes/."""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from ..config import MARConfig, named_config
from ..data.video import Sampling
from ..kernels import checks

FOLDER = Path(__file__).with_name("recipes")


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which tokens the encoder sees in training, and which positions the decoder predicts."""

    kind: Literal["none", "cell_running", "random", "tube", "frame"] = "none"
    ratio: float = 0.0
    temporal_shuffle: bool = True
    """Only for cell_running."""
    spatial_repeat: bool = True
    """Only for cell_running: one phase a clip, not one a cell."""
    decoder: Literal["dropped", "cell_running"] = "dropped"
    """What the decoder predicts: all that was dropped, or a running half of all cells (VideoMAE v2's dual masking)."""
    decoder_ratio: float = 0.5
    """Share of positions that the decoder does not predict; only with decoder = "cell_running"."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a step reads."""

    sampling: Sampling = "stride"
    stride: int = 4
    fps: float = 0.0
    """Frames a second in which the stride counts; 0 counts the file's own frames."""
    batch: int = 64
    """Videos a step, over all processes."""
    repeats: int = 1
    """Repeated augmentation: clips of each video in a step."""
    repeat: Literal["resample", "reaugment"] = "resample"
    """Each clip of a video is sampled anew (MAR), or the same frames are augmented again (VideoMAE)."""
    max_broken: float = 0.02
    """Share of videos that may be unreadable before the run ends."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What is done to clips and to batches of them; every rate 0 means not at all."""

    rand_augment: str = ""
    """timm's notation: "rand-m9-mstd0.5-inc1" or "rand-m7-n4-mstd0.5-inc1"; empty for none."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of RandAugment's geometric ops; crops are resized bilinearly."""
    fill: Literal["gray", "mean"] = "gray"
    """What RandAugment's geometric ops move into the picture: 128 (VideoMAE), or the mean colour of the model (MAR)."""
    crop: Literal["random_resized", "multi_scale", "center"] = "random_resized"
    scale: tuple[float, ...] = (0.08, 1.0)
    """Of random_resized: least and greatest area. Of multi_scale: the shares of the short side to choose from."""
    aspect: tuple[float, ...] = (0.75, 4 / 3)
    """Least and greatest width / height; only for random_resized."""
    flip: float = 0.5
    erase: float = 0.0
    """Probability of random erasing."""
    erase_area: tuple[float, ...] = (0.02, 1 / 3)
    erase_aspect: float = 0.3
    mixup: float = 0.0
    """Alpha of mixup's beta distribution."""
    cutmix: float = 0.0
    mix: float = 1.0
    """Probability that a batch is mixed at all."""
    switch: float = 0.5
    """Probability of cutmix where both are on."""
    smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, its learning rate, and which parameters it treats differently."""

    lr: float = 1e-3
    lr_batch: int = 0
    """0: lr is absolute. Else lr, min_lr and warmup_lr are for this many videos a step and grow with the batch."""
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    """Of matrices; 0 for biases, norms and the mask token."""
    layer_decay: float = 1.0
    layer_decay_of: Literal["all", "weights"] = "all"
    """All parameters of a layer (VideoMAE), or the encoder's matrices alone (MAR)."""
    clip_grad: float = 0.0
    """Greatest norm of all gradients together; 0 for no limit."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of autocast; fp16 comes with a gradient scaler."""
    ema: float = 0.0
    """Decay of the moving average of weights; 0 for none."""
    head_scale: float = 1.0
    """The new head's first weights are multiplied by it."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Cosine by iteration after a linear warm-up."""

    epochs: int = 100
    warmup_epochs: float = 5.0
    warmup_lr: float = 0.0
    min_lr: float = 1e-6
    warmup_to: Literal["peak", "cosine"] = "peak"
    """The warm-up ends at lr and the cosine begins there; or the cosine counts from the first step, and the warm-up
    ends at the value that it has by then (MAR)."""


@dataclass(frozen=True, kw_only=True)
class Test:
    """The validation and the multi-view test, and how often."""

    clips: int = 5
    crops: int = 3
    every: int = 1
    """Epochs from one validation, on one centre view, to the next."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run. ``model`` has the name of a model and any fields of `MARConfig`."""

    task: Literal["finetune", "pretrain"] = "finetune"
    model: Mapping[str, Any] = field(default_factory=lambda: {"name": "mar_vit_base"})
    mask: Mask = Mask()
    data: Data = Data()
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    test: Test = Test()
    reconstruction_weight: float = 0.0
    """Of the reconstruction loss beside cross-entropy; pre-training has no other loss."""
    checkpoint_every: int = 1
    """Epochs from one checkpoint to the next."""
    keep: int = 2
    """How many of the newest checkpoints stay, besides the best one."""
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def config(self, **overrides: Any) -> MARConfig:
        """The model's configuration.

        Raises:
            ValueError, TypeError: the section [model] does not fit.
        """
        given = {**self.model, "gradient_checkpointing": self.gradient_checkpointing, **overrides}
        return named_config(given.pop("name", "mar_vit_base"), **given)


def list_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("[!_]*.toml"))


def read_recipe(recipe: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: A name from `list_recipes`, or a TOML file. Its key ``extends`` names a recipe to begin with.
        changes: "section.key=value" or "key=value", which replace what the file says; values as in TOML, and text may
            stand without quotes.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: not TOML, an unknown key, or a value that does not fit; the message names it.
    """
    content = _read(recipe)
    for change in changes:
        _set(content, change)
    return _build(Recipe, content, "")


def _read(recipe: str | Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix != ".toml":
        path = FOLDER / f"{recipe}.toml"
    if not path.is_file():
        close = difflib.get_close_matches(str(recipe), list_recipes(), 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise FileNotFoundError(f"recipe: got {str(recipe)!r}, expected a .toml file or one of {list_recipes()}{hint}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise checks.bad("recipe", f"{str(path)!r}, which is not TOML ({error})", "TOML") from error
    base = content.pop("extends", None)
    if base is None:
        return content
    if base in above:
        raise checks.bad("extends", " -> ".join((*above, base)), "recipes that do not extend themselves")
    beside = path.with_name(f"{base}.toml")
    merged = _read(beside if beside.is_file() else base, (*above, base))
    for key, value in content.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def _set(content: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not all(key.split(".")) or key.count(".") > 1:
        raise checks.bad("--set", repr(change), "section.key=value, for example optimizer.lr=3e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *section, name = key.split(".")
    target = content.setdefault(section[0], {}) if section else content
    if not isinstance(target, dict):
        raise checks.bad("--set", repr(change), f"{section[0]}=value: it is no section")
    target[name] = value


def _build(kind: Any, content: Mapping[str, Any], section: str) -> Any:
    """A dataclass of this kind from what a file says, with an error for what it does not know."""
    types = get_type_hints(kind)
    values = {}
    for key, value in content.items():
        name = f"{section}.{key}".lstrip(".")
        if key not in types:
            raise _unknown(name, key, types)
        wanted = types[key]
        if isinstance(wanted, type) and issubclass(wanted, Mask | Data | Augment | Optimizer | Schedule | Test):
            if not isinstance(value, dict):
                raise checks.bad(name, repr(value), "a section")
            values[key] = _build(wanted, value, name)
        elif name == "model":
            known = {item.name: None for item in fields(MARConfig)} | {"name": None}
            for inner in value if isinstance(value, dict) else [value]:
                if inner not in known:
                    raise _unknown(f"model.{inner}", str(inner), known)
            values[key] = {inner: _field(field_value) for inner, field_value in value.items()}
        else:
            values[key] = _value(name, value, wanted)
    return kind(**values)


def _field(value: Any) -> Any:
    """A field of `MARConfig` from TOML, which has no tuples and no None."""
    return None if value == "none" else tuple(value) if isinstance(value, list) else value


def _unknown(name: str, key: str, known: Iterable[str]) -> ValueError:
    known = list(known)
    close = difflib.get_close_matches(key, known, 1, cutoff=0.3)
    nearest = f"{close[0]!r}, the nearest known key" if close else f"one of {', '.join(known)}"
    return checks.bad(name, "an unknown key", nearest)


def _value(name: str, value: Any, wanted: Any) -> Any:
    """``value`` if it is of the type that a field has; whole numbers count as floats, lists as tuples."""
    choices = get_args(wanted)
    if choices and all(isinstance(choice, str) for choice in choices):
        if value not in choices:
            raise checks.bad(name, repr(value), "one of " + ", ".join(map(repr, choices)))
        return value
    if wanted == tuple[float, ...]:
        if not isinstance(value, list | tuple) or not all(_is_number(part) for part in value):
            raise checks.bad(name, repr(value), "a list of numbers")
        return tuple(float(part) for part in value)
    if wanted is float and _is_number(value):
        return float(value)
    if type(value) is not wanted:
        what = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[wanted]
        raise checks.bad(name, repr(value), what)
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(recipe: Recipe) -> None:
    """Check ranges; types were checked on reading."""

    def need(name: str, value: Any, met: bool, accepted: str) -> None:
        if not met:
            raise checks.bad(name, repr(value), accepted)

    for section, names in _LEAST_ONE.items():
        for name in names:
            value = getattr(getattr(recipe, section), name)
            need(f"{section}.{name}", value, value >= 1, "a whole number, 1 or more")
    for section, names in _SHARES.items():
        for name in names:
            value = getattr(getattr(recipe, section), name)
            need(f"{section}.{name}", value, 0 <= value <= 1, "a number from 0 to 1")
    for section, names in _NOT_NEGATIVE.items():
        for name in names:
            value = getattr(getattr(recipe, section), name)
            need(f"{section}.{name}", value, value >= 0, "0 or more")
    augment, optimizer, schedule = recipe.augment, recipe.optimizer, recipe.schedule
    for name, pair in (("augment.aspect", augment.aspect), ("augment.erase_area", augment.erase_area)):
        need(name, pair, len(pair) == 2 and 0 < pair[0] <= pair[1], "two numbers above 0, the smaller first")
    need("augment.scale", augment.scale, bool(augment.scale) and 0 < min(augment.scale) <= max(augment.scale) <= 1,
         "numbers above 0, up to 1")  # fmt: skip
    need("optimizer.betas", optimizer.betas, len(optimizer.betas) == 2 and 0 <= min(optimizer.betas) < 1, "two rates")
    need("optimizer.lr", optimizer.lr, optimizer.lr > 0, "a number above 0")
    need("optimizer.layer_decay", optimizer.layer_decay, 0 < optimizer.layer_decay <= 1, "a number above 0, up to 1")
    need("schedule.warmup_epochs", schedule.warmup_epochs, 0 <= schedule.warmup_epochs <= schedule.epochs,
         f"0 to {schedule.epochs}, the epochs of the run")  # fmt: skip
    need("mask.ratio", recipe.mask.ratio, 0 <= recipe.mask.ratio < 1, "a share in [0, 1)")
    need("mask.ratio", recipe.mask.ratio, (recipe.mask.kind == "none") == (recipe.mask.ratio == 0),
         "0 with kind 'none', and above 0 with any other")  # fmt: skip
    need("reconstruction_weight", recipe.reconstruction_weight, recipe.reconstruction_weight >= 0, "0 or more")
    config = recipe.config()
    if recipe.task == "pretrain":
        need("model.decoder_depth", config.decoder_depth, config.decoder_depth > 0, "1 or more: pre-training decodes")
        need("model.classifier", config.classifier, config.classifier is None, "none in pre-training")
        need("mask.ratio", recipe.mask.ratio, recipe.mask.ratio > 0, "above 0: pre-training predicts what is dropped")
    else:
        need("model.classifier", config.classifier, config.classifier is not None, "one, in fine-tuning")
        weighted = recipe.reconstruction_weight > 0
        need("reconstruction_weight", recipe.reconstruction_weight, not weighted or config.decoder_depth > 0,
             "0: this model has no decoder")  # fmt: skip


_LEAST_ONE = {"data": ("stride", "batch", "repeats"), "schedule": ("epochs",), "test": ("clips", "crops", "every")}
_SHARES = {
    "augment": ("flip", "erase", "mix", "switch", "smoothing"),
    "data": ("max_broken",),
    "mask": ("decoder_ratio",),
    "optimizer": ("ema",),
}
_NOT_NEGATIVE = {
    "augment": ("mixup", "cutmix"),
    "data": ("fps",),
    "optimizer": ("weight_decay", "clip_grad", "eps", "head_scale", "lr_batch"),
    "schedule": ("warmup_lr", "min_lr"),
}


def as_json(recipe: Recipe) -> str:
    """The recipe in one line, to be compared by when a run is resumed."""
    return json.dumps(asdict(recipe), sort_keys=True)
