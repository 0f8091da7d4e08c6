"""``python -m mar_fast.bench tune``: faster launch choices for the GPU at hand.

For every kernel, dtype and shape that the calls of `kernel_calls` reach: a candidate is run only if it compiles clean,
timed only if its results are those of the choice in force, and wins only beyond the spread. Winners go to a file of
your own ($MAR_FAST_CONFIGS, or mar_fast/overrides.json in your configuration folder), each as soon as it is known:
Ctrl-C keeps what has been measured.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mar_fast.kernels import device
from mar_fast.kernels.jit.compile_check import Code, Report, check_all, code, recorded
from mar_fast.kernels.jit.launch import Choice, LaunchConfig, forced, forget_choices, overrides_path, read_overrides

from . import machine
from .kernel_calls import calls
from .matrix import check_names, described, print_table

FIRST_ROUNDS, FINALISTS, FINAL_ROUNDS = 7, 6, 60
# Two results agree if they differ by no more than this share of the value, and of the largest value.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Cycles that the device waits before a timed run, so that the host has queued all its launches by then: about 1 ms.
HEAD_START = 2_000_000


@dataclass(frozen=True)
class Unit:
    """One choice, and the calls that make it: by their place, and whether in their backward pass."""

    choice: Choice
    runs: tuple[tuple[int, bool], ...]

    def __str__(self) -> str:
        shape = [f"{name} {value}" for name, value in self.choice.shape.items()]
        return ", ".join([self.choice.kernel, self.choice.dtype, *shape])

    def names(self) -> set[str]:
        """Its kernel, and the ops that launch it."""
        return {self.choice.kernel, *(calls("meta")[call].op for call, _ in self.runs)}


@dataclass(frozen=True)
class Result:
    """What became of a unit: the winner is None where the choice in force stays. Seconds are medians, by run.

    ``problem`` says why nothing could be tried.
    """

    unit: Unit
    winner: LaunchConfig | None = None
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
    """What measures: `Gpu`, or a stand-in."""

    architecture: str

    def compile(self, codes: Sequence[Code]) -> Iterator[tuple[int, Report]]:
        """The compiler's reports, in any order, with the place of each in ``codes``."""

    def outcome(self, call: int, kernel: str, config: LaunchConfig) -> list[Tensor]:
        """Outputs and gradients of a call with this configuration, in memory that held NaN before."""

    def seconds(self, call: int, backward: bool, kernel: str, config: LaunchConfig) -> float:
        """The device's time for the call's forward or backward pass."""


