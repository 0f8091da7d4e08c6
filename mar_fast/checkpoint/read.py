"""Checkpoint files to named tensors: file formats, envelopes and prefixes. Nothing here knows a model."""

import argparse
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import checks
from . import processors
from .layouts import Checkpoint
from .report import some

SUFFIXES = (".pth", ".pt", ".bin", ".pyth", ".ckpt", ".pkl", ".pth.tar", ".tar", ".safetensors")
"""How the names of checkpoint files end, in lower or upper case."""
# What transformers calls its files.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_CONFIGS = ("config.json", *processors.FILES)
Configs = dict[str, dict[str, Any]]
METADATA_KEY = "mar_fast.config"
"""In a safetensors file: the `MARConfig` as JSON, which makes a file of ours complete."""
# The keys under which trainers put the weights, in the order in which they are looked for.
_ENVELOPES = (
    "model", "module", "model_state", "model_state_dict", "state_dict",
    "model_ema", "model_ema_state", "state_dict_ema", "ema_state_dict", "ema",
)  # fmt: skip
_DEEPEST = 4
"""Envelopes within envelopes that are opened: a damaged file may hold itself."""
# What DDP, torch.compile, activation checkpointing, FSDP and Lightning's strategies put around a module is part of the
# names of its tensors, in front or, where only parts were wrapped, in the middle.
_WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_fpw_module|_forward_module)\."
)
# Classes that a pickle may ask for, beside those of torch: plain values. Paths of another system have no class here.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__ if name != "ObjectDType"),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
for _module in ("pathlib", "pathlib._local"):
    _PLAIN += [(PurePosixPath, f"{_module}.PosixPath"), (PureWindowsPath, f"{_module}.WindowsPath")]


def read(source: object, model_key: str | None = None, revision: str | None = None) -> Checkpoint:
    """Read a file, a Hugging Face folder, a hub id or a state dict; the arguments are those of `from_pretrained`.

    Raises:
        ValueError, TypeError, OSError: it cannot be read; the message names it.
    """
    if isinstance(source, Mapping):
        return _unwrap("state dict", dict(source), model_key, {})
    if not isinstance(source, str | Path):
        raise checks.bad_type("source", type(source).__name__, "a path, a hub id or a state dict")
    path = Path(source).expanduser()
    where = str(path)
    if isinstance(source, str) and not path.exists() and is_hub_id(source):
        path, where = _fetch(source, revision), source
    elif revision is not None:
        raise checks.bad("revision", repr(revision), f"None: {path} is not a hub id")
    elif not path.exists():
        accepted = f"a file ({', '.join(SUFFIXES)}), a Hugging Face folder, a hub id (owner/name) or a state dict"
        raise FileNotFoundError(f"source: got {where!r}, which does not exist, expected {accepted}")
    names = _SAFETENSORS + _PICKLED
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            accepted = "model.safetensors or pytorch_model.bin, whole or sharded with an index"
            raise FileNotFoundError(f"source: got the folder {where} without weights, expected {accepted} in it")
        path = found[0]
    content, configs = _read_file(path)
    if path.name in names:
        beside = {name: _read_json(path.with_name(name)) for name in _CONFIGS if path.with_name(name).is_file()}
        if "mar_fast" in (config := beside.get("config.json", {})):
            beside["mar_fast"] = config["mar_fast"]
        configs = beside | configs
    return _unwrap(where, content, model_key, configs)


def _fetch(hub_id: str, revision: str | None = None) -> Path:
    """The local folder of a model of the hub: its configuration, and its weights once, safetensors where there are."""
    snapshot_download = hub(f"source: got the hub id {hub_id!r}").snapshot_download
    try:
        for weights in ((*_SAFETENSORS, "model-*-of-*.safetensors"), (*_PICKLED, "pytorch_model-*-of-*.bin")):
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*_CONFIGS, *weights]))
            if any((folder / name).is_file() for name in weights):
                break
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        at = f" at {revision!r}" if revision else ""
        raise checks.bad("source", f"{hub_id!r}{at}, which the hub does not give ({reason})", "a hub id") from error
    return folder


