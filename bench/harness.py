"""The harness: providers of a case are made ready, checked against float64, timed in turn; results are records.

Nothing that is wrong or cannot run here gets a time; a record says why.
"""

import functools
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mar_fast import machine
from mar_fast.checkpoint.compare import relative
from mar_fast.eval.measured import OnStep, part
from mar_fast.kernels import checks
from mar_fast.timing import Spread, interleaved

from . import records
from .case import Case, Prepared, RunOptions
from .records import FLOOR, NO_TIME, Record, in_words
from .suites import SUITES

# Usual sizes, and clips a call. Quick runs take the small model: all of them together take minutes.
USUAL = {"cpu": (("base",), (1, 4)), "cuda": (("base", "large"), (1, 8, 32)), "quick": (("small",), (1,))}
# Others may differ from float64 by twice as much as the baseline, and by this more.
SLACK = 1e-3

PRINT = functools.partial(print, flush=True)


def chosen_suites(names: Sequence[str]) -> list[str]:
    """The suites that are named; "all" stands for those whose packages are installed here.

    Raises:
        ValueError: there is no such suite, or none is named.
        ModuleNotFoundError: one that is named needs a package that is not installed.
    """
    known = f"one or more of {', '.join(SUITES)}, or all"
    if not names:
        raise checks.bad("suite", "none", known)
    lacks = {name: suite.needs for name, suite in SUITES.items() if suite.needs and find_spec(suite.needs) is None}
    for name in names:
        if name != "all" and name not in SUITES:
            raise checks.bad("suite", repr(name), known)
        if name in lacks:
            raise ModuleNotFoundError(f"suite {name}: {lacks[name]} is not installed: pip install 'mar-fast[hf]'")
    return [name for name in SUITES if name not in lacks] if "all" in names else list(dict.fromkeys(names))


def ceilings(device: torch.device, quick: bool = False) -> dict[str, float]:
    """What this machine can do at best, measured: FLOP/s of matrix products by dtype, bytes/s of "copy"."""
    dtypes = ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    rates = machine.matmul_rates(device, dtypes, budget=1.5 if quick else 6.0)
    rates["copy"] = machine.copy_rate(device, budget=1.0 if quick else 3.0)
    return rates


