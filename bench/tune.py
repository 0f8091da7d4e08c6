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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mar_fast import files, machine, timing
from mar_fast.kernels import device, use_backend
from mar_fast.kernels.jit.compile_check import Code, Report, check_all, code, recorded
from mar_fast.kernels.jit.launch import Choice, LaunchConfig, forced, forget_choices, overrides_path, read_overrides
from mar_fast.timing import Spread

from .kernel_calls import calls
from .matrix import described, named

FIRST_ROUNDS, FINALISTS, FINAL_ROUNDS = 7, 6, 60
# Two results agree if they differ by no more than this share of the value, and of the largest value.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
Times = dict[LaunchConfig, list[Spread]]


@dataclass
class Unit:
    """One choice, and the calls that make it: by their place, and whether in their backward pass; what became of it.

    No winner: the choice in force stays. Seconds are medians, by run. ``problem`` says why nothing could be tried.
    """

    choice: Choice
    runs: tuple[tuple[int, bool], ...]
    winner: LaunchConfig | None = None
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    timed: int = 0
    dropped: dict[LaunchConfig, str] = field(default_factory=dict)
    problem: str = ""

    def __str__(self) -> str:
        shape = [f"{name} {value}" for name, value in self.choice.shape.items()]
        return ", ".join([self.choice.kernel, self.choice.dtype, *shape])


class Gpu:
    """The current GPU; RuntimeError where torch finds none. Tests have a stand-in."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU here, expected one to measure on")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.architecture = device.architecture(torch.empty(0, device=self.device))
        self._call, self._operands = -1, dict[str, Any]()

    def compile(self, codes: Sequence[Code]) -> Iterator[tuple[int, Report]]:
        """The compiler's reports, in any order, with the place of each."""
        return check_all(codes, os.cpu_count() or 1)

    def outcome(self, call: int, kernel: str, config: LaunchConfig) -> list[Tensor]:
        """Outputs and gradients of a call; what a kernel leaves unwritten is NaN, not what was there before."""
        operands, one = self._at(call), calls("cuda")[call]
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
        try:
            with use_backend("triton"), forced({kernel: config}):
                alone, (outputs, backward) = one.inference(operands), one.training(operands)
                results = [result.detach() for result in (*alone, *outputs, *backward())]
                torch.cuda.synchronize(self.device)
                return results
        finally:
            torch.use_deterministic_algorithms(before)

    def seconds(self, call: int, backward: bool, kernel: str, config: LaunchConfig) -> float:
        """The device's time for a call's forward or backward pass."""
        operands, one = self._at(call), calls("cuda")[call]
        with use_backend("triton"), forced({kernel: config}):
            for _ in range(2):  # the first one has its launches looked up
                run = one.training(operands)[1] if backward else partial(one.inference, operands)
                taken = timing.seconds(run, self.device)
        return taken

    def _at(self, call: int) -> dict[str, Any]:
        """Its operands; those of the last call only are kept."""
        if self._call != call:
            self._operands = {}
            torch.cuda.empty_cache()
            self._call, self._operands = call, calls("cuda")[call].operands()
        return self._operands


def units(architecture: str, kernels: Sequence[str] = ()) -> list[Unit]:
    """Everything that can be tuned, of some kernels or ops, in the order of the calls."""
    found: dict[str, Unit] = {}
    for place, call in enumerate(calls("meta")):
        forward = {launch.choice.kernel for launch, _ in recorded(call.inference, architecture)}
        for launch, _ in recorded(call.everything, architecture):
            new = Unit(launch.choice, ())
            unit, run = found.setdefault(str(new), new), (place, launch.choice.kernel not in forward)
            unit.runs = tuple(dict.fromkeys((*unit.runs, run)))
    return named(
        found.values(), kernels, lambda unit: {unit.choice.kernel, *(calls("meta")[i].op for i, _ in unit.runs)}
    )


