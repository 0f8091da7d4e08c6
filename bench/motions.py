"""motions: what each part of MAR is worth on the demo's camera motions, a stand-in for a real data set.

The base and five single changes, and the base from a pre-trained start, with several seeds each: accuracy on frames
of the films it was trained on and on a film that it never saw. Results are written as they come; a second call goes on.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mar_fast import MAR
from mar_fast.timing import interleaved
from mar_fast.train import World, read_recipe
from mar_fast.train.dataset import collate
from mar_fast.train.demo import CLIPS, SPLITS, Motions, demo
from mar_fast.train.loader import StepSampler
from mar_fast.train.log import add_row
from mar_fast.train.masks import draw_mask
from mar_fast.train.mixing import mix_batch
from mar_fast.train.step import Inputs, Stepper

from .plain import PlainMAR, patch_loss

NAME = "motions"
VARIANTS: dict[str, tuple[str, ...]] = {
    "base: 50 %, cell running, bridging": (),
    "75 % masked": ("mask.ratio=0.75", "model.mask_ratio=0.75"),
    "tube masks": ("mask.kind=tube",),
    "random masks": ("mask.kind=random",),
    "linear classifier": ("model.classifier=linear",),
    "no reconstruction": ("reconstruction_weight=0.0", "model.decoder_depth=0"),
    "pre-trained start": (),
}


def train(name: str, seed: int, epochs: int, out: Path) -> dict[str, Any]:
    """One run, in a process of its own; its row. One that was killed goes on from its newest checkpoint."""
    torch.set_num_threads(1)
    folder = out / f"{list(VARIANTS).index(name)}-{seed}"
    common = [f"schedule.epochs={epochs}", f"seed={seed}", f"test.every={epochs}"]
    recipe, alone = read_recipe(NAME, [*VARIANTS[name], *common]), World(0, 1, torch.device("cpu"))
    how: dict[str, Any] = dict(resume=True, clips=32, workers=0, say=lambda text: None)
    found = demo(recipe, folder, alone, pretrain=name == "pre-trained start", **how)
    if found is None:
        raise KeyboardInterrupt
    accuracies: dict[str, float] = {split: found[f"accuracy, {split}"] for split in SPLITS}
    return {"variant": name, "seed": seed, "steps": found["steps"], **accuracies}


def throughput(seconds: float) -> str:
    """Steps of ours against a plain PyTorch loop: the same clips, augmentation, masks, model and optimizer."""
    recipe = read_recipe(NAME, ["augment.mixup=0.8", "augment.cutmix=1.0", "augment.smoothing=0.1"])
    config, device = recipe.config(), torch.device("cpu")
    videos = Motions("train", CLIPS)
    generator = torch.Generator().manual_seed(0)
    keys = itertools.cycle(StepSampler(len(videos), recipe.data.batch))

    def inputs() -> Iterator[Inputs]:
        batch = collate([videos[key] for key in next(keys)])
        mask, _ = draw_mask(recipe.mask, len(batch.video), config, generator)
        video, target = mix_batch(recipe.augment, config, batch.video, batch.labels, batch.boxes, generator)
        yield Inputs(video, target, mask)

    model, plain = MAR(config), PlainMAR(config).train()
    stepper = Stepper(model, recipe, World(0, 1, device))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.05, fused=True)

    def plain_step() -> None:
        one = next(inputs())
        assert one.mask is not None and one.target is not None
        keep, drop = one.mask.keep_idx.long(), one.mask.drop_idx.long()
        logits, features = plain(one.video, keep)
        loss = F.cross_entropy(logits, one.target)
        pixels = plain.pixels(features, keep, drop)
        (loss + recipe.reconstruction_weight * patch_loss(pixels, one.video, drop, config)).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), recipe.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def read() -> None:
        next(inputs())

    calls = {"mar_fast": lambda: stepper.step(inputs(), 1, 1e-3), "plain PyTorch": plain_step, "reading alone": read}
    spreads = interleaved(calls, device, budget=seconds, min_rounds=7)
    rate = {name: recipe.data.batch / spread.p50 for name, spread in spreads.items()}
    lines = [f"{name}: {rate[name]:.1f} clips/s (step {spread})" for name, spread in spreads.items()]
    return "\n".join([*lines, f"ours / plain: {rate['mar_fast'] / rate['plain PyTorch']:.2f}x"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean, least and greatest accuracy of each variant, in Markdown."""
    lines = [
        f"| | {' | '.join(f'{split}: mean (least to greatest)' for split in SPLITS)} | seeds |",
        "|---|---|---|---|",
    ]
    for name in VARIANTS:
        if mine := [row for row in rows if row["variant"] == name]:
            accuracies = [[row[split] for row in mine] for split in SPLITS]
            cells = (f"{statistics.mean(own):.1%} ({min(own):.1%} to {max(own):.1%})" for own in accuracies)
            lines.append(f"| {name} | {' | '.join(cells)} | {len(mine)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(prog=f"python -m mar_fast.bench {NAME}", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("motions"), help="folder of the runs and of results.jsonl")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--epochs", type=int, default=5, help="of a run, 100 steps of 32 clips each")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--throughput", type=float, metavar="SECONDS", help="compare with a plain loop instead")
    options = parser.parse_args(arguments)
    if options.throughput:
        print(throughput(options.throughput))
        return 0
    results = options.out / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    done = {(row["variant"], row["seed"]) for row in rows}
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [(name, seed) for seed in range(options.seeds) for name in VARIANTS if (name, seed) not in done]
    with ProcessPoolExecutor(options.processes) as pool:
        for job in as_completed([pool.submit(train, *one, options.epochs, options.out) for one in wanted]):
            rows.append(job.result())
            add_row(results, rows[-1])
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    return 0
