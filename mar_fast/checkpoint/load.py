"""from_pretrained: a checkpoint of any layout into a `mar_fast.MAR`, strictly, with a report."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import checks
from ..model import MAR
from . import huggingface
from .choose import Choice, Position, choose
from .facts import TABLES, gather, table_fault
from .layouts import Layout, detect
from .read import Checkpoint, read
from .repair import BIASES, Repair, put_back
from .report import LoadReport, Note

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
        source: A file (.pth, .pt, .bin, .pyth, .ckpt, .safetensors), a Hugging Face folder, a hub id (owner/name) or a
            state dict. Pickled files are read with ``weights_only``.
        position: For clips of another size (``num_frames``, ``image_size``) than the checkpoint's: "interpolate" its
            position table to the new grid, so that each place keeps the code that the weights learned to read, or make
            the table by the "formula" for the new grid, where the flat index of a place is another. None interpolates
            where the file says its size, and is an error where it does not.
        allow_missing: Shell patterns of names, of the model or the checkpoint: these may stay at their initial value.
        allow_unknown: Of entries of the checkpoint that the model has no use for.
        allow_mismatched: Of tensors with another shape or no floating-point dtype; what they are for stays initial.
        allow_nonfinite: Of tensors that may hold NaN or infinity; they are read as they are.
        model_key: Which envelope ("model", "model_ema", ...) to open, where a file has several.
        revision: Of a hub id: a branch, a tag or a commit.
        biases_from: A source that still has the biases of query and value which ``source`` has lost, as files have that
            transformers 5.5 to 5.17 saved: they are put back where ``source`` has none, or zeros. Depth and width must
            agree. The report says how many, and warns if the other weights have changed since.
        **overrides: Fields of `MARConfig`. Those that shapes give must agree with them.

    Returns:
        The model in evaluation mode, on the CPU, in float32 (float16 and bfloat16 files are widened exactly).

    Raises:
        ValueError: a checkpoint that is damaged, does not fit or does not say enough; the message names what.
        TypeError: a source or an override of a wrong type.
        OSError: there is no such file.
        ModuleNotFoundError: a hub id without huggingface_hub.
    """
    allowed = _Allowed(
        missing=_patterns("allow_missing", allow_missing),
        unknown=_patterns("allow_unknown", allow_unknown),
        mismatched=_patterns("allow_mismatched", allow_mismatched),
        nonfinite=_patterns("allow_nonfinite", allow_nonfinite),
    )
    checkpoint = read(source, model_key, revision)
    layout = detect(checkpoint.where, checkpoint.tensors)
    repair = None
    if biases_from is not None:
        decoder = overrides.get("decoder_depth") != 0
        checkpoint, repair = put_back(checkpoint, layout, biases_from, decoder=decoder)
    facts = gather(checkpoint, layout, overrides)
    heads = ("classifier.head.weight", *layout.theirs("classifier.head.weight"))
    choice = choose(checkpoint, layout, facts, position, allowed.allows("mismatched", *heads), overrides)
    if choice.config.classifier and "num_classes" not in choice.origins and allowed.allows("missing", *heads):
        raise checks.bad("num_classes", "none: the file has no head that says", "num_classes=, where it may be missing")
    with torch.device("meta"):
        model = MAR(choice.config)
    fit = _fit(checkpoint, layout, choice, model, allowed)
    if repair is not None:
        _note(fit, repair, checkpoint, layout)
    model.to_empty(device="cpu")
    if fit.initial:
        model.reset_parameters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in fit.values:
                parameter.copy_(fit.values.pop(name))
    model.load_report = _report(checkpoint, layout, choice, fit, model)
    logger.info("%s", model.load_report)
    for warning in model.load_report.warnings:
        logger.warning("%s: %s", checkpoint.where, warning)
    return model.eval()


def _patterns(argument: str, given: Patterns) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise checks.bad_type(argument, repr(given), "a shell pattern or a sequence of them")
    return tuple(patterns)


@dataclass(frozen=True, kw_only=True)
class _Allowed:
    """Patterns of what may be wrong."""

    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    mismatched: tuple[str, ...]
    nonfinite: tuple[str, ...]

    def allows(self, fault: str, *names: str) -> bool:
        """Whether any of the names of a thing is allowed to have this fault."""
        return any(fnmatchcase(name, pattern) for pattern in getattr(self, fault) for name in names)


