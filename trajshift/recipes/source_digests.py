"""Digests of the data behind a recipe's tasks, without loading it where it is files."""

from __future__ import annotations

from glob import glob
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from trajshift.data.fingerprint import examples_digest, files_digest
from trajshift.data.registry import find
from trajshift.recipes.sections import DataRecipe, TaskRecipe

if TYPE_CHECKING:
    from trajshift.task import Task


def source_digest(task: TaskRecipe, data: DataRecipe, built: Task | None = None) -> str | None:
    """The digest of a task's data; None where it cannot be known, as for data on the hub.

    Args:
        task: the task.
        data: where its files are.
        built: the task with its data loaded, for a source that is the user's own function.
    """
    kind, _, place = task.source.partition(":")
    root = Path(data.root).expanduser()
    if kind == "npz":
        return files_digest(root / place)
    if kind == "cache":
        return files_digest(root / (find(place).whole or place) / "manifest.json")  # it has the SHA-256 of the files
    if kind == "hf":
        return _local_digest(root / place)
    if kind == "hub":
        copy = task.options.get("from")
        return None if copy is None else files_digest(root / str(copy))
    if kind == "digits" or built is None:
        return None  # comes with the package, whose version is kept
    return examples_digest(built.train, built.test)


def _local_digest(place: Path) -> str | None:
    if place.exists():
        return files_digest(place)
    found = [files_digest(Path(file)) for file in sorted(glob(str(place)))]
    return sha256("".join(map(str, found)).encode()).hexdigest()[:16] if found else None
