"""mar-fast checkpoint verify: whether two checkpoints are the same model."""

import math
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from ..checkpoint import compare
from ..kernels import checks
from . import common, options


def verify(
    first: options.Source,
    second: Annotated[str, typer.Argument(help="Another one, in any layout.")],
    tolerance: Annotated[float, typer.Option(help="Largest relative difference of a layer that passes.")] = 1e-5,
    ratio: Annotated[float, typer.Option(help="Share of masked patches, the same for both.")] = 0.5,
    seed: options.Seed = 0,
    given: options.Given = None,
    position: options.Position = None,
    as_json: options.Json = False,
) -> None:
    """Run the same random clip through two checkpoints and compare every layer.

    Exit code 1 if a layer differs by more than the tolerance, or is in one of them only.
    """
    if not 0 <= tolerance < math.inf:
        raise checks.bad("--tolerance", tolerance, "a number, 0 or more")
    models = [options.load(source, given, position=position) for source in (first, second)]
    found = compare(*models, ratio=ratio, seed=seed)
    within = found.within(tolerance)
    if as_json:
        # JSON has no infinity.
        layers = [{"layer": layer, "difference": it if it < math.inf else None} for layer, it in found.layers.items()]
        told = {"first": first, "second": second, "tolerance": tolerance, "within": within}
        common.print_json({**told, **asdict(found), "layers": layers})
    else:
        table = Table("layer", title=f"{second} against {first}", title_justify="left")
        table.add_column("relative difference", justify="right")
        for layer, difference in found.layers.items():
            table.add_row(layer, f"{difference:.1e}", style="" if difference <= tolerance else "red")
        for where, names in (("first", found.only_first), ("second", found.only_second)):
            for name in names:
                table.add_row(name, f"only in the {where}", style="red")
        common.results.print(table)
    if not within:
        common.show_error(f"not the same model within {tolerance:.0e}")
        raise typer.Exit(common.CHECK_FAILED)
