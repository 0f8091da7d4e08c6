"""``python -m mar_fast.bench SUITE...``: the suites with no more than torch; ``mar-fast bench`` adds comforts."""

import argparse
import importlib
import sys
from pathlib import Path

from mar_fast import files, machine
from mar_fast.config import SIZES
from mar_fast.machine import DTYPES

from . import harness
from .suites import SUITES

# Commands with options of their own.
COMMANDS = ("fp8", "gpu", "host", "kept", "matrix", "motions", "tune")


def main(arguments: list[str] | None = None) -> int:
    """Run suites, or a command of its own; exit code 1 if one of our own results is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] and arguments[0] in COMMANDS:
        # Imported only here: they need Triton, or films.
        command = importlib.import_module(f".{arguments[0]}", __package__)
        return int(command.main(arguments[1:]))
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench", description=__doc__)
    parser.add_argument(
        "suites", nargs="+", metavar="SUITE", help=f"{', '.join(SUITES)}, or all; alone: {', '.join(COMMANDS)}"
    )
    parser.add_argument("--out", type=Path, help="write the measurements there, as JSON lines")
    parser.add_argument("--force", action="store_true", help="replace that file")
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--size", action="append", default=[], choices=SIZES, help="may be given again")
    parser.add_argument("--batch", action="append", type=int, default=[], help="clips a call; may be given again")
    parser.add_argument("--seconds", type=float, help="for the timed rounds of a case")
    parser.add_argument("--threads", type=int, help="of a CPU; usually as many as PyTorch chooses")
    parser.add_argument("--clip", type=Path, help="a video file for the pipeline")
    given = vars(parser.parse_args(arguments))
    suites, out, force, threads = (given.pop(name) for name in ("suites", "out", "force", "threads"))
    try:
        names = harness.chosen_suites(suites)
        files.may_write([out] if out else [], force)
        with machine.threads(threads):
            options, reason, rates = harness.options_for(sizes=given.pop("size"), batches=given.pop("batch"), **given)
            print(f"dtype: {reason}")
            done = harness.run(names, options, rates, out=out)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.error(str(error))
    return int(harness.failures(done) > 0)


if __name__ == "__main__":
    sys.exit(main())
