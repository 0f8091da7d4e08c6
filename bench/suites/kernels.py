"""kernels: each op against its peers, forward and backward.

On a GPU at the sizes of ViT-B and L, on a CPU at one of them. Operands are random and come in several sets that take
turns, so that none is left in a cache. On a GPU ``graph`` times what a CUDA graph replays: the launches of a small op
cost more on the host than it takes on the device.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from mar_fast.inference import captured

from ..case import Candidate, Case, Floor, Prepared, Setting
from ..op_cases import OpCase, Operands, Provider, op_cases

# What a provider's result may differ from float64: some roundings of the dtype. TF32 is let pass in float32. On a CPU
# PyTorch sums LayerNorm's gradients of weight and bias in bfloat16, which alone is off by 3e-2.
BOUND = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 5e-2}
BATCHED = ("video", "keep_idx", "drop_idx", "qkv", "x", "residual", "visible", "pixels")
SETS = 3


def cases(setting: Setting) -> Iterator[Case]:
    """Every op at every size, batch and keep ratio, forward and backward."""
    for op_case in every_op_case(setting):
        for mode in ("forward", "backward"):
            yield kernel_case(op_case, mode)


def every_op_case(setting: Setting) -> Iterator[OpCase]:
    """The ops and shapes of a setting; a quick one takes one case of each op."""
    whole_gpu = setting.on_gpu and not setting.quick
    sizes = setting.sizes if whole_gpu else setting.sizes[:1]
    batches = setting.batches if whole_gpu else setting.batches[:1]
    kept = (0.25, 0.5, 1.0) if whole_gpu else (0.5,)
    found = op_cases(setting.device, setting.dtype, sizes, batches, kept, graph=setting.on_gpu)
    if not setting.quick:
        return found
    first: dict[str, OpCase] = {}
    for op_case in found:
        first.setdefault(op_case.op, op_case)
    return iter(first.values())


def kernel_case(op_case: OpCase, mode: str) -> Case:
    """One op, shape and pass as a case of the suite."""

    @functools.cache
    def sets() -> list[Operands]:
        return [op_case.operands() for _ in range(SETS)]

    providers = [(name, provider, True) for name, provider in op_case.providers.items()]
    if mode == "forward":
        providers += [(name, provider, False) for name, provider in op_case.bounds.items()]
    candidates = [
        Candidate(name, functools.partial(prepared, provider, op_case, mode, sets), checked=checked)
        for name, provider, checked in providers
    ]
    flops, moved = (1.0, 1.0) if mode == "forward" else op_case.backward
    return Case(
        "kernels", f"{op_case.op}: {op_case.label}", mode, op_case.tokens, op_case.dtype, 0, tuple(candidates),
        lambda: exact(op_case, mode, sets), BOUND[op_case.dtype],
        floor=Floor(flops * op_case.flops / 2, moved * op_case.bytes), baseline="mar_fast", share=0.4,
    )  # fmt: skip


def prepared(provider: Provider, op_case: OpCase, mode: str, sets: Callable[[], list[Operands]]) -> Prepared:
    """A provider with operands: the pass alone, another set of operands in each call."""
    if mode == "forward":
        calls = [forward_of(provider, operands) for operands in sets()]
    else:
        calls = [backward_of(provider, operands, op_case.differentiated) for operands in sets()]
    if op_case.graph and mode == "forward":
        calls = [captured(call) for call in calls]
    return Prepared(in_turn(calls), lambda: results(provider, few(sets()[0]), op_case.differentiated, mode))


def exact(op_case: OpCase, mode: str, sets: Callable[[], list[Operands]]) -> list[Tensor]:
    """The op itself in float64, where it is plain PyTorch."""
    return results(op_case.providers["mar_fast"], double(few(sets()[0])), op_case.differentiated, mode)


def few(operands: Operands, clips: int = 2) -> Operands:
    """The first clips only: a check needs no more."""
    return {key: value[:clips] if key in BATCHED else value for key, value in operands.items()}


def double(operands: Operands) -> Operands:
    """The same in float64, which all ops compute in plain PyTorch; indices and bytes stay."""
    return {key: value.double() if value.is_floating_point() else value for key, value in operands.items()}


def results(provider: Provider, operands: Operands, differentiated: tuple[str, ...], mode: str) -> list[Tensor]:
    """Outputs, or with mode "backward" the gradients of the differentiated operands for random seeds."""
    if mode == "forward":
        return listed(forward_of(provider, operands)())
    return list(backward_of(provider, operands, differentiated)())


def listed(output: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """One output or several as a list."""
    return list(output) if isinstance(output, tuple) else [output]


def forward_of(provider: Provider, operands: Operands) -> Callable[[], Any]:
    """A function that runs the forward pass alone."""

    def run() -> Any:
        with torch.no_grad():
            return provider(**operands)

    return run


def backward_of(provider: Provider, operands: Operands, differentiated: tuple[str, ...]) -> Callable[[], Any]:
    """A function that runs the backward pass alone, again and again; the forward pass is done here."""
    leaves = {key: operands[key].detach().requires_grad_() for key in differentiated}
    with functorch_config.patch(donated_buffer=False):  # what is compiled here keeps what its backward pass reads
        outputs = [out for out in listed(provider(**{**operands, **leaves})) if out.requires_grad]
    generator = torch.Generator("cpu" if outputs[0].is_meta else outputs[0].device).manual_seed(1)
    seeds = [
        torch.randn(out.shape, device=out.device, generator=generator, dtype=torch.float32).to(out.dtype)
        for out in outputs
    ]
    return functools.partial(torch.autograd.grad, outputs, [*leaves.values()], seeds, retain_graph=True)


def in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """A function that makes another of the calls each time: no operand is still in a cache."""
    turn = iter(range(sys.maxsize))
    return lambda: calls[next(turn) % len(calls)]()
