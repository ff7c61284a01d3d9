"""What the shipped models read off a task, and the initialization they share."""

from __future__ import annotations

from torch import nn

from trajshift.errors import UsageError
from trajshift.task import Task


def image_channels(task: Task) -> int:
    """Channels of one image of the task, from `input_shape` `(C, H, W)`.

    Raises:
        UsageError: the task's examples are not images, or its input_shape is not set.
    """
    shape = task.input_shape
    if shape is None or len(shape) != 3 or min(shape) < 1:
        said = "does not say its input_shape" if shape is None else f"has input_shape {tuple(shape)}"
        raise UsageError(f"task {task.name!r} {said}; an image model needs (channels, height, width)")
    return shape[0]


def head(task: Task, features: int) -> nn.Linear:
    """A new linear head `[features] -> [outputs]` with PyTorch's default initialization.

    Raises:
        UsageError: the task does not say its number of outputs.
    """
    if task.outputs is None or task.outputs < 1:
        raise UsageError(f"task {task.name!r} has outputs {task.outputs}; set its number of classes or targets")
    return nn.Linear(features, task.outputs)


def positive(model: str, option: str, value: int) -> int:
    """`value` if it is a whole number of at least one.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"model {model!r} has {option} {value!r}; use a whole number of at least 1")
    return value


def init_convolutions(module: nn.Module) -> None:
    """Draws all convolutions from N(0, 2 / fan_out) (He et al., 2015), as published; biases are zero."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
