"""Sources of examples, batches that are pure functions of the step, and the built-in digits tasks.

The public names are resolved on first use (PEP 562), so reading the registry does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trajshift.data.augmentation import ImageTransform, image_task
    from trajshift.data.batches import TaskBatches
    from trajshift.data.cache_reader import open_cache
    from trajshift.data.cache_writer import prepare_cache
    from trajshift.data.digits import digits_targets, digits_task, digits_tasks, load_digits
    from trajshift.data.huggingface import hf_source, load_hf
    from trajshift.data.loader import PrefetchLoader
    from trajshift.data.npz import load_npz
    from trajshift.data.registry import DataSet, registered
    from trajshift.data.sources import (
        ArraySource,
        DatasetSource,
        ImageData,
        MappedSource,
        Source,
        as_source,
        class_balanced_subset,
        subset,
    )

__all__ = [
    "ArraySource",
    "DataSet",
    "DatasetSource",
    "ImageData",
    "ImageTransform",
    "MappedSource",
    "Source",
    "PrefetchLoader",
    "TaskBatches",
    "as_source",
    "class_balanced_subset",
    "digits_targets",
    "digits_task",
    "digits_tasks",
    "hf_source",
    "image_task",
    "load_digits",
    "load_hf",
    "load_npz",
    "open_cache",
    "prepare_cache",
    "registered",
    "subset",
]

_HOMES = {
    "batches": ("TaskBatches",),
    "digits": ("digits_targets", "digits_task", "digits_tasks", "load_digits"),
    "cache_reader": ("open_cache",),
    "huggingface": ("hf_source", "load_hf"),
    "augmentation": ("ImageTransform", "image_task"),
    "npz": ("load_npz",),
    "cache_writer": ("prepare_cache",),
    "registry": ("DataSet", "registered"),
    "loader": ("PrefetchLoader",),
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "sources")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