def hub(what: str) -> Any:
    """huggingface_hub; the error where it is not installed says ``what`` needs it."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what}, for which huggingface_hub is needed: pip install 'mar-fast[hf]'") from error
    return huggingface_hub


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise checks.bad(str(path), f"no valid JSON ({error})", "a JSON object") from error
    if not isinstance(content, dict):
        raise checks.bad(str(path), type(content).__name__, "a JSON object")
    return content


def _read_file(path: Path) -> tuple[dict[str, Any], Configs]:
    """Content, and the configurations inside the file."""
    if path.name.endswith(".index.json"):
        return _read_shards(path), {}
    if not path.name.lower().endswith(SUFFIXES):
        raise checks.bad("source", repr(str(path)), f"a file that ends with {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise checks.bad(str(path), "an empty file", "a checkpoint")
    if path.name.lower().endswith(".safetensors"):
        return _read_safetensors(path)
    content = _read_pickled(path)
    if not isinstance(content, Mapping):
        raise checks.bad_type(str(path), type(content).__name__, "a state dict, or a dict with one in it")
    arguments = content.get("args")
    return dict(content), {"args": vars(arguments)} if isinstance(arguments, argparse.Namespace) else {}


def is_hub_id(source: str) -> bool:
    """Whether this may be owner/name, and does not end like a file."""
    found = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source)
    return found is not None and not source.lower().endswith(SUFFIXES)


def _read_shards(index: Path) -> dict[str, Any]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise checks.bad(f"{index}, weight_map", type(weight_map).__name__, "an object of file names")
    content: dict[str, Any] = {}
    for file in sorted(set(weight_map.values())):
        shard = index.parent / file
        if Path(file).name != file or not shard.is_file():
            raise FileNotFoundError(f"{index}: got the shard {file!r}, expected a file of this name beside it")
        for name, tensor in _read_file(shard)[0].items():
            if weight_map.get(name) != file:
                raise checks.bad(str(shard), f"the tensor {name}", f"only those that {index.name} lists for it")
            content[name] = tensor
    if lost := sorted(set(weight_map) - set(content)):
        raise checks.bad(str(index), f"shards without {', '.join(lost[:5])}", "shards that hold all that it lists")
    return content


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Configs]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise checks.bad(str(path), f"no whole safetensors file ({error})", "one") from error
    if METADATA_KEY not in metadata:
        return content, {}
    try:
        return content, {"mar_fast": json.loads(metadata[METADATA_KEY])}
    except ValueError as error:
        raise checks.bad(f"{path}, metadata {METADATA_KEY}", "no valid JSON", "a MARConfig as JSON") from error


def _read_pickled(path: Path) -> object:
    # The list of allowed classes is torch's own for the whole process: this context manager leaves it as it was.
    try:
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            accepted = (
                "tensors, plain values and argparse.Namespace only: unpickling anything else can run code; if you "
                "trust the file, give the state dict in torch.load(file, weights_only=False) instead of the path"
            )
            raise checks.bad(str(path), f"a pickle that asks for {foreign[1]}", accepted) from error
        raise checks.bad(str(path), "something that is no checkpoint of torch.save", "one") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        first = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise checks.bad(str(path), f"a damaged file ({first})", "a whole checkpoint of torch.save") from error


def _unwrap(where: str, content: dict[str, Any], model_key: str | None, configs: Configs) -> Checkpoint:
    """Open envelopes and take wrappers' names off."""
    groups, path = dict(_groups(content)), ""
    accepted = f"one of {some([repr(key) for key in groups], 6) or 'none: the tensors stand bare'}"
    chosen = model_key if model_key in groups else None
    remarks: list[str] = []
    while len(remarks) < _DEEPEST and (key := chosen or next((key for key in _ENVELOPES if key in groups), None)):
        unread = ", ".join(repr(other) for other in _ENVELOPES if other in groups and other != key)
        remarks.append(f"weights read under {key!r}" + (f"; {unread} not read (model_key= chooses)" if unread else ""))
        content, chosen, path = dict(groups[key]), None, f"{path}{key}."
        groups = dict(_groups(content))
        if key == model_key:
            model_key = None
    entries: dict[str, object] = {}
    taken_off: set[str] = set()
    for entry, value in content.items():
        name = _WRAPPERS.sub("", str(entry))
        if model_key is not None and not name.startswith(f"{model_key}."):
            continue
        name = name.removeprefix(f"{model_key}.")
        taken_off.update(_WRAPPERS.findall(str(entry)))
        if name in entries:
            raise checks.bad(where, f"{name} twice, with and without wrappers' names", "every name once")
        entries[name] = value
    tensors = {name: value.detach() for name, value in entries.items() if isinstance(value, Tensor)}
    if model_key is not None:
        if not tensors:
            raise checks.bad("model_key", repr(model_key), accepted)
        remarks.append(f"only what begins with '{model_key}.' read, without that")
    remarks += [f"{wrapper + '.'!r} taken off names" for wrapper in sorted(taken_off)]
    if tensors.pop("n_averaged", None) is not None:
        remarks.append("weights averaged by torch.optim.swa_utils.AveragedModel")
    kinds = {name: type(value).__name__ for name, value in entries.items() if not isinstance(value, Tensor)}
    return Checkpoint(
        where=where,
        entries=tensors,
        groups=tuple(path + key for key in groups),
        configs=configs,
        unknown={name: f"a {kind} and no tensor" for name, kind in kinds.items()},
        remarks=remarks,
    )


def _holds_tensors(value: object, deepest: int = _DEEPEST) -> bool:
    if not isinstance(value, Mapping):
        return False
    return any(
        isinstance(item, Tensor) or (key in _ENVELOPES and deepest > 0 and _holds_tensors(item, deepest - 1))
        for key, item in value.items()
    )


def _groups(content: Mapping[Any, Any], stem: str = "", deepest: int = _DEEPEST) -> Iterator[tuple[str, Any]]:
    """Mappings that hold tensors, under known keys or not: their keys, joined by dots, and they themselves."""
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and deepest:
            if _holds_tensors(value):
                yield stem + key, value
            yield from _groups(value, f"{stem}{key}.", deepest - 1)
