"""Labels of runs: the method, and whatever else sets runs of one method apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trajshift.recipes.recipe import Recipe, flatten
from trajshift.recipes.short_names import in_short_names
from trajshift.utils.dotted_names import is_within

_IGNORED = (
    "seed", "output", "device", "workers", "threads", "engine", "channels_last", "data.root", "finetune", "targets",
    "tuning",
)  # fmt: skip
"""Fields that do not change a label: a label is averaged over seeds, and the others do not change phi."""


def labels_of(recipes: Mapping[Path, Recipe]) -> dict[Path, str]:
    """`label_runs` for recipes."""
    return label_runs({path: in_short_names(flatten(recipe)) for path, recipe in recipes.items()})


def label_runs(recipes: Mapping[Any, Mapping[str, Any]]) -> dict[Any, str]:
    """Run -> label: the method, and what else sets runs of one method apart (seed, targets and output aside).

    `recipes` are flat: dotted field -> value. Three seeds of one recipe are one label; `reptile` at two
    meta-learning rates is `reptile meta_lr=1` and `reptile meta_lr=3`.
    """
    fields = {
        run: {key: value for key, value in recipe.items() if not is_within(key, _IGNORED)}
        for run, recipe in recipes.items()
    }
    labels = {}
    for run, mine in fields.items():
        same = [other for other in fields.values() if other["method"] == mine["method"]]
        keys = sorted({key for other in same for key in other})
        apart = {key: mine.get(key) for key in keys if any(other.get(key) != mine.get(key) for other in same)}
        names = [_task_names(other) for other in same]
        if any(other != names[0] for other in names):
            apart = {key: value for key, value in apart.items() if not is_within(key, ("tasks",))}
            apart["tasks"] = "+".join(_task_names(mine))
        labels[run] = " ".join([str(mine["method"]), *(f"{key}={_short(value)}" for key, value in apart.items())])
    return labels


def _task_names(recipe: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(key.split(".")[1] for key in recipe if key.startswith("tasks.")))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")
