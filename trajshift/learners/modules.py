"""Turns the model that the user gives into one module per task, all its random numbers drawn from one key."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from trajshift.errors import UsageError, first_line
from trajshift.learners.initialization import is_statistic
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
        module = _copied(model)
        fresh = nn.Linear(old.in_features, task.outputs, bias=old.bias is not None)
        parent, _, leaf = head.rpartition(".")
        setattr(module.get_submodule(parent), leaf, fresh.to(old.weight))
        return module

    return build_module


def _copied(model: nn.Module) -> nn.Module:
    """A copy of a module given as the model.

    Raises:
        UsageError: something in it cannot be copied; names it.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a part's own __deepcopy__ raises
        raise UsageError(
            f"the {type(model).__name__} given as the model cannot be copied for each task: {_not_copied(model)}"
            f" ({first_line(error)}); pass a factory model(task) that builds it"
        ) from error


def _not_copied(model: nn.Module) -> str:
    """Names the attribute of a module that cannot be copied."""
    for name, part in model.named_modules():
        for attribute, value in vars(part).items():
            if attribute in ("_modules", "_parameters"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                return f"its attribute {f'{name}.{attribute}' if name else attribute!r} is a {type(value).__name__}"
    return "a part of it refuses"


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
    lazy = next((n for n, p in [*module.named_parameters(), *module.named_buffers()] if is_lazy(p)), None)
    if lazy is not None:
        raise UsageError(
            f"parameter {lazy!r} of the model for task {task.name!r} has no shape before its first batch: a lazy layer"
            "; give the layer its sizes, or pass an example through the module before the factory returns it"
        )
    return module.train()


def refuse_common_memory(module: nn.Module, other: nn.Module, task: str, other_task: str) -> None:
    """Rejects two modules of a factory that train the same memory; frozen parameters may be shared.

    Raises:
        UsageError: names the parameter, and the tasks if they are two.
    """
    held = {address for _, address in _trained_memory(other)}
    for name, address in _trained_memory(module):
        if address in held:
            when = f"twice for task {task!r}" if task == other_task else f"for tasks {task!r} and {other_task!r}"
            raise UsageError(
                f"the model factory, called {when}, returned the same parameter {name!r}; build a new module in "
                "every call, or return copy.deepcopy(module)"
            )


def _trained_memory(module: nn.Module) -> list[tuple[str, int]]:
    """Names and addresses of the storages that training writes to: trainable parameters and statistics."""
    tensors: dict[str, torch.Tensor] = {
        name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    tensors |= {name: buffer for name, buffer in module.named_buffers() if is_statistic(name)}
    addresses = [(name, tensor.untyped_storage().data_ptr()) for name, tensor in tensors.items()]
    return [(name, address) for name, address in addresses if address != 0]


def phi_key(seed: int) -> int:
    """The draw behind the first phi: it depends on the seed alone."""
    return key(seed, "phi")


def head_key(seed: int, task: str, renewal: int = 0) -> int:
    """The draw behind a task's own parameters; `renewal` counts the rounds at which heads were renewed."""
    return key(seed, task, "head", renewal)
