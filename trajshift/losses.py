"""The losses and metrics of the three kinds of task; shapes are compared, never broadcast.

Shapes: N examples, C classes, labels or targets, `...` places of an example (pixels, tokens), if it has any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trajshift.errors import UsageError

Batch = Any
"""Any pytree of tensors; for images `(x [B, C, H, W], y [B])`."""


def logits_of(output: Any) -> Tensor:
    """The one tensor that a model's output means: itself, its `logits` (or `out`), or the only entry of a tuple.

    Raises:
        UsageError: several tensors and none of these names.
    """
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if isinstance(output, Mapping) and found is None:
        found = output.get("logits", output.get("out"))
    if isinstance(output, (Mapping, tuple, list)) and found is None and len(output) == 1:
        found = next(iter(output.values() if isinstance(output, Mapping) else output))
    if not isinstance(found, Tensor):
        raise UsageError(
            f"the model returned a {type(output).__name__}, in which no tensor is named logits; return the logits "
            "alone, or give the task a loss and metrics of its own"
        )
    return found


def classification_loss(module: nn.Module, batch: Batch, *, outputs: int | None = None) -> Tensor:
    """Mean cross-entropy of `module(x)` `[N, C, ...]` against `y`; batch is `(x, y)`.

    `y` is class numbers `[N, ...]` (or `[N, 1, ...]`), or probabilities `[N, C, ...]`, one-hot ones included.

    Raises:
        UsageError: other shapes, or fewer classes than `outputs`.
    """
    x, y = batch
    logits = logits_of(module(x))
    return F.cross_entropy(logits, _classes(logits, y, outputs))


def classification_metrics(module: nn.Module, batch: Batch, *, outputs: int | None = None) -> dict[str, Tensor]:
    """Means over examples and places: `accuracy` in [0, 1] and the cross-entropy `loss` in nats."""
    x, y = batch
    logits = logits_of(module(x))
    target = _classes(logits, y, outputs)
    truth = target.argmax(1) if target.is_floating_point() else target
    return {"accuracy": (logits.argmax(1) == truth).float().mean(), "loss": F.cross_entropy(logits, target)}


def regression_loss(module: nn.Module, batch: Batch, *, outputs: int | None = None) -> Tensor:
    """Mean squared error of `module(x)` against `y`; batch is `(x, y)`.

    The shapes are the same but for dimensions of size 1: an output `[N, 1]` fits `y` `[N]`.

    Raises:
        UsageError: other shapes.
    """
    x, y = batch
    output = logits_of(module(x))
    return F.mse_loss(output, _like(output, y, "targets"))


def regression_metrics(module: nn.Module, batch: Batch, *, outputs: int | None = None) -> dict[str, Tensor]:
    """Means over the batch: `mse`, and the same number as `loss`."""
    error = regression_loss(module, batch)
    return {"mse": error, "loss": error}


def multilabel_loss(module: nn.Module, batch: Batch, *, outputs: int | None = None) -> Tensor:
    """Mean binary cross-entropy of `module(x)` `[N, C]` (logits) against `y` `[N, C]` of 0 and 1; batch is `(x, y)`.

    Raises:
        UsageError: other shapes, or another number of labels than `outputs`.
    """
    x, y = batch
    logits = logits_of(module(x))
    return F.binary_cross_entropy_with_logits(logits, _labels(logits, y, outputs))


def multilabel_metrics(module: nn.Module, batch: Batch, *, outputs: int | None = None) -> dict[str, Tensor]:
    """Means over examples: `accuracy`, `f1` and the binary cross-entropy `loss` in nats; a label is set above logit 0.

    `accuracy` is the share of labels that are right. `f1` is computed for each example over its labels,
    2 TP / (2 TP + FP + FN), and is 1 where no label is set and none is predicted.
    """
    x, y = batch
    logits = logits_of(module(x))
    target = _labels(logits, y, outputs)
    truth, said = target.flatten(1) > 0.5, logits.flatten(1) > 0
    both, either = (truth & said).sum(1), truth.sum(1) + said.sum(1)
    f1 = torch.where(either > 0, 2 * both / either.clamp(min=1), 1.0)
    return {
        "accuracy": (truth == said).float().mean(),
        "f1": f1.mean(),
        "loss": F.binary_cross_entropy_with_logits(logits, target),
    }


def _classes(logits: Tensor, y: Tensor, outputs: int | None) -> Tensor:
    """`y` as `cross_entropy` takes it: int64 class numbers `[N, ...]` or probabilities `[N, C, ...]`."""
    shape, shown = tuple(logits.shape), f"an output of shape {list(logits.shape)}"
    if len(shape) < 2 or shape[1] < max(2, outputs or 2):
        needed = "two or more classes" if outputs is None else f"{outputs} classes"
        raise UsageError(f"the model gave {shown} for {needed}; return logits [N, classes, ...]")
    places = (shape[0], *shape[2:])
    if tuple(y.shape) == (shape[0], 1, *shape[2:]):
        y = y.squeeze(1)
    if tuple(y.shape) == places and not y.is_floating_point():
        return y.long()
    if tuple(y.shape) != shape:
        kind = "floating-point labels" if y.is_floating_point() else "labels"
        raise UsageError(
            f"{kind} of shape {list(y.shape)} do not fit {shown}; give integer class numbers {list(places)} or "
            f"probabilities {list(shape)}, with the classes on dimension 1"
        )
    if not y.is_floating_point() and not _capturing(y) and not bool((y.long().sum(1) == 1).all()):
        raise UsageError(
            f"labels of shape {list(y.shape)} are not one-hot: a row does not sum to 1; use kind='multilabel' for "
            "several labels per example"
        )
    return y.to(logits.dtype)


def _capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, in which no value can be read."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _labels(logits: Tensor, y: Tensor, outputs: int | None) -> Tensor:
    if outputs is not None and (logits.ndim < 2 or logits.shape[1] != outputs):
        raise UsageError(
            f"the model gave an output of shape {list(logits.shape)} for {outputs} labels; return logits [N, {outputs}]"
        )
    return _like(logits, y, "labels")


def _like(output: Tensor, y: Tensor, what: str) -> Tensor:
    """`y` in the shape and dtype of the output; shapes may differ in dimensions of size 1 alone."""
    if output.ndim == 0 or y.ndim == 0 or _without_ones(output) != _without_ones(y):
        raise UsageError(
            f"{what} of shape {list(y.shape)} do not fit an output of shape {list(output.shape)}; give both one shape"
        )
    return (y if y.is_floating_point() else y.to(output.dtype)).reshape(output.shape)


def _without_ones(tensor: Tensor) -> tuple[int, ...]:
    return (len(tensor), *(size for size in tensor.shape[1:] if size != 1))


def check_values(kind: str, outputs: int | None, labels: Tensor) -> str | None:
    """What is wrong with floating-point or multi-label targets, as the end of a sentence; None if nothing is.

    Integer class numbers are checked where batches are made.
    """
    if not len(labels):
        return None
    shape = list(labels.shape)
    if kind == "classification" and labels.is_floating_point():
        if outputs is None:  # a task without it may have another loss in mind; its own refuses them
            return None
        if labels.ndim < 2 or labels.shape[1] == 1:
            return f"floating-point labels of shape {shape}; use integer class numbers, or kind='regression'"
        sums = labels.sum(1)
        if not bool((labels >= 0).all() and (sums - 1).abs().max() < 0.01):
            return (
                f"labels of shape {shape} whose rows are not probabilities (sums from {float(sums.min()):g} to "
                f"{float(sums.max()):g}); use kind='multilabel' for several labels per example"
            )
    if kind == "multilabel":
        if outputs is not None and (labels.shape[1:2] or (1,)) != (outputs,):
            return f"labels of shape {shape} but outputs={outputs}; give 0 or 1 for every label, [N, {outputs}]"
        if not bool(((labels >= 0) & (labels <= 1)).all()):
            low, high = (float(value) for value in (labels.min(), labels.max()))
            return f"labels from {low:g} to {high:g}; multi-label targets are 0 or 1"
    return None
