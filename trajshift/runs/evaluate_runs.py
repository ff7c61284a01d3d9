"""Fine-tune targets from what runs learned, and keep one row for each in `runs/NAME/evaluation.jsonl`.

A row that is already there is not computed again, so an evaluation that was cut short goes on where it
stopped. Reading rows needs no torch; `comparison` says what is in one and makes tables of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trajshift.errors import UsageError, nearest
from trajshift.evaluation.comparison import FINAL, SCRATCH, START, UNTRAINED, Row
from trajshift.evaluation.evaluate import ProgressCallback, finetuned_row
from trajshift.recipes.recipe import Recipe, load
from trajshift.runs.directory import RunDirectory
from trajshift.runs.evaluation_rows import (
    FILE,
    distinct,
    identity_of,
    labelled,
    labels_of,
    read_evaluation,
    setting_of,
)
from trajshift.runs.starting_points import checkpoints_of, digest_of, load_phi, manifest_of
from trajshift.utils.files import append_row, read_jsonl

if TYPE_CHECKING:
    from torch import Tensor

    from trajshift.task import Task

SECTIONS = ("targets", "tuning")


def evaluate_runs(
    paths: Sequence[Path | str],
    *,
    targets: str = "targets",
    train_images: Sequence[int | None] | None = None,
    checkpoints: bool = False,
    scratch: bool = False,
    overrides: Sequence[str] = (),
    progress: ProgressCallback | None = None,
) -> list[Row]:
    """Fine-tunes the targets of each run's recipe from what the run learned; rows that exist are only read.

    Args:
        paths: run directories.
        targets: the recipe's section to fine-tune: `targets`, or `tuning` for choosing hyper-parameters.
        train_images: numbers of training images (None: all); None takes the recipe's `finetune.train_images`.
        checkpoints: also from every checkpoint that was kept, for accuracy against inner steps.
        scratch: also without meta-training, once per seed: from the recipe's `initialization`, or where it has none
            from scratch.
        overrides: `key.path=value` for the recipes, such as `finetune.steps=300`.
        progress: called before each fine-tuning.

    Returns:
        The rows asked for, labelled so that runs of one method with different recipes stay apart.

    Raises:
        UsageError: no run directory, an unfinished run (without `checkpoints`), or no such targets.
    """
    if targets not in SECTIONS:
        raise UsageError(f"cannot evaluate {targets!r}{nearest(targets, SECTIONS)}")
    paths = distinct(paths)
    recipes = {path: load(path, overrides) for path in paths}
    jobs: list[_Job] = []
    for path, recipe in recipes.items():
        jobs += _jobs(path, recipe, targets, train_images, checkpoints=checkpoints, scratch=scratch)
    jobs = _without_repeats(jobs)
    known = {path: _valid_rows(path) for path in paths}
    found = {index: row for index, job in enumerate(jobs) if (row := _existing(job, known)) is not None}
    missing = [index for index in range(len(jobs)) if index not in found]
    builder = _Builder()
    for done, index in enumerate(missing):
        job = jobs[index]
        if progress is not None:
            progress(done, len(missing), f"{job.base['label']} seed {job.base['seed']} on {job.target}")
        found[index] = builder.compute(job)
        append_row(job.path / FILE, found[index])
    labels = labels_of(recipes)
    return [labelled(found[index], job.path, labels) for index, job in enumerate(jobs)]


# -- what is to be done ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One fine-tuning: where it starts, on what, and where its row goes."""

    path: Path
    recipe: Recipe
    target: str
    train_images: int | None
    source: Path | None
    """The initialization file or checkpoint folder; None for scratch."""
    base: Row
    """The row without results."""


