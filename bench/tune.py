"""``python -m mar_fast.bench tune``: faster launch choices for the GPU at hand.

For every kernel, dtype and shape of `matrix`: one setting is changed at a time, then again from the winner, until
nothing wins. A candidate is run only if it compiles clean, timed only if its results are those of the choice in force,
and wins only beyond the spread. Choices that beat the one in force go to a file of your own ($MAR_FAST_CONFIGS, or
mar_fast/overrides.json in your configuration folder), each as soon as it is known: Ctrl-C keeps what has been measured.
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mar_fast import files
from mar_fast.kernels import device, use_backend
from mar_fast.kernels.jit.compile_check import Code, check_all, code
from mar_fast.kernels.jit.launch import Choice, LaunchConfig, forced, forget_choices, overrides_path, read_overrides

from .case import Case, Prepared, Provider, RunOptions
from .harness import measure
from .matrix import calls, launched, launches
from .records import Record
from .suites import kernels as suite

# Two results agree if they differ by no more than this share of the value, and of the largest value; 8 bits not at all.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float8_e4m3fn: 0.0}
Times = dict[LaunchConfig, list[Record]]  # for each call


def workload(call: str, mode: str, kernel: str, configs: Sequence[LaunchConfig]) -> Case:
    """A call's pass as a case of the suite, with launch choices as its providers: the first is the one in force.

    One that does not give what the first gives, which must be finite, is unavailable.
    """
    # Without FLOPs `kernel_case` captures a forward pass in a CUDA graph.
    case = suite.kernel_case(replace(calls("cuda")[call], flops=0.0), mode, on_gpu=True, sets=1, clips=None)
    ours, in_force = case.providers[0], list[Tensor]()

    def prepare(config: LaunchConfig) -> Prepared:
        with use_backend("triton"), forced({kernel: config}):
            made = ours.prepare()
            made.run()  # fixes the launches, in the CUDA graph or in what autograd keeps
            torch.use_deterministic_algorithms(True, warn_only=True)  # what a kernel leaves unwritten is NaN
            try:
                found = made.outputs()
            finally:
                torch.use_deterministic_algorithms(False)
        in_force.extend(found if config == configs[0] else ())
        for mine, theirs in zip(found, in_force, strict=True):
            share, largest = TOLERANCE[theirs.dtype], float(theirs.float().abs().max())
            assert math.isfinite(largest), "results that are not finite"
            torch.testing.assert_close(mine, theirs, rtol=share, atol=share * largest)
        return made

    providers = tuple(Provider(str(config), partial(prepare, config), checked=False) for config in configs)
    return replace(case, providers=providers, baseline=str(configs[0]))


def neighbours(config: LaunchConfig) -> list[LaunchConfig]:
    """What differs in one setting: a block halved or doubled, warps along with it or alone, stages, residence."""
    changes: list[dict[str, Any]] = [{"num_warps": warps} for warps in (2, 4, 8, 16)]
    least, most = (16, 256) if config.block_k else (1, 4096)
    for block in ("block_m", "block_n", "block_k"):
        size = getattr(config, block)
        for other in (size // 2, size * 2):
            if least <= other <= most:
                changes += [{block: other}, {block: other, "num_warps": config.num_warps * other // size}]
    if config.num_stages > 1 or config.block_k:
        changes += [{"num_stages": stages} for stages in range(1, 6)]
    changes += [{switch: not getattr(config, switch)} for switch in ("resident", "tma", "fused", "cudnn")]
    found = dict.fromkeys(replace(config, **change) for change in changes)
    # Neither threads without work nor more values than a thread has registers for; whole rows are of any length.
    return [
        one
        for one in found
        if one != config
        and 2 <= one.num_warps <= 16
        and (not one.block_n or 4 <= one.block_m * one.block_n / (32 * one.num_warps) <= 256)
    ]


@dataclass(frozen=True)
class Unit:
    """One choice and the calls that make it; ``run`` measures a case."""

    choice: Choice
    calls: Sequence[str]
    architecture: str
    run: Callable[[Case], list[Record]]

    def compiled_clean(self, configs: Sequence[LaunchConfig]) -> list[LaunchConfig]:
        """Those that may be run, each code once; the one in force must only compile."""
        codes, in_force = dict[tuple[Code, ...], LaunchConfig](), self.choice.config
        for config in configs:
            with suppress(Exception), forced({self.choice.kernel: config}):  # a launcher may refuse a configuration
                made = [
                    code(*one, self.architecture) for call in self.calls for one in launches(call, self.architecture)
                ]
                codes.setdefault(tuple(one for one in made if one.kernel == self.choice.kernel), config)
        reports = check_all([one for told in codes for one in told], os.cpu_count() or 0)
        bad = {one.code.config for one in reports if one.faults and (one.code.config != in_force or not one.figures)}
        if in_force in bad:
            raise ArithmeticError("the configuration in force does not compile")
        return [config for config in codes.values() if config not in bad]

    def race(self, configs: Sequence[LaunchConfig]) -> Times:
        """The times of those that give in every call what the first one gives, the configuration in force."""
        times = Times({config: [] for config in configs})
        for call in self.calls:
            forward = {launch.choice.kernel for launch, _ in launches(call, self.architecture, ["forward"])}
            mode = "forward" if self.choice.kernel in forward else "backward"
            found = self.run(workload(call, mode, self.choice.kernel, [*times]))
            taken = {record.provider: record for record in found if record.metric == "time"}
            if str(self.choice.config) not in taken:
                raise ArithmeticError("the configuration in force does not run, or gives no finite results")
            times = {config: [*every, taken[str(config)]] for config, every in times.items() if str(config) in taken}
        return times

    def search(self) -> tuple[LaunchConfig, Times]:
        """The best configuration, or the one in force, and the times of the last race."""
        best, winner, seen, times = None, self.choice.config, {self.choice.config}, Times()
        while winner != best:
            best, fresh = winner, [config for config in neighbours(winner) if config not in seen]
            seen.update(fresh)
            times = self.race(self.compiled_clean([*dict.fromkeys([self.choice.config, best, *fresh])]))
            winner = fastest(times, self.choice.config)
        return winner, times


def fastest(times: Times, in_force: LaunchConfig) -> LaunchConfig:
    """The fastest candidate, by geometric mean, that beats the one in force beyond the spread; else the one in force.

    Its 80th percentile is below the other's 20th in some call, and in no call its 20th is above the other's 80th.
    """
    ratios = {in_force: 0.0}
    for config, every in times.items():
        pairs = list(zip(every, times[in_force], strict=True))
        if any(mine.p80 < other.p20 for mine, other in pairs) and all(mine.p20 <= other.p80 for mine, other in pairs):
            ratios[config] = statistics.fmean(math.log(mine.p50 / other.p50) for mine, other in pairs)
    return min(ratios, key=ratios.__getitem__)


def add_override(path: Path, architecture: str, choice: Choice, config: LaunchConfig, origin: str) -> None:
    """Put a row into the file, whole or not at all, in place of one for the same calls; choices are then read again."""
    where = {feature: [int(value), int(value)] for feature, value in choice.shape.items()}
    row = {"dtypes": [choice.dtype], "where": where, "config": asdict(config), "origin": origin}
    content = json.loads(path.read_text()) if path.is_file() else {}
    rows = content.setdefault(architecture, {}).setdefault(choice.kernel, [])
    rows[:] = [row, *(old for old in rows if any(old.get(key) != row[key] for key in ("dtypes", "where")))]

    def write(temporary: Path) -> None:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        read_overrides(temporary)

    files.write_whole(path, write)
    forget_choices()


def gpu() -> tuple[torch.device, str]:
    """The current GPU, and its architecture; ValueError where torch finds none."""
    if not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here, expected one to measure on")
    where = torch.device("cuda")
    return where, device.architecture(torch.empty(0, device=where))


def main(arguments: Sequence[str]) -> int:
    """The command: each winner is written as soon as it is known."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench tune", description=__doc__)
    parser.add_argument("--kernel", action="append", default=[], help="an op or a kernel; may be given again")
    parser.add_argument("--out", type=Path, default=overrides_path(), help="the file to write")
    given, rows = parser.parse_args(arguments), 0
    try:
        where, architecture = gpu()
        options = RunOptions(where, torch.bfloat16, (), ())
        run, about = partial(measure, options=options, rates={}), options.environment
        measured = "measured: " + ", ".join(f"{about[key]}" for key in ("device", "torch", "triton", "commit", "date"))
        read_overrides(given.out)
        for choice, made_by in launched(lambda launch, *_: launch.choice, [architecture], given.kernel).items():
            try:
                best, times = Unit(choice, made_by, architecture, run).search()
            except ArithmeticError as error:
                print(f"{choice}: {error}", flush=True)
                continue
            every = zip(times[best], times[choice.config], made_by, strict=True)
            said = "; ".join(f"{a.words} against {b.words} ({call})" for a, b, call in every)
            if best != choice.config:
                add_override(given.out, architecture, choice, best, f"{measured}: {said}")
                rows += 1
            print(f"{choice}: {best if best != choice.config else 'stays'}, {said}", flush=True)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    finally:
        print(f"{rows} rows written: {given.out}")
    return 0
