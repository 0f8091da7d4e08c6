"""The kernels suite: each op against its peers, forward and backward, every result checked before it is timed.

``python -m mar_fast.bench.ops`` on any machine; on a GPU at the sizes of ViT-B and L, on a CPU at one small size.
"""

import argparse
import functools
import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from . import machine, records
from .op_cases import OpCase, Operands, Provider, cases
from .timing import Spread, interleaved

# What a provider's result may differ from float64: some roundings of the dtype. TF32 is let pass in float32.
BOUND = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BATCHED = ("video", "keep_idx", "drop_idx", "qkv", "x", "branch", "visible", "pixels")


@dataclass(frozen=True)
class Result:
    """One provider of one case in one mode: its time, or why there is none."""

    case: OpCase
    provider: str
    mode: str
    spread: Spread | None
    withheld: str = ""


def few(operands: Operands, clips: int = 2) -> Operands:
    """The first clips only: a check needs no more."""
    return {key: value[:clips] if key in BATCHED else value for key, value in operands.items()}


def double(operands: Operands) -> Operands:
    """The same in float64, which all ops compute in plain PyTorch; indices and bytes stay."""
    return {key: value.double() if value.is_floating_point() else value for key, value in operands.items()}


def results(provider: Provider, operands: Operands, differentiated: tuple[str, ...], mode: str) -> list[Tensor]:
    """Outputs, or with mode "backward" the gradients of the differentiated operands for seeds of one."""
    if mode == "forward":
        with torch.no_grad():
            return listed(provider(**operands))
    return list(backward_of(provider, operands, differentiated)())


