"""Checkpoint files to named tensors: file formats, envelopes and prefixes. Nothing here knows a model."""

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import checks

PICKLED = (".pth", ".pt", ".bin", ".pyth", ".ckpt")
SUFFIXES = (*PICKLED, ".safetensors")
# The keys under which trainers put the weights, in the order in which they are looked for.
ENVELOPES = ("model", "module", "model_state", "state_dict", "model_ema", "model_ema_state")
PREFIXES = ("module.", "_orig_mod.")
METADATA_KEY = "mar_fast.config"
"""In a safetensors file: the `MARConfig` as JSON, which makes a file of ours complete."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a source holds.

    Attributes:
        where: The source, for messages.
        tensors: By name, without prefixes.
        others: Entries among them that are no tensors, and their types.
        remarks: Envelope and prefixes that were taken off.
        configs: "config.json" and "preprocessor_config.json" of a Hugging Face folder, "mar_fast" of a file of ours,
            "args" of VideoMAE's own; only those that are there.
    """

    where: str
    tensors: dict[str, Tensor]
    others: dict[str, str]
    remarks: tuple[str, ...]
    configs: dict[str, dict[str, Any]]


def read(source: object, model_key: str | None = None, revision: str | None = None) -> Checkpoint:
    """Read a file, a Hugging Face folder, a hub id or a state dict.

    Args:
        source: As `from_pretrained` takes it.
        model_key: The envelope to open, where a file has several.
        revision: Of a hub id.

    Raises:
        ValueError, TypeError, OSError: it cannot be read; the message names it.
    """
    if isinstance(source, Mapping):
        return _unwrap("state dict", dict(source), model_key, {})
    if not isinstance(source, str | Path):
        raise checks.bad_type("source", type(source).__name__, "a path, a hub id or a state dict")
    path = Path(source).expanduser()
    if isinstance(source, str) and not path.exists() and _is_hub_id(source):
        from .hub import fetch

        return _read_folder(fetch(source, revision), source, model_key)
    if revision is not None:
        raise checks.bad("revision", repr(revision), f"None: {path} is not a hub id")
    if path.is_dir():
        return _read_folder(path, str(path), model_key)
    if not path.exists():
        raise FileNotFoundError(f"source: got {str(path)!r}, which does not exist, expected {_ACCEPTED}")
    content, configs = _read_file(path)
    if path.name in _WHOLE:
        configs = {**_json_configs(path.parent), **configs}
    return _unwrap(str(path), content, model_key, configs)


_ACCEPTED = f"a file ({', '.join(SUFFIXES)}), a Hugging Face folder, a hub id (owner/name) or a state dict"


# What transformers calls its files: their configuration stands beside them.
_WHOLE = ("model.safetensors", "pytorch_model.bin")


def _is_hub_id(source: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source)) and not source.endswith(SUFFIXES)


def _read_folder(folder: Path, where: str, model_key: str | None) -> Checkpoint:
    configs = _json_configs(folder)
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        if (folder / name).is_file():
            break
    else:
        name = "pytorch_model.bin.index.json"
        if not (folder / name).is_file():
            accepted = "model.safetensors or pytorch_model.bin, whole or sharded with an index"
            raise FileNotFoundError(f"source: got the folder {where} without weights, expected {accepted} in it")
    if name.endswith(".index.json"):
        return _unwrap(where, _read_shards(folder / name), None, configs)
    content, own = _read_file(folder / name)
    return _unwrap(where, content, model_key, {**configs, **own})


def _json_configs(folder: Path) -> dict[str, dict[str, Any]]:
    names = ("config.json", "preprocessor_config.json")
    configs = {name: _read_json(folder / name) for name in names if (folder / name).is_file()}
    if "mar_fast" in configs.get("config.json", {}):
        configs["mar_fast"] = configs["config.json"]["mar_fast"]
    return configs


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise checks.bad(str(path), f"no valid JSON ({error})", "a JSON object") from error
    if not isinstance(content, dict):
        raise checks.bad(str(path), type(content).__name__, "a JSON object")
    return content


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


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Content, and the configurations inside the file."""
    if path.suffix not in SUFFIXES:
        raise checks.bad("source", repr(str(path)), f"a file that ends with {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise checks.bad(str(path), "an empty file", "a checkpoint")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _read_pickled(path)
    if not isinstance(content, Mapping):
        raise checks.bad_type(str(path), type(content).__name__, "a state dict, or a dict with one in it")
    arguments = content.get("args")
    configs = {"args": vars(arguments)} if isinstance(arguments, argparse.Namespace) else {}
    return dict(content), configs


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
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
        own = json.loads(metadata[METADATA_KEY])
    except ValueError as error:
        raise checks.bad(f"{path}, metadata {METADATA_KEY}", "no valid JSON", "a MARConfig as JSON") from error
    return content, {"mar_fast": own}


def _read_pickled(path: Path) -> object:
    # The list of allowed classes is torch's own for the whole process: this context manager leaves it as it was.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            accepted = "tensors, plain values and argparse.Namespace only: unpickling anything else can run code"
            raise checks.bad(str(path), f"a pickle that asks for {foreign[1]}", accepted) from error
        raise checks.bad(str(path), "something that is no checkpoint of torch.save", "one") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        first = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise checks.bad(str(path), f"a damaged file ({first})", "a whole checkpoint of torch.save") from error


def _unwrap(
    where: str, content: dict[str, Any], model_key: str | None, configs: dict[str, dict[str, Any]]
) -> Checkpoint:
    remarks: list[str] = []
    envelopes = [key for key in ENVELOPES if _holds_tensors(content.get(key))]
    if model_key is not None and not _holds_tensors(content.get(model_key)):
        raise checks.bad("model_key", repr(model_key), f"one of {envelopes or 'none: the tensors stand bare'}")
    for _ in range(_DEEPEST):
        key = model_key or next(iter(envelopes), None)
        if key is None:
            break
        others = ", ".join(repr(other) for other in envelopes if other != key)
        besides = f"; {others} not read (model_key= chooses)" if others else ""
        remarks.append(f"weights read under {key!r}{besides}")
        content, model_key = dict(content[key]), None
        envelopes = [key for key in ENVELOPES if _holds_tensors(content.get(key))]
    tensors: dict[str, Tensor] = {}
    others_: dict[str, str] = {}
    taken_off: set[str] = set()
    for entry, value in content.items():
        name = str(entry)
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
            name = name.removeprefix(prefix)
            taken_off.add(prefix)
        if name in tensors or name in others_:
            raise checks.bad(where, f"{name} twice, with and without prefixes", "every name once")
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
        else:
            others_[name] = type(value).__name__
    remarks += [f"prefix {prefix!r} taken off" for prefix in sorted(taken_off)]
    return Checkpoint(where=where, tensors=tensors, others=others_, remarks=tuple(remarks), configs=configs)


_DEEPEST = 4
"""Envelopes within envelopes that are opened: a damaged file may hold itself."""


def _holds_tensors(value: object, deepest: int = _DEEPEST) -> bool:
    if not isinstance(value, Mapping):
        return False
    return any(
        isinstance(item, Tensor) or (key in ENVELOPES and deepest > 0 and _holds_tensors(item, deepest - 1))
        for key, item in value.items()
    )