def _jobs(
    path: Path,
    recipe: Recipe,
    section: str,
    train_images: Sequence[int | None] | None,
    *,
    checkpoints: bool,
    scratch: bool,
) -> list[_Job]:
    names = list(getattr(recipe, section))
    if not names:
        raise UsageError(f"the recipe of {path} has no tasks under {section}; add one there or in an override")
    points: list[tuple[str | int, Path | None]] = [_untrained(recipe)] if scratch else []
    final = RunDirectory(path).initialization
    if final.is_file():
        points.append((FINAL, final))
    elif not checkpoints:
        raise UsageError(
            f"{path} is not finished: it has no {final.name}; continue it with --resume or evaluate its checkpoints"
        )
    points += list(checkpoints_of(path)) if checkpoints else []
    sizes = train_images if train_images is not None else [recipe.finetune.train_images]
    jobs = []
    for checkpoint, source in points:
        method = str(checkpoint) if checkpoint in UNTRAINED else recipe.method
        common: Row = {
            "checkpoint": checkpoint,
            "inner_steps": 0 if source is None or checkpoint == START else _inner_steps(path, recipe, source),
            "method": method,
            "label": method,
            "seed": recipe.seed,
            "section": section,
            "phi": digest_of(source),
        }
        for name in names:
            setting = {"setting": setting_of(recipe, section, name)}
            for size in sizes:
                base = common | setting | {"target": name, "train_images": size, "steps": recipe.finetune.steps}
                jobs.append(_Job(path=path, recipe=recipe, target=name, train_images=size, source=source, base=base))
    return jobs


def _untrained(recipe: Recipe) -> tuple[str, Path | None]:
    """Where fine-tuning starts without meta-training."""
    if recipe.initialization is None:
        return SCRATCH, None
    from trajshift.learners.pretrained import locate

    return START, locate(recipe.initialization)


def _inner_steps(path: Path, recipe: Recipe, source: Path) -> int:
    """Cumulative inner steps per task, replays counted, behind a starting point."""
    if source.is_dir():
        return int(manifest_of(source)["numbers"]["inner_steps"])
    rows = read_jsonl(path / "metrics.jsonl")
    return int(rows[-1]["inner_steps"]) if rows else recipe.total_steps


# -- what is there ---------------------------------------------------------------------------------------------


def _valid_rows(path: Path) -> dict[tuple[Any, ...], Row]:
    return {identity_of(row): row for row in read_evaluation(path)}


def _existing(job: _Job, known: Mapping[Path, Mapping[tuple[Any, ...], Row]]) -> Row | None:
    """The row of this job if it was computed before; rows without meta-training may lie with any run."""
    places = known if job.base["checkpoint"] in UNTRAINED else [job.path]
    rows = (known[path].get(identity_of(job.base)) for path in places)
    return next((row for row in rows if row is not None), None)


def _without_repeats(jobs: Sequence[_Job]) -> list[_Job]:
    """What is not meta-trained does not depend on the run: once per seed, target, size and setting is enough."""
    kept: dict[tuple[Any, ...], _Job] = {}
    for job in jobs:
        kept.setdefault((None if job.base["checkpoint"] in UNTRAINED else job.path, *identity_of(job.base)), job)
    return list(kept.values())


# -- doing it --------------------------------------------------------------------------------------------------


class _Builder:
    """Computes jobs; a task is built once, and a phi once for the jobs in a row that start from it."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._source: Path | None = None
        self._phi: Mapping[str, Tensor] | None = None

    def compute(self, job: _Job) -> Row:
        """The finished row."""
        from trajshift.recipes.build_trainer import finetune_options

        options = finetune_options(job.recipe)
        del options["seed"]  # the row says which
        if job.source != self._source:
            self._source, self._phi = job.source, None if job.source is None else load_phi(job.source)
        return finetuned_row(job.base, self._phi, self._task(job), job.train_images, options)

    def _task(self, job: _Job) -> Task:
        from trajshift.recipes.build_tasks import build_tasks, resolved

        fields = resolved(getattr(job.recipe, job.base["section"])[job.target], job.recipe.data)
        name = json.dumps([job.target, asdict(fields), job.recipe.data.root], sort_keys=True)
        if name not in self._tasks:
            self._tasks[name] = build_tasks(job.recipe, [job.target])[job.target]
        return self._tasks[name]
