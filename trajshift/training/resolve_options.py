"""Turns what the user asked for into the parts of a run; invalid combinations raise an error that explains why."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trajshift.algorithm import meta_gradients as metagrads
from trajshift.algorithm.carries import Carry, build_carry
from trajshift.algorithm.methods import Method, ResolvedMethod, resolve
from trajshift.errors import UsageError, nearest
from trajshift.learners.initialization import is_statistic
from trajshift.learners.modules import Factory, as_factory
from trajshift.learners.sharing import Blueprint, is_in_head
from trajshift.settings import Inner
from trajshift.task import Task
from trajshift.training.meta_optimizer import MetaOptimizer, OptimizerMetaStep, PlainMetaStep

RENEWABLE = ("heads", "optimizer", "statistics")


def choose_method(
    method: str | Method,
    *,
    horizon: int,
    metagrad: str | metagrads.MetaGradient | None,
    options: dict[str, Any],
    carry: str | Carry | None,
    **choices: Any,
) -> tuple[ResolvedMethod, metagrads.MetaGradient, Carry]:
    """The preset with the user's choices filled in, its meta-gradient and its carry."""
    name = carry if isinstance(carry, str) else None
    resolved, built = _choose_meta_gradient(
        method, horizon=horizon, metagrad=metagrad, options=options, carry=name, **choices
    )
    if not isinstance(carry, Carry):
        return resolved, built, build_carry(resolved.carry)
    kind = type(carry).__name__
    if resolved.joint or resolved.adapt == "head":
        raise UsageError(f"carry {kind} with adapt head: theta never leaves phi; use carry shift, or adapt all")
    return replace(resolved, carry=kind), built, carry


def _choose_meta_gradient(
    method: str | Method,
    *,
    horizon: int,
    metagrad: str | metagrads.MetaGradient | None,
    options: dict[str, Any],
    **choices: Any,
) -> tuple[ResolvedMethod, metagrads.MetaGradient]:
    if not isinstance(metagrad, metagrads.MetaGradient):
        resolved = resolve(method, horizon=horizon, metagrad=metagrad, **choices)
        return resolved, metagrads.build_meta_gradient(resolved.metagrad, resolved.batch, options)
    kind = type(metagrad).__name__
    if options or choices["batch"]:
        raise UsageError(f"metagrad is a {kind} object, which already has its options; drop gradient_options and batch")
    choices["batch"] = "heldout" if metagrad.needs_heldout else "train"
    name = metagrads.name_of(metagrad)
    # Nothing is known about a custom class that would rule out a combination.
    resolved = resolve(method, horizon=horizon, metagrad=name or "last_gradient", **choices)
    if resolved.joint and name is None:
        raise UsageError(f"{resolved.name} is joint training: it allows no metagrad {kind}")
    return replace(resolved, metagrad=name or kind), metagrad


def choose_meta_optimizer(
    method: ResolvedMethod, phi: Tensor, blueprint: Blueprint, inner: Inner, *,
    horizon: int, meta_lr: float | None, optimizer: Any, options: dict[str, Any],
) -> MetaOptimizer:  # fmt: skip
    """How phi follows the mean meta-gradient."""
    if method.joint:
        if meta_lr is not None or optimizer is not None or options:
            raise UsageError(
                f"{method.name} moves phi with the inner optimizer; drop meta_lr and the meta-optimizer, "
                "and set the inner ones"
            )
        return OptimizerMetaStep(phi, blueprint.layout, inner.optimizer, inner.lr, inner.arguments)
    if meta_lr is None:
        meta_lr = method.default_meta_lr(horizon, method.meta_every)
    if not (0.0 < meta_lr < float("inf")):
        raise UsageError(f"meta_lr is {meta_lr}; use a positive number")
    if optimizer is None:
        if options:
            raise UsageError(f"meta options {options} belong to a meta-optimizer; name one, or drop them")
        return PlainMetaStep(meta_lr)
    return OptimizerMetaStep(phi, blueprint.layout, optimizer, meta_lr, options)


