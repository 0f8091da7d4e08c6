"""put_back: biases of queries and values that a checkpoint has lost, from one that still has them.

transformers 5.5 to 5.17 has biases under other names than the files of the hub, and a key bias besides: it reads such a
file without them, begins them at zero, and writes zeros when it saves.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import checks
from . import huggingface
from .layouts import Layout, detect
from .read import Checkpoint, read

BIASES = ("attn.q_bias", "attn.v_bias")


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What was put back.

    Attributes:
        original: Where the biases are from.
        layout: Its layout.
        count: Biases that were put back.
        missing: How many of them the checkpoint lacked; in the others it had zeros.
    """

    original: Checkpoint
    layout: Layout
    count: int
    missing: int

    def verdict(self, names: Iterable[str], checkpoint: Checkpoint, layout: Layout) -> tuple[str, str | None]:
        """A remark on what was put back, and a warning where other weights are not the original's.

        Args:
            names: Parameters, by our names, that are read from the checkpoint.
            checkpoint: The one that was repaired.
            layout: Its layout.
        """
        shared, changed, apart, size = 0, 0, 0.0, 0.0
        for ours in names:
            theirs = self.layout.theirs(ours)
            if ours.endswith(BIASES) or any(name not in self.original.tensors for name in theirs):
                continue
            value, before = _value(checkpoint, layout, ours), _value(self.original, self.layout, ours)
            shared += 1
            if value.shape != before.shape:
                changed, apart, size = changed + 1, apart + _energy(value), size + _energy(before)
            else:
                # As the checkpoint keeps it: a copy in half precision has rounded what it had.
                changed += not torch.equal(value, before.to(value.dtype))
                apart, size = apart + _energy(value.double() - before.double()), size + _energy(before)
        state = {0: "all zero", self.count: "missing"}.get(self.missing, f"zero, {self.missing} of them missing,")
        remark = f"{self.count} biases of query and value, {state} in the file, put back from {self.original.where}"
        if not changed:
            return f"{remark}; the other {shared} weights that both have are the same", None
        distance = (apart / size) ** 0.5 if size else float("inf")
        trained = "the model was trained on without these biases, and may be better as it was: compare both"
        what = trained if distance < 1 else "this looks like another model than the original"
        warning = f"{changed} of {shared} weights that both have differ from {self.original.where}"
        return remark, f"{warning} (relative difference of all together {distance:.1e}): {what}"


def put_back(
    checkpoint: Checkpoint, layout: Layout, original: str | Path | Mapping[str, Any], *, decoder: bool
) -> tuple[Checkpoint, Repair]:
    """A checkpoint with the biases of another one in place of those that it has lost.

    Args:
        checkpoint: In which they are missing or zero.
        layout: Its layout.
        original: What still has them, of any layout: a source as `from_pretrained` takes it.
        decoder: Whether the pixel decoder is read, where the checkpoint has one.

    Raises:
        ValueError: the checkpoint has biases of its own, or those of the original do not fit or are lost as well.
    """
    where = checkpoint.where
    if layout.key == "hf" and huggingface.lacks_biases(checkpoint):
        raise checks.bad(f"{where}, config.json", "a model without biases of query and value", "one that has lost them")
    known = read(original)
    known_layout = detect(known.where, known.tensors)
    names = _names(checkpoint, layout, known, known_layout, decoder)
    own = {ours: tensor for ours in names if (tensor := checkpoint.tensors.get(layout.theirs(ours)[0])) is not None}
    if trained := [layout.theirs(ours)[0] for ours, tensor in own.items() if bool(tensor.any())]:
        accepted = "zeros or none: it has not lost them, or they were trained since and fit its other weights"
        raise checks.bad(where, f"biases of query and value that are not zero ({_some(trained)})", accepted)
    if lost := [name for ours in names if (name := known_layout.theirs(ours)[0]) not in known.tensors]:
        raise checks.bad("biases_from", f"{known.where}, without {_some(lost)}", "a checkpoint that has all of them")
    found = {ours: known.tensors[known_layout.theirs(ours)[0]] for ours in names}
    if not any(bool(tensor.any()) for tensor in found.values()):
        raise checks.bad("biases_from", f"{known.where}, in which all of them are zero", "one that has not lost them")
    for ours, tensor in found.items():
        beside = checkpoint.tensors.get(layout.theirs(re.sub(r"[qv]_bias$", "proj.bias", ours))[0])
        if beside is not None and tensor.shape != beside.shape:
            got = f"{known.where}, {known_layout.theirs(ours)[0]} of shape {tuple(tensor.shape)}"
            raise checks.bad("biases_from", got, f"{tuple(beside.shape)}, the width of {where}")
    tensors = checkpoint.tensors | {layout.theirs(ours)[0]: tensor for ours, tensor in found.items()}
    repair = Repair(original=known, layout=known_layout, count=len(names), missing=len(names) - len(own))
    return replace(checkpoint, tensors=tensors), repair


def _names(checkpoint: Checkpoint, layout: Layout, known: Checkpoint, known_layout: Layout, decoder: bool) -> list[str]:
    """The biases of all blocks, by our names."""
    names = []
    for stem in ("encoder", "decoder"):
        if stem == "decoder" and not (decoder and layout.has("decoder", checkpoint.tensors)):
            continue
        depth, its = layout.depth(stem, checkpoint.tensors), known_layout.depth(stem, known.tensors)
        if depth != its:
            got = f"{known.where}, with {its} blocks in its {stem}"
            raise checks.bad("biases_from", got, f"{depth}, as {checkpoint.where} has")
        names += [f"{stem}.blocks.{block}.{bias}" for block in range(depth) for bias in BIASES]
    return names


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _value(checkpoint: Checkpoint, layout: Layout, ours: str) -> Tensor:
    """One of our parameters, as the checkpoint has it."""
    pieces = [checkpoint.tensors[name] for name in layout.theirs(ours)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _energy(value: Tensor) -> float:
    return float(value.double().square().sum())
