"""Recipe: every number of a training run, read strictly from TOML; the published ones are in recipes/."""

import difflib
import json
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..config import MARConfig, check_cell, masked_slots, named_config
from ..data.video import Decoder, Sampling
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
    decoder: Decoder = "pyav"
    """Of the videos to train on; those to validate and test on are read by PyAV."""


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
    checkpoint_minutes: float = 30.0
    """Within an epoch a checkpoint is written after so many minutes; 0 for none but at the ends of epochs."""
    keep: int = 2
    """How many of the newest checkpoints stay, besides the best one."""
    gradient_checkpointing: bool = False
    compile: bool = False
    shard: bool = False
    """Spread parameters over the processes (FSDP2), for models that are too large for one GPU; else DDP."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    def config(self, **overrides: Any) -> MARConfig:
        """The model's configuration.

        Raises:
            ValueError, TypeError: the section [model] does not fit.
        """
        given = {**self.model, "gradient_checkpointing": self.gradient_checkpointing, **overrides}
        if self.mask.kind in ("none", "cell_running"):  # what is validated and tested, where the model does not say it
            given.setdefault("mask_ratio", self.mask.ratio)
        if self.task == "finetune" and not self.reconstruction_weight:
            given["decoder_depth"] = 0  # without a loss it would be run for nothing, and DDP would wait for gradients
        return named_config(given.pop("name", "mar_vit_base"), **given)


def list_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("[!_]*.toml"))


def read_recipe(recipe: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: A name from `list_recipes`, or a TOML file. Its key ``extends`` names a recipe to begin with: a file
            beside it (without .toml), or one of the package.
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


def _read(recipe: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What the file says, laid over what it extends; ``above`` are the files that extend this one."""
    path = Path(recipe)
    if path.suffix != ".toml":
        path = FOLDER / f"{recipe}.toml"
    base_alone = path.parent == FOLDER and path.name.startswith("_") and not above
    if not path.is_file() or base_alone:
        close = difflib.get_close_matches(str(recipe), list_recipes(), 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise FileNotFoundError(f"recipe: got {str(recipe)!r}, expected a .toml file or one of {list_recipes()}{hint}")
    path = path.resolve()
    if path in above:
        raise checks.bad("extends", " -> ".join(file.stem for file in (*above, path)), "no recipe that extends itself")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise checks.bad("recipe", f"{str(path)!r}, which is not TOML ({error})", "TOML") from error
    if "extends" not in content:
        return content
    base = content.pop("extends")
    if not isinstance(base, str) or not base:
        raise checks.bad("extends", repr(base), "the name of a recipe")
    beside = path.parent / f"{base}.toml"
    merged = _read(beside if beside.is_file() else base, (*above, path))
    for key, value in content.items():
        below = merged.get(key)
        merged[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _set(content: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    *section, name = (part.strip() for part in key.split("."))
    if not equals or not all((*section, name)) or len(section) > 1:
        raise checks.bad("--set", repr(change), "section.key=value, for example optimizer.lr=3e-4")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {"value": text.strip()}
    target = content.setdefault(section[0], {}) if section else content
    if not isinstance(target, dict):
        raise checks.bad("--set", repr(change), f"{section[0]}=value: it is no section")
    target[name] = parsed["value"]


def _build(kind: Any, content: object, section: str) -> Any:
    """A dataclass of this kind from what a file says, with an error for what it does not know."""
    if not isinstance(content, dict):
        raise checks.bad(section, repr(content), "a section")
    types = get_type_hints(kind)
    values = {}
    for key, value in content.items():
        name = f"{section}.{key}".lstrip(".")
        if key not in types:
            raise _unknown(name, key, types)
        if is_dataclass(types[key]):
            values[key] = _build(types[key], value, name)
        else:
            values[key] = _model(value) if name == "model" else _value(name, value, types[key])
    return kind(**values)


def _model(content: object) -> dict[str, Any]:
    """The section [model]: fields of `MARConfig`; TOML has no None, so that is the text "none"."""
    if not isinstance(content, Mapping):
        raise checks.bad("model", repr(content), "a section")
    types = _model_types()
    for key in content:
        if key not in types:
            raise _unknown(f"model.{key}", str(key), types)
    return {key: _value(f"model.{key}", value, types[key]) for key, value in content.items()}


def _model_types() -> dict[str, Any]:
    types = {"name": str} | get_type_hints(MARConfig)
    del types["gradient_checkpointing"]  # a key of the recipe itself
    return types


def _unknown(name: str, key: str, known: Iterable[str]) -> ValueError:
    """The error for a key that is not known here: the same key in another section, or the nearest one in this."""
    sections = get_type_hints(Recipe)
    places = [section for section, kind in sections.items() if is_dataclass(kind) and key in get_type_hints(kind)]
    elsewhere = [key] * (key in sections) + [f"{section}.{key}" for section in places]
    elsewhere += [f"model.{key}"] * (key in _model_types())
    if elsewhere:
        return checks.bad(name, "an unknown key", " or ".join(map(repr, elsewhere)))
    known = list(known)
    close = difflib.get_close_matches(key, known, 1, cutoff=0.3)
    nearest = f"{close[0]!r}, the nearest known key" if close else f"one of {', '.join(known)}"
    return checks.bad(name, "an unknown key", nearest)


def _value(name: str, value: Any, wanted: Any) -> Any:
    """``value`` if it is of the type that a field has; whole numbers count as floats, lists as tuples."""
    options = get_args(wanted)
    if NoneType in options:
        if value is None or value == "none":
            return None
        return _value(name, value, next(option for option in options if option is not NoneType))
    if get_origin(wanted) is Literal:
        if value not in options:
            raise checks.bad(name, repr(value), "one of " + ", ".join(map(repr, options)))
        return value
    if get_origin(wanted) is tuple:
        size = None if ... in options else len(options)
        if not isinstance(value, list | tuple) or (size is not None and len(value) != size):
            raise checks.bad(name, repr(value), "a list of numbers" if size is None else f"a list of {size} numbers")
        return tuple(_value(name, part, options[0]) for part in value)
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if type(value) is not wanted or wanted is float:
        what = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}[wanted]
        raise checks.bad(name, repr(value), what)
    return value


def _check(recipe: Recipe) -> None:
    """Check types, ranges, and what must fit together."""

    def need(name: str, value: Any, met: bool, accepted: str) -> None:
        if not met:
            raise checks.bad(name, repr(value), accepted)

    values: dict[str, Any] = {}
    for key, kind in get_type_hints(Recipe).items():
        value = getattr(recipe, key)
        if is_dataclass(kind):
            need(key, value, type(value) is kind, f"a {kind.__name__}")  # type: ignore[union-attr]
            for inner, wanted in get_type_hints(kind).items():
                name = f"{key}.{inner}"
                values[name] = _value(name, getattr(value, inner), wanted)
        elif key != "model":
            values[key] = _value(key, value, kind)
    for names, accepted, fits in _RANGES:
        for name in names.split():
            need(name, values[name], fits(values[name]), accepted)
    mask, augment, optimizer, schedule = recipe.mask, recipe.augment, recipe.optimizer, recipe.schedule
    for name in ("augment.aspect", "augment.erase_area"):
        pair = values[name]
        need(name, pair, len(pair) == 2 and 0 < pair[0] <= pair[1], "two numbers above 0, the smaller first")
    need("augment.erase_area", augment.erase_area, augment.erase_area[1] <= 1, "shares of the picture, up to 1")
    scale, ordered = augment.scale, "two areas above 0, up to 1, the smaller first"
    need("augment.scale", scale, bool(scale) and 0 < min(scale) <= max(scale) <= 1, "numbers above 0, up to 1")
    if augment.crop == "random_resized":
        need("augment.scale", scale, len(scale) == 2 and scale[0] <= scale[1], ordered)
    betas = optimizer.betas
    need("optimizer.betas", betas, len(betas) == 2 and 0 <= min(betas) <= max(betas) < 1, "two rates in [0, 1)")
    need("schedule.min_lr", schedule.min_lr, schedule.min_lr <= optimizer.lr, f"{optimizer.lr} (optimizer.lr) or less")
    last = f"0 to {schedule.epochs}, the epochs of the run"
    need("schedule.warmup_epochs", schedule.warmup_epochs, schedule.warmup_epochs <= schedule.epochs, last)
    need("mask.ratio", mask.ratio, (mask.kind == "none") == (mask.ratio == 0), "0 with kind 'none', else above 0")
    try:
        config = recipe.config(**{"mask_ratio": 0.0} | _model(recipe.model))  # mask.ratio is checked below
        if "cell_running" in (mask.kind, mask.decoder):
            check_cell(config.cell, config.grid)
    except (TypeError, ValueError) as error:
        raise ValueError(str(error) if str(error).startswith("model") else f"model.{error}") from error
    for name, kind in (("mask.ratio", mask.kind), ("mask.decoder_ratio", mask.decoder)):
        if kind == "cell_running":
            masked_slots(name, values[name], config.cell)
    ratio, decodes = config.mask_ratio, mask.decoder == "dropped" or config.decoder_depth > 0
    need("model.mask_ratio", ratio, mask.kind != "none" or not ratio, "0 with mask.kind = 'none'")
    need("mask.decoder", mask.decoder, decodes, "'dropped': this model has no decoder")
    if recipe.task == "pretrain":
        need("model.decoder_depth", config.decoder_depth, config.decoder_depth > 0, "1 or more: pre-training decodes")
        need("model.classifier", config.classifier, config.classifier is None, "'none' in pre-training")
        need("mask.ratio", mask.ratio, mask.ratio > 0, "above 0: pre-training predicts what is dropped")
        for name in ("augment.mixup", "augment.cutmix", "augment.smoothing"):
            need(name, values[name], values[name] == 0, "0 in pre-training, which has no labels")
    else:
        need("model.classifier", config.classifier, config.classifier is not None, "one, in fine-tuning")
        need("model.num_classes", config.num_classes, config.num_classes > 0, "1 or more, in fine-tuning")
        weight = recipe.reconstruction_weight
        need("reconstruction_weight", weight, not weight or config.decoder_depth > 0, "0: this model has no decoder")
        need("reconstruction_weight", weight, not weight or mask.ratio > 0, "0: without a mask nothing is predicted")


_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    (
        "data.stride data.batch data.repeats schedule.epochs test.clips test.crops test.every checkpoint_every keep",
        "a whole number, 1 or more",
        lambda value: value >= 1,
    ),
    (
        "augment.flip augment.erase augment.mix augment.switch augment.smoothing data.max_broken",
        "a number from 0 to 1",
        lambda value: 0 <= value <= 1,
    ),
    ("mask.ratio mask.decoder_ratio optimizer.ema", "a number in [0, 1)", lambda value: 0 <= value < 1),
    ("optimizer.layer_decay augment.erase_aspect", "a number above 0, up to 1", lambda value: 0 < value <= 1),
    ("optimizer.lr optimizer.eps", "a number above 0", lambda value: value > 0),
    (
        "augment.mixup augment.cutmix data.fps optimizer.weight_decay optimizer.clip_grad optimizer.head_scale "
        "optimizer.lr_batch schedule.warmup_lr schedule.warmup_epochs schedule.min_lr reconstruction_weight seed "
        "checkpoint_minutes",
        "0 or more",
        lambda value: value >= 0,
    ),
)