def choose_model(
    model: Factory | nn.Module, tasks: Sequence[Task], *,
    head: str | Sequence[str] | None, shared: Sequence[str] | None, seed: int,
    initialization: Mapping[str, Tensor] | None, device: torch.device, channels_last: bool | None,
) -> tuple[Blueprint, Tensor]:  # fmt: skip
    """What the tasks share, and the first phi on the device."""
    blueprint = Blueprint.inspect(as_factory(model, head), tasks, head, shared, seed, channels_last)
    phi = blueprint.phi.to(device, copy=True)
    if initialization is not None:
        start_from(initialization, blueprint, phi)
    blueprint.constants.to(device)
    return blueprint, phi


def start_from(initialization: Mapping[str, Tensor], blueprint: Blueprint, phi: Tensor) -> None:
    """Puts named tensors into phi `[P]`; each shared parameter must be there with its shape.

    Raises:
        UsageError: shared parameters that are missing or have another shape, or tensors that the model does not have
            (heads and BatchNorm statistics aside); lists all.
    """
    views = blueprint.layout.views(phi)
    missing = [name for name in views if name not in initialization]
    constants = constants_given(initialization, blueprint)
    places = views | {name: blueprint.constants.common[name] for name in constants}
    unequal = [name for name in places if name in initialization and initialization[name].shape != places[name].shape]
    own = (name for name in initialization if not is_in_head(name, blueprint.heads) and not is_statistic(name))
    unexpected = [name for name in own if name not in blueprint.names]
    if missing or unequal or unexpected:
        shapes = [f"{name} {tuple(initialization[name].shape)}, not {tuple(places[name].shape)}" for name in unequal]
        kinds = (("missing", missing), ("wrong shape", shapes), ("unexpected", unexpected))
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds if names)
        raise UsageError(f"the initialization does not fit the model ({found}); use the model it was learned with")
    for name, view in views.items():
        view.copy_(initialization[name])
    for name in constants:
        blueprint.constants.take(name, initialization[name])
    blueprint.left = tuple(name for name in initialization if name not in views and name not in constants)


def constants_given(initialization: Mapping[str, Tensor], blueprint: Blueprint) -> list[str]:
    """Frozen parameters and buffers whose values the initialization decides.

    Not those that a factory gives every task, which a run keeps with phi for readers without the factory; nor those
    that depend on the number of outputs or on the size of an image and have another shape there.
    """
    found = blueprint.constants
    built = getattr(initialization, "about", {}).get("built", ())
    names = [name for name in found.common if name in initialization and name not in built]

    def must_fit(name: str) -> bool:
        return not is_in_head(name, blueprint.heads) and (name in found.frozen or name in found.from_phi)

    return [n for n in names if must_fit(n) or initialization[n].shape == found.common[n].shape]


def choose_tasks(tasks: Sequence[Task] | Mapping[str, Task], method: Method) -> list[Task]:
    """The tasks as a list, names unique and as many as the method takes."""
    listed = list(tasks.values()) if isinstance(tasks, Mapping) else list(tasks)
    if not listed:
        raise UsageError("no tasks were given; name at least one")
    names = [task.name for task in listed]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UsageError(f"two tasks are named {doubled[0]!r}; give each its own name")
    if method.single and len(listed) != 1:
        raise UsageError(f"{method.name} trains on one task, {len(listed)} were given; keep one")
    return listed


def choose_autocast(autocast: str | torch.dtype | None) -> torch.dtype | None:
    """The type of the forward passes, from its name or torch's own."""
    dtype: torch.dtype | None = getattr(torch, autocast) if isinstance(autocast, str) else autocast
    return dtype


def choose_renewals(renew: Collection[str]) -> frozenset[str]:
    """What a reset renews, names checked."""
    for name in renew:
        if name not in RENEWABLE:
            raise UsageError(f"cannot renew {name!r} at a reset{nearest(name, RENEWABLE)}")
    return frozenset(renew)
