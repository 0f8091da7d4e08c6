"""from_pretrained: a checkpoint of any layout into a `mar_fast.MAR`, strictly, with a report."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import checks
from ..kernels.quantize_rows import E4M3
from ..model import MAR
from ..scaled_linear import ScaledLinear
from .layouts import BIASES, Checkpoint, part_of
from .plan import Position, plan
from .read import read
from .repair import compare_others, put_back
from .report import LoadReport, some
from .sources import NORMALISATION, convert, is_finite

logger = logging.getLogger("mar_fast.checkpoint")

Patterns = str | Sequence[str]


def from_pretrained(
    source: str | Path | Mapping[str, Any],
    *,
    position: Position | None = None,
    allow_missing: Patterns = (),
    allow_unknown: Patterns = (),
    allow_mismatched: Patterns = (),
    allow_nonfinite: Patterns = (),
    model_key: str | None = None,
    revision: str | None = None,
    biases_from: str | Path | Mapping[str, Any] | None = None,
    **overrides: Any,
) -> MAR:
    """A model with the weights of a checkpoint, whatever its layout: MAR, VideoMAE, Hugging Face VideoMAE or our own.

    Sizes are read from shapes, the number of heads from a configuration file or the known models. Nothing is loaded
    half: what is missing, unknown, of another shape, not finite or not floating point is an error, unless it is allowed
    by name. ``model.load_report`` says what was read, what was not and why; the log ``mar_fast.checkpoint`` too.

    A MAR file gives the bridging classifier; a fine-tuned VideoMAE or Hugging Face classifier the linear one at
    mask_ratio 0; a pre-training file none, or with ``num_classes`` a new bridging one (or ``classifier="linear"``) and
    the checkpoint's pixel decoder, ready to be fine-tuned. ``classifier=None`` or ``decoder_depth=0`` leave a part out.

    Args:
        source: A file (.pth, .pt, .bin, .pyth, .ckpt, .pkl, .tar, .safetensors), a Hugging Face folder, a hub id
            (owner/name) or a state dict. Pickled files are read with ``weights_only``.
        position: For clips of another size (``num_frames``, ``image_size``) than the checkpoint's: "interpolate" its
            position table to the new grid, so that each position keeps the code that the weights learned to read, or
            make the table by the "formula" for the new grid, where a position has another flat index. None interpolates
            where the file says its size, and is an error where it does not.
        allow_missing: Shell patterns of names, of the model or the checkpoint: these may stay at their initial value.
        allow_unknown: Of entries of the checkpoint that the model has no use for.
        allow_mismatched: Of tensors with another shape or no floating-point dtype; what they are for stays initial.
        allow_nonfinite: Of tensors that may hold NaN or infinity; they are read as they are.
        model_key: Which envelope ("model", "model_ema", ...) to open, where a file has several or one that is not
            known; "a.b" is the one called b inside a. What names begin with ("student") chooses among several models.
        revision: Of a hub id: a branch, a tag or a commit.
        biases_from: A source that still has the biases of query and value which ``source`` has lost, as files have that
            transformers 5.5 to 5.17 saved: they are put back where ``source`` has none, or zeros. Depth and width must
            agree. The report says how many, and warns if the other weights have changed since.
        **overrides: Fields of `MARConfig`. Those that shapes give must agree with them.

    Returns:
        The model in evaluation mode, on the CPU, in float32 (float16 and bfloat16 files are widened exactly). Layers
        that `mar_fast.quantize` made stay in fp8, and such a model is for inference.

    Raises:
        ValueError: a checkpoint that is damaged, does not fit or does not say enough; the message names what.
        TypeError: a source or an override of a wrong type.
        OSError: there is no such file.
        ModuleNotFoundError: a hub id without huggingface_hub.
    """
    allowed = {
        "allow_missing": allow_missing,
        "allow_unknown": allow_unknown,
        "allow_mismatched": allow_mismatched,
        "allow_nonfinite": allow_nonfinite,
    }
    for argument, patterns in allowed.items():
        if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
            raise checks.bad_type(argument, repr(patterns), "a shell pattern or a sequence of them")
    checkpoint = convert(read(source, model_key, revision), given=overrides)
    original = None if biases_from is None else convert(read(biases_from), given=NORMALISATION)
    if original is not None:
        put_back(checkpoint, original, decoder=overrides.get("decoder_depth") != 0)
    head = ("classifier.head.weight", *checkpoint.layout.theirs("classifier.head.weight"))
    config, origins = plan(checkpoint, position, _matches(head, allowed["allow_mismatched"]), overrides)
    if config.classifier and "num_classes" not in origins and _matches(head, allowed["allow_missing"]):
        raise checks.bad("num_classes", "none: the file has no head that says", "num_classes=, where it may be missing")
    with torch.device("meta"):
        model = MAR(config)
    scaled = _put_scaled(model, checkpoint)
    values, initial = _fit(checkpoint, model, allowed)
    remarks, warnings = checkpoint.remarks, checkpoint.warnings
    if scaled:
        remarks.append(f"{len(scaled) // 2} layers in fp8 (e4m3), for inference")
    if original is not None:
        compare_others(checkpoint, original, values)
    for dtype in sorted({checkpoint.tensors[name].dtype for name in values} - {torch.float32}, key=str):
        how = "rounded to" if dtype == torch.float64 else "widened to"
        remarks.append(f"{str(dtype).removeprefix('torch.')} {how} float32")
    labels = checkpoint.labels if "classifier.head.weight" in values else None
    model.load_report = LoadReport(
        source=checkpoint.where,
        layout=checkpoint.layout.title,
        config=config,
        parameters=sum(value.numel() for value in model.state_dict().values()),
        read=tuple(dict.fromkeys(name for ours in (*values, *scaled) for name in checkpoint.layout.theirs(ours))),
        initial=initial,
        ignored=checkpoint.unused,
        origins=origins,
        remarks=tuple(remarks),
        warnings=tuple(warnings),
        labels=labels if labels and len(labels) == config.num_classes else None,
    )
    model.to_empty(device="cpu")
    if initial:
        model.reset_parameters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values.pop(name))
    logger.info("%s", model.load_report)
    for warning in warnings:
        logger.warning("%s: %s", checkpoint.where, warning)
    return model.eval().requires_grad_(not scaled)


def _put_scaled(model: MAR, checkpoint: Checkpoint) -> list[str]:
    """Put the checkpoint's layers in fp8 into a model on the meta device; the names of the tensors that they took."""
    tensors, modules, taken = checkpoint.tensors, dict(model.named_modules()), list[str]()
    for stem in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        layer, names = modules.get(stem), (f"{stem}.weight", f"{stem}.weight_scale")
        if not isinstance(layer, nn.Linear) or names[0] not in tensors:
            continue  # of a part that is left out, or unknown
        found = [tensors.pop(name) for name in names]
        shapes = layer.weight.shape, (layer.out_features, 1)
        for name, tensor, dtype, shape in zip(names, found, (E4M3, torch.float32), shapes, strict=True):
            if tensor.dtype != dtype or tensor.shape != shape or not is_finite(tensor.float()):
                got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise checks.bad(f"{checkpoint.where}, {name}", got, f"finite {dtype} of shape {tuple(shape)}")
        model.set_submodule(stem, ScaledLinear(found[0], found[1], layer.bias))
        taken += names
    return taken