class Gpu:
    """The current GPU.

    Raises:
        RuntimeError: torch finds none.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU here, expected one to measure on")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.architecture = device.architecture(torch.empty(0, device=self.device))
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._flush = torch.empty(4 * cache, dtype=torch.uint8, device=self.device)
        self._call, self._operands = -1, dict[str, Any]()

    def compile(self, codes: Sequence[Code]) -> Iterator[tuple[int, Report]]:
        """In several processes."""
        return check_all(codes, os.cpu_count() or 1)

    def outcome(self, call: int, kernel: str, config: LaunchConfig) -> list[Tensor]:
        """Without and with gradients; what a kernel leaves unwritten is NaN, which a block freed before might hide."""
        operands, before = self._at(call), torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
        try:
            with forced({kernel: config}):
                alone = calls("cuda")[call].inference(operands)
                outputs, backward = calls("cuda")[call].training(operands)
                results = [*alone, *outputs, *backward()]
                torch.cuda.synchronize(self.device)
        finally:
            torch.use_deterministic_algorithms(before)
        return [result.detach() for result in results]

    def seconds(self, call: int, backward: bool, kernel: str, config: LaunchConfig) -> float:
        """By events, on a cold cache."""
        operands, one = self._at(call), calls("cuda")[call]
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with forced({kernel: config}):
            run = one.training(operands)[1] if backward else lambda: one.inference(operands)
            self._flush.zero_()
            torch.cuda._sleep(HEAD_START)
            start.record()
            run()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def _at(self, call: int) -> dict[str, Any]:
        """Its operands; those of the last call only are kept."""
        if self._call != call:
            self._operands = {}
            torch.cuda.empty_cache()
            self._call, self._operands = call, calls("cuda")[call].operands()
        return self._operands


# What to try.


def units(architecture: str, kernels: Sequence[str] = ()) -> list[Unit]:
    """Everything that can be tuned, in the order of the calls.

    Raises:
        ValueError: there is no such kernel.
    """
    found: dict[str, Unit] = {}
    for place, call in enumerate(calls("meta")):
        alone = recorded(lambda call=call: call.inference(call.operands()), architecture)  # type: ignore[misc]
        forward = {launch.choice.kernel for launch, _ in alone}
        for launch, _ in recorded(call.everything, architecture):
            unit = Unit(launch.choice, ((place, launch.choice.kernel not in forward),))
            before = found.get(str(unit), unit)
            found[str(unit)] = replace(before, runs=tuple(dict.fromkeys(before.runs + unit.runs)))
    check_names(kernels, {name for unit in found.values() for name in unit.names()})
    return [unit for unit in found.values() if not kernels or unit.names() & set(kernels)]


def candidates(config: LaunchConfig, quick: bool = False) -> list[LaunchConfig]:
    """The neighbourhood of a configuration, itself first: blocks halved and doubled, other warps, stages and switches.

    All combinations of them, or, if ``quick``, one change at a time.
    """
    least, most = (16, 256) if config.block_k else (1, 4096)
    choices: dict[str, list[int]] = {}
    for name in ("block_m", "block_n", "block_k"):
        size = getattr(config, name)
        choices[name] = [size, *(other for other in (size // 2, size * 2) if size and least <= other <= most)]
    choices["num_warps"] = [2, 4, 8, 16]
    choices["num_stages"] = [1, 2, 3, 4, 5] if config.num_stages > 1 or config.block_k else [config.num_stages]
    choices |= {option.name: [False, True] for option in fields(config) if isinstance(option.default, bool)}
    changes = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    if quick:
        changes = [{name: value} for name, values in choices.items() for value in values]
    found = (replace(config, **change) for change in changes)  # type: ignore[arg-type]
    return list(dict.fromkeys([config, *filter(_sensible, found)]))


def _sensible(config: LaunchConfig) -> bool:
    """Neither threads without work nor more values than a thread has registers for; whole rows are of any length."""
    return not config.block_n or 4 <= config.block_m * config.block_n / (32 * config.num_warps) <= 256


# What is fit to be timed.


def codes_of(unit: Unit, config: LaunchConfig, architecture: str) -> list[Code]:
    """What a candidate compiles to in all calls of a unit."""
    found, kernel = [], unit.choice.kernel
    with forced({kernel: config}):
        for place in dict.fromkeys(place for place, _ in unit.runs):
            launches = recorded(calls("meta")[place].everything, architecture)
            found += [code(*one, architecture) for one in launches if one[0].choice.kernel == kernel]
    return found


def compiled_clean(
    unit: Unit, configs: Sequence[LaunchConfig], machine: Machine
) -> tuple[list[LaunchConfig], dict[LaunchConfig, str]]:
    """The candidates that may be run, and why others may not; ``configs[0]`` is the one in force.

    One that is the same code as another before it is left out: not every kernel reads every option.

    Raises:
        ArithmeticError: the configuration in force does not compile.
    """
    codes: dict[str, tuple[LaunchConfig, list[Code]]] = {}
    dropped: dict[LaunchConfig, str] = {}
    for config in configs:
        try:
            of_config = codes_of(unit, config, machine.architecture)
            codes.setdefault(repr(of_config), (config, of_config))
        except Exception as error:  # a launcher may refuse a configuration
            dropped[config] = f"the launcher fails: {type(error).__name__}: {error}"
    every = [(config, one) for config, of_config in codes.values() for one in of_config]
    reports = dict(machine.compile([one for _, one in every]))
    for place, (config, _) in enumerate(every):
        if config == configs[0] and reports[place].error:
            raise ArithmeticError(f"the configuration in force {reports[place].error}")
        for fault in reports[place].faults() if config != configs[0] else ():
            dropped.setdefault(config, fault)
    return [config for config, _ in codes.values() if config not in dropped], dropped


def disagreement(got: Sequence[Tensor], want: Sequence[Tensor]) -> str:
    """In what way results are not those wanted; empty where they agree."""
    if len(got) != len(want):
        return f"{len(got)} results, not {len(want)}"
    for number, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return f"result {number} is of another kind"
        if not bool(mine.isfinite().all()):
            return f"result {number} is not finite everywhere"
        if mine.numel():
            allowed = TOLERANCE[mine.dtype] * (theirs.abs() + theirs.abs().max())
            if not bool(((mine - theirs).abs() <= allowed).all()):
                return f"result {number} differs by more than rounding"
    return ""


def disagreeing(unit: Unit, configs: Sequence[LaunchConfig], machine: Machine) -> dict[LaunchConfig, str]:
    """Why candidates that compile may not be timed.

    Raises:
        ArithmeticError: the results of the configuration in force are not finite.
    """
    dropped: dict[LaunchConfig, str] = {}
    for call in dict.fromkeys(call for call, _ in unit.runs):
        want = machine.outcome(call, unit.choice.kernel, configs[0])
        if not all(bool(result.isfinite().all()) for result in want):
            raise ArithmeticError("results of the configuration in force are not finite")
        for config in [config for config in configs[1:] if config not in dropped]:
            try:
                reason = disagreement(machine.outcome(call, unit.choice.kernel, config), want)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # the driver may refuse what the compiler took
                reason = f"does not run: {type(error).__name__}: {error}"
            if reason:
                dropped[config] = reason
    return dropped


# Which one is fastest.


def _race(
    unit: Unit, configs: Sequence[LaunchConfig], machine: Machine, rounds: int
) -> dict[LaunchConfig, list[list[float]]]:
    """Time them in turn, so that a drift of the clock hits all alike: seconds by candidate and run."""
    times: dict[LaunchConfig, list[list[float]]] = {config: [[] for _ in unit.runs] for config in configs}
    for number, run in enumerate(unit.runs):
        for turn in range(-2, rounds):  # two uncounted
            for config in configs:
                taken = machine.seconds(*run, unit.choice.kernel, config)
                if turn >= 0:
                    times[config][number].append(taken)
    return times


def _medians(every: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(statistics.median(series) for series in every)


def _spread(series: Sequence[float]) -> tuple[float, float]:
    """20th and 80th percentile."""
    quantiles = statistics.quantiles(series, n=5, method="inclusive")
    return quantiles[0], quantiles[3]


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Geometric mean of the ratios."""
    return math.exp(statistics.fmean(math.log(a / b) for a, b in zip(ours, theirs, strict=True)))


