"""From a recipe to tasks, model and trainer."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from glob import glob
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trajshift import models
from trajshift.algorithm.carries import Carry
from trajshift.data.augmentation import image_task
from trajshift.data.batches import TaskBatches
from trajshift.data.cache_reader import open_cache
from trajshift.data.digits import load_digits
from trajshift.data.npz import load_npz
from trajshift.data.registry import find
from trajshift.data.sources import ImageData, class_balanced_subset, subset
from trajshift.errors import UsageError, nearest
from trajshift.learners.initialization import is_statistic
from trajshift.learners.inner_optimizer import Inner
from trajshift.learners.learner import Factory, fresh_module, head_key, seeded
from trajshift.learners.parameter_matrix import is_in_head
from trajshift.learners.pretrained import load_start
from trajshift.recipes.recipe import TASK_SECTIONS, Recipe
from trajshift.recipes.sections import DataRecipe, TaskRecipe
from trajshift.rng import key
from trajshift.task import Task
from trajshift.training.approximation_error import Gauge
from trajshift.training.trainer import MetaTrainer
from trajshift.utils.imports import load_object

IMAGE_FIELDS = ("size", "channels", "crop_padding", "flip", "mean", "std", "train_images")
"""What a task takes from `data` where it leaves it open."""


def build_trainer(recipe: Recipe) -> MetaTrainer:
    """The trainer of a recipe at step 0, its data loaded.

    Raises:
        UsageError: whatever does not fit, in one sentence.
    """
    tasks = build_tasks(recipe)
    inner = recipe.inner
    start = None if recipe.initialization is None else load_start(recipe.initialization)
    model = model_factory(recipe)
    check_fit(model, tasks, recipe)
    return MetaTrainer(
        model,
        tasks,
        recipe.method,
        horizon=recipe.horizon,
        rounds=recipe.rounds,
        meta_lr=recipe.meta_lr,
        meta_every=recipe.meta_every,
        carry=_carry(recipe.carry),
        adapt=recipe.adapt,
        metagrad=recipe.metagrad,
        batch=recipe.batch,
        metagrad_options=recipe.metagrad_options,
        inner=Inner(
            optimizer=inner.optimizer,
            lr=inner.lr,
            options=inner.options or {},
            schedule=inner.schedule,
            milestones=inner.milestones,
            factor=inner.factor,
            flat=inner.flat,
        ),
        meta_optimizer=recipe.meta.optimizer,
        meta_options=recipe.meta.options,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        head=recipe.head,
        shared=[recipe.shared] if isinstance(recipe.shared, str) else recipe.shared,
        renew=recipe.renew,
        tasks_per_round=recipe.tasks_per_round,
        initialization=start,
        heldout=recipe.heldout,
        workers=recipe.workers,
        device=device(recipe.device),
        grad_clip=recipe.grad_clip,
        autocast=None if recipe.autocast is None else getattr(torch, recipe.autocast),
        channels_last=recipe.channels_last,
        overlap=recipe.overlap,
        engine=recipe.engine,
        gauge=None if recipe.output.error_every is None else Gauge.every(recipe.output.error_every, recipe.horizon),
    )


def _carry(name: str | None) -> str | Carry | None:
    """A carry by name, or made by the user's own function or class.

    Raises:
        UsageError: what an import path names makes no `Carry`.
    """
    if name is None or ":" not in name:
        return name
    try:
        made = load_object(name, "carry")()
    except TypeError as error:
        raise UsageError(f"carry {name!r} could not be called without arguments: {error}") from error
    if not isinstance(made, Carry):
        raise UsageError(f"carry {name!r} returned a {type(made).__name__}; return a trajshift.algorithm.carries.Carry")
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
            f"device {name!r} is not to be had here: {str(error).splitlines()[0]}; try device=cpu"
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
    """The factory `model(task) -> module` of a recipe; `options` are put in over its own."""

    def model(task: Task) -> nn.Module:
        return models.build(recipe.model.name, task, **recipe.model.options, **(options or {}))

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
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shape = "" if task.input_shape is None else f" of shape {list(task.input_shape)}"
            raise UsageError(
                f"the examples of task {name!r}{shape} do not fit model {recipe.model.name!r}: "
                f"{str(error).splitlines()[0]}; set data.size and data.channels, or use another model"
            ) from error


def unshared(trainer: MetaTrainer) -> list[str]:
    """Trainable parameters of the first task's model outside the head that are not shared with all tasks.

    Images of unequal channels make the first layer such a one, which is seldom wanted.
    """
    task = next(iter(trainer.roster.tasks.values()))
    module = fresh_module(trainer.blueprint.factory, task, head_key(trainer.seed, task.name))
    heads, shared = trainer.blueprint.heads, {entry.name for entry in trainer.layout.entries}
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return [name for name in names if name not in shared and not is_in_head(name, heads)]


def describe_start(recipe: Recipe, trainer: MetaTrainer) -> str | None:
    """How many tensors of the recipe's `initialization` phi took and which it left; None where phi was drawn."""
    if recipe.initialization is None:
        return None
    shared = {entry.name for entry in trainer.layout.entries}
    start = load_start(recipe.initialization)
    left = [name for name in start if name not in shared]
    statistics = [name for name in left if is_statistic(name)]
    rest = [name for name in left if not is_statistic(name)]
    parts = [f"not used: {', '.join(rest)}"] if rest else []
    parts += [f"{len(statistics)} BatchNorm statistics, which belong to tasks"] if statistics else []
    return "; ".join([f"phi starts from {recipe.initialization}: {len(start) - len(left)} parameters", *parts])