def _matches(names: Iterable[str], patterns: Patterns) -> bool:
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _fit(
    checkpoint: Checkpoint, model: MAR, allowed: Mapping[str, Patterns]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Check every parameter and every entry; the error names all faults at once.

    Returns the values of parameters, and why the other parameters stay initial. The checkpoint gets warnings, and notes
    on entries that are passed over.
    """
    values: dict[str, Tensor] = {}
    initial: dict[str, str] = {}
    faults: dict[str, list[str]] = {argument: [] for argument in _FAULTS}
    unread, warnings = dict(checkpoint.tensors), checkpoint.warnings

    def allows(argument: str, names: Iterable[str], fault: str) -> bool:
        if _matches(names, allowed[argument]):
            return True
        faults[argument].append(fault)
        return False

    for ours, parameter in model.named_parameters():
        names = checkpoint.layout.theirs(ours)
        title, new = ", ".join(names), checkpoint.absent.get(part_of(ours) or "")
        tensor = None if new else unread.pop(ours, None)
        if tensor is None and (reason := new or checkpoint.absent.get(ours)):
            initial[ours] = reason
        elif tensor is None:
            missing = [name for name in names if name not in checkpoint.unused]
            if all([allows("allow_missing", (ours, name), name) for name in missing]):
                initial[ours] = _MISSING
        elif fault := _fault(tensor, parameter.shape):
            if allows("allow_mismatched", (ours, *names), f"{title}: {fault}"):
                initial[ours] = f"{title}: {fault}, allowed"
                checkpoint.unused |= dict.fromkeys(names, f"{fault}, allowed")
        else:
            values[ours] = tensor.to(torch.float32)
            if not is_finite(values[ours]) and allows("allow_nonfinite", (ours, *names), title):
                warnings.append(f"{title} holds NaN or infinity, allowed")
    left = [name for ours in unread for name in checkpoint.layout.theirs(ours) if name not in checkpoint.unused]
    unknown = dict.fromkeys(left, "") | checkpoint.unknown
    for name, what in unknown.items():
        if allows("allow_unknown", (name,), f"{name} ({what})" if what else name):
            checkpoint.unused[name] = f"{what or 'unknown'}, allowed"
    if any(faults.values()):
        raise ValueError(_message(checkpoint, faults))
    biases = [name for name in values if name.startswith("encoder.") and name.endswith(BIASES)]
    if biases and not any(bool(values[name].any()) for name in biases):
        warnings.append(f"all biases of query and value are zero, as in a model that was never trained. {_LOST}")
    missing = [name for name, reason in initial.items() if reason == _MISSING]
    for why, found in ((_MISSING, missing), ("unknown, allowed", list(unknown))):
        if found:
            warnings.append(f"{why}: {some(found, 6)}")
    return values, initial


_MISSING = "missing in the checkpoint, allowed"
_LOST = (
    "transformers 5.5 to 5.17 loses them when it reads a file of the hub; "
    "mar-fast checkpoint convert FILE OUT --biases-from ORIGINAL "
    "(in Python from_pretrained(..., biases_from=)) puts them back"
)
_FAULTS = {
    "allow_missing": "missing",
    "allow_unknown": "unknown",
    "allow_mismatched": "of another shape or dtype",
    "allow_nonfinite": "with NaN or infinity",
}


def _fault(tensor: Tensor, shape: torch.Size) -> str | None:
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return f"got a {'meta' if tensor.device.type == 'meta' else tensor.layout} tensor, expected values"
    if tensor.dtype not in checks.FLOATS:
        return f"got {tensor.dtype}, expected {checks.names(checks.FLOATS)}"
    if tensor.shape != shape:
        return f"got shape {tuple(tensor.shape)}, expected {tuple(shape)}"
    return None


def _message(checkpoint: Checkpoint, faults: Mapping[str, list[str]]) -> str:
    told = {argument: names for argument, names in faults.items() if names}
    got = ", ".join(f"{len(said)} {_FAULTS[argument]} ({some(said, 6, '; ')})" for argument, said in told.items())
    accepted = "none, or " + ", ".join(f"{argument}=(patterns,)" for argument in told)
    missing = faults["allow_missing"]
    lost = missing and all(name.endswith(("q_bias", "v_bias", "query.bias", "value.bias")) for name in missing)
    hint = f". The biases of query and value are lost: {_LOST}" if lost else ""
    where = f"{checkpoint.where}, {checkpoint.layout.title} layout"
    return f"{where}: got tensors {got}, expected {accepted} to go on without{hint}"