def choose(times: Mapping[LaunchConfig, Sequence[Sequence[float]]], in_force: LaunchConfig) -> LaunchConfig | None:
    """The fastest candidate that beats the one in force beyond the spread; None where there is none.

    Its 80th percentile is below the other's 20th in some run, and in no run its 20th is above the other's 80th.
    """
    base, ratios = list(map(_spread, times[in_force])), dict[LaunchConfig, float]()
    for config, every in times.items():
        runs = list(zip(map(_spread, every), base, strict=True))
        if any(mine[1] < other[0] for mine, other in runs) and not any(mine[0] > other[1] for mine, other in runs):
            ratios[config] = _ratio(_medians(every), _medians(times[in_force]))
    best = min(ratios, key=ratios.__getitem__, default=None)
    return best if best and ratios[best] < 1 else None


def tune_unit(unit: Unit, machine: Machine, quick: bool = False) -> Result:
    """Find the best configuration for one unit."""
    in_force = unit.choice.config
    try:
        configs, dropped = compiled_clean(unit, candidates(in_force, quick), machine)
        dropped |= disagreeing(unit, configs, machine)
    except ArithmeticError as error:
        return Result(unit, problem=str(error))
    configs = [config for config in configs if config not in dropped]
    first = {config: _medians(every) for config, every in _race(unit, configs, machine, FIRST_ROUNDS).items()}
    order = sorted(configs[1:], key=lambda config: _ratio(first[config], first[in_force]))
    times = _race(unit, [in_force, *order[:FINALISTS]], machine, FINAL_ROUNDS)
    winner = choose(times, in_force)
    after = _medians(times[winner]) if winner else ()
    return Result(unit, winner, _medians(times[in_force]), after, len(configs), dropped)


