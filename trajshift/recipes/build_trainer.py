"""From a recipe to its model, its trainer and its fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from trajshift import models
from trajshift.algorithm.carries import Carry
from trajshift.algorithm.meta_gradients import MetaGradient
from trajshift.data.batches import TaskBatches
from trajshift.errors import UsageError, first_line
from trajshift.learners.initialization import is_statistic
from trajshift.learners.modules import Factory, fresh_module, head_key
from trajshift.learners.pretrained import load_start
from trajshift.recipes.build_tasks import build_tasks
from trajshift.recipes.recipe import Recipe
from trajshift.rng import seeded
from trajshift.settings import Meta
from trajshift.task import Task
from trajshift.training.approximation_error import ApproximationErrorMeter
from trajshift.training.trainer import MetaTrainer
from trajshift.utils.imports import load_object


def build_trainer(recipe: Recipe) -> MetaTrainer:
    """The trainer of a recipe at step 0, its data loaded.

    Raises:
        UsageError: a field that does not fit, explained in one sentence.
    """
    tasks = build_tasks(recipe)
    start = None if recipe.initialization is None else load_start(recipe.initialization)
    model = model_factory(recipe)
    check_fit(model, tasks, recipe)
    device(str(recipe.execution.device))
    every = recipe.output.error_every
    return MetaTrainer(
        model,
        tasks,
        recipe.method,
        horizon=recipe.horizon,
        rounds=recipe.rounds,
        inner=recipe.inner,
        meta=with_own_objects(recipe.meta),
        execution=recipe.execution,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        head=recipe.head,
        shared=[recipe.shared] if isinstance(recipe.shared, str) else recipe.shared,
        renew=recipe.renew,
        tasks_per_round=recipe.tasks_per_round,
        initialization=start,
        heldout=recipe.heldout,
        error_meter=None if every is None else ApproximationErrorMeter.every(every, recipe.horizon),
    )


def with_own_objects(meta: Meta) -> Meta:
    """The section with the meta-gradient and the carry built that it names as `package.module:factory`.

    Raises:
        UsageError: a factory that cannot be imported or called, or returns something else.
    """
    made: dict[str, Any] = {}
    if meta.gradient is not None and ":" in meta.gradient:
        made["gradient"] = _call(meta.gradient, "meta.gradient", MetaGradient, meta.gradient_options)
        made["gradient_options"] = {}
    if meta.carry is not None and ":" in meta.carry:
        made["carry"] = _call(meta.carry, "meta.carry", Carry, {})
    return replace(meta, **made)


def _call(name: str, role: str, kind: type, options: Mapping[str, Any]) -> Any:
    """What the user's own function or class returns, which must be of this kind."""
    try:
        made = load_object(name, role)(**options)
    except TypeError as error:
        given = f"with {dict(options)}" if options else "without arguments"
        raise UsageError(f"{role} {name!r} could not be called {given}: {error}") from error
    if not isinstance(made, kind):
        raise UsageError(f"{role} {name!r} returned a {type(made).__name__}; return a trajshift.{kind.__name__}")
    return made


def device(name: str) -> torch.device:
    """The torch device of a name.

    Raises:
        UsageError: no such device, or not on this machine.
    """
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device {name!r} is not available on this machine: {first_line(error)}; try device=cpu"
        ) from None
    return found


def refuse_absent_device(name: str) -> None:
    """As `device`, but takes no memory of a GPU that is there.

    Raises:
        UsageError: no such device, or not on this machine.
    """
    if not (name.startswith("cuda") and torch.cuda.is_available()):
        device(name)


def model_factory(recipe: Recipe, options: Mapping[str, Any] | None = None) -> Factory:
    """The factory `model(task) -> module` of a recipe; `options` override its own."""

    def model(task: Task) -> nn.Module:
        return models.build_model(recipe.model.name, task, **recipe.model.options, **(options or {}))

    return model


def check_fit(model: Factory, tasks: dict[str, Task], recipe: Recipe) -> None:
    """Refuse tasks whose examples the model cannot take; one task for each shape of example is tried.

    Raises:
        UsageError: names the task, the shape and torch's reason.
    """
    tried: set[tuple[int, ...] | None] = set()
    for name, task in tasks.items():
        if task.input_shape in tried and task.input_shape is not None:
            continue
        tried.add(task.input_shape)
        module = fresh_module(model, task, head_key(recipe.seed, name)).eval()
        batch = TaskBatches(replace(task, batch_size=2), seed=recipe.seed, batch_size=2).train(0)
        try:
            with torch.no_grad(), seeded(0, torch.device("cpu")):
                task.compute_loss(module, batch)
        except UsageError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shape = "" if task.input_shape is None else f" of shape {list(task.input_shape)}"
            raise UsageError(
                f"the examples of task {name!r}{shape} do not fit model {recipe.model.name!r}: "
                f"{first_line(error)}; set data.size and data.channels, or use another model"
            ) from error


def describe_start(recipe: Recipe, trainer: MetaTrainer) -> str | None:
    """How many tensors of the recipe's `initialization` phi took and which were not used; None where phi was drawn."""
    if recipe.initialization is None:
        return None
    left = trainer.meta_step.active.blueprint.left
    statistics = [name for name in left if is_statistic(name)]
    rest = [name for name in left if not is_statistic(name)]
    parts = [f"not used: {', '.join(rest)}"] if rest else []
    parts += [f"{len(statistics)} BatchNorm statistics, which belong to tasks"] if statistics else []
    return "; ".join([f"phi starts from {recipe.initialization}: {len(trainer.layout.entries)} parameters", *parts])


def finetune_options(recipe: Recipe) -> dict[str, Any]:
    """The recipe's arguments for `finetune`, its seed included."""
    return {
        "settings": recipe.finetune,
        "model": model_factory(recipe),
        "head": recipe.head,
        "device": device(str(recipe.execution.device)),
        "workers": recipe.execution.workers,
        "seed": recipe.seed,
    }
