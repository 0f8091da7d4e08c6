"""Runs cases: prepares every candidate, checks it, times all in turn, measures memory; and what came of it in rows."""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mar_fast import machine
from mar_fast.timing import Spread, interleaved

from .case import Candidate, Case, Prepared, Setting
from .records import Record, is_ours

Step = Callable[[str, float], None]


def quiet(what: str, share: float) -> None:
    """A `Step` that shows nothing."""


@dataclass
class Result:
    """What came of one candidate: figures, or in ``absent`` or ``withheld`` why there are none.

    Times in seconds, memory in bytes, ``error`` is the largest norm of a difference to the truth, relative to it.
    """

    provider: str
    absent: str = ""
    withheld: str = ""
    error: float | None = None
    compile_seconds: float | None = None
    time: Spread | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Finding:
    """A figure that is no measurement of one call: a count, a fitted exponent, a verdict."""

    case: str
    provider: str
    metric: str
    unit: str
    value: float
    x: float = 0.0
    mode: str = ""
    dtype: str = ""
    note: str = ""


@dataclass
class Outcome:
    """All results of a case, and the ceilings of the machine that they are held against."""

    case: Case
    results: list[Result]
    rates: Mapping[str, float]
    _by_name: dict[str, Result] = field(init=False)

    def __post_init__(self) -> None:
        self._by_name = {result.provider: result for result in self.results}

    def of(self, provider: str) -> Result | None:
        """The result of one provider, if it took part."""
        return self._by_name.get(provider)

    @property
    def baseline(self) -> Result | None:
        """What speed-ups are given over."""
        return self.of(self.case.baseline or self.results[0].provider)

    @property
    def floor(self) -> float | None:
        """Seconds that the job takes at the ceilings of this machine."""
        if self.case.floor is None or self.case.dtype_name not in self.rates:
            return None
        return self.case.floor.at(self.rates[self.case.dtype_name], self.rates["copy"])

    @property
    def wrong(self) -> bool:
        """Whether one of our own results is wrong or does not run."""
        return any(
            (result.withheld or result.absent) and is_ours(self.case.suite, result.provider) for result in self.results
        )


def ceilings(device: torch.device, quick: bool = False) -> dict[str, float]:
    """What this machine can do at best, measured: FLOP/s of matrix products by dtype, bytes/s of "copy"."""
    dtypes = ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    rates = machine.matmul_rates(device, dtypes, budget=1.5 if quick else 6.0)
    rates["copy"] = machine.copy_rate(device, budget=1.0 if quick else 3.0)
    return rates


def measure(case: Case, setting: Setting, rates: Mapping[str, float], on_step: Step = quiet) -> Outcome:
    """All candidates of a case: made ready, checked against the truth, timed in turn, their memory measured.

    Nothing that is wrong or cannot run here gets a time; the result says why.
    """
    torch.compiler.reset()  # a function is compiled for a few shapes only, all cases together
    results = {candidate.provider: Result(candidate.provider) for candidate in case.candidates}
    ready: dict[str, Prepared] = {}
    truths: dict[int, list[Tensor]] = {}
    # The yardstick goes first: it says how much others may differ.
    order = sorted(case.candidates, key=lambda candidate: candidate.provider != case.yardstick)
    for number, candidate in enumerate(order):
        on_step(f"{case.name}: preparing {candidate.provider}", 0.5 * number / len(order))
        result = results[candidate.provider]
        prepared = _prepared(candidate, result)
        if prepared is None:
            continue
        if candidate.checked:
            yardstick = results[case.yardstick].error if case.yardstick in results else None
            _check(case, candidate, prepared, result, yardstick, truths)
        if not result.withheld and not result.absent:
            ready[candidate.provider] = prepared
        gc.collect()
    truths.clear()
    for provider in list(ready):  # what takes the few clips of a check may not take all of them, for memory say
        try:
            ready[provider].run()
        except Exception as error:
            results[provider].absent = reason(error)
            del ready[provider]
    runs = {name: ready[name].run for name in results if name in ready}
    if runs:
        times = interleaved(
            runs, setting.device, budget=case.share * setting.budget, warm=1, max_rounds=200,
            min_rounds=3 if setting.quick else 5,
            on_round=lambda share: on_step(f"{case.name}: timing {len(runs)} in turn", 0.5 + 0.45 * share),
        )  # fmt: skip
        for name, run in runs.items():
            on_step(f"{case.name}: memory of {name}", 0.95)
            results[name].time = times[name]
            results[name].memory = machine.peak_memory(run, setting.device)
    outcome = Outcome(case.emptied(), list(results.values()), rates)
    ready.clear()
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()
    return outcome


def reason(error: Exception) -> str:
    """Why a candidate cannot run here, in one line: the first one of what it raised, which may have none."""
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first[:120]}"


def _prepared(candidate: Candidate, result: Result) -> Prepared | None:
    try:
        prepared = candidate.prepare()
    except Exception as error:  # a peer that cannot run here is absent, whatever it raises
        result.absent = reason(error)
        return None
    result.compile_seconds = prepared.compile_seconds
    return prepared


