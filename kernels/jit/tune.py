"""The tuner: finds, on a GPU, launch configurations that are faster than those of the tables, and writes them down.

It works row by row: all cases that take one row of the tables in one dtype are a `Unit`, and a candidate has to serve
all of them. A candidate is run only if it compiles clean, and timed only if its results are those of the row in force.
"""

import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..launch_config import LaunchConfig, Row, assumed_architecture, forget_tables, read_table, rows
from . import cases, matrix
from .compile_matrix import Report, launch_key
from .launch import recording
from .matrix import Found

BLOCKS = ("block_m", "block_n", "block_k")
FIRST_ROUNDS, FINALISTS, FINAL_ROUNDS = 7, 6, 60
# Two results agree if they differ by no more than this share of the value, and of the largest value.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}

Series = list[float]


@dataclass(frozen=True)
class Unit:
    """A row of the tables in one dtype, and the passes of cases (without a configuration) that take it."""

    kernel: str
    row: Row
    dtype: str
    runs: tuple[Found, ...]


@dataclass(frozen=True)
class Result:
    """What became of a unit: the winner is None where the row in force stays. Seconds are medians, by run.

    ``problem`` says why nothing could be tried.
    """

    unit: Unit
    winner: LaunchConfig | None
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    timed: int = 0
    dropped: Mapping[LaunchConfig, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def gain(self) -> float:
        """How many times as fast as before."""
        return 1 / _ratio(self.after, self.before) if self.winner else 1.0


class Machine(Protocol):
    """What measures: `gpu.Gpu`, or a stand-in."""

    architecture: str
    description: str

    def compile(self, found: Sequence[Found]) -> Iterator[tuple[int, Report]]:
        """The compiler's reports, in any order, with the place of each in ``found``."""

    def outcome(self, run: Found) -> list[Tensor]:
        """Results of one run under its configuration, in memory that held NaN before."""

    def seconds(self, run: Found, turn: int) -> float:
        """How long it takes; ``turn`` counts up, so that inputs can take turns."""


# What to try.


def units(architecture: str, kernels: Sequence[str] = ()) -> list[Unit]:
    """Everything that can be tuned, in the order of the cases.

    Raises:
        ValueError: there is no such kernel.
    """
    wanted = set(matrix.matching(kernels))
    runs: dict[tuple[str, Row, str], list[Found]] = {}
    for number, case in enumerate(cases.cases()):
        for call, run in case.calls("meta").items():
            with assumed_architecture(architecture) as choices, recording() as launches:
                run()
            names = [launch.name for launch in launches]
            for choice in dict.fromkeys(choices):
                name = choice.row.kernel
                if name in wanted and name in names:
                    found = Found(name, number, call, names.index(name), architecture)
                    runs.setdefault((name, choice.row, choice.dtype), []).append(found)
    return [Unit(kernel, row, dtype, tuple(found)) for (kernel, row, dtype), found in runs.items()]


def candidates(config: LaunchConfig, quick: bool = False) -> list[LaunchConfig]:
    """The neighbourhood of a configuration, itself first: blocks halved and doubled, other warps, stages and switches.

    All combinations of them, or, if ``quick``, one change at a time.
    """
    least, most = (16, 256) if config.block_k else (1, 4096)
    choices: dict[str, list[int]] = {}
    for name in BLOCKS:
        size = getattr(config, name)
        sizes = (size // 2, size * 2) if size else ()
        choices[name] = [size, *(other for other in sizes if least <= other <= most)]
    choices["num_warps"] = [config.num_warps, *(warps for warps in (2, 4, 8, 16) if warps != config.num_warps)]
    loops = config.num_stages > 1 or config.block_k
    stages = [other for other in range(1, 6) if other != config.num_stages] if loops else []
    choices["num_stages"] = [config.num_stages, *stages]
    for name in (option.name for option in fields(config) if isinstance(option.default, bool)):
        choices[name] = [getattr(config, name), not getattr(config, name)]
    changes: list[dict[str, Any]]
    if quick:
        changes = [{name: value} for name, values in choices.items() for value in values[1:]]
    else:
        changes = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    found = [replace(config, **change) for change in changes]
    return list(dict.fromkeys([config, *(other for other in found if _sensible(other))]))


def _sensible(config: LaunchConfig) -> bool:
    """Neither threads without work nor more values than a thread has registers for."""
    if not config.block_n:  # a block of whole rows, of unknown length
        return True
    return 4 <= config.block_m * config.block_n / (32 * config.num_warps) <= 256


# What is fit to be timed.


def distinct(unit: Unit, configs: Sequence[LaunchConfig]) -> list[LaunchConfig]:
    """Without those that are the same launch as one before: not every kernel reads every option."""
    found: dict[str, LaunchConfig] = {}
    for config in configs:
        try:
            key = launch_key(matrix.launch_at(replace(unit.runs[0], config=config)), unit.runs[0].target)
        except Exception:  # it may be refused, which compiling it will report
            key = repr(config)
        found.setdefault(key, config)
    return list(found.values())


def compiled_clean(unit: Unit, configs: Sequence[LaunchConfig], machine: Machine) -> dict[LaunchConfig, str]:
    """Why candidates may not be run, by candidate; ``configs[0]``, the one in force, is what they are held against.

    Raises:
        ArithmeticError: the configuration in force does not compile.
    """
    dropped: dict[LaunchConfig, str] = {}
    for run in unit.runs:
        left = [config for config in configs if config not in dropped]
        reports = dict(machine.compile([replace(run, config=config) for config in left]))
        in_force = reports[0]
        if in_force.error:
            raise ArithmeticError(f"the configuration in force {in_force.error}")
        for place, config in enumerate(left[1:], 1):
            report = reports[place]
            faults = report.faults()
            if in_force.tensor_core and not report.tensor_core and not report.error:
                faults.append("no tensor core instruction")
            if faults:
                dropped[config] = faults[0]
    return dropped


def disagreement(got: Sequence[Tensor], want: Sequence[Tensor]) -> str:
    """In what way results are not those wanted; empty where they agree."""
    if len(got) != len(want):
        return f"{len(got)} results, not {len(want)}"
    for number, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return f"result {number} is of another kind"
        if not mine.is_floating_point():
            if not torch.equal(mine, theirs):
                return f"result {number} differs"
            continue
        if not bool(mine.isfinite().all()):
            return f"result {number} is not finite everywhere"
        if mine.numel():
            share = TOLERANCE[mine.dtype]
            allowed = share * (theirs.abs() + theirs.abs().max())
            if not bool(((mine - theirs).abs() <= allowed).all()):
                return f"result {number} differs by more than rounding"
    return ""


def _agreeing(unit: Unit, configs: Sequence[LaunchConfig], machine: Machine) -> dict[LaunchConfig, str]:
    """Why candidates that compile may not be timed.

    Raises:
        ArithmeticError: the results of the configuration in force are not finite.
    """
    dropped: dict[LaunchConfig, str] = {}
    for run in unit.runs:
        want = machine.outcome(replace(run, config=configs[0]))
        if not all(bool(result.isfinite().all()) for result in want):
            raise ArithmeticError("results of the configuration in force are not finite")
        for config in configs[1:]:
            if config in dropped:
                continue
            try:
                reason = disagreement(machine.outcome(replace(run, config=config)), want)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # the driver may refuse what the compiler took
                reason = f"does not run: {type(error).__name__}: {error}"
            if reason:
                dropped[config] = reason
    return dropped


# Which one is fastest.


def _race(
    unit: Unit, configs: Sequence[LaunchConfig], machine: Machine, rounds: int, on_round: Callable[[float], None]
) -> dict[LaunchConfig, list[Series]]:
    """Time them in turn, so that a drift of the clock hits all alike: seconds by candidate and run."""
    times: dict[LaunchConfig, list[Series]] = {config: [] for config in configs}
    for number, run in enumerate(unit.runs):
        for config in configs:
            times[config].append([])
        for turn in range(-2, rounds):  # two uncounted
            for place, config in enumerate(configs):
                taken = machine.seconds(replace(run, config=config), (turn + 2) * (len(configs) + 1) + place)
                if turn >= 0:
                    times[config][-1].append(taken)
            on_round((number + (turn + 3) / (rounds + 2)) / len(unit.runs))
    return times


def spread(series: Series) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    p20, _, _, p80 = statistics.quantiles(series, n=5, method="inclusive")
    return p20, statistics.median(series), p80


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Geometric mean of the ratios."""
    return math.exp(statistics.fmean(math.log(a / b) for a, b in zip(ours, theirs, strict=True)))


def choose(times: Mapping[LaunchConfig, list[Series]], in_force: LaunchConfig) -> LaunchConfig | None:
    """The fastest candidate that beats the one in force beyond the spread; None where there is none.

    Its 80th percentile is below the other's 20th in some run, and in no run its 20th is above the other's 80th.
    """
    base = [spread(series) for series in times[in_force]]
    best, least = None, 1.0
    for config, every in times.items():
        runs = list(zip([spread(series) for series in every], base, strict=True))
        faster = any(mine[2] < other[0] for mine, other in runs)
        slower = any(mine[0] > other[2] for mine, other in runs)
        ratio = _ratio([mine[1] for mine, _ in runs], [other[1] for _, other in runs])
        if faster and not slower and ratio < least:
            best, least = config, ratio
    return best


def tune_unit(
    unit: Unit,
    machine: Machine,
    *,
    quick: bool = False,
    on_step: Callable[[str, float], None] = lambda what, share: None,
) -> Result:
    """Find the best configuration for one unit."""
    try:
        return _tune_unit(unit, machine, quick, on_step)
    except ArithmeticError as error:
        return Result(unit, None, problem=str(error))


def _tune_unit(unit: Unit, machine: Machine, quick: bool, on_step: Callable[[str, float], None]) -> Result:
    in_force = unit.row.config
    configs = distinct(unit, candidates(in_force, quick))
    on_step(f"compiling {len(configs)} candidates", 0.0)
    dropped = compiled_clean(unit, configs, machine)
    configs = [config for config in configs if config not in dropped]
    on_step(f"checking {len(configs)} candidates", 0.4)
    dropped |= _agreeing(unit, configs, machine)
    configs = [config for config in configs if config not in dropped]
    text = f"timing {len(configs)} candidates"
    first = _race(unit, configs, machine, FIRST_ROUNDS, lambda share: on_step(text, 0.5 + 0.25 * share))
    medians = {config: [statistics.median(series) for series in every] for config, every in first.items()}
    order = sorted(configs[1:], key=lambda config: _ratio(medians[config], medians[in_force]))
    text = f"timing the best {len(order[:FINALISTS])}"
    times = _race(
        unit, [in_force, *order[:FINALISTS]], machine, FINAL_ROUNDS, lambda share: on_step(text, 0.75 + share / 4)
    )
    winner = choose(times, in_force)
    after = tuple(spread(series)[1] for series in times[winner]) if winner else ()
    return Result(unit, winner, tuple(spread(series)[1] for series in times[in_force]), after, len(configs), dropped)


# The table.


def origin(result: Result, machine: Machine, project: str, date: str) -> str:
    """What a reader needs to know about a measured row."""
    labels = [f"{cases.cases()[run.case].label} {run.call}" for run in result.unit.runs]
    medians = [
        f"{after * 1e6:.1f} us against {before * 1e6:.1f} us ({label})"
        for after, before, label in zip(result.after, result.before, labels, strict=True)
    ]
    return f"measured on {machine.description}, {project}, {date}: {'; '.join(medians)}"


def merged(
    mine: Sequence[Row], others: Sequence[Row], winners: Mapping[tuple[Row, str], LaunchConfig]
) -> list[dict[str, Any]]:
    """The rows of one kernel for a user's table.

    Args:
        mine: Its rows in the user's table so far.
        others: Those of the package's tables, which come after them.
        winners: New configurations, by the row in force (one of these) and dtype.

    A winner goes right before the row that it replaces for its dtype. The user's table goes before all others, so
    rows of theirs that a winner must not take calls from are copied before it.
    """
    table: list[tuple[Row, bool]] = []  # and whether it belongs into the user's table by itself
    for row in [*mine, *others]:
        new = [
            Row(row.table, row.kernel, (dtype,), row.where, config)
            for (replaced, dtype), config in winners.items()
            if replaced == row
        ]
        table += [(winner, True) for winner in new]
        dtypes = tuple(dtype for dtype in row.dtypes if all(dtype not in winner.dtypes for winner in new))
        if dtypes or not row.dtypes:
            table.append((replace(row, dtypes=dtypes), row in mine))
    kept: list[Row] = []
    for row, belongs in reversed(table):
        if belongs or any(_overlap(row, later) for later in kept):
            kept.insert(0, row)
    return [entry(row) for row in kept]


def _overlap(row: Row, other: Row) -> bool:
    """Whether some call fits both."""
    ranges = {name: (low, high) for name, low, high in row.where}
    disjoint = any(
        name in ranges and (high < ranges[name][0] or ranges[name][1] < low) for name, low, high in other.where
    )
    return not disjoint and (not row.dtypes or not other.dtypes or bool(set(row.dtypes) & set(other.dtypes)))


def entry(row: Row) -> dict[str, Any]:
    """A row as it stands in a table's file."""
    written: dict[str, Any] = {"dtypes": list(row.dtypes)} if row.dtypes else {}
    if row.where:
        written["where"] = {name: [low, high] for name, low, high in row.where}
    return written | {"config": row.config.options(), "origin": row.config.origin}


def write_table(path: Path, content: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write a table whole or not at all, one row a line, and have the tables read again."""
    kernels = []
    for kernel in sorted(content):
        lines = ",\n".join(f"    {json.dumps(row)}" for row in content[kernel])
        kernels.append(f"  {json.dumps(kernel)}: [\n{lines}\n  ]")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".json")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write("{\n" + ",\n".join(kernels) + "\n}\n")
        read_table(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    forget_tables()


def tune(
    machine: Machine,
    path: Path,
    *,
    project: str,
    date: str,
    kernels: Sequence[str] = (),
    quick: bool = False,
    on_step: Callable[[str, float], None] = lambda what, share: None,
) -> Iterator[Result]:
    """Tune, and write each winner to the table ``path`` as soon as it is known: an interrupt loses one unit.

    Raises:
        ValueError: there is no such kernel, or ``path`` is there and is no table.
    """
    todo = units(machine.architecture, kernels)
    before = read_table(path) if path.is_file() else {}
    content = {kernel: [entry(row) for row in table] for kernel, table in before.items()}
    others = {
        unit.kernel: [row for row in rows(unit.kernel, machine.architecture) if row.table.resolve() != path.resolve()]
        for unit in todo
    }
    winners: dict[str, dict[tuple[Row, str], LaunchConfig]] = {}
    for number, unit in enumerate(todo):

        def step(what: str, share: float, number: int = number, unit: Unit = unit) -> None:
            on_step(f"{unit.kernel}, {unit.dtype}: {what}", (number + share) / len(todo))

        result = tune_unit(unit, machine, quick=quick, on_step=step)
        if result.winner is not None:
            config = replace(result.winner, origin=origin(result, machine, project, date))
            of_kernel = winners.setdefault(unit.kernel, {})
            of_kernel[unit.row, unit.dtype] = config
            content[unit.kernel] = merged(before.get(unit.kernel, []), others[unit.kernel], of_kernel)
            write_table(path, content)
        yield result