@dataclass
class _Fit:
    """Which tensor goes where, and everything that goes nowhere."""

    values: dict[str, Tensor] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)
    initial: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)
    """By the argument that would allow them."""

    def fault(self, argument: str, what: str) -> None:
        self.faults.setdefault(argument, []).append(what)


def _fit(checkpoint: Checkpoint, layout: Layout, choice: Choice, model: MAR, allowed: _Allowed) -> _Fit:
    fit, tensors = _Fit(), checkpoint.tensors
    claimed: set[str] = set()
    no_biases = layout.key == "hf" and huggingface.lacks_biases(checkpoint)
    for ours, parameter in model.named_parameters():
        part = _part(ours)
        if part in choice.fresh:
            fit.initial[ours] = choice.fresh[part]
            continue
        sources = layout.theirs(ours)
        claimed.update(sources)
        missing = [name for name in sources if name not in tensors]
        if len(missing) == len(sources) and no_biases and ours.endswith(BIASES):
            fit.initial[ours] = "zero: config.json says that query and value have no bias"
        elif missing and all(allowed.allows("missing", ours, name) for name in missing):
            fit.initial[ours] = "missing in the checkpoint, allowed"
            fit.ignored.update(dict.fromkeys(set(sources) - set(missing), f"the rest of {ours} is missing"))
        elif missing:
            for name in missing:
                fit.fault("allow_missing", name)
        else:
            _take(fit, ours, sources, parameter, tensors, allowed)
    _leftovers(fit, checkpoint, layout, choice, claimed, allowed)
    if fit.faults:
        raise ValueError(_message(checkpoint, layout, fit))
    _suspicions(fit, model, layout, checkpoint)
    return fit


def _part(ours: str) -> str | None:
    if ours.startswith("classifier."):
        return "classifier"
    if ours.startswith("encoder.norm."):
        return "final_norm"
    return None if ours.startswith("encoder.") else "decoder"


