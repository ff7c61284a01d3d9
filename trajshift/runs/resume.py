"""What may change when a run is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from trajshift.errors import UsageError
from trajshift.recipes.recipe import Recipe, differences, flatten
from trajshift.recipes.short_names import in_short_names
from trajshift.runs.data_record import refuse_another_start
from trajshift.utils.dotted_names import is_within

MAY_CHANGE = ("rounds", "output", "data.root")
"""Fields that a resumed run may change at any step: they do not alter a number that was already computed."""
MAY_CHANGE_BETWEEN_ROUNDS = ("tasks", "train_on")
NOT_TRAINED = ("tuning", "targets")


def fingerprint(recipe: Recipe, start: str | None = "a file") -> str:
    """A hash of the fields that must not change on resume, to recognize a checkpoint of another recipe.

    `start` stands for the path of an initialization, which may move; version 0.1 put the path itself in the hash.
    """
    if recipe.initialization is not None:
        recipe = replace(recipe, initialization=start)
    free = (*MAY_CHANGE, *MAY_CHANGE_BETWEEN_ROUNDS, *NOT_TRAINED, "threads")
    fixed = {key: value for key, value in in_short_names(flatten(recipe)).items() if not is_within(key, free)}
    return blake2b(json.dumps(fixed, sort_keys=True).encode(), digest_size=8).hexdigest()


def resumed_recipe(old: Recipe, new: Recipe, where: Path) -> Recipe:
    """The recipe a resumed run continues with; what `new` does not set (name, threads) stays as it was.

    Raises:
        UsageError: names a field that may not differ but does.
    """
    new = with_absolute_paths(with_threads(new, new.execution.threads or old.execution.threads))
    new.output = replace(new.output, name=new.output.name or old.output.name)
    free = (*MAY_CHANGE, *MAY_CHANGE_BETWEEN_ROUNDS, *NOT_TRAINED)
    refused = [key for key in differences(old, new) if not is_within(key, free)]
    if "initialization" in refused and None not in (old.initialization, new.initialization):
        refuse_another_start(where, old.initialization, new.initialization)
        refused.remove("initialization")
    if refused:
        before, after = flatten(old), flatten(new)
        key = refused[0]
        others = f" (also {', '.join(refused[1:])})" if refused[1:] else ""
        raise UsageError(
            f"{where} was started with another recipe: {key} was {before.get(key)!r} and is now {after.get(key)!r}"
            f"{others}; only tasks, rounds and output may change on resume; give the new run another name or folder"
        )
    return new


def with_threads(recipe: Recipe, threads: int | None) -> Recipe:
    """The recipe with another number of threads."""
    return replace(recipe, execution=replace(recipe.execution, threads=threads))


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with its files found from any working directory."""
    data = replace(recipe.data, root=str(Path(recipe.data.root).expanduser().resolve()))
    initialization = recipe.initialization
    if initialization is not None and not initialization.startswith("hub:"):
        initialization = str(Path(initialization).expanduser().resolve())
    return replace(recipe, data=data, initialization=initialization)


def check_boundary(old: Recipe, new: Recipe, step: int) -> None:
    """Refuse changed source tasks unless `step` is between two rounds."""
    changed = [key for key in differences(old, new) if is_within(key, MAY_CHANGE_BETWEEN_ROUNDS)]
    if changed and step % new.horizon:
        raise UsageError(
            f"{changed[0]} may change only between rounds, but the newest checkpoint is at step {step} "
            f"and a round has {new.horizon}; continue with the old tasks to the end of the round"
        )
    if changed and step == new.total_steps:
        raise UsageError(f"{changed[0]} was changed, but the run is complete at step {step}; raise rounds too")
    if step > new.total_steps:
        raise UsageError(
            f"rounds is {new.rounds}, which ends at step {new.total_steps}, but step {step} is already done"
        )
