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

from . import host, records, rows, runner, session
from .case import Case

# Peers of the short run: the plainest good one, the fastest known, and each of them once more in a CUDA graph.
PEERS = (
    "PyTorch SDPA", "PyTorch SDPA, CUDA graph", "SDPA cuDNN", "SDPA flash", "PyTorch", "PyTorch, compiled",
    "reshape + index + linear", "the same, compiled", "cuBLAS on gathered patches",
)  # fmt: skip
OURS = ("mar_fast", "mar_fast, CUDA graph")
COMPILED = "PyTorch SDPA, compiled"  # a minute each: where it decides
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
    ("kernels", "add_layer_norm", "backward", None, "75 %"),
    ("kernels", "bias_gelu", "backward", None, "75 %"),
    ("kernels", "masked_patch_loss", "forward", None, "65 %"),
    ("kernels", "masked_patch_loss", "backward", None, "75 %"),
)


def short(case: Case) -> Case | None:
    """A case of the short run with its candidates, or None for one that is left out."""
    wanted = {*PEERS, *OURS}
    if case.suite == "encoder" and (case.x == 1 or (case.x == 0.25 and case.clips != 32)):
        return None
    if case.suite != "encoder" and "32" not in re.findall(r"\d+", case.name):
        return None
    if case.suite == "training" and case.x != 0.5:
        return None
    if case.suite == "kernels" and case.x == 1568 and not case.name.startswith("attention"):
        return None
    if case.suite in ("encoder", "training") and case.clips == 32 and case.x == 0.5:
        wanted.add(COMPILED)
    return replace(case, candidates=tuple(one for one in case.candidates if one.provider in wanted), yardstick="")


def target(row: records.Record) -> str:
    """What is aimed at for a row of ours; "" where nothing is."""
    for suite, case, mode, x, aim in TARGETS:
        if (row.suite, row.mode) == (suite, mode) and re.match(case, row.case) and x in (None, row.x):
            return aim
    return ""


def table(found: Iterable[records.Record]) -> str:
    """A line for each of our times. A CUDA graph's peers are CUDA graphs."""
    lines = [f"{'what':78} {'ours':>9} {'best peer':>9} {'ratio':>6} {'target':>7} {'floor':>5}  peer"]
    for setting, group in rows.grouped(found, rows.setting).items():
        times = {row.provider: row for row in group if row.metric == "time"}
        floor = next((row.p50 for row in group if row.metric == "floor"), None)
        for name, row in times.items():
            if not records.is_ours(setting.suite, name):
                continue
            graph = name.endswith("CUDA graph")
            peers = {
                peer: other.p50 for peer, other in times.items()
                if not records.is_ours(setting.suite, peer) and peer.endswith("CUDA graph") == graph
                and peer != "cuBLAS on gathered patches"
            }  # fmt: skip
            best = min(peers, key=peers.__getitem__, default=None)
            what = f"{setting.suite}: {setting.case}, {setting.mode}, {setting.x:g}{', CUDA graph' if graph else ''}"
            cells = [runner.seconds(row.p50), "-", "-"]
            if best is not None:
                cells[1:] = [runner.seconds(peers[best]), f"{peers[best] / row.p50:.2f}x"]
            share = f"{floor / row.p50:.0%}" if floor else ""
            lines.append(
                f"{what:78} {cells[0]:>9} {cells[1]:>9} {cells[2]:>6} {target(row):>7} {share:>5}  {best or ''}"
            )
        for provider, why in {row.provider: row.note for row in group if row.metric in rows.NO_TIME}.items():
            lines.append(f"{setting.case}, {setting.mode}: {provider}: {why}")
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
    figures = host.measure(device, quick=not options.full)
    print(host.table(figures, device), flush=True)
    records.write(paths[host.SUITE], host.rows(figures, device))
    if options.full:
        setting, _, rates = session.setting_for(device="cuda", dtype="bf16")
    else:
        setting, _, rates = session.setting_for(
            device="cuda", dtype="bf16", sizes=("base",), batches=(32, 8, 1), seconds=options.seconds
        )
    everything, wrong = [], 0
    for name in names:
        done = session.run(
            [name], setting, rates, out=paths[name], say=lambda text: print(text, flush=True),
            chosen=None if options.full else short,
        )  # fmt: skip
        everything += done.rows
        wrong += done.wrong
    print(table(everything), flush=True)
    return int(wrong > 0)