def candidates(config: LaunchConfig, quick: bool = False) -> list[LaunchConfig]:
    """The neighbourhood of a configuration, itself first: blocks halved and doubled, other warps, stages and switches.

    All combinations of them, or, if ``quick``, one change at a time.
    """
    least, most = (16, 256) if config.block_k else (1, 4096)
    values: dict[str, list[int]] = {"num_warps": [2, 4, 8, 16]}
    values |= {option.name: [False, True] for option in fields(config) if isinstance(option.default, bool)}
    if config.num_stages > 1 or config.block_k:
        values["num_stages"] = [1, 2, 3, 4, 5]
    for name in ("block_m", "block_n", "block_k"):
        if size := getattr(config, name):
            values[name] = [size, *(other for other in (size // 2, size * 2) if least <= other <= most)]
    # What is in force first: it stands for all that compile to the same.
    values = {name: sorted(every, key=lambda one: one != getattr(config, name)) for name, every in values.items()}
    changes = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    if quick:
        changes = [{name: value} for name, every in values.items() for value in every]
    found = [replace(config, **change) for change in changes]  # type: ignore[arg-type]
    return list(dict.fromkeys([config, *filter(_sensible, found)]))


def _sensible(config: LaunchConfig) -> bool:
    """Neither threads without work nor more values than a thread has registers for; whole rows are of any length."""
    return not config.block_n or 4 <= config.block_m * config.block_n / (32 * config.num_warps) <= 256


def compiled_clean(unit: Unit, configs: Sequence[LaunchConfig], machine: Gpu) -> list[LaunchConfig]:
    """The candidates that may be run, each code once; ``configs[0]`` is the one in force.

    Raises:
        ArithmeticError: the configuration in force does not compile.
    """
    kernel, codes = unit.choice.kernel, dict[str, tuple[LaunchConfig, list[Code]]]()
    for config in configs:
        try:
            with forced({kernel: config}):
                launches = [
                    one
                    for call, _ in unit.runs
                    for one in recorded(calls("meta")[call].everything, machine.architecture)
                ]
        except Exception as error:  # a launcher may refuse a configuration
            unit.dropped[config] = f"the launcher fails: {type(error).__name__}: {error}"
        else:
            found = [code(*one, machine.architecture) for one in launches if one[0].choice.kernel == kernel]
            codes.setdefault(repr(found), (config, found))
    every = [(config, one) for config, found in codes.values() for one in found]
    for place, report in machine.compile([one for _, one in every]):
        config = every[place][0]
        if config == configs[0] and report.error:
            raise ArithmeticError(f"the configuration in force {report.error}")
        if config != configs[0] and report.faults():
            unit.dropped[config] = report.faults()[0]
    return [config for config, _ in codes.values() if config not in unit.dropped]


def disagreement(got: Sequence[Tensor], want: Sequence[Tensor]) -> str:
    """In what way results are not those wanted; empty where they agree."""
    try:
        for mine, theirs in zip(got, want, strict=True):
            share = TOLERANCE[theirs.dtype]
            torch.testing.assert_close(mine, theirs, rtol=share, atol=share * float(theirs.abs().max()))
    except (AssertionError, ValueError) as error:
        return "other results: " + " ".join(str(error).split())
    return ""


def agreeing(unit: Unit, configs: Sequence[LaunchConfig], machine: Gpu) -> list[LaunchConfig]:
    """The candidates that may be timed.

    Raises:
        ArithmeticError: the results of the configuration in force are not finite.
    """
    for call in dict.fromkeys(call for call, _ in unit.runs):
        want = machine.outcome(call, unit.choice.kernel, configs[0])
        if not all(bool(result.isfinite().all()) for result in want):
            raise ArithmeticError("results of the configuration in force are not finite")
        for config in [config for config in configs[1:] if config not in unit.dropped]:
            try:
                reason = disagreement(machine.outcome(call, unit.choice.kernel, config), want)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # the driver may refuse what the compiler took
                reason = f"does not run: {type(error).__name__}: {error}"
            if reason:
                unit.dropped[config] = reason
    return [config for config in configs if config not in unit.dropped]


def _race(unit: Unit, configs: Sequence[LaunchConfig], machine: Gpu, rounds: int) -> Times:
    """Time them in turn, so that a drift of the clock hits all alike: by candidate and run."""
    times: dict[LaunchConfig, list[list[float]]] = {config: [[] for _ in unit.runs] for config in configs}
    for number, run in enumerate(unit.runs):
        for _ in range(rounds):
            for config in configs:
                times[config][number].append(machine.seconds(*run, unit.choice.kernel, config))
    return {config: list(map(Spread.of, every)) for config, every in times.items()}


def _ratio(ours: Sequence[Spread], theirs: Sequence[Spread]) -> float:
    """Geometric mean of the ratios of medians."""
    return math.exp(statistics.fmean(math.log(a.p50 / b.p50) for a, b in zip(ours, theirs, strict=True)))


def choose(times: Times, in_force: LaunchConfig) -> LaunchConfig | None:
    """The fastest candidate that beats the one in force beyond the spread; None where there is none.

    Its 80th percentile is below the other's 20th in some run, and in no run its 20th is above the other's 80th.
    """
    ratios = {in_force: 1.0}
    for config, every in times.items():
        runs = list(zip(every, times[in_force], strict=True))
        if any(mine.p80 < other.p20 for mine, other in runs) and not any(mine.p20 > other.p80 for mine, other in runs):
            ratios[config] = _ratio(every, times[in_force])
    best = min(ratios, key=ratios.__getitem__)
    return best if best != in_force else None


def tune_unit(unit: Unit, machine: Gpu, quick: bool = False) -> Unit:
    """Find the best configuration for one unit, which is returned."""
    in_force = unit.choice.config
    try:
        configs = agreeing(unit, compiled_clean(unit, candidates(in_force, quick), machine), machine)
    except ArithmeticError as error:
        unit.problem = str(error)
        return unit
    first, unit.timed = _race(unit, configs, machine, FIRST_ROUNDS), len(configs)
    best = sorted(configs[1:], key=lambda config: _ratio(first[config], first[in_force]))[:FINALISTS]
    times = _race(unit, [in_force, *best], machine, FINAL_ROUNDS)
    unit.winner = choose(times, in_force)
    unit.before = tuple(one.p50 for one in times[in_force])
    unit.after = tuple(one.p50 for one in times[unit.winner or in_force])
    return unit


def add_override(path: Path, architecture: str, kernel: str, row: dict[str, Any]) -> None:
    """Put a row into the file, whole or not at all, in place of one for the same calls; choices are then read again."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    rows = content.setdefault(architecture, {}).setdefault(kernel, [])
    rows[:] = [row, *(old for old in rows if any(old.get(key) != row[key] for key in ("dtypes", "where")))]

    def write(temporary: Path) -> None:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        read_overrides(temporary)

    files.write_whole(path, write)
    forget_choices()


def tune(machine: Gpu, path: Path, said: str, kernels: Sequence[str] = (), quick: bool = False) -> Iterator[Unit]:
    """Tune, and write each winner to ``path`` as soon as it is known, with what is ``said`` of the measurement.

    Raises:
        ValueError: there is no such kernel, or ``path`` is there and is no such file.
    """
    if path.is_file():
        read_overrides(path)
    for unit in units(machine.architecture, kernels):
        if winner := tune_unit(unit, machine, quick).winner:
            medians = [
                f"{after * 1e6:.1f} us against {before * 1e6:.1f} us ({calls('meta')[call]}{', backward' * backward})"
                for after, before, (call, backward) in zip(unit.after, unit.before, unit.runs, strict=True)
            ]
            where = {name: [int(value), int(value)] for name, value in unit.choice.shape.items()}
            row = {"dtypes": [unit.choice.dtype], "where": where, "config": winner.options()}
            row["origin"] = f"{said}: {'; '.join(medians)}"
            add_override(path, machine.architecture, unit.choice.kernel, row)
        yield unit


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench tune", description=__doc__)
    parser.add_argument("--kernel", action="append", default=[], help="an op or a kernel; may be given again")
    parser.add_argument("--quick", action="store_true", help="fewer candidates: one change at a time")
    parser.add_argument("--out", type=Path, default=overrides_path(), help="the file to write")
    options, won = parser.parse_args(arguments), 0
    try:
        gpu = Gpu()
        about = machine.environment(gpu.device)
        said = "measured: " + ", ".join(f"{about[key]}" for key in ("device", "torch", "triton", "commit", "date"))
        for unit in tune(gpu, options.out, said, options.kernel, options.quick):
            won += unit.winner is not None
            before, after = (" ".join(f"{s * 1e6:.1f}" for s in medians) for medians in (unit.before, unit.after))
            outcome = f"{after} us, {described(unit.winner)}" if unit.winner else unit.problem or "stays"
            tried = f"{unit.timed} of {unit.timed + len(unit.dropped)}"
            print(f"{unit!s:80} {tried:>10} candidates, {before} us: {outcome}", flush=True)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    finally:
        print(f"{won} rows written: {options.out}")
    return 0
