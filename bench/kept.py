"""kept: what a training step keeps for backward, tensor by tensor; fake tensors, so no GPU and no memory are needed.

The Triton path is taken, under autocast to 16 bits with float32 weights. Weights are left out, their casts are not.
"""

import argparse
import sys
from collections import Counter

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from mar_fast import MAR, MARConfig, TokenMask, masking
from mar_fast.kernels.jit.launch import stubbed

from .suites.common import model_config

# (shape, dtype, the call that keeps it)
Kept = Counter[tuple[tuple[int, ...], torch.dtype, str]]


def kept(config: MARConfig, clips: int) -> Kept:
    """Bytes of each sort of tensor that the forward pass of a training step keeps."""
    found, storages, alive = Kept(), set[int](), list[Tensor]()

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in storages:
            storages.add(storage._cdata)
            alive.append(value)  # so that no other storage gets its number
            found[tuple(value.shape), value.dtype, _caller()] += storage.nbytes()
        return value

    mask = masking.cell_running(clips, config.grid, config.mask_ratio, cell=config.cell, phase=0)
    with torch.device("meta"):
        model = MAR(config).train()
    with stubbed(), FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # fake tensors on a CPU, whose kernels can be stubbed
        storages.update(value.untyped_storage()._cdata for value in model.parameters())
        fake = TokenMask(torch.empty_like(mask.keep_idx), torch.empty_like(mask.drop_idx), config.grid)
        video = torch.empty(clips, config.channels, config.num_frames, *config.image_size, dtype=torch.uint8)
        with saved_tensors_hooks(keep, lambda value: value), torch.autocast("cpu", torch.bfloat16):
            model(video, fake)
    return found


def _caller() -> str:
    """The two innermost functions of model and ops: "Mlp.forward > linear_gelu"."""
    names, frame = list[str](), sys._getframe(2)
    while frame and len(names) < 2:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname
        if module.startswith("mar_fast.") and ".jit." not in module and "<" not in name:
            names.insert(0, name)
        frame = frame.f_back  # type: ignore[assignment]
    return " > ".join(names)


def table(found: Kept) -> str:
    """In Markdown, the largest first; what has less than 0.2 % of the whole is summed up."""
    whole = sum(found.values())
    large = [(what, size) for what, size in found.most_common() if size >= 0.002 * whole]
    small = whole - sum(size for _, size in large)
    lines = ["| bytes | shape | dtype | kept by |", "|---|---|---|---|"]
    lines += [f"| {size / 1e6:,.0f} MB | {shape} | {str(dtype)[6:]} | {by} |" for (shape, dtype, by), size in large]
    return "\n".join([*lines, f"| {small / 1e6:,.0f} MB | others | | |", f"| {whole / 1e9:.2f} GB | all | | |"])


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench kept", description=__doc__)
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--keep", type=float, default=0.5, help="share of tokens that are visible")
    options = parser.parse_args(arguments)
    print(table(kept(model_config(options.size, options.keep, decoder=True), options.batch)))
    return 0
