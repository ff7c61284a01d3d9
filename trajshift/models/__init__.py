"""Models by name, or by the import path of your own factory.

Every model here takes images of any size, is built as `factory(task, **options)`, ends in a linear head
called `fc`, and draws the body's parameters before the head's, so that the body does not depend on the number
of classes. Nothing here imports torch until a model is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trajshift.errors import UsageError, nearest
from trajshift.utils.imports import load_object

if TYPE_CHECKING:
    from torch import nn

    from trajshift.task import Task

_FACTORIES = {
    "conv": "trajshift.models.conv:conv",
    "resnet20": "trajshift.models.resnet:resnet20",
    "resnet32": "trajshift.models.resnet:resnet32",
    "resnet44": "trajshift.models.resnet:resnet44",
    "resnet56": "trajshift.models.resnet:resnet56",
    "resnet18": "trajshift.models.resnet:resnet18",
    "resnet34": "trajshift.models.resnet:resnet34",
}


def names() -> tuple[str, ...]:
    """The models that `build_model` knows by name."""
    return tuple(_FACTORIES)


def check_model_name(name: str) -> None:
    """Rejects a name that `build_model` cannot know; an import path is not followed.

    Raises:
        UsageError: an unknown name without a colon; names the nearest.
    """
    if ":" not in name and name not in _FACTORIES:
        raise UsageError(f"unknown model {name!r}{nearest(name, _FACTORIES)}; or write package.module:factory")


def build_model(name: str, task: Task, /, **options: Any) -> nn.Module:
    """A new model for one task, its parameters drawn from torch's global generator.

    Args:
        name: one of `names()`, or `package.module:factory` for a callable `factory(task, **options)`.
        task: sizes the head (`outputs`) and the first layer (`input_shape`).
        options: keyword arguments of the factory.

    Raises:
        UsageError: an unknown model or option, a path that cannot be imported, a value that the model
            refuses, a task without the sizes it needs, or a factory that returns no module.
    """
    check_model_name(name)
    factory = load_object(_FACTORIES.get(name, name), "model")
    if not callable(factory):
        raise UsageError(f"model {name!r} is a {type(factory).__name__}; name a callable factory(task, **options)")
    _check_options(name, factory, task, options)
    module = factory(task, **options)
    # Imported here: looking up names must not import torch.
    from torch import nn

    if not isinstance(module, nn.Module):
        raise UsageError(f"model {name!r} returned a {type(module).__name__}; return a torch.nn.Module")
    return module


def _check_options(name: str, factory: Callable[..., Any], task: Task, options: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # a callable written in C has no signature to compare with
        return
    parameters = list(signature.parameters.values())[1:]  # the first one takes the task
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for option in options:
        if option not in known and not open_ended:
            raise UsageError(f"model {name!r} has no option {option!r}{nearest(option, known)}")
    try:
        signature.bind(task, **options)
    except TypeError as error:
        raise UsageError(f"model {name!r} cannot be called as factory(task, **options): {error}") from None
