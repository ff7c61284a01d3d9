"""Optimizers: built by name or callable, and their state as named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trajshift.errors import UsageError, nearest
from trajshift.settings import Optimization

_FUSED = {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW}
"""Optimizers for which PyTorch has one kernel over all parameters, on the CPU and on CUDA."""
_REFUSED = {
    "LBFGS": "it needs a closure that evaluates the loss several times a step",
    "SparseAdam": "it needs sparse gradients, and a trajectory is one dense row",
}
_NOT_A_CHOICE = {"Optimizer", *_REFUSED}
_BY_NAME: dict[str, type[Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and name not in _NOT_A_CHOICE
}

PARAMETER_SPACE_STATE = {"ax", "z"}
"""Optimizer state that lives in parameter space (ASGD's average, schedule-free's z) and moves with a shift."""


def optimizer_class(optimizer: str | Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """The class for a name (case does not matter); a callable is returned as it is.

    Raises:
        UsageError: an unknown name, or an optimizer that cannot run inside the loop, with the reason.
    """
    name = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "")
    for refused, reason in _REFUSED.items():
        if name.lower() == refused.lower():
            raise UsageError(f"optimizer {refused} is refused: {reason}; use a first-order one such as SGD or Adam")
    if not isinstance(optimizer, str):
        return optimizer
    if name.lower() not in _BY_NAME:
        raise UsageError(f"unknown optimizer {optimizer!r}{nearest(name.lower(), _BY_NAME)}")
    return _BY_NAME[name.lower()]


def optimizer_for(settings: Optimization, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer that `Inner` or `Finetune` names, on these parameters."""
    return build_optimizer(settings.optimizer, parameters, lr=settings.lr, **settings.arguments)


def build_optimizer(
    optimizer: str | Callable[..., Optimizer], parameters: Iterable[nn.Parameter], **options: Any
) -> Optimizer:
    """An optimizer by name or callable, fused where PyTorch supports that; wrong options raise one sentence."""
    kind, parameters = optimizer_class(optimizer), list(parameters)
    fused: dict[str, bool] = {}
    if kind in _FUSED and not {"foreach", "fused", "differentiable"} & options.keys() and not options.get("dampening"):
        fused["fused"] = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    try:
        built = kind(parameters, **options, **fused)
    except (TypeError, ValueError) as error:
        name = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", repr(optimizer))
        raise UsageError(f"optimizer {name} does not accept {options}: {error}") from error
    optimizer_class(type(built))  # the name of a callable does not tell what it builds
    if kind is torch.optim.SGD and fused.get("fused") and options.get("momentum"):
        for parameter in parameters:
            # The fused kernel has momentum buffers for all or for none, and a parameter may get its first gradient
            # later than others. Without dampening momentum from zero is the same as from the first gradient.
            built.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return built


def set_lr(optimizer: Optimizer, lr: float | Tensor) -> None:
    """Sets the learning rate of every parameter group; a tensor (fused optimizers only) is read on the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_tensors(optimizer: Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by `parameter/key` and plain numbers; `names` in the optimizer's order.

    Raises:
        UsageError: state that is neither a tensor nor a number.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            elif value is None or isinstance(value, (int, float, bool)):
                numbers[f"{name}/{key}"] = value
            else:
                raise UsageError(
                    f"{type(optimizer).__name__} keeps {key} as {type(value).__name__}, which cannot be saved; "
                    "use an optimizer whose state is tensors and numbers"
                )
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if value is None or isinstance(value, (int, float, bool)):
                numbers[f"group {index}/{key}"] = value
    return tensors, numbers


def load_state_tensors(
    optimizer: Optimizer, names: Sequence[str], tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> None:
    """The inverse of `state_tensors`; replaces all state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_name = dict(zip(names, parameters, strict=True))
    steps_on_device = any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups)
    optimizer.state.clear()
    for label, tensor in tensors.items():
        name, key = label.rsplit("/", 1)
        parameter = by_name[name]
        if key == "step" and not steps_on_device:  # PyTorch's rule: it is read on the CPU
            value = tensor.clone()
        elif tensor.shape == parameter.shape:  # keeps the strides that the optimizer would have chosen
            value = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        else:
            value = tensor.to(parameter.device, copy=True)
        optimizer.state[parameter][key] = value
    for label, number in numbers.items():
        name, key = label.rsplit("/", 1)
        if name.startswith("group ") and name not in by_name:
            optimizer.param_groups[int(name.split()[1])][key] = number
        else:
            optimizer.state[by_name[name]][key] = number
