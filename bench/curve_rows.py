"""What was measured of a curve, as records that `mar-fast report` and `mar-fast bench --compare` read."""

from .curve import Curve
from .records import Record
from .runner import once
from .timing import Spread

SUITE = "curve"


def rows(curve: Curve) -> list[Record]:
    """The records of a curve: per setting time, throughput, memory, multiply-adds of a view, agreement, error."""
    made = []
    for point in curve.points:
        values: list[tuple[str, str, Spread | float | None]] = [("error", "1", point.difference)]
        if not point.correct:
            values.append(("withheld", "1", 0.0))
        if point.latency is not None:
            time, views = point.latency, curve.timed_views
            rate = Spread(views / time.p80, views / time.p50, views / time.p20, time.n)
            values = [("time", "s", time), ("throughput", "clips/s", rate), *values]
        values += [
            ("peak memory", "B", point.peak_memory),
            ("multiply-adds", "1", point.multiply_adds),
            ("top-1 agreement", "1", point.top1_agreement),
            ("mean KL", "nat", point.kl),
        ]
        provider = f"mar_fast, {point.kind}" + (f", {point.passes} views" if point.passes > 1 else "")
        for metric, unit, value in values:
            if value is None or value == float("inf"):
                continue
            made.append(
                Record.of(
                    curve.environment, value if isinstance(value, Spread) else once(value),
                    suite=SUITE, case=f"{curve.model}, batch {curve.timed_views}", provider=provider,
                    mode="inference", metric=metric, unit=unit, dtype=curve.dtype, x=point.keep,
                    note="" if point.correct else "wrong: differs from the reference beyond rounding",
                )
            )  # fmt: skip
    return made
