"""Which parameters the tasks share, by rule, and which are heads: found by building the model once for every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from trajshift.errors import UsageError
from trajshift.learners.constants import Constants
from trajshift.learners.initialization import tensor_names
from trajshift.learners.modules import (
    Factory,
    faster_channels_last,
    fresh_module,
    head_key,
    phi_key,
    refuse_common_memory,
    to_channels_last,
)
from trajshift.learners.parameter_matrix import Layout
from trajshift.task import Task
from trajshift.utils.dotted_names import is_within

_USUAL_HEADS = ("fc", "head", "heads", "classifier")


@dataclass(slots=True)
class Blueprint:
    """What all learners have in common, found by building the model once for every task."""

    factory: Factory
    layout: Layout
    heads: tuple[str, ...]
    phi: Tensor
    """The first phi `[P]`, on the CPU."""
    constants: Constants
    """Frozen parameters and buffers that are no statistics."""
    channels_last: bool
    """Whether the factory's modules keep their convolutions' weights channels-last."""
    names: frozenset[str]
    """Names of all parameters and buffers of the first task's model."""
    unshared: tuple[str, ...]
    """Trainable parameters of the first task's model outside the heads that not every task has with one shape.

    With images of unequal channels the first layer is one of these, which is seldom intended.
    """
    doubts: tuple[str, ...] = ()
    """Sentences for the user about choices that are probably not meant."""
    left: tuple[str, ...] = ()
    """Tensors of the given initialization that are not part of phi: heads, BatchNorm statistics."""

    @classmethod
    def inspect(
        cls,
        factory: Factory,
        tasks: Sequence[Task],
        head: str | Sequence[str] | None,
        rule: Sequence[str] | None,
        seed: int,
        channels_last: bool | None = None,
    ) -> Blueprint:
        """Builds the model for each task, decides what is shared and draws the first phi.

        Raises:
            UsageError: no head can be found, or the sharing rule does not fit.
        """
        first = fresh_module(factory, tasks[0], phi_key(seed))
        if channels_last is None:
            channels_last = faster_channels_last(first)
        if channels_last:
            made = factory
            factory, first = lambda task: to_channels_last(made(task)), to_channels_last(first)
        heads = find_heads(first, head, rule)
        constants = Constants.start(first)
        trainable: dict[str, dict[str, tuple[int, ...]]] = {}
        for task in tasks:
            module = fresh_module(factory, task, head_key(seed, task.name))
            again = first if task is tasks[0] else fresh_module(factory, task, phi_key(seed))
            refuse_common_memory(module, again, task.name, task.name)
            refuse_common_memory(module, first, task.name, tasks[0].name)
            constants.compare(module, again)
            named = module.named_parameters()
            trainable[task.name] = {name: tuple(p.shape) for name, p in named if p.requires_grad}
        parameters = dict(first.named_parameters())
        outside = [n for n in following_outputs(factory, tasks[0], seed) if not is_in_head(n, heads)]
        if outside and head is None and rule is None and len({task.outputs for task in tasks}) > 1:
            raise UsageError(f"cannot tell which part of the model is the head: {_wrong_head(outside, heads)}")
        shared = {name: parameters[name].data for name in shared_names(trainable, heads, rule)}
        doubtful = [name for name in outside if name in shared]
        doubts = (f"all tasks share {doubtful[0]!r}: {_wrong_head(doubtful, heads)}",) if doubtful else ()
        layout = Layout(shared)
        phi = layout.flatten(shared, out=torch.zeros(layout.size, dtype=layout.dtype))
        own = tuple(n for n in trainable[tasks[0].name] if n not in shared and not is_in_head(n, heads))
        return cls(factory, layout, heads, phi, constants, channels_last, tensor_names(first), own, doubts)

    def admit(self, tasks: Sequence[Task], seed: int) -> None:
        """Rejects a task whose model lacks a shared parameter, or has it in another shape."""
        for task in tasks:
            named = dict(fresh_module(self.factory, task, head_key(seed, task.name)).named_parameters())
            for entry in self.layout.entries:
                shape = tuple(named[entry.name].shape) if entry.name in named else "missing"
                if shape != entry.shape:
                    raise UsageError(
                        f"task {task.name!r} cannot join: shared parameter {entry.name!r} is {shape} there and "
                        f"{entry.shape} in this run; build it with the same shared parameters"
                    )