def _take(
    fit: _Fit,
    ours: str,
    sources: tuple[str, ...],
    parameter: Tensor,
    tensors: Mapping[str, Tensor],
    allowed: _Allowed,
) -> None:
    shape = (parameter.shape[0] // len(sources), *parameter.shape[1:])
    pieces: list[Tensor] = []
    for name in sources:
        tensor = tensors[name]
        fault = _tensor_fault(tensor, shape)
        if fault and allowed.allows("mismatched", ours, name):
            fit.initial[ours] = f"{name}: {fault}, allowed"
            fit.ignored.update({other: f"the rest of {ours} does not fit" for other in sources})
            fit.ignored[name] = f"{fault}, allowed"
            return
        if fault:
            fit.fault("allow_mismatched", f"{name}: {fault}")
            continue
        piece = tensor.to(torch.float32)
        if not _is_finite(piece):
            if allowed.allows("nonfinite", ours, name):
                fit.warnings.append(f"{name} holds NaN or infinity, allowed")
            else:
                fit.fault("allow_nonfinite", name)
        pieces.append(piece)
    if len(pieces) == len(sources):
        # Faults are collected first, so that one message names all of them.
        fit.values[ours] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        fit.read += sources


def _tensor_fault(tensor: Tensor, shape: tuple[int, ...]) -> str | None:
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return f"got a {tensor.device.type if tensor.device.type == 'meta' else tensor.layout} tensor, expected values"
    if tensor.dtype not in checks.FLOATS:
        return f"got {tensor.dtype}, expected {checks.names(checks.FLOATS)}"
    if tuple(tensor.shape) != shape:
        return f"got shape {tuple(tensor.shape)}, expected {shape}"
    return None


def _leftovers(
    fit: _Fit, checkpoint: Checkpoint, layout: Layout, choice: Choice, claimed: set[str], allowed: _Allowed
) -> None:
    """Entries of the checkpoint that no parameter asks for."""
    for name, kind in checkpoint.others.items():
        if allowed.allows("unknown", name):
            fit.ignored[name] = f"a {kind} and no tensor, allowed"
        else:
            fit.fault("allow_unknown", f"{name} (a {kind} and no tensor)")
    for name, tensor in checkpoint.tensors.items():
        part = layout.part(name)
        if name in claimed:
            continue
        if name in layout.unused:
            fit.ignored[name] = layout.unused[name]
        elif part in choice.dropped:
            fit.ignored[name] = choice.dropped[part]
        elif layout.key == "hf" and name.endswith(".attention.attention.key.bias") and _is_finite(tensor):
            fit.ignored[name] = "it adds the same to all scores of a query, which softmax takes out"
        elif layout.key == "mar" and name in ("mean", "std") and "mar_fast" not in checkpoint.configs:
            fit.ignored[name] = "read into the configuration"
        elif name in TABLES and table_fault(tensor) is None:
            fit.ignored[name] = "the position table of the formula, which the model makes itself"
        elif allowed.allows("unknown", name):
            fit.ignored[name] = "unknown, allowed"
        else:
            why = f" ({table_fault(tensor)})" if name in TABLES else ""
            fit.fault("allow_unknown", name + why)


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


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


def _message(checkpoint: Checkpoint, layout: Layout, fit: _Fit) -> str:
    said = []
    for argument, kind in _FAULTS.items():
        if names := fit.faults.get(argument):
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            said.append(f"{len(names)} {kind} ({'; '.join(names[:6])}{more})")
    hint = ""
    if missing := fit.faults.get("allow_missing"):
        biases = [name for name in missing if re.search(r"(q_bias|v_bias|query\.bias|value\.bias)$", name)]
        if len(biases) == len(missing):
            hint = f". The biases of query and value are lost: {_LOST}"
    accepted = "none, or " + ", ".join(f"{argument}=(patterns,)" for argument in _FAULTS if argument in fit.faults)
    got = ", ".join(said)
    return f"{checkpoint.where}, {layout.title} layout: got tensors {got}, expected {accepted} to go on without{hint}"


def _note(fit: _Fit, repair: Repair, checkpoint: Checkpoint, layout: Layout) -> None:
    remark, warning = repair.verdict(fit.values, checkpoint, layout)
    fit.remarks.append(remark)
    if warning is not None:
        fit.warnings.append(warning)


def _suspicions(fit: _Fit, model: MAR, layout: Layout, checkpoint: Checkpoint) -> None:
    """What is allowed, and yet looks like an accident."""
    biases = [name for name in fit.values if name.startswith("encoder.") and name.endswith(BIASES)]
    if biases and not any(bool(fit.values[name].any()) for name in biases):
        fit.warnings.append(f"all biases of query and value are zero, as in a model that was never trained. {_LOST}")
    if layout.title == "VideoMAE pre-training" and not layout.has("decoder", checkpoint.tensors):
        fit.warnings.append("the encoder alone: there is no pixel decoder in the file")
    for argument in ("missing in the checkpoint, allowed", "unknown, allowed"):
        found = [name for notes in (fit.initial, fit.ignored) for name, reason in notes.items() if reason == argument]
        if found:
            more = f" and {len(found) - 6} more" if len(found) > 6 else ""
            fit.warnings.append(f"{argument}: {', '.join(found[:6])}{more}")


def _report(checkpoint: Checkpoint, layout: Layout, choice: Choice, fit: _Fit, model: MAR) -> LoadReport:
    remarks = [*checkpoint.remarks, *choice.remarks, *fit.remarks]
    dtypes = {checkpoint.tensors[name].dtype for name in fit.read} - {torch.float32}
    for dtype in sorted(dtypes, key=str):
        how = "rounded to" if dtype == torch.float64 else "widened to"
        remarks.append(f"{str(dtype).removeprefix('torch.')} {how} float32")
    dropout = [
        f"{key} {value}"
        for key, value in checkpoint.configs.get("config.json", {}).items()
        if key in ("hidden_dropout_prob", "attention_probs_dropout_prob") and value
    ]
    if dropout:
        remarks.append(f"not carried over, without effect in evaluation: {', '.join(dropout)}")
    return LoadReport(
        source=checkpoint.where,
        layout=layout.title,
        config=choice.config,
        parameters=sum(math.prod(parameter.shape) for parameter in model.parameters()),
        read=tuple(fit.read),
        initial=tuple(Note(*item) for item in fit.initial.items()),
        ignored=tuple(Note(*item) for item in fit.ignored.items()),
        origins=tuple(Note(*item) for item in choice.origins.items()),
        remarks=tuple(remarks),
        warnings=tuple(fit.warnings),
        labels=None if "classifier.head.weight" in fit.initial else huggingface.labels(checkpoint, choice.config),
    )