def build_tasks(recipe: Recipe, names: Iterable[str] | None = None) -> dict[str, Task]:
    """The tasks of these names from any section; None is the tasks that the recipe meta-trains on.

    Raises:
        UsageError: an unknown name, a missing or malformed source.
    """
    chosen = recipe.source_tasks() if names is None else {name: find_task(recipe, name) for name in names}
    return {name: build_task(name, task, recipe.data) for name, task in chosen.items()}


def find_task(recipe: Recipe, name: str) -> TaskRecipe:
    """A task of any section by its name.

    Raises:
        UsageError: no section has it; names the nearest.
    """
    known: dict[str, TaskRecipe] = {}
    for section in reversed(TASK_SECTIONS):
        known.update(getattr(recipe, section))
    if name not in known:
        raise UsageError(f"unknown task {name!r}{nearest(name, known)}")
    return known[name]


def build_task(name: str, task: TaskRecipe, data: DataRecipe) -> Task:
    """One task with its data loaded; what it leaves open is taken from `data`."""
    kind, _, place = task.source.partition(":")
    whole = resolved(task, data)
    if kind in ("cache", "hub") and task.flip is None:
        whole.flip = whole.flip and find(place).flip
    if kind in _LOADERS:
        images = _LOADERS[kind](name, place, whole, data)
    else:
        made = _by_import(name, task)
        if isinstance(made, Task):
            return _adopt(name, made, task)
        images = made
    return _image_task(name, images, whole)


def _image_task(name: str, images: ImageData, task: TaskRecipe) -> Task:
    train = images.train
    if task.train_images is not None:
        draw = key(name, "train_images")  # no seed in it: the subset is part of the task, the same in every run
        train = subset(train, class_balanced_subset(train, task.train_images, draw))
    return image_task(
        name,
        train,
        images.test,
        outputs=images.outputs,
        crop_padding=task.crop_padding or 0,
        flip=bool(task.flip),
        mean=task.mean if task.mean is not None else 0.5,
        std=task.std if task.std is not None else 0.5,
        channels=task.channels,
        weight=task.weight,
        batch_size=task.batch_size,
    )


