"""kernels: each op against its peers, forward and backward.

On a GPU at the sizes of ViT-B and L, on a CPU at one of them. Operands are random, and several sets take turns, so that
none is still in a cache. On a GPU a small op is timed as a CUDA graph: launching it takes the host longer than running
it takes the device.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mar_fast.cost import Cost, Part
from mar_fast.inference import captured
from mar_fast.kernels import cpu_attention

from ..case import Case, Prepared, Provider, RunOptions
from ..op_cases import PART, Function, OpCase, Operands, op_cases
from ..records import OURS

# How far a provider's result may be from float64: a few roundings of the dtype. TF32 passes for float32. On a CPU
# PyTorch sums LayerNorm's gradients of weight and bias in bfloat16, which is an error of 3e-2 by itself.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 5e-2}
BATCHED = ("video", "keep_idx", "drop_idx", "qkv", "x", "residual", "visible", "pixels")
SETS = 3


def cases(options: RunOptions) -> Iterator[Case]:
    """Every op at every size, batch and keep ratio, forward and backward."""
    for op_case in every_op_case(options):
        for mode in ("forward", "backward"):
            yield kernel_case(op_case, mode, on_gpu=options.on_gpu)


def every_op_case(options: RunOptions) -> Iterator[OpCase]:
    """The ops and shapes of a run; a quick one takes one case of each op."""
    whole_gpu = options.on_gpu and not options.quick
    sizes = options.sizes if whole_gpu else options.sizes[:1]
    batches = options.batches if whole_gpu else options.batches[:1]
    kept = (0.25, 0.5, 1.0) if whole_gpu else (0.5,)
    found = op_cases(options.device, options.dtype, sizes, batches, kept)
    if not options.quick:
        return found
    first: dict[str, OpCase] = {}
    for op_case in found:
        first.setdefault(op_case.op, op_case)
    return iter(first.values())


def kernel_case(op_case: OpCase, mode: str, *, on_gpu: bool, sets: int = SETS, clips: int | None = 2) -> Case:
    """One op, shape and pass as a case of the suite: the pass alone is timed, another set of operands in each call.

    Results are compared for the first ``clips``, which is enough for a check; None compares those of all.
    """

    @functools.cache
    def operands() -> list[Operands]:
        return [op_case.operands() for _ in range(sets)]

    def prepared(function: Function) -> Prepared:
        if mode == "forward":
            calls = [forward_of(function, one) for one in operands()]
            # Launching an op that computes next to nothing costs the host more than it costs the device.
            calls = [captured(call) for call in calls] if on_gpu and not op_case.flops else calls
        else:
            calls = [backward_of(function, one, op_case.differentiated) for one in operands()]
        turns = itertools.cycle(calls)  # no operand is still in a cache
        return Prepared(lambda: next(turns)(), lambda: results(function, first(), op_case.differentiated, mode))

    def first() -> Operands:
        return {key: value[:clips] if key in BATCHED else value for key, value in operands()[0].items()}

    def expected() -> list[Tensor]:
        """The op itself in float64, where it is plain PyTorch."""
        return results(op_case.ours, double(first()), op_case.differentiated, mode)

    peers = measured_peers(op_case, mode, on_gpu)
    flops, moved = (1.0, 1.0) if mode == "forward" else op_case.backward
    return Case(
        suite="kernels",
        name=f"{op_case.op}: {op_case.label}",
        mode=mode,
        x=op_case.tokens,
        dtype=op_case.dtype,
        clips=0,
        providers=tuple(
            Provider(name, functools.partial(prepared, function), checked=name != PART)
            for name, function in {OURS: op_case.ours, **peers}.items()
        ),
        expected=expected,
        tolerance=TOLERANCE[op_case.dtype],
        baseline=next(iter(peers)),
        floor=Cost((Part(op_case.op, 0, round(flops * op_case.flops / 2), round(moved * op_case.bytes)),)),
        share=0.4,
    )


def measured_peers(op_case: OpCase, mode: str, on_gpu: bool) -> dict[str, Function]:
    """All but the first one on a CPU, which is what our op runs there, unless that is attention in blocks of scores."""
    left_out = set() if on_gpu and mode == "forward" else {PART}
    in_blocks = op_case.op == "attention" and mode == "forward" and op_case.dtype == torch.bfloat16
    if not on_gpu and not (in_blocks and cpu_attention.PREFERRED):
        left_out.add(next(iter(op_case.peers)))
    return {name: function for name, function in op_case.peers.items() if name not in left_out}


def double(operands: Operands) -> Operands:
    """The same in float64, which all ops compute in plain PyTorch; indices and bytes stay."""
    return {key: value.double() if value.is_floating_point() else value for key, value in operands.items()}


def results(function: Function, operands: Operands, differentiated: tuple[str, ...], mode: str) -> list[Tensor]:
    """Outputs, or with mode "backward" the gradients of the differentiated operands for random seeds."""
    if mode == "forward":
        return tree_leaves(forward_of(function, operands)())
    return list(backward_of(function, operands, differentiated)()) if differentiated else []


def forward_of(function: Function, operands: Operands) -> Callable[[], Any]:
    """A function that runs the forward pass alone."""
    return torch.no_grad()(functools.partial(function, **operands))


def backward_of(function: Function, operands: Operands, differentiated: tuple[str, ...]) -> Callable[[], Any]:
    """A function that runs the backward pass alone, again and again; the forward pass is done here."""
    leaves = {key: operands[key].detach().requires_grad_() for key in differentiated}
    with functorch_config.patch(donated_buffer=False):  # a compiled function's backward pass runs again and again
        outputs = [out for out in tree_leaves(function(**{**operands, **leaves})) if out.requires_grad]
    generator = torch.Generator("cpu" if outputs[0].is_meta else outputs[0].device).manual_seed(1)
    seeds = [
        torch.randn(out.shape, device=out.device, generator=generator, dtype=torch.float32).to(out.dtype)
        for out in outputs
    ]
    return functools.partial(torch.autograd.grad, outputs, [*leaves.values()], seeds, retain_graph=True)
