"""gpu: what ``make gpu`` measures: the shapes that decide, against the strongest peers, in a few minutes.

One file of records for each suite, written as they come, and last a table: ours, the best peer, their ratio, the
target, and the share of the machine's ceiling. ``--full`` runs the suites whole.
"""

import argparse
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mar_fast import files, machine

from . import harness, host, records
from .case import Case
from .op_cases import PART
from .records import Record

# Providers of the short run: ours, the plainest good peer, the fastest known, and whole models also in a CUDA graph.
PROVIDERS = {
    "mar_fast", "mar_fast, CUDA graph", "PyTorch SDPA", "PyTorch SDPA, CUDA graph", "SDPA cuDNN", "SDPA flash",
    "PyTorch", "PyTorch, compiled", "reshape + index + linear", "reshape + index + linear, compiled", PART,
}  # fmt: skip
COMPILED = {"PyTorch SDPA, compiled"}  # a minute each: where it decides
GRAPH = ", CUDA graph"
SUITES = ("kernels", "encoder", "training")
FULL = ("kernels", "encoder", "training", "waterfall", "scaling")

# Times the best peer, microseconds of an H200, or the least share of the floor, for (suite, case, mode, x). A case is
# named by a pattern for the beginning of its name.
TARGETS = (
    ("encoder", "ViT-B, batch 32", "inference", 0.5, "1.28x"),
    ("encoder", "ViT-B, batch 32", "inference", 0.25, "1.28x"),
    ("encoder", "ViT-B, batch 8", "inference", 0.5, "1.1x"),
    ("encoder", "ViT-B, batch 1", "inference", 0.5, "1.1x"),
    ("training", "ViT-B, batch 32", "training step", 0.5, "1.15x"),
    ("kernels", "attention", "forward", None, "1.1x"),
    ("kernels", "attention", "backward", 784, "1.25x"),
    ("kernels", "attention", "backward", 392, "1.35x"),
    ("kernels", "attention", "backward", 1568, "1.0x"),
    ("kernels", "gather_patch_embed.*uint8", "forward", 784, "120 us"),
    ("kernels", "gather_patch_embed.*uint8", "forward", 392, "65 us"),
    ("kernels", "gather_patch_embed", "backward", None, "1.0x"),
    ("kernels", "add_layer_norm", "forward", None, "88 %"),
    ("kernels", "bias_gelu", "forward", None, "88 %"),
    ("kernels", "linear_gelu", "forward", 784, "205 us"),
    ("kernels", "add_layer_norm", "backward", None, "75 %"),
    ("kernels", "bias_gelu", "backward", None, "75 %"),
    ("kernels", "masked_patch_loss", "forward", None, "65 %"),
    ("kernels", "masked_patch_loss", "backward", None, "75 %"),
)


def short(case: Case) -> Case | None:
    """A case of the short run with its providers, or None for one that is left out."""
    if case.suite == "encoder" and (case.x == 1 or (case.x == 0.25 and case.clips != 32)):
        return None
    if case.suite != "encoder" and "32" not in re.findall(r"\d+", case.name):
        return None
    if case.suite == "training" and case.x != 0.5:
        return None
    if case.suite == "kernels" and case.x == 1568 and not case.name.startswith("attention"):
        return None
    wanted = PROVIDERS | COMPILED if case.clips == 32 and case.x == 0.5 else PROVIDERS
    return replace(case, providers=tuple(one for one in case.providers if one.name in wanted))


def target(record: Record) -> str:
    """What is aimed at for a record of ours; "" where nothing is."""
    for suite, case, mode, x, aim in TARGETS:
        if (record.suite, record.mode) == (suite, mode) and re.match(case, record.case) and x in (None, record.x):
            return aim
    return ""


def table(found: Iterable[Record]) -> str:
    """A line for each of our times. A CUDA graph's peers are CUDA graphs."""
    lines = [f"{'what':78} {'ours':>9} {'best peer':>9} {'ratio':>6} {'target':>7} {'floor':>5}  peer"]
    for group in records.grouped(found, lambda record: record.workload).values():
        times = [record for record in group if record.metric == "time" and record.provider != PART]
        floor = next((record.p50 for record in group if record.metric == "floor"), None)
        for own in (one for one in times if one.ours):
            graph = own.provider.endswith(GRAPH)
            peers = (one for one in times if not one.ours and one.provider.endswith(GRAPH) == graph)
            best = min(peers, key=lambda other: other.p50, default=None)
            what = f"{own.suite}: {own.case}, {own.mode}, {own.x:g}{GRAPH if graph else ''}"
            theirs, ratio = (best.words, f"{best.p50 / own.p50:.2f}x") if best else ("-", "-")
            share = f"{floor / own.p50:.0%}" if floor else ""
            peer = best.provider if best else ""
            lines.append(f"{what:78} {own.words:>9} {theirs:>9} {ratio:>6} {target(own):>7} {share:>5}  {peer}")
        lost = {record.provider: record for record in group if record.metric in records.NO_TIME}
        lines += [f"{one.case}, {one.mode}: {one.provider}: {one.note}" for one in lost.values()]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The command; exit code 1 if one of our own results is wrong."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench gpu", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every suite whole")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the record files")
    parser.add_argument("--force", action="store_true", help="replace them")
    parser.add_argument("--seconds", type=float, default=2.0, help="for the timed rounds of a case of the short run")
    options = parser.parse_args(arguments)
    names = FULL if options.full else SUITES
    try:
        device = machine.device("cuda")
        paths = {name: options.out / f"{name}.jsonl" for name in (host.SUITE, *names)}
        files.may_write(list(paths.values()), options.force)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    of_host = host.measure(device, quick=not options.full)
    print(host.table(of_host, device), flush=True)
    records.write(paths[host.SUITE], of_host)
    short_run = {} if options.full else dict(sizes=("base",), batches=(32, 8, 1), seconds=options.seconds)
    chosen, _, rates = harness.options_for(device="cuda", dtype="bf16", **short_run)
    everything: list[Record] = []
    for name in names:
        everything += harness.run([name], chosen, rates, out=paths[name], chosen=None if options.full else short)
    print(table(everything), flush=True)
    return int(harness.failures(everything) > 0)
