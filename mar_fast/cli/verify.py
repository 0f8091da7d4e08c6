"""mar-fast verify: whether two checkpoints are the same model."""

import math
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from ..checkpoint import compare
from .common import CHECK_FAILED, errors, print_json, results
from .loading import Given, Position, load


def verify(
    first: Annotated[str, typer.Argument(help="A file, a Hugging Face folder or a hub id.")],
    second: Annotated[str, typer.Argument(help="Another one, of any layout.")],
    tolerance: Annotated[float, typer.Option(help="Largest relative difference of a layer that passes.")] = 1e-5,
    ratio: Annotated[float, typer.Option(help="Share of masked tokens, the same for both.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the random clip and mask.")] = 0,
    given: Given = None,
    position: Position = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Run the same random clip through two checkpoints and compare every layer.

    Exit code 1 if a layer differs by more than the tolerance, or is in one of them only.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"--tolerance: got {tolerance}, expected a number, 0 or more")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed: got {seed}, expected a whole number from 0 to 2^63 - 1")
    models = [load(source, given, position=position) for source in (first, second)]
    found = compare(*models, ratio=ratio, seed=seed)
    within = found.within(tolerance)
    if as_json:
        print_json({"first": first, "second": second, "tolerance": tolerance, "within": within, **asdict(found)})
    else:
        table = Table(title=f"{second} against {first}", title_justify="left")
        table.add_column("layer")
        table.add_column("relative difference", justify="right")
        for layer in found.layers:
            beyond = not layer.difference <= tolerance
            table.add_row(layer.layer, f"{layer.difference:.1e}", style="red" if beyond else "")
        for where, names in (("first", found.only_first), ("second", found.only_second)):
            for name in names:
                table.add_row(name, f"only in the {where}", style="red")
        results.print(table)
    if not within:
        errors.print(f"error: not the same model within {tolerance:.0e}", style="red", highlight=False)
        raise typer.Exit(CHECK_FAILED)
