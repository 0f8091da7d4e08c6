"""put_back: biases of queries and values that a checkpoint has lost, from one that still has them.

transformers 5.5 to 5.17 has biases under other names than the files of the hub, and a key bias besides: it reads such a
file without them, begins them at zero, and writes zeros when it saves.
"""

import re
from collections.abc import Iterable

import torch

from ..kernels import checks
from .layouts import BIASES, Checkpoint
from .report import some


def put_back(checkpoint: Checkpoint, original: Checkpoint, *, decoder: bool) -> None:
    """Put the biases of another checkpoint in place of those that this one has lost, with a remark that says so.

    Those of the pixel decoder too, where ``decoder`` says that it is read.

    Raises:
        ValueError: the checkpoint has biases of its own, or those of the original do not fit or are lost as well.
    """
    where = checkpoint.where
    if any(name.endswith(BIASES) for name in checkpoint.absent):
        raise checks.bad(f"{where}, config.json", "a model without biases of query and value", "one that has lost them")
    names = []
    for stem in ("encoder", "decoder") if decoder and checkpoint.has("decoder") else ("encoder",):
        depth, its = checkpoint.depth(stem), original.depth(stem)
        if depth != its:
            got = f"{original.where}, with {its} blocks in its {stem}"
            raise checks.bad("biases_from", got, f"{depth}, as {where} has")
        names += [f"{stem}.blocks.{block}.{bias}" for block in range(depth) for bias in BIASES]

    def theirs(of: Checkpoint, ours: list[str]) -> str:
        return some([of.layout.theirs(name)[0] for name in ours], 3)

    own = [name for name in names if name in checkpoint.tensors]
    if trained := [name for name in own if bool(checkpoint.tensors[name].any())]:
        accepted = "zeros or none: it has not lost them, or they were trained since and fit its other weights"
        got = f"biases of query and value that are not zero ({theirs(checkpoint, trained)})"
        raise checks.bad(where, got, accepted)
    if lost := [name for name in names if name not in original.tensors]:
        got = f"{original.where}, without {theirs(original, lost)}"
        raise checks.bad("biases_from", got, "a checkpoint that has all of them")
    found = {name: original.tensors[name] for name in names}
    if not any(bool(tensor.any()) for tensor in found.values()):
        got = f"{original.where}, in which all of them are zero"
        raise checks.bad("biases_from", got, "one that has not lost them")
    for name, tensor in found.items():
        beside = checkpoint.tensors.get(re.sub(r"[qv]_bias$", "proj.bias", name))
        if beside is not None and tensor.shape != beside.shape:
            got = f"{original.where}, {theirs(original, [name])} of shape {tuple(tensor.shape)}"
            raise checks.bad("biases_from", got, f"{tuple(beside.shape)}, the width of {where}")
    missing = len(names) - len(own)
    state = {0: "all zero", len(names): "missing"}.get(missing, f"zero, {missing} of them missing,")
    checkpoint.tensors |= found
    remark = f"{len(names)} biases of query and value, {state} in the file, put back from {original.where}"
    checkpoint.remarks.append(remark)


def compare_others(checkpoint: Checkpoint, original: Checkpoint, names: Iterable[str]) -> None:
    """Remark that the other weights that are read, by ``names``, are the original's, or warn that they are not."""
    shared = [name for name in names if name in original.tensors and not name.endswith(BIASES)]
    changed, apart, size = 0, 0.0, 0.0
    for name in shared:
        value, before = checkpoint.tensors[name], original.tensors[name]
        same_shape = value.shape == before.shape
        # As the checkpoint keeps it: a copy in half precision has rounded what it had.
        changed += not (same_shape and torch.equal(value, before.to(value.dtype)))
        apart += float((value.double() - before.double() if same_shape else value.double()).square().sum())
        size += float(before.double().square().sum())
    if not changed:
        checkpoint.remarks.append(f"the other {len(shared)} weights that both have are the same")
        return
    distance = (apart / size) ** 0.5 if size else float("inf")
    trained = "the model was trained on without these biases, and may be better as it was: compare both"
    what = trained if distance < 1 else "this looks like another model than the original"
    differ = f"{changed} of {len(shared)} weights that both have differ from {original.where}"
    checkpoint.warnings.append(f"{differ} (relative difference of all together {distance:.1e}): {what}")
