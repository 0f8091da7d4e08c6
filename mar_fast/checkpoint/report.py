"""LoadReport: what `from_pretrained` did, for people and for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from ..config import MARConfig
from ..kernels import checks
from ..model import MAR

Said = dict[str, tuple[Any, str]]
"""Field of `MARConfig` -> (value, where it is said)."""


def say(origin: str, **values: Any) -> Said:
    """Fields that one origin gives."""
    return {name: (value, origin) for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was read, what was not, and where every size and eps came from.

    Attributes:
        source: The file, folder, hub id, or "state dict".
        layout: "MAR", "VideoMAE pre-training", "VideoMAE fine-tuned", "Hugging Face VideoMAEModel", ..., "mar_fast".
        config: The configuration of the model that came out.
        parameters: Values in the model.
        read: Tensors of the checkpoint that are in the model now, by the checkpoint's names.
        initial: Parameters of the model that were left at their initial value, by the model's names, and why.
        ignored: Entries of the checkpoint that were not used, and why.
        origins: Fields of the configuration, and where their values came from.
        remarks: What else there is to know: envelope, prefixes, dtypes, position tables.
        warnings: What may be wrong although it is allowed.
        labels: Names of the classes, one for each, where a Hugging Face config.json has them (id2label).
    """

    source: str
    layout: str
    config: MARConfig
    parameters: int
    read: tuple[str, ...]
    initial: dict[str, str]
    ignored: dict[str, str]
    origins: dict[str, str]
    remarks: tuple[str, ...]
    warnings: tuple[str, ...]
    labels: tuple[str, ...] | None = None

    def __str__(self) -> str:
        """Several lines; names with the same reason stand together."""
        lines = [
            f"{self.source}: {self.layout} layout, {len(self.read)} tensors read, "
            f"{self.parameters / 1e6:.2f} M parameters"
        ]
        fields = {f"{name} {getattr(self.config, name)}": reason for name, reason in self.origins.items()}
        for title, notes, most in (
            ("left at their initial value", self.initial, 12),
            ("ignored", self.ignored, 12),
            ("configuration", fields, len(fields)),
        ):
            if notes:
                lines.append(f"{title}:")
            lines += [f"  {line}" for line in by_reason(notes, most)]
        lines += [f"note: {remark}" for remark in self.remarks]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def class_names(model: MAR, labels: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of a model's classes: ``labels``, or where that is None its checkpoint's; None if that has none either.

    Raises:
        ValueError: not one name for each class.
    """
    config, report = model.config, model.load_report
    classes = config.num_classes if config.classifier else 0
    if labels is None:
        return report.labels if report is not None and classes else None
    if isinstance(labels, str) or len(labels) != classes:
        accepted = f"{classes}, one for each class" if classes else "None: this model has no classes"
        raise checks.bad("labels", f"{len(labels)} names", accepted)
    return tuple(labels)


def by_reason(notes: Mapping[str, str], most: int) -> list[str]:
    """A line for each reason, with the first names that have it."""
    groups = groupby(sorted(notes, key=notes.__getitem__), notes.__getitem__)
    return [f"{some(list(names), most)}: {reason}" for reason, names in groups]


def some(names: Sequence[str], most: int, between: str = ", ") -> str:
    """The first of these names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more