def listed(output: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """One output or several as a list."""
    return list(output) if isinstance(output, tuple) else [output]


def backward_of(provider: Provider, operands: Operands, differentiated: tuple[str, ...]) -> Callable[[], Any]:
    """A function that runs the backward pass alone, again and again; the forward pass is done here."""
    leaves = {key: operands[key].detach().requires_grad_() for key in differentiated}
    outputs = [out for out in listed(provider(**{**operands, **leaves})) if out.requires_grad]
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    seeds = [
        torch.randn(out.shape, device=out.device, generator=generator, dtype=torch.float32).to(out.dtype)
        for out in outputs
    ]
    return functools.partial(torch.autograd.grad, outputs, [*leaves.values()], seeds, retain_graph=True)


def absent(error: Exception) -> str:
    """Why a provider gets no time that cannot run here: the first line of what it raised, which may have none."""
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"absent: {type(error).__name__}: {first[:100]}"


def fault(provider: Provider, case: OpCase, operands: Operands, mode: str) -> str:
    """Why a provider gets no time: it fails here, or its result is wrong. "" if all is well."""
    try:
        got = results(provider, few(operands), case.differentiated, mode)
    except Exception as error:  # a peer that cannot run here is absent, whatever it raises
        return absent(error)
    exact = results(case.providers["mar_fast"], double(few(operands)), case.differentiated, mode)
    for number, (value, truth) in enumerate(zip(got, exact, strict=True)):
        difference = float((value.double() - truth).norm() / truth.norm())
        if not difference <= BOUND[case.dtype]:
            return f"wrong: result {number} differs from float64 by {difference:.1e}"
    return ""


def in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """A function that makes another of the calls each time: no operand is still in a cache."""
    turn = iter(range(sys.maxsize))
    return lambda: calls[next(turn) % len(calls)]()


def forward_of(provider: Provider, operands: Operands) -> Callable[[], Any]:
    """A function that runs the forward pass alone."""

    def run() -> Any:
        with torch.no_grad():
            return provider(**operands)

    return run


def measure(case: OpCase, device: torch.device, mode: str, budget: float, sets: int = 3) -> list[Result]:
    """Check and time all providers of a case in one interleaved run."""
    operands = [case.operands() for _ in range(sets)]
    withheld = {name: fault(provider, case, operands[0], mode) for name, provider in case.providers.items()}
    present: dict[str, Provider] = {name: case.providers[name] for name, why in withheld.items() if not why}
    if mode == "forward":
        present |= case.bounds
    calls = {}
    for name, provider in present.items():
        try:
            run = in_turn(
                [
                    forward_of(provider, each)
                    if mode == "forward"
                    else backward_of(provider, each, case.differentiated)
                    for each in operands
                ]
            )
            run()
        except Exception as error:  # it takes the few clips of the check and not all of them, for memory say
            withheld[name] = absent(error)
        else:
            calls[name] = run
    spreads = interleaved(calls, device, budget=budget, min_rounds=10, max_rounds=200) if calls else {}
    return [
        Result(case, name, mode, spreads.get(name), withheld.get(name, "")) for name in [*case.providers, *case.bounds]
        if name in spreads or withheld.get(name)
    ]  # fmt: skip


def floor_seconds(case: OpCase, mode: str, rates: Mapping[str, float]) -> float:
    """The least time at this machine's own ceilings."""
    flops, moved = (1.0, 1.0) if mode == "forward" else case.backward
    key = next(name for name, dtype in machine.DTYPES.items() if dtype == case.dtype)
    return max(flops * case.flops / rates[key], moved * case.bytes / rates["copy"])


def table(found: list[Result], rates: Mapping[str, float]) -> str:
    """Lines of one case: time with spread, speed over each peer, share of the floor."""
    ours = next((result.spread for result in found if result.provider == "mar_fast"), None)
    lines = [f"{found[0].case.op} {found[0].mode}: {found[0].case.label}, {str(found[0].case.dtype)[6:]}"]
    for result in found:
        if result.spread is None:
            lines.append(f"  {result.provider:28} {result.withheld}")
            continue
        spread = result.spread
        ratio = f"{spread.p50 / ours.p50:5.2f} x ours" if ours else ""
        share = floor_seconds(result.case, result.mode, rates) / spread.p50
        lines.append(
            f"  {result.provider:28} {spread.p50 * 1e6:9.1f} us ({spread.p20 * 1e6:.1f} - {spread.p80 * 1e6:.1f})"
            f"  {ratio}  {share:4.0%} of the floor's speed"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; exit code 1 if one of our own results is wrong."""
    parser = argparse.ArgumentParser(prog="python -m mar_fast.bench.ops", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the measurements there, as JSON lines")
    parser.add_argument("--op", action="append", help="only this op; may be given again")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each case and mode")
    parser.add_argument("--quick", action="store_true", help="one size of each op")
    options = parser.parse_args(arguments)
    functorch_config.donated_buffer = False  # a compiled backward pass is run many times
    device = machine.device()
    on_gpu = device.type == "cuda"
    rates = machine.matmul_rates(device, ("fp32", "bf16", "fp16") if on_gpu else ("fp32", "bf16"))
    rates["copy"] = machine.copy_rate(device)
    environment = machine.environment(device)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    print(", ".join(f"{key} {rate / 1e9:.0f} G{'B' if key == 'copy' else 'FLOP'}/s" for key, rate in rates.items()))
    if on_gpu:
        sizes, batches, kept = (
            (["base"], [32], [0.5]) if options.quick else (["base", "large"], [1, 8, 32, 64], [0.25, 0.5, 1.0])
        )
        dtype = torch.bfloat16
    else:
        sizes, batches, kept, dtype = ["base"], [1], [0.5], torch.float32
    found, wrong = [], False
    for case in cases(device, dtype, sizes, batches, kept):
        if options.op and case.op not in options.op:
            continue
        for mode in ("forward", "backward"):
            torch.compiler.reset()
            results = measure(case, device, mode, options.budget)
            wrong |= any(result.provider == "mar_fast" and result.spread is None for result in results)
            print(table(results, rates), flush=True)
            for result in results:
                if result.spread is not None:
                    found.append(
                        records.Record.of(
                            environment, result.spread, suite="kernels", case=f"{case.op}: {case.label}", mode=mode,
                            provider=result.provider, metric="time", unit="s", x=case.tokens, dtype=str(case.dtype)[6:],
                        )
                    )  # fmt: skip
            if options.out:
                records.write(options.out, found)
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