def options_for(
    *,
    device: str = "auto",
    dtype: str = "auto",
    sizes: Sequence[str] = (),
    batches: Sequence[int] = (),
    quick: bool = False,
    seconds: float | None = None,
    clip: Path | None = None,
) -> tuple[RunOptions, str, dict[str, float]]:
    """The options of a run, why it has its dtype, and the ceilings of the machine, which are measured for it.

    The arguments are the fields of `RunOptions`, by name; dtype "auto" is bf16 where its products are clearly faster
    here. Without sizes or batches the `USUAL` ones are taken, without seconds 12, in a quick run 1.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    if seconds is not None:
        checks.positive("seconds", seconds)
    for batch in batches:
        checks.whole("batch", batch)
    if clip is not None and not clip.is_file():
        raise FileNotFoundError(f"clip: got {str(clip)!r}, expected an existing video file")
    where = machine.device(device)
    rates = ceilings(where, quick)
    reason = "asked for"
    if dtype == "auto":
        dtype, reason = machine.choose_dtype(where, rates)
    usual_sizes, usual_batches = USUAL["quick" if quick else where.type]
    options = RunOptions(
        device=where,
        dtype=machine.DTYPES[dtype],
        sizes=tuple(sizes) or usual_sizes,
        batches=tuple(batches) or usual_batches,
        quick=quick,
        seconds=seconds or (1.0 if quick else 12.0),
        clip=clip,
    )
    return options, reason, rates


def run(
    names: Sequence[str],
    options: RunOptions,
    rates: Mapping[str, float],
    *,
    out: Path | None = None,
    say: Callable[[str], None] = PRINT,
    on_step: OnStep = lambda what, share: None,
    into: list[Record] | None = None,
    chosen: Callable[[Case], Case | None] | None = None,
) -> list[Record]:
    """Run suites. After every case the file at ``out`` is written anew, whole, so an interrupted run keeps its cases.

    Args:
        names: Suites, see `chosen_suites`.
        options: Where, in which dtype, how much.
        rates: Ceilings, as `options_for` measured them.
        out: A file for the records, JSON lines; None keeps them in memory only.
        say: Takes the table of every case as it is done.
        on_step: Told what is going on and which share of the suite is done.
        into: Takes the records as they are made, so that they are there after an interruption; None makes a new list.
        chosen: Gets each case of a suite and gives the one to measure in its place, None for none; None measures all.
    """
    found = into if into is not None else []

    def keep(made: list[Record]) -> None:
        found.extend(made)
        if out is not None:
            records.write(out, found)

    keep(_ceilings(rates, options))
    for name in names:
        suite, own = SUITES[name], list[Record]()
        # Not as a list: a case holds its models and operands once it has been measured.
        total = sum(1 for _ in suite.cases(options))
        for number, offered in enumerate(suite.cases(options)):
            case = chosen(offered) if chosen else offered
            if case is None:
                continue
            made = measure(case, options, rates, part(on_step, number / total, 1 / total))
            say(text(made))
            own += made
            keep(made)
        concluded = suite.conclude(options, own)
        if concluded:
            say(figures(concluded))
            keep(concluded)
    return found


def _ceilings(rates: Mapping[str, float], options: RunOptions) -> list[Record]:
    environment = options.environment
    note = ", ".join(f"{key} {environment[key]}" for key in ("threads", "clocks") if environment.get(key))
    where = {name: dict(case="matrix product", unit="FLOP/s", dtype=name) for name in rates}
    where["copy"] = dict(case="copy", unit="B/s")
    of_machine: dict[str, Any] = dict(suite="machine", provider="machine", metric="rate", note=note)
    return [Record.of(environment, rate, **of_machine, **where[name]) for name, rate in rates.items()]


def failures(found: Sequence[Record]) -> int:
    """In how many cases a result of ours is wrong or does not run."""
    return len({record.workload for record in found if record.ours and record.metric in NO_TIME})


def measure(
    case: Case, options: RunOptions, rates: Mapping[str, float], on_step: OnStep = lambda what, share: None
) -> list[Record]:
    """All providers of a case: made ready, checked against the expected outputs, timed in turn, their memory measured.

    Returns:
        By provider: "time" in seconds, "throughput", "peak memory" in bytes, "error" (the largest norm of a difference
        to the expected outputs, relative to theirs), "compile time"; or "unavailable" or "withheld" with the reason.
        Of provider "roofline": the least work, and the time it takes at this machine's ceilings.
    """
    torch.compiler.reset()  # a function is compiled for a few shapes only, all cases together
    found: list[Record] = []
    label = f"{case.suite}, {case.name}"
    positions = {provider.name: case.x if provider.x is None else provider.x for provider in case.providers}
    positions[FLOOR] = case.x
    of_case = dict(suite=case.suite, case=case.name, mode=case.mode, dtype=case.dtype_name, baseline=case.baseline)

    def keep(name: str, metric: str, value: Spread | float, unit: str = "1", *, note: str = "") -> None:
        names = dict(provider=name, metric=metric, unit=unit, x=positions[name], note=note)
        found.append(Record.of(options.environment, value, **of_case, **names))

    def lose(name: str, metric: str, note: str) -> None:
        keep(name, metric, Spread(0, 0, 0, 0), note=note)

    expected = functools.cache(lambda outputs: outputs())
    ready: dict[str, Prepared] = {}
    limit = case.tolerance
    # The baseline goes first: it says how much others may differ.
    order = sorted(case.providers, key=lambda provider: provider.name != case.baseline)
    for number, provider in enumerate(order):
        on_step(f"{label}: preparing {provider.name}", 0.5 * number / len(order))
        want = expected(provider.expected or case.expected) if provider.checked else []
        gc.collect()
        try:
            prepared = provider.prepare()
            error = difference(prepared.outputs(), want) if provider.checked else None
        except Exception as failure:  # a peer that cannot run here is unavailable, whatever it raises
            lose(provider.name, "unavailable", reason(failure))
            continue
        if prepared.compile_seconds is not None:
            keep(provider.name, "compile time", prepared.compile_seconds, "s")
        if error is not None:
            if error < math.inf:
                keep(provider.name, "error", error)
            # A provider that computes another function than the case's is not held to the baseline's rounding.
            allowed = case.tolerance if provider.expected else limit
            if error > allowed:
                note = f"wrong: differs from float64 by {error:.1e}, {allowed:.1e} is allowed"
                lose(provider.name, "withheld", note)
                continue
            if provider.name == case.baseline:
                limit = min(limit, 2 * error + SLACK)
        ready[provider.name] = prepared
    expected.cache_clear()
    for name in list(ready):  # a check takes few clips: all of them may take too much memory
        try:
            ready[name].run()
        except Exception as failure:
            lose(name, "unavailable", reason(failure))
            del ready[name]
    runs = {name: ready[name].run for name in positions if name in ready}
    if runs:
        times = interleaved(
            runs,
            options.device,
            budget=case.share * options.seconds,
            warm=1,
            max_rounds=200,
            min_rounds=3 if options.quick else 5,
            on_round=lambda share: on_step(f"{label}: timing {len(runs)} in turn", 0.5 + 0.45 * share),
        )
        for name, time in times.items():
            on_step(f"{label}: memory of {name}", 0.95)
            keep(name, "time", time, "s")
            if case.clips:
                clips = Spread(case.clips / time.p80, case.clips / time.p50, case.clips / time.p20, time.n)
                keep(name, "throughput", clips, "clips/s")
            memory = machine.peak_memory(runs[name], options.device)
            if memory is not None:
                keep(name, "peak memory", memory, "B")
    if case.floor is not None:
        keep(FLOOR, "multiply-adds", case.floor.multiply_adds)
        keep(FLOOR, "bytes moved", case.floor.bytes_moved, "B")
        if case.dtype_name in rates:
            keep(FLOOR, "floor", case.floor.floor_seconds(rates[case.dtype_name], rates["copy"]), "s")
    runs, ready = {}, {}
    gc.collect()
    if options.on_gpu:
        torch.cuda.empty_cache()
    return [record for name in positions for record in found if record.provider == name]


def reason(error: Exception) -> str:
    """Why a provider cannot run here, in one line: the first one of what it raised, which may have none."""
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first[:120]}"


def difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest norm of a difference over that of what is expected, in float64; infinity for NaN or another shape."""
    return max(relative(one, other) for one, other in zip(got, want, strict=True))