def following_outputs(factory: Factory, task: Task, seed: int) -> list[str]:
    """Names of the parameters whose shapes follow the task's number of outputs; none if the factory cannot be asked."""
    if task.outputs is None:
        return []
    try:
        asked, wider = (
            dict(fresh_module(factory, one, phi_key(seed)).named_parameters())
            for one in (task, replace(task, outputs=task.outputs + 1))
        )
    # Another number of outputs than the data's may be anything to a user's factory.
    except Exception:
        return []
    return [name for name, p in asked.items() if name in wider and wider[name].shape != p.shape]


def _wrong_head(names: Sequence[str], heads: Sequence[str]) -> str:
    """Why parameters outside the heads are doubtful, and the remedy."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    found = " and ".join(map(repr, heads)) or "none"
    return (
        f"its head is {found}, but the shape of {names[0]!r} follows the number of outputs; name the heads, for "
        f"instance head={layers[0]!r} or head={[*heads, *layers]!r}"
    )


def doubt_of_head(factory: Factory, task: Task, seed: int, heads: Sequence[str], filled: Sequence[str]) -> str | None:
    """A sentence if an initialization fills a parameter that follows the number of outputs; None if none does."""
    outside = [name for name in following_outputs(factory, task, seed) if name in filled]
    return f"the initialization fills {outside[0]!r}: {_wrong_head(outside, heads)}" if outside else None


def find_heads(module: nn.Module, head: str | Sequence[str] | None, rule: Sequence[str] | None) -> tuple[str, ...]:
    """Dotted names of the heads: those given, else the usual one if there is one; none if a sharing rule needs none.

    Raises:
        UsageError: a head that the model does not have, or no way to tell which part it is.
    """
    names = [name for name, _ in module.named_parameters()]
    if head is None:
        children = {name for name, _ in module.named_children()}
        found = tuple(name for name in _USUAL_HEADS if name in children)
        if len(found) != 1 and rule is None:
            which = " and ".join(repr(name) for name in found) or "none of " + ", ".join(map(repr, _USUAL_HEADS))
            raise UsageError(f"cannot tell which part of the model is the head (found {which}); name it with head=")
        return found
    heads = (head,) if isinstance(head, str) else tuple(head)
    for one in heads:
        if not any(is_in_head(name, (one,)) for name in names):
            raise UsageError(
                f"the model has no head named {one!r}; its parts are {sorted({n.split('.')[0] for n in names})}"
            )
    return heads


def shared_names(
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    heads: Sequence[str],
    rule: Sequence[str] | None,
) -> list[str]:
    """Names of the shared parameters, in the first task's order.

    Without a rule: every trainable parameter with the same name and shape in all tasks, minus the heads.
    With one: every trainable parameter that a shell-style pattern (`*.adapter.*`) matches.

    Args:
        shapes: for each task the shapes of its trainable parameters by name.
        heads: dotted prefixes of the heads.
        rule: name patterns, or None.

    Raises:
        UsageError: a pattern that matches nothing, or a named parameter missing or of unequal shape in a task.
    """
    first_task, first = next(iter(shapes.items()))
    if rule is None:
        return [
            name
            for name, shape in first.items()
            if not is_in_head(name, heads) and all(other.get(name) == shape for other in shapes.values())
        ]
    for pattern in rule:
        if not any(fnmatchcase(name, pattern) for name in first):
            raise UsageError(f"sharing pattern {pattern!r} matches no trainable parameter of task {first_task!r}")
    chosen = [name for name in first if any(fnmatchcase(name, pattern) for pattern in rule)]
    for task, other in shapes.items():
        for name in chosen:
            if other.get(name) != first[name]:
                raise UsageError(
                    f"parameter {name!r} cannot be shared: its shape is {first[name]} in task {first_task!r} "
                    f"and {other.get(name, 'missing')} in task {task!r}; take it out of the sharing rule"
                )
    return chosen


def is_in_head(name: str, heads: Sequence[str]) -> bool:
    """Whether a dotted parameter name is inside one of the heads."""
    return is_within(name, heads)
