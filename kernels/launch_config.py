"""Launch configurations: tile sizes as data, chosen by architecture, dtype and shape.

A table is a JSON file ``configs/<architecture>.json``: kernel name -> rows, the first that fits wins. A row is
``{"dtypes": [...], "where": {feature: [low, high]}, "config": {...}, "origin": "..."}``; dtypes and where may be
left out. A user's own table (written by ``mar-fast tune``) goes first, then that of the architecture, then
``default.json``, whose last row for each kernel fits everything.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLES = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and launch options of one kernel, and where the choice came from.

    ``block_m`` is along rows (tokens, queries), ``block_n`` along columns (width, keys), ``block_k`` along the summed
    dimension of a matrix product. ``resident`` says whether the tile that a program owns stays in registers or is
    loaded anew at each step. Which of these a kernel reads is said where it is launched.
    """

    block_m: int
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 1
    resident: bool = True
    origin: str = field(default="", compare=False)

    def options(self) -> dict[str, int | bool]:
        """What is said of it: warps and stages, and everything else that is not at its default."""
        always = ("block_m", "num_warps", "num_stages")
        return {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.name in always or (option.name != "origin" and getattr(self, option.name) != option.default)
        }


@dataclass(frozen=True)
class Row:
    """One row of a table, a file: for which dtypes and shapes its configuration is meant."""

    table: Path
    kernel: str
    dtypes: tuple[str, ...]
    where: tuple[tuple[str, int, int], ...]
    config: LaunchConfig

    def fits(self, dtype: str, features: dict[str, int]) -> bool:
        """Whether this row is meant for a call; a feature that the call does not have never fits."""
        return (not self.dtypes or dtype in self.dtypes) and all(
            name in features and low <= features[name] <= high for name, low, high in self.where
        )


def user_table_folder() -> Path:
    """Where ``mar-fast tune`` writes: $MAR_FAST_CONFIGS, else mar_fast/configs in the user's configuration folder."""
    if named := os.environ.get("MAR_FAST_CONFIGS"):
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "mar_fast" / "configs"


def read_table(path: Path) -> dict[str, list[Row]]:
    """The rows of one file by kernel.

    Raises:
        ValueError: the file is not such a table; the message names it and the row.
    """
    try:
        content: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
        return {kernel: [_row(path, kernel, entry) for entry in rows] for kernel, rows in content.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: got {error!r}, expected a table of launch configurations") from error


def _row(table: Path, kernel: str, entry: dict[str, Any]) -> Row:
    config = LaunchConfig(**entry["config"], origin=str(entry["origin"]))
    for option in ("block_m", "block_n", "block_k", "num_warps"):
        value = getattr(config, option)
        if not isinstance(value, int) or value < 0 or value & (value - 1):
            raise ValueError(f"{kernel}: {option} {value!r} is not a power of two")
    where = tuple((name, int(low), int(high)) for name, (low, high) in entry.get("where", {}).items())
    return Row(table, kernel, tuple(entry.get("dtypes", ())), where, config)


@cache
def rows(kernel: str, architecture: str) -> tuple[Row, ...]:
    """All rows for ``kernel`` on ``architecture``, in the order of precedence."""
    paths = [folder / f"{architecture}.json" for folder in (user_table_folder(), TABLES)] + [TABLES / "default.json"]
    return tuple(row for path in paths if path.is_file() for row in read_table(path).get(kernel, ()))


@cache
def select(kernel: str, architecture: str, dtype: torch.dtype, features: tuple[tuple[str, int], ...]) -> Row:
    """The row that a call takes.

    Raises:
        KeyError: no table has a row for it.
    """
    name = str(dtype).removeprefix("torch.")
    for row in rows(kernel, architecture):
        if row.fits(name, dict(features)):
            return row
    raise KeyError(f"no launch configuration for {kernel} on {architecture}, {name}, {dict(features)}")


def forget_tables() -> None:
    """Have the tables read again at the next call: for a process that has just written one."""
    rows.cache_clear()
    select.cache_clear()


@dataclass(frozen=True)
class Choice:
    """The row that a call of a launcher took, and for which dtype."""

    row: Row
    dtype: str


_forced: dict[str, LaunchConfig] = {}
_assumed: str | None = None
_chosen: list[Choice] | None = None


def launch_config(kernel: str, operand: Tensor, dtype: torch.dtype | None = None, **features: int) -> LaunchConfig:
    """The launch configuration of ``kernel`` for a call: where ``operand`` lives, its dtype or ``dtype``, its shape."""
    if kernel in _forced:
        return _forced[kernel]
    dtype = dtype or operand.dtype
    row = select(kernel, architecture(operand), dtype, tuple(features.items()))
    if _chosen is not None:
        _chosen.append(Choice(row, str(dtype).removeprefix("torch.")))
    return row.config


@contextmanager
def forced(configs: Mapping[str, LaunchConfig]) -> Iterator[None]:
    """Within this context these kernels take these configurations, whatever the tables say."""
    before = dict(_forced)
    _forced.update(configs)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def assumed_architecture(name: str) -> Iterator[list[Choice]]:
    """Within this context tensors without memory live on ``name``; yields the choices as they are made."""
    global _assumed, _chosen
    before, (_assumed, _chosen) = (_assumed, _chosen), (name, [])
    try:
        yield _chosen
    finally:
        _assumed, _chosen = before


@cache
def _device_architecture(index: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architecture(operand: Tensor) -> str:
    """The architecture that ``operand`` lives on: "sm_90", "gfx942", or "interpreter" for a CPU tensor."""
    if operand.is_cuda:
        return _device_architecture(operand.get_device())
    return _assumed or "interpreter" if operand.is_meta else "interpreter"