def _check(
    case: Case, candidate: Candidate, prepared: Prepared, result: Result, yardstick: float | None,
    truths: dict[int, list[Tensor]],
) -> None:  # fmt: skip
    truth = candidate.truth or case.truth
    if id(truth) not in truths:
        truths[id(truth)] = truth()
    try:
        outputs = prepared.outputs()
    except Exception as error:
        result.absent = reason(error)
        return
    differences = [relative(got, want) for got, want in zip(outputs, truths[id(truth)], strict=True)]
    result.error = max(differences)
    allowed = case.bound
    # What computes another function than the yardstick rounds in its own way.
    if yardstick is not None and candidate.truth is None and candidate.provider != case.yardstick:
        allowed = min(allowed, 2 * yardstick + case.slack)
    if not result.error <= allowed:
        result.withheld = f"wrong: differs from float64 by {result.error:.1e}, {allowed:.1e} is let pass"


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of ``want``, in float64; NaN counts as infinitely far."""
    ratio = float((got.detach().double() - want.double()).norm() / want.double().norm())
    return ratio if ratio == ratio else float("inf")


def rows(outcome: Outcome, environment: Mapping[str, str | int]) -> Iterator[Record]:
    """The records of a case."""
    case = outcome.case

    places = {candidate.provider: candidate.x for candidate in case.candidates if candidate.x is not None}

    def row(provider: str, metric: str, unit: str, spread: Spread, note: str = "", x: float | None = None) -> Record:
        return Record.of(
            environment, spread, suite=case.suite, case=case.name, provider=provider, mode=case.mode, metric=metric,
            unit=unit, dtype=case.dtype_name, x=places.get(provider, case.x) if x is None else x, note=note,
        )  # fmt: skip

    for result in outcome.results:
        why = result.absent or result.withheld
        if why:
            yield row(result.provider, "absent" if result.absent else "withheld", "1", Spread(0, 0, 0, 0), why)
        if result.time is not None:
            time = result.time
            yield row(result.provider, "time", "s", time)
            if case.clips:
                clips = Spread(case.clips / time.p80, case.clips / time.p50, case.clips / time.p20, time.n)
                yield row(result.provider, "throughput", "clips/s", clips)
        for metric, unit, value in (
            ("peak memory", "B", result.memory if result.time is not None else None),
            ("error", "1", result.error),
            ("compile time", "s", result.compile_seconds),
        ):
            if value is not None and value != float("inf"):
                yield row(result.provider, metric, unit, once(value))
    if case.floor is not None:
        for x in places.values() or (case.x,):
            yield row("roofline", "multiply-adds", "1", once(case.floor.multiply_adds), x=x)
            yield row("roofline", "bytes moved", "B", once(case.floor.bytes_moved), x=x)
            if outcome.floor is not None:
                yield row("roofline", "floor", "s", once(outcome.floor), x=x)


def finding_rows(
    suite: str, findings: Iterable[Finding], environment: Mapping[str, str | int]
) -> Iterator[Record]:  # fmt: skip
    """The records of findings."""
    for found in findings:
        yield Record.of(
            environment, once(found.value), suite=suite, case=found.case, provider=found.provider, mode=found.mode,
            metric=found.metric, unit=found.unit, dtype=found.dtype, x=found.x, note=found.note,
        )  # fmt: skip


def ceiling_findings(rates: Mapping[str, float], environment: Mapping[str, str | int]) -> list[Finding]:
    """The machine's ceilings as findings of suite "machine"."""
    note = ", ".join(f"{key} {environment[key]}" for key in ("threads", "clocks") if environment.get(key))
    return [
        Finding("copy", "machine", "rate", "B/s", rate, note=note) if name == "copy"
        else Finding("matrix product", "machine", "rate", "FLOP/s", rate, dtype=name, note=note)
        for name, rate in rates.items()
    ]  # fmt: skip


def once(value: float) -> Spread:
    """A single figure as a spread."""
    return Spread(float(value), float(value), float(value), 1)


def text(outcome: Outcome) -> str:
    """A table of one case in plain text: time with spread, speed-up over the baseline, share of the floor, error."""
    case = outcome.case
    lines = [f"{case.suite}: {case.name}, x = {case.x:g}, {case.mode or 'one call'}, {case.dtype_name}"]
    base = outcome.baseline
    for result in outcome.results:
        if result.time is None:
            lines.append(f"  {result.provider:36} {'absent: ' + result.absent if result.absent else result.withheld}")
            continue
        time = result.time
        parts = [f"  {result.provider:36} {seconds(time.p50):>10} ({seconds(time.p20)} - {seconds(time.p80)})"]
        if base is not None and base.time is not None:
            parts.append(f"{base.time.p50 / time.p50:6.2f}x")
        if outcome.floor is not None:
            parts.append(f"{outcome.floor / time.p50:4.0%} of floor")
        if result.memory is not None:
            parts.append(f"{result.memory / 1e6:7.0f} MB")
        if result.error is not None:
            parts.append(f"error {result.error:.0e}")
        if result.compile_seconds is not None:
            parts.append(f"compiled in {result.compile_seconds:.0f} s")
        lines.append("  ".join(parts))
    if base is not None:
        floor = f"; floor: {seconds(outcome.floor)}" if outcome.floor else ""
        lines.append(f"  (speed-up over {base.provider}{floor})")
    return "\n".join(lines)


def findings_text(findings: list[Finding]) -> str:
    """Findings, a line each."""
    return "\n".join(
        f"{found.case}, x = {found.x:g}, {found.provider}: {found.metric} {found.value:.3g}"
        + (f" ({found.note})" if found.note else "")
        for found in findings
    )


def seconds(value: float | None) -> str:
    """A time in words: s, ms or us."""
    if value is None:
        return "-"
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:.0f} {unit}"
    return f"{value / 1e-6:.3g} us"
