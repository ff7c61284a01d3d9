"""A task: data, a loss and what a model factory needs to know about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trajshift.errors import UsageError

Batch = Any
"""Any pytree of tensors; for images `(x [B, C, H, W], y [B])`."""

Loss = Callable[[nn.Module, Batch], Tensor]
Metrics = Callable[[nn.Module, Batch], dict[str, Tensor]]
Transform = Callable[[Batch, "int | None"], Batch]


def classification_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of `module(x)` `[B, classes]` against `y` `[B]`; batch is `(x, y)`."""
    x, y = batch
    return F.cross_entropy(module(x), y)


def classification_metrics(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Means over the batch: `accuracy` in [0, 1] and the cross-entropy `loss` in nats."""
    x, y = batch
    logits = module(x)
    return {"accuracy": (logits.argmax(-1) == y).float().mean(), "loss": F.cross_entropy(logits, y)}


def regression_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of `module(x)` against `y` of the same shape; batch is `(x, y)`."""
    x, y = batch
    return F.mse_loss(module(x), y)


def regression_metrics(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Means over the batch: `mse`, and the same number as `loss`."""
    error = regression_loss(module, batch)
    return {"mse": error, "loss": error}


_KINDS: dict[str, tuple[Loss, Metrics]] = {
    "classification": (classification_loss, classification_metrics),
    "regression": (regression_loss, regression_metrics),
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
    """Number of classes or of regression targets, from which a model factory sizes its head."""
    kind: str = "classification"
    """`classification` or `regression`: supplies `loss` and `metrics` where they are not given."""
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
            raise UsageError(f"task {self.name!r} has kind {self.kind!r}; use classification or regression")
        if not (self.weight > 0.0 and self.weight < float("inf")):
            raise UsageError(f"task {self.name!r} has weight {self.weight}; use a positive number")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"task {self.name!r} has batch_size {self.batch_size}; use at least 1")
        if self.kind == "classification" and self.outputs is not None and self.outputs < 2:
            raise UsageError(f"task {self.name!r} has {self.outputs} classes; classification needs at least 2")

    def compute_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """The scalar training loss of `module` on `batch`."""
        return (self.loss or _KINDS[self.kind][0])(module, batch)

    def compute_metrics(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Metrics of `module` on `batch`, means over its examples."""
        if self.metrics is None and self.loss is not None:
            return {"loss": self.loss(module, batch)}
        return (self.metrics or _KINDS[self.kind][1])(module, batch)


def untested(name: str) -> UsageError:
    """The error for a task that needs test examples and has none."""
    return UsageError(
        f"task {name!r} has no test examples; give it some (for an hf: source set options.test to a split or a share"
        " such as 0.2)"
    )


def move(batch: Batch, device: torch.device | str) -> Batch:
    """`batch` with every tensor on `device`."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device, non_blocking=True), batch)
