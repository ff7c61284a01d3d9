"""One fine-tuning: where it started, on what, and its result. A row of `evaluation.jsonl` is one of these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trajshift.errors import UsageError

_SCRATCH, _INITIAL_WEIGHTS, _FINAL, _CHECKPOINT = "scratch", "initial weights", "initialization", "checkpoint"


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """Where a fine-tuning starts: one of the constants below, or `StartingPoint.at_step(step)`."""

    kind: str
    step: int | None = None
    """Inner steps of the checkpoint; None for everything else."""

    @classmethod
    def at_step(cls, step: int) -> StartingPoint:
        """phi of the checkpoint after this many inner steps."""
        return cls(_CHECKPOINT, step)

    @classmethod
    def from_json(cls, value: str | int) -> StartingPoint:
        """The inverse of `to_json`.

        Raises:
            UsageError: a word that does not name a starting point.
        """
        if isinstance(value, int):
            return cls.at_step(value)
        if value not in (_SCRATCH, _INITIAL_WEIGHTS, _FINAL):
            raise UsageError(f"checkpoint {value!r} is not a starting point")
        return cls(value)

    def to_json(self) -> str | int:
        """As in the files: the step of a checkpoint, or a word."""
        return self.kind if self.step is None else self.step

    @property
    def is_meta_trained(self) -> bool:
        """Whether it comes from meta-training; if not, a row belongs to no run and its method is its label."""
        return self.kind not in UNTRAINED_LABELS

    @property
    def is_end(self) -> bool:
        """Whether it enters the comparison of methods: the end of meta-training, or no meta-training at all."""
        return self.kind != _CHECKPOINT


SCRATCH = StartingPoint(_SCRATCH)
INITIAL_WEIGHTS = StartingPoint(_INITIAL_WEIGHTS)
"""What the recipe's phi starts from, such as ImageNet weights."""
FINAL = StartingPoint(_FINAL)
"""phi at the end of meta-training."""
UNTRAINED_LABELS = (_SCRATCH, _INITIAL_WEIGHTS)
"""Labels of the rows without meta-training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """One fine-tuning with its test metrics, or with `error` where it broke down."""

    start: StartingPoint
    inner_steps: int
    """Inner steps of meta-training per task behind `start`, replays included."""
    method: str
    label: str
    """The method, and what else sets its run apart from others in the same comparison."""
    seed: int
    target: str
    steps: int
    """Steps of fine-tuning."""
    train_images: int | None = None
    """Training images asked for; None: all."""
    images: int | None = None
    """Training images used; None for a fine-tuning that is still to be done."""
    section: str = "targets"
    """Section of the recipe that lists the target: `targets` or `tuning`."""
    setting: str | None = None
    """Digest of model, target and fine-tuning options."""
    phi: str | None = None
    """Digest of the file that phi was read from; None from scratch."""
    data: str | None = None
    """Digest of the target's data; None where it is not known, as in rows of version 0.1."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Test metrics by name, all finite; empty where the fine-tuning broke down or a metric is not finite."""
    error: str | None = None
    """Why the fine-tuning broke down."""
    run: str | None = None
    """Name of the run directory that the row was read from; not written, as the file is in it."""

    def __post_init__(self) -> None:
        bad = {name: value for name, value in self.metrics.items() if not math.isfinite(value)}
        for name, value in bad.items():
            # A number that is none would win comparisons and stop every table.
            sentence = f"test {name} of {self.target!r} is {value}; look for such values in its test set, or lower lr"
            object.__setattr__(self, "error", self.error or sentence)
            object.__setattr__(self, "metrics", {})
            break

    @property
    def place(self) -> tuple[Any, ...]:
        """What the row is a result for, within its run."""
        return self.start, self.target, self.train_images, self.steps

    @property
    def identity(self) -> tuple[Any, ...]:
        """Two rows with this in common hold the same numbers."""
        return (*self.place, self.seed, self.setting, self.phi, self.data)

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object, its keys in the order of the files."""
        result: Mapping[str, Any] = self.metrics if self.error is None else {"error": self.error}
        return {
            "checkpoint": self.start.to_json(),
            "inner_steps": self.inner_steps,
            "method": self.method,
            "label": self.label,
            "seed": self.seed,
            "section": self.section,
            "phi": self.phi,
            "setting": self.setting,
            **({} if self.data is None else {"data": self.data}),
            "target": self.target,
            "train_images": self.train_images,
            "steps": self.steps,
            "images": self.images,
            **result,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> EvaluationRow:
        """The inverse of `to_json`; `JSON_FIELDS` must be there, and any other number is a metric.

        Raises:
            UsageError: the starting point is unknown.
        """
        known = {name: row[name] for name in _OTHER_FIELDS if name in row}
        for name, value in known.items():
            if isinstance(value, bool) or not isinstance(value, _OTHER_FIELDS[name]):
                raise UsageError(f"{name} is {str(value)[:80]!r}")
        metrics = {
            name: float(value)
            for name, value in row.items()
            if name not in JSON_FIELDS and name not in _OTHER_FIELDS and isinstance(value, (int, float))
        }
        fields = {name: row[name] for name in JSON_FIELDS if name != "checkpoint"}
        start = StartingPoint.from_json(row["checkpoint"])
        return cls(start=start, metrics=metrics, **{"label": row["method"]} | fields | known)


JSON_FIELDS: Mapping[str, Any] = {
    "checkpoint": (str, int), "target": str, "steps": int, "seed": int, "inner_steps": int, "method": str,
}  # fmt: skip
"""What every row in a file has: field -> type, or a tuple of types."""
_OTHER_FIELDS: Mapping[str, Any] = {
    "label": str, "train_images": (int, type(None)), "images": (int, type(None)), "section": str,
    "setting": (str, type(None)), "phi": (str, type(None)), "data": (str, type(None)), "error": (str, type(None)),
    "run": (str, type(None)),
}  # fmt: skip
