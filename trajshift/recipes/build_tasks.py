"""From a recipe to its tasks, their data loaded."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from trajshift.data.augmentation import image_task
from trajshift.data.cache_reader import open_cache
from trajshift.data.digits import load_digits
from trajshift.data.npz import MAX_GIB, load_npz
from trajshift.data.registry import find
from trajshift.data.sources import ImageData, class_balanced_subset, subset
from trajshift.errors import UsageError, nearest
from trajshift.recipes.recipe import TASK_SECTIONS, Recipe
from trajshift.recipes.sections import DataRecipe, TaskRecipe
from trajshift.rng import key
from trajshift.task import Task
from trajshift.utils.imports import load_object

IMAGE_FIELDS = ("size", "channels", "crop_padding", "flip", "mean", "std", "train_images")
"""Fields that a task takes from `data` if they are not set."""


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
    """One task with its data loaded; fields that are not set are taken from `data`."""
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


def resolved(task: TaskRecipe, data: DataRecipe) -> TaskRecipe:
    """The task with the fields that are not set taken from `data`."""
    return replace(task, **{field: getattr(data, field) for field in IMAGE_FIELDS if getattr(task, field) is None})


# sources ----------------------------------------------------------------------------------------------------


def _npz(name: str, place: str, task: TaskRecipe, data: DataRecipe) -> ImageData:
    limit = task.options.get("max_gib", MAX_GIB)
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise UsageError(f"task {name!r}: options.max_gib is {limit!r}; use a number of GiB")
    _no_options(name, replace(task, options={k: v for k, v in task.options.items() if k != "max_gib"}))
    path = Path(data.root).expanduser() / place
    return load_npz(path, size=task.size, channels=task.channels, max_gib=limit)


def _digits(name: str, place: str, task: TaskRecipe, data: DataRecipe) -> ImageData:
    _no_options(name, task)
    return load_digits(place, size=task.size, channels=task.channels)


def _hf(name: str, place: str, task: TaskRecipe, data: DataRecipe) -> ImageData:
    from trajshift.data.huggingface import load_hf

    known = [
        field for field in inspect.signature(load_hf).parameters if field not in ("path_or_id", "size", "channels")
    ]
    for option in task.options:
        if option not in known:
            raise UsageError(f"task {name!r}: hf sources have no option {option!r}{nearest(option, known)}")
    return load_hf(
        _hf_place(name, place, Path(data.root).expanduser()), size=task.size, channels=task.channels, **task.options
    )


def _hf_place(name: str, place: str, root: Path) -> Path | str:
    """A local path, or a hub id where nothing local has that name.

    Raises:
        UsageError: a hub id that the library would take for a folder of the working directory.
    """
    from trajshift.data.huggingface import is_hub_id

    local = root / Path(place).expanduser()
    if local.exists() or not is_hub_id(place):
        return local
    if Path(place).exists():
        raise UsageError(
            f"task {name!r}: there is no {os.path.abspath(local)}, but {place} is a folder of the current directory,"
            " which is not data.root; set data.root"
        )
    print(f"task {name!r}: there is no {os.path.abspath(local)}; looking up {place} on the hub", file=sys.stderr)
    return place


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
    for sentence in opened.notes:
        print(f"warning: task {name!r}: {sentence}", file=sys.stderr)
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
    """A complete task that the user's function returned, under the recipe's name."""
    ignored = [field for field in IMAGE_FIELDS if getattr(task, field) is not None]
    if ignored:
        raise UsageError(
            f"task {name!r} has {ignored[0]} set, but {task.source!r} returns a whole Task, which decides it; "
            "drop the field"
        )
    weight = task.weight if task.weight != 1.0 else made.weight
    return replace(made, name=name, weight=weight, batch_size=task.batch_size or made.batch_size)


_LOADERS = {"npz": _npz, "digits": _digits, "hf": _hf, "cache": _cache, "hub": _hub}
