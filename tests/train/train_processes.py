"""What torchrun runs in test_distributed.py: steps in each process; the first one writes what came of them."""

import sys
from pathlib import Path

import torch
from test_step import LR, inputs_of, recipe_of, rows

from mar_fast.train.distributed import leave, world
from mar_fast.train.start import start
from mar_fast.train.state import Checkpoints, export
from mar_fast.train.step import Stepper


def step(here, case, shard, out, micro_batches=2):
    """A step by DDP, or by FSDP2 with ``shard``; in ``out`` is then its checkpoint, its model and result.pt."""
    recipe = recipe_of(case, f"shard={str(shard).lower()}")
    model = start(recipe)[0].double()
    inputs, size = inputs_of(recipe, 8), 8 // here.size // micro_batches
    stepper = Stepper(model, recipe, here)
    firsts = [(number * here.size + here.rank) * size for number in range(micro_batches)]
    real, kept = stepper.optimizer.step, {}

    def seen(*args, **options):
        kept.update({name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None})
        return real(*args, **options)

    stepper.optimizer.step = seen
    told = stepper.step(iter([rows(inputs, first, first + size) for first in firsts]), micro_batches, LR)
    weights = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    # Saved, changed, and put back: the same bits, each process its share.
    checkpoints = Checkpoints(out / "checkpoints", 2, {"world": here.size})
    checkpoints.save(1, stepper, {"best": {}}, here)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert checkpoints.load(stepper) == (1, {"best": {}})
    assert all(torch.equal(whole(p), weights[name]) for name, p in model.named_parameters())
    with torch.no_grad():  # a validation: no backward pass follows
        one = rows(inputs, 0, 1)
        stepper.called.eval()(one.video, one.mask)
    assert stepper.sharded == shard
    export(stepper, out / "model.safetensors", here)
    told = here.sum(told / here.size)
    if here.main:
        torch.save({"gradients": kept, "weights": weights, "told": told}, out / "result.pt")


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


if __name__ == "__main__":
    torch.set_num_threads(1)
    with world("cpu") as here:
        for how in ("ddp", "fsdp"):
            step(here, sys.argv[1], how == "fsdp", Path(sys.argv[2]) / how)
    leave(0)