# The file.


def override(result: Result, said: str) -> dict[str, Any]:
    """A winner as a row for exactly its shape, with what a reader needs to know about it."""
    assert result.winner is not None
    medians = [
        f"{after * 1e6:.1f} us against {before * 1e6:.1f} us ({calls('meta')[call]}{', backward' if backward else ''})"
        for after, before, (call, backward) in zip(result.after, result.before, result.unit.runs, strict=True)
    ]
    where = {name: [int(value), int(value)] for name, value in result.unit.choice.shape.items()}
    row = {"dtypes": [result.unit.choice.dtype], "where": where, "config": result.winner.options()}
    return row | {"origin": f"{said}: {'; '.join(medians)}"}


def add_override(path: Path, architecture: str, kernel: str, row: dict[str, Any]) -> None:
    """Put a row into the file, in place of one for the same dtypes and shape, and have the choices read again.

    The file is written whole or not at all.

    Raises:
        ValueError: the file, or the row, is not as it should be.
    """
    content = json.loads(path.read_text()) if path.is_file() else {}
    rows = content.setdefault(architecture, {}).setdefault(kernel, [])
    rows[:] = [row, *(old for old in rows if any(old.get(key) != row[key] for key in ("dtypes", "where")))]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".json")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        read_overrides(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    forget_choices()


def tune(
    machine: Machine, path: Path, said: str = "", kernels: Sequence[str] = (), quick: bool = False
) -> Iterator[Result]:
    """Tune, and write each winner to ``path`` as soon as it is known: an interrupt loses one unit.

    Raises:
        ValueError: there is no such kernel, or ``path`` is there and is no such file.
    """
    if path.is_file():
        read_overrides(path)
    for unit in units(machine.architecture, kernels):
        result = tune_unit(unit, machine, quick)
        if result.winner is not None:
            add_override(path, machine.architecture, unit.choice.kernel, override(result, said))
        yield result


COLUMNS = ("choice", "candidates", "before, us", "after, us", "gain", "configuration")


def row(result: Result) -> tuple[str, ...]:
    """One line of the table."""
    before, after = (" ".join(f"{s * 1e6:.1f}" for s in medians) for medians in (result.before, result.after))
    outcome = described(result.winner) if result.winner else result.problem or "stays"
    tried = f"{result.timed} of {result.timed + len(result.dropped)}"
    return (str(result.unit), tried, before, after, f"{result.gain:.2f}x", outcome)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench tune", description=__doc__)
    parser.add_argument("--kernel", action="append", default=[], help="an op or a kernel; may be given again")
    parser.add_argument("--quick", action="store_true", help="fewer candidates: one change at a time")
    parser.add_argument("--out", type=Path, default=overrides_path(), help="the file to write")
    options = parser.parse_args(arguments)
    results: list[Result] = []
    try:
        gpu = Gpu()
        about = machine.environment(gpu.device)
        versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "mar_fast", "commit"))
        said = f"measured on {about['device']}, {versions}, {about['date']}"
        for result in tune(gpu, options.out, said, options.kernel, options.quick):
            results.append(result)
            print(", ".join(row(result)), flush=True)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    finally:
        print_table(COLUMNS, *map(row, results))
        print(f"{sum(bool(result.winner) for result in results)} rows written: {options.out}")
    return 0
