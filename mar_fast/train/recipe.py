"""Recipe: every number of a training run, read strictly from TOML; the published ones are in recipes/."""

import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from ..config import MARConfig, check_cell, masked_slots, named_config
from ..data.video import Decoder, Sampling
from ..kernels import checks

FOLDER = Path(__file__).with_name("recipes")

# A type, what is accepted in words, and the check.
Count = Annotated[int, "a whole number, 1 or more", lambda value: value >= 1]
Share = Annotated[float, "a number from 0 to 1", lambda value: 0 <= value <= 1]
PartialShare = Annotated[float, "a number in [0, 1)", lambda value: 0 <= value < 1]
Factor = Annotated[float, "a number above 0, up to 1", lambda value: 0 < value <= 1]
Positive = Annotated[float, "a number above 0", lambda value: value > 0]
NotNegative = Annotated[float, "0 or more", lambda value: value >= 0]
NotNegativeInt = Annotated[int, "0 or more", lambda value: value >= 0]
Two = tuple[float, float]
Pair = Annotated[Two, "two numbers above 0, the smaller first", lambda two: 0 < two[0] <= two[1]]
Rates = Annotated[Two, "two rates in [0, 1)", lambda two: 0 <= min(two) <= max(two) < 1]
Shares = Annotated[
    tuple[float, ...], "numbers above 0, up to 1", lambda found: found and 0 < min(found) <= max(found) <= 1
]


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which tokens the encoder sees in training, and which positions the decoder predicts."""

    kind: Literal["none", "cell_running", "random", "tube", "frame"] = "none"
    ratio: PartialShare = 0.0
    temporal_shuffle: bool = True
    """Only for cell_running."""
    spatial_repeat: bool = True
    """Only for cell_running: one phase a clip, not one a cell."""
    decoder: Literal["dropped", "cell_running"] = "dropped"
    """What the decoder predicts: all that was dropped, or a running half of all cells (VideoMAE v2's dual masking)."""
    decoder_ratio: PartialShare = 0.5
    """Share of positions that the decoder does not predict; only with decoder = "cell_running"."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a step reads."""

    sampling: Sampling = "stride"
    stride: Count = 4
    fps: NotNegative = 0.0
    """Frames a second in which the stride counts; 0 counts the file's own frames."""
    batch: Count = 64
    """Videos a step, over all processes."""
    repeats: Count = 1
    """Repeated augmentation: clips of each video in a step."""
    repeat: Literal["resample", "reaugment"] = "resample"
    """Each clip of a video is sampled anew (MAR), or the same frames are augmented again (VideoMAE)."""
    max_broken: Share = 0.02
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
    scale: Shares = (0.08, 1.0)
    """Of random_resized: least and greatest area. Of multi_scale: the shares of the short side to choose from."""
    aspect: Pair = (0.75, 4 / 3)
    """Least and greatest width / height; only for random_resized."""
    flip: Share = 0.5
    erase: Share = 0.0
    """Probability of random erasing."""
    erase_area: Pair = (0.02, 1 / 3)
    erase_aspect: Factor = 0.3
    mixup: NotNegative = 0.0
    """Alpha of mixup's beta distribution."""
    cutmix: NotNegative = 0.0
    mix: Share = 1.0
    """Probability that a batch is mixed at all."""
    switch: Share = 0.5
    """Probability of cutmix where both are on."""
    smoothing: Share = 0.0


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, its learning rate, and which parameters it treats differently."""

    lr: Positive = 1e-3
    lr_batch: NotNegativeInt = 0
    """0: lr is absolute. Else lr, min_lr and warmup_lr are for this many videos a step and grow with the batch."""
    betas: Rates = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.05
    """Of matrices; 0 for biases, norms and the mask token."""
    layer_decay: Factor = 1.0
    layer_decay_of: Literal["all", "weights"] = "all"
    """All parameters of a layer (VideoMAE), or the encoder's matrices alone (MAR)."""
    clip_grad: NotNegative = 0.0
    """Greatest norm of all gradients together; 0 for no limit."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of autocast; fp16 comes with a gradient scaler."""
    ema: PartialShare = 0.0
    """Decay of the moving average of weights; 0 for none."""
    head_scale: NotNegative = 1.0
    """The new head's first weights are multiplied by it."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Cosine by iteration after a linear warm-up."""

    epochs: Count = 100
    warmup_epochs: NotNegative = 5.0
    warmup_lr: NotNegative = 0.0
    min_lr: NotNegative = 1e-6
    warmup_to: Literal["peak", "cosine"] = "peak"
    """The warm-up ends at lr and the cosine begins there; or the cosine counts from the first step, and the warm-up
    ends at the value that it has by then (MAR)."""


@dataclass(frozen=True, kw_only=True)
class Test:
    """The validation and the multi-view test, and how often."""

    clips: Count = 5
    crops: Count = 3
    every: Count = 1
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
    reconstruction_weight: NotNegative = 0.0
    """Of the reconstruction loss beside cross-entropy; pre-training has no other loss."""
    checkpoint_every: Count = 1
    """Epochs from one checkpoint to the next."""
    checkpoint_minutes: NotNegative = 30.0
    """Within an epoch a checkpoint is written after so many minutes; 0 for none but at the ends of epochs."""
    keep: Count = 2
    """How many of the newest checkpoints stay, besides the best one."""
    gradient_checkpointing: bool = False
    compile: bool = False
    shard: bool = False
    """Spread parameters over the processes (FSDP2), for models that are too large for one GPU; else DDP."""
    seed: NotNegativeInt = 0

    def __post_init__(self) -> None:
        for name, value in _values("", asdict(self)).items():
            object.__setattr__(self, name, value)
        _check(self)

    @property
    def reconstructs(self) -> bool:
        """Whether a step runs the pixel decoder."""
        return self.task == "pretrain" or self.reconstruction_weight > 0

    def config(self, **overrides: Any) -> MARConfig:
        """The model's configuration.

        Raises:
            ValueError, TypeError: the section [model] does not fit.
        """
        given = {**self.model, "gradient_checkpointing": self.gradient_checkpointing, **overrides}
        if self.mask.kind in ("none", "cell_running"):  # what is validated and tested, where the model does not say it
            given.setdefault("mask_ratio", self.mask.ratio)
        if not self.reconstructs:
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
        changes: "section.key=value" or "key=value" in TOML, which replace what the file says, key by key; text needs no
            quotes.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: not TOML, an unknown key, or a value that does not fit; the message names it.
    """
    content = _read(recipe)
    for change in changes:
        content = _over(content, _changes(change))
    return Recipe(**_values("", content))


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
    return _over(_read(beside if beside.is_file() else base, (*above, path)), content)


def _changes(change: str) -> dict[str, Any]:
    """What "section.key=value" says: a line of TOML, in which text needs no quotes."""
    key, equals, text = change.partition("=")
    for line in (f"{key} = {text}", f"{key}{equals}{json.dumps(text.strip(), ensure_ascii=False)}"):
        with suppress(tomllib.TOMLDecodeError):
            if found := tomllib.loads(line):  # nothing in a comment
                return found
    raise checks.bad("--set", repr(change), "section.key=value, for example optimizer.lr=3e-4")


def _over(base: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """``base`` with what ``content`` says; of a section that both have, key by key."""
    for key, value in content.items():
        below = base.get(key)
        base[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    return base


@cache
def _keys() -> dict[str, dict[str, Any]]:
    """The keys of each section and their types; "" has those that are in no section, and the sections."""
    keys = {"": get_type_hints(Recipe, include_extras=True), "model": {"name": str} | get_type_hints(MARConfig)}
    del keys["model"]["gradient_checkpointing"]  # a key of the recipe itself
    sections = {name: kind for name, kind in keys[""].items() if is_dataclass(kind)}
    return keys | {name: get_type_hints(kind, include_extras=True) for name, kind in sections.items()}


def _values(section: str, content: object) -> dict[str, Any]:
    """What a section says, each value of the type that its key has; "" is the whole recipe."""
    if not isinstance(content, Mapping):
        raise checks.bad(section, repr(content), "a section")
    types, values = _keys()[section], {}
    for key, value in content.items():
        name = f"{section}.{key}".lstrip(".")
        if key not in types:
            raise _unknown(name, key, types)
        if section or key not in _keys():
            values[key] = _value(name, value, types[key])
        else:
            inner = _values(key, value)
            values[key] = inner if key == "model" else types[key](**inner)
    return values


def _unknown(name: str, key: str, known: Iterable[str]) -> ValueError:
    """The error for a key that is not known here: the same key in another section, or the nearest one in this."""
    elsewhere = [f"{section}.{key}".lstrip(".") for section, types in _keys().items() if key in types]
    if elsewhere:
        return checks.bad(name, "an unknown key", " or ".join(map(repr, elsewhere)))
    close = difflib.get_close_matches(key, known, 1, cutoff=0.3)
    nearest = f"{close[0]!r}, the nearest known key" if close else f"one of {', '.join(known)}"
    return checks.bad(name, "an unknown key", nearest)


def _value(name: str, value: Any, wanted: Any) -> Any:
    """``value`` if it has the type and range of a key; whole numbers count as floats, lists as tuples."""
    options = get_args(wanted)
    if get_origin(wanted) is Annotated:
        kind, accepted, fits = options
        value = _value(name, value, kind)
        if not fits(value):
            raise checks.bad(name, repr(value), accepted)
        return value
    if NoneType in options:
        if value is None or value == "none":  # TOML has no None
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
    """Check what must fit together."""
    mask, augment, schedule, weight = recipe.mask, recipe.augment, recipe.schedule, recipe.reconstruction_weight
    config = None

    def need(name: str, met: object, accepted: str) -> None:
        if not met:
            section, _, key = name.rpartition(".")
            there = config if section == "model" else getattr(recipe, section) if section else recipe
            raise checks.bad(name, repr(getattr(there, key)), accepted)

    need("augment.erase_area", augment.erase_area[1] <= 1, "shares of the picture, up to 1")
    if augment.crop == "random_resized":
        ordered = len(augment.scale) == 2 and augment.scale[0] <= augment.scale[1]
        need("augment.scale", ordered, "two areas above 0, up to 1, the smaller first")
    lr, epochs = recipe.optimizer.lr, schedule.epochs
    need("schedule.min_lr", schedule.min_lr <= lr, f"{lr} (optimizer.lr) or less")
    need("schedule.warmup_epochs", schedule.warmup_epochs <= epochs, f"0 to {epochs}, the epochs of the run")
    need("mask.ratio", (mask.kind == "none") == (mask.ratio == 0), "0 with kind 'none', else above 0")
    try:
        config = recipe.config(mask_ratio=recipe.model.get("mask_ratio", 0.0))  # mask.ratio is checked below
        if "cell_running" in (mask.kind, mask.decoder):
            check_cell(config.cell, config.grid)
    except (TypeError, ValueError) as error:
        raise ValueError(str(error) if str(error).startswith("model") else f"model.{error}") from error
    if mask.kind == "cell_running":
        masked_slots("mask.ratio", mask.ratio, config.cell)
    if mask.decoder == "cell_running":
        masked_slots("mask.decoder_ratio", mask.decoder_ratio, config.cell)
    decodes, classifies = config.decoder_depth > 0, config.classifier is not None
    need("model.mask_ratio", mask.kind != "none" or not config.mask_ratio, "0 with mask.kind = 'none'")
    need("mask.decoder", mask.decoder == "dropped" or decodes, "'dropped': this model has no decoder")
    if recipe.task == "pretrain":
        need("model.decoder_depth", decodes, "1 or more: pre-training decodes")
        need("model.classifier", not classifies, "'none' in pre-training")
        need("mask.ratio", mask.ratio > 0, "above 0: pre-training predicts what is dropped")
        for name in ("mixup", "cutmix", "smoothing"):
            need(f"augment.{name}", not getattr(augment, name), "0 in pre-training, which has no labels")
    else:
        need("model.classifier", classifies, "one, in fine-tuning")
        need("model.num_classes", config.num_classes > 0, "1 or more, in fine-tuning")
        need("reconstruction_weight", not weight or decodes, "0: this model has no decoder")
        need("reconstruction_weight", not weight or mask.ratio > 0, "0: without a mask nothing is predicted")