def text(found: Sequence[Record]) -> str:
    """A case in plain text: a line a provider, time with spread, speed-up over the baseline, share of the floor."""
    first, p50 = found[0], {(record.provider, record.metric): record.p50 for record in found}
    base, floor = p50.get((first.baseline, "time")), p50.get((FLOOR, "floor"))
    lines = [f"{first.suite}: {first.case}, x = {first.x:g}, {first.mode}, {first.dtype}"]
    for provider, own in records.grouped(found, lambda record: record.provider).items():
        at = {record.metric: record for record in own}
        parts = [f"{metric}: {at[metric].note}" for metric in NO_TIME if metric in at]
        if "time" in at:
            time = at["time"]
            parts.append(f"{time.words:>10} ({time.spread})")
            parts += [f"{base / time.p50:6.2f}x"] if base else []
            parts += [f"{floor / time.p50:4.0%} of floor"] if floor else []
            parts += [f"{name} {at[name].words}" for name in ("peak memory", "error", "compile time") if name in at]
        if parts:
            lines.append(f"  {provider:36} {'  '.join(parts)}")
    said = f"; floor: {in_words(floor, 's')}" if floor else ""
    lines.append(f"  (speed-up over {first.baseline}{said})")
    return "\n".join(lines)


def figures(found: Sequence[Record]) -> str:
    """Figures that are no times, a line for each case, provider and metric, by x."""
    lines = []
    for (case, provider, metric), own in records.grouped(found, lambda r: (r.case, r.provider, r.metric)).items():
        values = (
            record.words + (f" at {record.x:g}" if record.x else "") + (f" ({record.note})" if record.note else "")
            for record in own
        )
        lines.append(f"{case}, {provider}: {metric} {', '.join(values)}")
    return "\n".join(lines)
