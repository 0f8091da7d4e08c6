"""The report: records as one Markdown page with tables and pictures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mar_fast import files
from mar_fast.eval import plot

from . import records, tables
from .pictures import Picture, pictures
from .records import Record

PAGE = "report.md"
ABOUT = """# Measurements

Times are medians over interleaved rounds, p20 - p80 the 20th and 80th percentile. A speed-up is over the baseline of
the case, which has 1.00x; "over its dense" is over the same provider at keep ratio 1, "of the step" over the step
above. The floor is the least time by arithmetic at this machine's own measured ceilings.
"""


def write(
    found: list[Record],
    out: Path,
    *,
    force: bool = False,
    baseline: str | None = None,
    on_step: Callable[[str, float], None] = lambda what, share: None,
) -> list[Path]:
    """Write the page and its pictures.

    Args:
        found: Records of any suites, devices and dates; of what was measured several times the newest is taken.
        out: The folder.
        force: Replace files that are there.
        baseline: The provider that speed-ups are over; by default each case's own.
        on_step: Told what is going on and which share of the whole is done.

    Returns:
        The files, the page first. It is written last, so that it never names a picture that is not there.

    Raises:
        FileExistsError: a file is there and ``force`` is not set.
        ModuleNotFoundError: pandas or matplotlib is not installed.
        ValueError: no time is of the provider ``baseline``.
    """
    providers = dict.fromkeys(record.provider for record in found if record.metric == "time")
    if baseline is not None and baseline not in providers:
        raise ValueError(f"baseline: got {baseline!r}, expected one of {', '.join(providers)}")
    latest = [replace(one, baseline=baseline or one.baseline) for one in records.newest(found)]
    plot.new_figure()  # without matplotlib, say so before anything is written
    planned = pictures(latest)
    text = page(latest, planned)
    paths = [out / PAGE, *(out / picture.name for picture in planned)]
    files.may_write(paths, force)
    for number, picture in enumerate(planned):
        on_step(f"drawing {picture.name}", number / len(planned))
        picture.draw(out / picture.name)
    files.write_whole(paths[0], lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return paths


def page(found: list[Record], planned: list[Picture]) -> str:
    """The page as Markdown: for each device its suites, for each suite its tables and pictures."""
    table = tables.frame(found)
    lines = [ABOUT, *tables.origins(table), ""]
    for device, own in table.groupby("device", sort=False):
        lines += [f"## {tables.escaped(device)}", ""]
        for suite, group in own.groupby("suite", sort=False):
            lines += [f"### {tables.escaped(suite)}", ""]
            for mode, made in tables.of_suite(group):
                lines += [*([f"#### {tables.escaped(mode)}", ""] if mode else []), *made]
            own_pictures = [picture.name for picture in planned if (picture.suite, picture.device) == (suite, device)]
            lines += [f"![{name}]({name})\n" for name in own_pictures]
    return "\n".join(lines).rstrip() + "\n"