def finetune_options(recipe: Recipe) -> dict[str, Any]:
    """The recipe's arguments for `finetune.finetune`, its seed included."""
    return {
        **asdict(recipe.finetune),
        "model": model_factory(recipe),
        "head": recipe.head,
        "device": device(recipe.device),
        "workers": recipe.workers,
        "seed": recipe.seed,
    }


def resolved(task: TaskRecipe, data: DataRecipe) -> TaskRecipe:
    """The task with its open fields taken from `data`."""
    return replace(task, **{field: getattr(data, field) for field in IMAGE_FIELDS if getattr(task, field) is None})


# sources ----------------------------------------------------------------------------------------------------


def _npz(name: str, place: str, task: TaskRecipe, data: DataRecipe) -> ImageData:
    _no_options(name, task)
    return load_npz(Path(data.root).expanduser() / place, size=task.size, channels=task.channels)


def _digits(name: str, place: str, task: TaskRecipe, data: DataRecipe) -> ImageData:
    _no_options(name, task)
    return load_digits(place, size=task.size, channels=task.channels)


def _hf(name: str, place: str, task: TaskRecipe, data: DataRecipe) -> ImageData:
    from trajshift.data.huggingface import load_hf

    local = Path(data.root).expanduser() / place
    known = [
        field for field in inspect.signature(load_hf).parameters if field not in ("path_or_id", "size", "channels")
    ]
    for option in task.options:
        if option not in known:
            raise UsageError(f"task {name!r}: hf sources have no option {option!r}{nearest(option, known)}")
    # A pattern such as train-*.parquet exists as its matches.
    return load_hf(
        local if local.exists() or glob(str(local)) else place, size=task.size, channels=task.channels, **task.options
    )


def _cache(name: str, place: str, task: TaskRecipe, data: DataRecipe) -> ImageData:
    _no_options(name, task)
    return open_cache(Path(data.root).expanduser(), place, task.size)


def _hub(name: str, place: str, task: TaskRecipe, data: DataRecipe) -> ImageData:
    from trajshift.data.cache_writer import open_entry, overridden
    from trajshift.data.huggingface import image_data

    options = {"size": task.size, **task.options} if task.size is not None else dict(task.options)
    copy = options.pop("from", None)
    root = Path(data.root).expanduser()
    opened, differing = open_entry(overridden(find(place), options), None if copy is None else root / str(copy))
    for sentence in differing:
        print(f"warning: task {name!r}: {sentence}; the registered figures are not verified", file=sys.stderr)
    return image_data(opened)


def _no_options(name: str, task: TaskRecipe) -> None:
    if task.options:
        kind = task.source.partition(":")[0]
        raise UsageError(
            f"task {name!r}: {kind} sources take no options, but {next(iter(task.options))!r} is given; drop it"
        )


def _by_import(name: str, task: TaskRecipe) -> Task | ImageData:
    """What the user's own function makes of a task's name and options."""
    function = load_object(task.source, "source")
    try:
        made = function(name, **task.options)
    except TypeError as error:
        raise UsageError(
            f"source {task.source!r} could not be called as function({name!r}, **options): {error}"
        ) from error
    if not isinstance(made, (Task, ImageData)):
        raise UsageError(f"source {task.source!r} returned a {type(made).__name__}; return a Task or ImageData")
    return made


def _adopt(name: str, made: Task, task: TaskRecipe) -> Task:
    """A task that the user's function made whole, under the recipe's name."""
    ignored = [field for field in IMAGE_FIELDS if getattr(task, field) is not None]
    if ignored:
        raise UsageError(
            f"task {name!r} has {ignored[0]} set, but {task.source!r} returns a whole Task, which decides it; "
            "drop the field"
        )
    weight = task.weight if task.weight != 1.0 else made.weight
    return replace(made, name=name, weight=weight, batch_size=task.batch_size or made.batch_size)


_LOADERS = {"npz": _npz, "digits": _digits, "hf": _hf, "cache": _cache, "hub": _hub}
