"""Fine-tune targets from what runs learned, and keep one row for each in `runs/NAME/evaluation.jsonl`.

A row that is already there is not computed again, so an evaluation that was cut short resumes where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trajshift.data.fingerprint import changed, touched
from trajshift.errors import UsageError, nearest
from trajshift.evaluation.evaluate import ProgressCallback, finetuned_row
from trajshift.evaluation.evaluation_row import EvaluationRow
from trajshift.recipes.recipe import Recipe, load
from trajshift.recipes.sections import SOURCE_KINDS
from trajshift.recipes.source_digests import source_digest
from trajshift.runs.collect_rows import append_evaluation, distinct, labelled, read_evaluation, setting_of
from trajshift.runs.labels import labels_of
from trajshift.runs.starting_points import SavedStart, load_phi, starts_of
from trajshift.utils.streams import say

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
) -> list[EvaluationRow]:
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
    builder = _Builder()
    jobs = [job.with_data(builder) for job in jobs]
    known = {path: read_evaluation(path) for path in paths}
    found = {index: row for index, job in enumerate(jobs) if (row := _existing(job, known)) is not None}
    missing = [index for index in range(len(jobs)) if index not in found]
    for done, index in enumerate(missing):
        job = jobs[index]
        if progress is not None:
            progress(done, len(missing), f"{job.row.label} seed {job.row.seed} on {job.row.target}")
        found[index] = builder.compute(job)
        append_evaluation(job.path, found[index])
    labels = labels_of(recipes)
    return [labelled(found[index], job.path, labels) for index, job in enumerate(jobs)]


# -- what is to be done, and what is there ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One fine-tuning: where it starts, on what, and where its row goes."""

    path: Path
    recipe: Recipe
    start: SavedStart
    row: EvaluationRow
    """The row without results."""

    def with_data(self, builder: _Builder) -> _Job:
        """The job with the digest of its target's data in the row."""
        return replace(self, row=replace(self.row, data=builder.data(self)))


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
    settings = {name: setting_of(recipe, section, name) for name in names}
    sizes = train_images if train_images is not None else [recipe.finetune.train_images]
    jobs = []
    for start in starts_of(path, recipe, checkpoints=checkpoints, scratch=scratch):
        method = recipe.method if start.point.is_meta_trained else start.point.kind
        inner_steps, phi = start.inner_steps(path, recipe), start.digest()
        for name in names:
            for size in sizes:
                row = EvaluationRow(
                    start=start.point,
                    inner_steps=inner_steps,
                    method=method,
                    label=method,
                    seed=recipe.seed,
                    section=section,
                    phi=phi,
                    setting=settings[name],
                    target=name,
                    train_images=size,
                    steps=recipe.finetune.steps,
                )
                jobs.append(_Job(path=path, recipe=recipe, start=start, row=row))
    return jobs


def _existing(job: _Job, known: Mapping[Path, Sequence[EvaluationRow]]) -> EvaluationRow | None:
    """The row of this job if it was computed before; rows without meta-training may be saved with any run.

    A row on other data does not count, which is reported.
    """
    places = [job.path] if job.row.start.is_meta_trained else known
    like = [row for path in places for row in known[path] if _same_but_for_data(row, job.row)]
    found = next((row for row in reversed(like) if not changed(row.data, job.row.data)), None)
    what = f"the data of {job.row.target!r} (data.root {job.recipe.data.root})"
    if like and found is None:
        say(f"note: {what} has changed since it was fine-tuned; it is fine-tuned again")
    elif found is not None and touched(found.data, job.row.data):
        say(f"warning: {what} was written to since it was fine-tuned; what was sampled is equal")
    return found


def _same_but_for_data(row: EvaluationRow, other: EvaluationRow) -> bool:
    return replace(row, data=None).identity == replace(other, data=None).identity


def _without_repeats(jobs: Sequence[_Job]) -> list[_Job]:
    """What is not meta-trained does not depend on the run: once per seed, target, size and setting is enough."""
    kept: dict[tuple[Any, ...], _Job] = {}
    for job in jobs:
        kept.setdefault((job.path if job.row.start.is_meta_trained else None, *job.row.identity), job)
    return list(kept.values())


# -- doing it --------------------------------------------------------------------------------------------------


class _Builder:
    """Computes jobs; a task is built once, and a phi once for the jobs in a row that start from it."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._data: dict[str, str | None] = {}
        self._source: Path | None = None
        self._phi: Mapping[str, Tensor] | None = None

    def compute(self, job: _Job) -> EvaluationRow:
        """The finished row."""
        from trajshift.recipes.build_trainer import finetune_options

        options = finetune_options(job.recipe)
        del options["seed"]  # the row says which
        source = job.start.source
        if source != self._source:
            self._source, self._phi = source, None if source is None else load_phi(source)
        return finetuned_row(job.row, self._phi, self._task(job), job.row.train_images, options)

    def data(self, job: _Job) -> str | None:
        """The digest of the data of a job's target; None where it is not known."""
        task = getattr(job.recipe, job.row.section)[job.row.target]
        name = f"{task} {job.recipe.data}"
        if name not in self._data:
            built = None
            if task.source.partition(":")[0] not in SOURCE_KINDS:  # the user's own function
                with suppress(UsageError):
                    built = self._task(job)
            self._data[name] = source_digest(task, job.recipe.data, built)
        return self._data[name]

    def _task(self, job: _Job) -> Task:
        from trajshift.recipes.build_tasks import build_tasks, resolved

        fields = resolved(getattr(job.recipe, job.row.section)[job.row.target], job.recipe.data)
        name = json.dumps([job.row.target, asdict(fields), job.recipe.data.root], sort_keys=True)
        if name not in self._tasks:
            self._tasks[name] = build_tasks(job.recipe, [job.row.target])[job.row.target]
        return self._tasks[name]
