"""Turns the model that the user gives into one module per task, all its random numbers drawn from one key."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from trajshift.errors import UsageError
from trajshift.rng import key, seeded
from trajshift.task import Task

Factory = Callable[[Task], nn.Module]


def as_factory(model: Factory | nn.Module, heads: str | Sequence[str] | None) -> Factory:
    """A model factory; a plain module is copied for each task and gets a fresh head (the first named) of its size.

    Raises:
        UsageError: a module without a head's name, or a head that cannot be resized.
    """
    if not isinstance(model, nn.Module):
        return model
    head = heads if isinstance(heads, str) else next(iter(heads or ()), None)
    if head is None:
        raise UsageError("a module was given as the model: name its head, for instance head='fc'")
    try:
        old = model.get_submodule(head)
    except AttributeError:
        raise UsageError(f"the model has no part named {head!r}; name its head") from None
    if not isinstance(old, nn.Linear):
        raise UsageError(
            f"head {head!r} is a {type(old).__name__}; only a Linear one can be resized, "
            "pass a factory model(task) instead"
        )

    def build_module(task: Task) -> nn.Module:
        if task.outputs is None:
            raise UsageError(f"task {task.name!r} names no outputs, which size its head; set outputs")
        module = copy.deepcopy(model)
        fresh = nn.Linear(old.in_features, task.outputs, bias=old.bias is not None)
        parent, _, leaf = head.rpartition(".")
        setattr(module.get_submodule(parent), leaf, fresh.to(old.weight))
        return module

    return build_module


def faster_channels_last(module: nn.Module) -> bool:
    """Whether it has float32 convolutions over images (a ResNet20's step then takes three quarters of the time)."""
    return any(isinstance(part, nn.Conv2d) and part.weight.dtype is torch.float32 for part in module.modules())


def to_channels_last(module: nn.Module) -> nn.Module:
    """The module, its convolutions' weights laid out channels-last; the activations then follow."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fresh_module(factory: Factory, task: Task, draw: int) -> nn.Module:
    """A module from the factory with all its random numbers drawn from one key, in training mode."""
    with seeded(draw, torch.device("cpu")):
        module = factory(task)
    if not isinstance(module, nn.Module):
        raise UsageError(f"the model factory returned {type(module).__name__} for task {task.name!r}, not a module")
    return module.train()


def phi_key(seed: int) -> int:
    """The draw behind the first phi: it depends on the seed alone."""
    return key(seed, "phi")


def head_key(seed: int, task: str, renewal: int = 0) -> int:
    """The draw behind a task's own parameters; `renewal` counts the rounds at which heads were renewed."""
    return key(seed, task, "head", renewal)
