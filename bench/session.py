"""A run of suites: ceilings, cases, findings, and a results file that is complete at every moment."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from mar_fast import machine
from mar_fast.kernels import checks

from . import records, runner
from .case import Case, Setting
from .suites import SUITES

# Quick runs take the small model: the whole of them must not take longer than a coffee.
CPU_SIZES, GPU_SIZES, QUICK_SIZES = ("base",), ("base", "large"), ("small",)
CPU_BATCHES, GPU_BATCHES, QUICK_BATCHES = (1, 4), (1, 8, 32), (1,)


@dataclass
class Session:
    """What came of a run so far.

    ``wrong`` counts cases in which one of our own results was withheld or did not run.
    """

    rows: list[records.Record] = field(default_factory=list)
    wrong: int = 0


def chosen_suites(names: Sequence[str]) -> list[str]:
    """The suites that are named; "all" is every one that has here what it needs.

    Raises:
        ValueError: there is no such suite, or none is named.
        ModuleNotFoundError: one that is named needs a package that is not installed.
    """
    known = f"one or more of {', '.join(SUITES)}, or all"
    if not names:
        raise checks.bad("suite", "none", known)
    for name in names:
        if name != "all" and name not in SUITES:
            raise checks.bad("suite", repr(name), known)
    lacks = {name: suite.needs for name, suite in SUITES.items() if suite.needs and find_spec(suite.needs) is None}
    for name in names:
        if name in lacks:
            raise ModuleNotFoundError(f"suite {name}: {lacks[name]} is not installed: pip install 'mar-fast[hf]'")
    return [name for name in SUITES if name not in lacks] if "all" in names else list(dict.fromkeys(names))


def setting_for(
    *,
    device: str = "auto",
    dtype: str = "auto",
    sizes: Sequence[str] = (),
    batches: Sequence[int] = (),
    quick: bool = False,
    seconds: float | None = None,
    clip: Path | None = None,
) -> tuple[Setting, str, dict[str, float]]:
    """The setting of a run, why it has its dtype, and the ceilings of the machine, which are measured for it.

    Args:
        device: "cpu", "cuda" or "auto".
        dtype: "bf16", "fp16", "fp32", or "auto": bf16 where its products are clearly faster here.
        sizes: Encoders; none means base, and on a GPU large too, or small for a quick run.
        batches: Clips a call; none means 1 and 4, on a GPU 1, 8 and 32, or 1 for a quick run.
        quick: Few and small cases.
        seconds: For the timed rounds of a case; None is 12, or 1 for a quick run.
        clip: A video file for the pipeline.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    if seconds is not None:
        checks.positive("seconds", seconds)
    for batch in batches:
        if not isinstance(batch, int) or batch < 1:
            raise checks.bad("batch", batch, "a whole number, 1 or more")
    if clip is not None and not clip.is_file():
        raise FileNotFoundError(f"clip: got {str(clip)!r}, expected an existing video file")
    where = machine.device(device)
    on_gpu = where.type == "cuda"
    rates = runner.ceilings(where, quick)
    if dtype == "auto":
        dtype, reason = machine.choose_dtype(where, rates)
    else:
        reason = "asked for"
    usual = (GPU_SIZES, GPU_BATCHES) if on_gpu else (CPU_SIZES, CPU_BATCHES)
    default_sizes, default_batches = (QUICK_SIZES, QUICK_BATCHES) if quick else usual
    setting = Setting(
        device=where, dtype=machine.DTYPES[dtype], sizes=tuple(sizes) or default_sizes,
        batches=tuple(batches) or default_batches, quick=quick,
        budget=seconds if seconds is not None else (1.0 if quick else 12.0), clip=str(clip) if clip else None,
    )  # fmt: skip
    return setting, reason, rates


def run(
    names: Sequence[str],
    setting: Setting,
    rates: dict[str, float],
    *,
    out: Path | None = None,
    say: Callable[[str], None] = print,
    on_step: runner.Step = runner.quiet,
    into: Session | None = None,
    chosen: Callable[[Case], Case | None] | None = None,
) -> Session:
    """Run suites. After every case the file at ``out`` is written anew, whole, so an interrupted run keeps its cases.

    Args:
        names: Suites, see `chosen_suites`.
        setting: Where, in which dtype, how much.
        rates: Ceilings, as `setting_for` measured them.
        out: A file for the records, JSON lines; None keeps them in memory only.
        say: Takes the table of every case as it is done.
        on_step: Told what is going on and which share of the suite is done.
        into: Takes what is found as it is found, so that it is there also after an interruption; None makes a new one.
        chosen: Gives the case that is measured in place of a suite's, or None to leave that out.
    """
    session = into if into is not None else Session()
    environment = machine.environment(setting.device)

    def keep(rows: Sequence[records.Record]) -> None:
        session.rows += rows
        if out is not None:
            records.write(out, session.rows)

    keep(list(runner.finding_rows("machine", runner.ceiling_findings(rates, environment), environment)))
    for name in names:
        suite, outcomes = SUITES[name], []
        # Not as a list: a case holds its models and operands once it has been measured.
        total = sum(1 for _ in suite.cases(setting))
        for number, offered in enumerate(suite.cases(setting)):
            case = offered if chosen is None else chosen(offered)
            if case is None:
                continue
            step = _within(on_step, name, number, total)
            outcome = runner.measure(case, setting, rates, step)
            say(runner.text(outcome))
            session.wrong += outcome.wrong
            outcomes.append(outcome)
            keep(list(runner.rows(outcome, environment)))
        findings = suite.conclude(setting, outcomes)
        if findings:
            say(suite.describe(findings))
        keep(list(runner.finding_rows(name, findings, environment)))
    return session


def _within(on_step: runner.Step, suite: str, number: int, total: int) -> runner.Step:
    return lambda what, share: on_step(f"{suite} {number + 1} of {total}: {what}", (number + share) / total)
