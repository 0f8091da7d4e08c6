"""The compile matrix: what every case launches on every target, compiled once each, in parallel processes."""

import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from ..device import INTERPRETING
from ..launch_config import TABLES, LaunchConfig, Row, assumed_architecture, forced, read_table, rows
from . import cases
from .compile_matrix import TARGETS, Report, compile_launch, launch_key, report
from .launch import Launch, recording


@dataclass(frozen=True)
class Found:
    """Where a launch was found, so that another process finds it again; with another configuration, if one is given.

    ``case`` is its place in `cases.cases`, ``place`` its place among the launches of the case's pass ``call``.
    """

    kernel: str
    case: int
    call: str
    place: int
    target: str
    config: LaunchConfig | None = None


@dataclass
class Plan:
    """What to compile, by key; the lines that each stands for; and what is wrong before anything is compiled."""

    found: dict[str, Found] = field(default_factory=dict)
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    faults: list[Report] = field(default_factory=list)


def kernel_names() -> list[str]:
    """All kernels that the package's tables know."""
    return sorted({name for path in TABLES.glob("*.json") for name in read_table(path)})


def matching(kernels: Sequence[str]) -> list[str]:
    """The kernels that are named, by their own name or their op's; all of them where none is named.

    Raises:
        ValueError: there is no such kernel.
    """
    known = kernel_names()
    for name in kernels:
        if not any(_is(kernel, name) for kernel in known):
            raise ValueError(f"kernel: got {name!r}, expected an op or a kernel of these: {', '.join(known)}")
    return [kernel for kernel in known if not kernels or any(_is(kernel, name) for name in kernels)]


def _is(kernel: str, name: str) -> bool:
    return kernel == name or kernel.startswith(f"{name}.")


def plan(
    targets: Sequence[str] = TARGETS,
    kernels: Sequence[str] = (),
    chosen: Callable[[cases.Case, str], bool] | None = None,
) -> Plan:
    """Find what is to be compiled.

    Args:
        targets: Architectures.
        kernels: Kernels or ops; none means all.
        chosen: Whether a case is wanted on a target. With it, rows that no case covers are no fault.

    Raises:
        ValueError: there is no such target or kernel.
        RuntimeError: kernels are interpreted in this process, and cannot be compiled.
    """
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"target: got {target!r}, expected one of {', '.join(TARGETS)}")
    if INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, and cannot be compiled")
    wanted = set(matching(kernels))
    made, covered = Plan(), set()
    for place, case in enumerate(cases.cases()):
        for target in targets:
            if chosen is not None and not chosen(case, target):
                continue
            covered |= _add_case(made, place, case, target, wanted)
    if chosen is None:
        made.faults += [_uncovered(target, row) for target, row in _required(targets, wanted) if row not in covered]
    return made


def _add_case(made: Plan, place: int, case: cases.Case, target: str, wanted: set[str]) -> set[Row]:
    line = {"case": case.label, "dtype": _name(case.dtype)}
    taken: list[Row] = []
    try:
        for call, run in _calls(place).items():
            with assumed_architecture(target) as choices, recording() as launches:
                run()
            taken += [choice.row for choice in choices]
            for number, launch in enumerate(launches):
                key = launch_key(launch, target)
                here = line | {"origin": launch.config.origin}
                if launch.name in wanted and here not in made.lines[key]:
                    made.found.setdefault(key, Found(launch.name, place, call, number, target))
                    made.lines[key].append(here)
    except Exception as error:  # whatever a launcher raises is the finding
        if case.op not in {kernel.split(".")[0] for kernel in wanted} and wanted != set(kernel_names()):
            return set()
        text = f"the launcher fails: {type(error).__name__}: {error}"
        made.faults.append(report(case.op, target, None, error=text, **line))
    return set(taken)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _required(targets: Sequence[str], wanted: set[str]) -> Iterator[tuple[str, Row]]:
    """Rows that some case must take: those of a target's own tables, and the default ones where it has none."""
    seen = set()
    for kernel in sorted(wanted):
        for target in targets:
            every = rows(kernel, target)
            own = [row for row in every if row.table.stem == target]
            for place, row in enumerate(own or every):
                if row not in seen and not any(_hides(earlier, row) for earlier in every[:place]):
                    seen.add(row)
                    yield target, row


