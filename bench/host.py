"""host: what a call costs the host, in microseconds and in units of F.layer_norm of a small tensor on a CPU.

Without a GPU the launches are stubbed: operands lie on the CPU, the Triton path is taken, nothing runs. On a GPU they
run, on operands so small that the device keeps up.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mar_fast import files, kernels, machine
from mar_fast.config import MARConfig
from mar_fast.kernels import use_backend
from mar_fast.kernels.jit.launch import stubbed
from mar_fast.model import MAR
from mar_fast.timing import Spread

from . import records
from .plain import PlainMAR
from .records import OURS, Record

Call = Callable[[], object]
# What a call of an op may cost, in units, and its backward in times F.layer_norm's own forward and backward.
LIMITS = {"no gradients": 2.5, "with gradients": 5.0, "backward": 1.5}
# The whole model against the same model in plain PyTorch.
MODEL_LIMIT = 0.65
SUITE, MODEL = "host", "model"


def operands(device: torch.device) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each op with the operands of one small call."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    index = torch.arange(8, dtype=torch.int32, device=device)[None]
    # Small, for what PyTorch does in the backward pass is not stubbed.
    clip = random(1, 3, 4, 4, 4)
    raw = torch.randint(256, (1, 4, 4, 4, 3), dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)
    weights = dict(weight=random(8, 3, 2, 2, 2), bias=random(8), pos_embed=random(8, 8))
    embedding = dict(keep_idx=index[:, :4], **weights)
    statistics = dict(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    offsets = torch.tensor([0, 9, 17], dtype=torch.int32, device=device)
    norm = dict(x=random(1, 17, 96), residual=random(1, 17, 96), weight=random(96), bias=random(96))
    ragged = dict(qkv=random(17, 3, 3, 32), cu_seqlens=offsets, max_seqlen=9)
    tokens = dict(visible=random(1, 8, 96), keep_idx=index, mask_token=random(96), pos_embed=random(17, 96))
    patches = dict(video=random(1, 3, 4, 32, 32), drop_idx=index[:, :4], patch_size=(2, 16, 16))
    return {
        "attention": (kernels.attention, dict(qkv=random(1, 17, 3, 3, 32))),
        "attention_varlen": (kernels.attention_varlen, ragged),
        "attention_kvpacked": (kernels.attention_kvpacked, dict(q=random(1, 9, 3, 32), kv=random(1, 17, 2, 3, 32))),
        "add_layer_norm": (kernels.add_layer_norm, norm),
        "bias_gelu": (kernels.bias_gelu, dict(x=random(1, 17, 96), bias=random(96))),
        "gather_patch_embed": (kernels.gather_patch_embed, dict(video=clip, **embedding)),
        "gather_patch_embed of uint8": (kernels.gather_patch_embed, dict(video=raw, **embedding, **statistics)),
        "scatter_tokens": (kernels.scatter_tokens, tokens),
        "masked_patch_loss": (kernels.masked_patch_loss, dict(pixels=random(1, 4, 1536), **patches)),
    }


WITH_GRADIENTS = ("with gradients", "forward and backward", "unit of both")

# Operands that are data: weights, activations and predictions get gradients.
NO_GRADIENT = ("video", "pos_embed")


def modes(op: Callable[..., Any], operands: Mapping[str, Any]) -> dict[str, Call]:
    """{mode: call}: without gradients, with them, and the backward pass through the engine after a forward."""
    leaves = {
        key: value.detach().requires_grad_(value.is_floating_point() and key not in NO_GRADIENT)
        if isinstance(value, Tensor)
        else value
        for key, value in operands.items()
    }
    wanted = tuple(leaf for leaf in leaves.values() if isinstance(leaf, Tensor) and leaf.requires_grad)
    first = op(**leaves)
    seeds, several = tuple(torch.ones_like(out) for out in tree_leaves(first)), isinstance(first, tuple)
    engine: Any = torch.autograd.Variable._execution_engine

    def training() -> Any:
        return op(**leaves)

    def both() -> object:
        """``torch.autograd.grad`` without what it checks in Python, which goes by the number of outputs."""
        outputs = op(**leaves)  # as in `training`: the rest of the time is the engine's
        outputs = outputs if several else (outputs,)
        return engine.run_backward(outputs, seeds, False, False, wanted, allow_unreachable=False, accumulate_grad=False)

    return {"no gradients": partial(op, **operands), "with gradients": training, "forward and backward": both}


def layer_norm(device: torch.device) -> dict[str, Call]:
    """F.layer_norm of (1, 17, 96)."""
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((1, 17, 96), (96,), (96,)))
    return modes(F.layer_norm, dict(input=x, normalized_shape=(96,), weight=weight, bias=bias, eps=1e-6))


def models(device: torch.device) -> dict[str, Call]:
    """The model through the kernels, and in plain PyTorch on the same ops and as `PlainMAR` writes them.

    ViT-B's depth and nothing else of it: width 32, one head, 4 tokens.
    """
    config = MARConfig(
        embed_dim=32, num_heads=1, bridge_embed_dim=32, bridge_num_heads=1, num_frames=2, image_size=(32, 32),
        mask_ratio=0.0, decoder_depth=0, num_classes=10,
    )  # fmt: skip
    model, plain = MAR(config).eval().to(device), PlainMAR(config).eval().to(device)
    clip, every = torch.randn(1, 3, 2, 32, 32, device=device), torch.arange(4, device=device)[None]
    return {
        "mar_fast": partial(model, clip),
        "mar_fast, eager backend": use_backend("eager")(partial(model, clip)),
        "PyTorch SDPA": partial(plain, clip, every),
    }


def interleaved(found: Mapping[str, Call], device: torch.device, rounds: int, repeat: int) -> dict[str, list[float]]:
    """Seconds of one call on the host, by name, one figure a round; all take turns in each round."""
    taken: dict[str, list[float]] = {name: [] for name in found}
    for number in range(-1, rounds):
        for name, call in found.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            with torch.set_grad_enabled(name in WITH_GRADIENTS):
                call()
                begin = time.perf_counter()
                for _ in range(repeat):
                    call()
                seconds = (time.perf_counter() - begin) / repeat
            if number >= 0:
                taken[name].append(seconds)
    return taken


def measure(device: torch.device, *, quick: bool = False) -> list[Record]:
    """What calls cost the host, one thread: of each case, provider and mode the time, and then a ratio.

    The ratio is to F.layer_norm of a CPU tensor without gradients; for "backward", which is forward and backward less
    the forward, to F.layer_norm's own forward and backward there; for a model to the first other one.
    """
    rounds, repeat = (15, 30) if quick else (60, 60)
    found: list[Record] = []
    make = partial(Record.of, machine.environment(device), suite=SUITE, dtype="fp32")
    on_gpu = device.type == "cuda"

    def keep(case: str, provider: str, mode: str, times: list[float], base: list[float]) -> None:
        ratios = [a / b for a, b in zip(times, base, strict=True)]
        for metric, unit, values in (("host time", "s", times), ("host ratio", "", ratios)):
            found.append(make(Spread.of(values), case=case, provider=provider, mode=mode, metric=metric, unit=unit))

    context: AbstractContextManager[object] = nullcontext() if on_gpu else stubbed()
    with machine.threads(1), context:
        norm = layer_norm(torch.device("cpu"))
        units = {"unit": norm["no gradients"], "unit of both": norm["forward and backward"]}
        for name, (op, arguments) in operands(device).items():
            times = interleaved(modes(op, arguments) | units, device, rounds, repeat)
            both, training = times.pop("forward and backward"), times["with gradients"]
            times["backward"] = [whole - part for whole, part in zip(both, training, strict=True)]
            for mode in LIMITS:
                keep(name, OURS, mode, times[mode], times["unit of both" if mode == "backward" else "unit"])
        if on_gpu:
            there = layer_norm(device)
            for mode in ("no gradients", "forward and backward"):
                times = interleaved({mode: there[mode], "unit": units["unit"]}, device, rounds, repeat)
                keep("F.layer_norm", "PyTorch", mode, times[mode], times["unit"])
        times = interleaved(models(device), device, rounds, 4)
        base_name = "PyTorch SDPA" if on_gpu else "mar_fast, eager backend"
        for name, values in times.items():
            keep(MODEL, name, "no gradients", values, times[base_name])
    return found


def limit(record: Record) -> float:
    """What a ratio of ours may be on a CPU; infinity for the others'."""
    if record.provider != OURS:
        return math.inf
    return MODEL_LIMIT if record.case == MODEL else LIMITS[record.mode]


def table(found: list[Record], device: torch.device) -> str:
    """What was measured as text."""
    lines = [f"{'what':36} {'mode':16} {'us':>8} {'ratio':>7} {'p20':>6} {'p80':>6} {'limit':>6}"]
    for seconds, ratio in zip(found[::2], found[1::2], strict=True):
        what = ratio.case if ratio.provider == OURS and ratio.case != MODEL else f"{ratio.case}: {ratio.provider}"
        spread = f"{ratio.p50:7.2f} {ratio.p20:6.2f} {ratio.p80:6.2f}"
        said = "" if limit(ratio) == math.inf or device.type == "cuda" else f"{limit(ratio):g}"
        lines.append(f"{what:36} {ratio.mode:16} {seconds.p50 * 1e6:8.1f} {spread} {said:>6}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The command; exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench host", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="write the measurements there, as JSON lines")
    parser.add_argument("--force", action="store_true", help="replace that file")
    options = parser.parse_args(arguments)
    try:
        device = machine.device(options.device)
        files.may_write([options.out] if options.out else [], options.force)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    found = measure(device, quick=options.quick)
    print(table(found, device))
    if options.out:
        records.write(options.out, found)
    return 0
