"""Fine-tuning many targets from many initializations, a row for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from trajshift.errors import NonFiniteLoss
from trajshift.evaluation.evaluation_row import FINAL, SCRATCH, EvaluationRow
from trajshift.settings import Finetune, finetune_settings

if TYPE_CHECKING:
    from torch import Tensor

    from trajshift.task import Task

ProgressCallback = Callable[[int, int, str], None]
"""Called with fine-tunings done, their number, and what the next one is."""


def evaluate(
    initializations: Mapping[str, Mapping[int, Mapping[str, Tensor] | None]],
    targets: Sequence[Task] | Mapping[str, Task],
    *,
    train_images: Sequence[int | None] = (None,),
    progress: ProgressCallback | None = None,
    **options: Any,
) -> list[EvaluationRow]:
    """Fine-tunes every target from every initialization; rows for `comparison.summary_table`.

    Args:
        initializations: method -> seed -> phi, None for scratch. The seed also decides head, batches and
            subset.
        targets: tasks with test examples.
        train_images: numbers of training images, None for all.
        progress: called before each fine-tuning.
        options: further arguments of `finetune`, such as model and steps, or settings in place of its fields.
    """
    tasks = list(targets.values()) if isinstance(targets, Mapping) else list(targets)
    jobs = [
        (label, seed, phi, task, images)
        for label, by_seed in initializations.items()
        for seed, phi in by_seed.items()
        for task in tasks
        for images in train_images
    ]
    rows = []
    for done, (label, seed, phi, task, images) in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs), f"{label} seed {seed} on {task.name}")
        row = EvaluationRow(
            start=FINAL if phi is not None else SCRATCH,
            inner_steps=getattr(phi, "about", {}).get("step", 0),
            method=label,
            label=label,
            seed=seed,
            target=task.name,
            steps=options.get("steps", 1000),
        )
        rows.append(finetuned_row(row, phi, task, images, options))
    return rows


def finetuned_row(
    row: EvaluationRow,
    phi: Mapping[str, Tensor] | None,
    task: Task,
    train_images: int | None,
    options: Mapping[str, Any],
) -> EvaluationRow:
    """The row with the result of its fine-tuning; a loss that is not finite is a result too, kept as `error`."""
    from trajshift.evaluation.finetuning import finetune, training_images
    from trajshift.task import untested

    if task.test is None:
        raise untested(task.name)
    own = {entry.name for entry in fields(Finetune)}
    others = {name: value for name, value in options.items() if name not in own and name != "settings"}
    given = {name: value for name, value in options.items() if name in own}
    settings = replace(finetune_settings(options.get("settings"), given), train_images=train_images)
    row = replace(row, train_images=train_images, images=training_images(task, train_images))
    try:
        tuned = finetune(phi, task, settings, seed=row.seed, **others)
    except NonFiniteLoss as error:
        return replace(row, error=str(error))
    return replace(row, metrics=tuned.metrics)
