"""A task: data, a loss and what a model factory needs to know about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trajshift.errors import UsageError
from trajshift.losses import (
    Batch,
    classification_loss,
    classification_metrics,
    multilabel_loss,
    multilabel_metrics,
    regression_loss,
    regression_metrics,
)

__all__ = [
    "Batch",
    "Loss",
    "Metrics",
    "Task",
    "Transform",
    "classification_loss",
    "classification_metrics",
    "move",
    "multilabel_loss",
    "multilabel_metrics",
    "regression_loss",
    "regression_metrics",
    "untested",
]

Loss = Callable[[nn.Module, Batch], Tensor]
Metrics = Callable[[nn.Module, Batch], dict[str, Tensor]]
Transform = Callable[[Batch, "int | None"], Batch]


_KINDS: dict[str, tuple[Callable[..., Tensor], Callable[..., dict[str, Tensor]]]] = {
    "classification": (classification_loss, classification_metrics),
    "regression": (regression_loss, regression_metrics),
    "multilabel": (multilabel_loss, multilabel_metrics),
}


@dataclass(kw_only=True)
class Task:
    """One learning problem; tasks may differ in everything but the shared part of the model.

    Raises:
        UsageError: an empty name, an unknown kind, a weight that is not positive or a batch size below one.
    """

    name: str
    """Names the task in every table, file and random draw; unique within a run."""
    train: Any
    """Training examples: a `Source` or any map-style data set."""
    test: Any = None
    """Test examples, likewise; None where the task is only meta-trained on."""
    outputs: int | None = None
    """Number of classes, of regression targets or of labels, from which a model factory sizes its head."""
    kind: str = "classification"
    """`classification`, `regression` or `multilabel`: supplies `loss` and `metrics` where they are not given.

    Classification takes class numbers `y` `[N]` (or one for each place, with the classes on dimension 1 of the output)
    or probabilities `[N, C]`, regression targets `[N, C]`, multilabel labels `[N, C]` of 0 and 1; its metrics are
    `accuracy` (of single labels), `f1` (of each example over its labels, then the mean) and `loss` (binary
    cross-entropy). Shapes that do not fit are refused, never broadcast.
    """
    loss: Loss | None = None
    """`loss(module, batch) -> scalar`, minimised by the inner loop."""
    metrics: Metrics | None = None
    """`metrics(module, batch) -> {name: scalar}`, each the mean over the batch's examples."""
    transform: Transform | None = None
    """`transform(batch, key)`, run on the device on whole batches; key None means evaluation: no random draw."""
    weight: float = 1.0
    """Weight in the mean over tasks of the meta-gradient."""
    batch_size: int | None = None
    """Examples per inner step; None takes the trainer's."""
    input_shape: tuple[int, ...] | None = None
    """Shape of one example as the model sees it, `(C, H, W)` for images."""

    def __post_init__(self) -> None:
        if not self.name:
            raise UsageError("a task has an empty name; give it one")
        if self.kind not in _KINDS:
            raise UsageError(f"task {self.name!r} has kind {self.kind!r}; use one of {', '.join(_KINDS)}")
        if not (self.weight > 0.0 and self.weight < float("inf")):
            raise UsageError(f"task {self.name!r} has weight {self.weight}; use a positive number")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"task {self.name!r} has batch_size {self.batch_size}; use at least 1")
        if self.kind == "classification" and self.outputs is not None and self.outputs < 2:
            raise UsageError(f"task {self.name!r} has {self.outputs} classes; classification needs at least 2")

    def compute_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """The scalar training loss of `module` on `batch`.

        Raises:
            UsageError: outputs and labels whose shapes do not fit.
        """
        if self.loss is not None:
            return self.loss(module, batch)
        with self._named():
            return _KINDS[self.kind][0](module, batch, outputs=self.outputs)

    def compute_metrics(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Metrics of `module` on `batch`, means over its examples."""
        if self.metrics is not None:
            return self.metrics(module, batch)
        if self.loss is not None:
            return {"loss": self.loss(module, batch)}
        with self._named():
            return _KINDS[self.kind][1](module, batch, outputs=self.outputs)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Names the task in the sentences of the losses above."""
        try:
            yield
        except UsageError as error:
            raise UsageError(f"task {self.name!r}: {error}") from error


def untested(name: str) -> UsageError:
    """The error for a task that needs test examples and has none."""
    return UsageError(
        f"task {name!r} has no test examples; give it some (for an hf: source set options.test to a split or a share"
        " such as 0.2)"
    )


def move(batch: Batch, device: torch.device | str) -> Batch:
    """`batch` with every tensor on `device`."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device, non_blocking=True), batch)