def _hides(earlier: Row, row: Row) -> bool:
    """Whether a row of a user's table takes every call that ``row`` of the package's table is meant for."""
    ranges = {name: (low, high) for name, low, high in row.where}
    return (
        earlier.table != row.table
        and (not earlier.dtypes or (row.dtypes != () and set(row.dtypes) <= set(earlier.dtypes)))
        and all(
            name in ranges and low <= ranges[name][0] and ranges[name][1] <= high for name, low, high in earlier.where
        )
    )


def _uncovered(target: str, row: Row) -> Report:
    where = ", ".join([*row.dtypes, *(f"{name} {low} to {high}" for name, low, high in row.where)]) or "everything"
    error = f"no case covers this row of {row.table.name}, for {where}"
    return report(row.kernel, target, row.config, error=error)


def compiled(made: Plan, jobs: int) -> Iterator[list[Report]]:
    """The reports of a plan, as they are done: one list for everything that one compilation stands for."""
    keys = list(made.found)
    for place, done in each(compile_found, list(made.found.values()), jobs):
        yield [replace(done, **line) for line in made.lines[keys[place]]]


def reports(made: Plan, jobs: int) -> list[Report]:
    """All reports of a plan, those of faults known before compiling included; see `each`."""
    return [*made.faults, *(line for lines in compiled(made, jobs) for line in lines)]


@cache
def _calls(place: int) -> cases.Calls:
    return cases.cases()[place].calls("meta")


def _recorded(found: Found) -> list[Launch]:
    run = _calls(found.case)[found.call]
    with assumed_architecture(found.target):
        # A backward pass that is the first of its case runs the forward pass for what it needs: not to be recorded.
        with recording():
            run()
        with recording() as launches:
            run()
    return launches


def launch_at(found: Found) -> Launch:
    """The launch itself."""
    launches = _recorded(found)
    launch = launches[found.place]
    if found.config is None:
        return launch
    rank = sum(earlier.name == found.kernel for earlier in launches[: found.place])
    with forced({found.kernel: found.config}):
        return [again for again in _recorded(found) if again.name == found.kernel][rank]


def compile_found(found: Found) -> Report:
    """Compile the launch that was found there; runs in a process of its own."""
    try:
        launch = launch_at(found)
    except Exception as error:  # a launcher may refuse a configuration
        return report(
            found.kernel, found.target, found.config, error=f"the launcher fails: {type(error).__name__}: {error}"
        )
    return compile_launch(launch, found.target)


def each(work: Callable[[Found], Report], items: Sequence[Found], jobs: int) -> Iterator[tuple[int, Report]]:
    """``work`` on every item, in ``jobs`` processes (0: in this one): (place of the item, result) as they are done.

    The compiler is C++ and may end its process; then the items are done one at a time, so that the one that does it is
    known: its report has the error.
    """
    if not jobs:
        yield from ((place, work(item)) for place, item in enumerate(items))
        return
    context = multiprocessing.get_context("spawn")
    pending = dict(enumerate(items))
    while pending:
        with ProcessPoolExecutor(min(jobs, len(pending)), mp_context=context) as pool:
            futures = {pool.submit(work, item): place for place, item in pending.items()}
            try:
                for future in as_completed(futures):
                    with suppress(BrokenProcessPool):
                        result = future.result()
                        del pending[futures[future]]
                        yield futures[future], result
            finally:
                pool.shutdown(cancel_futures=True)
        if pending and jobs == 1:  # done in order, so it was the first of these
            place = min(pending)
            yield place, _crashed(pending.pop(place))
        jobs = 1


def _crashed(item: Found) -> Report:
    return report(item.kernel, item.target, item.config, error="does not compile: the compiler ended its process")
