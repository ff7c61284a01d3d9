"""A job of the pool: one run to train, and what to fine-tune from it; and its worker's answer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trajshift.errors import NonFiniteLoss, UsageError
from trajshift.recipes.recipe import Recipe, validate
from trajshift.recipes.sections import TaskRecipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run and what to fine-tune from it."""

    path: Path
    """The run directory."""
    recipe: Recipe
    section: str | None = None
    """`targets` or `tuning`: fine-tuned after training; None for neither."""
    scratch: bool = False
    """Also fine-tune without meta-training, with the run's seed."""
    checkpoints: bool = False
    """Also fine-tune from every checkpoint kept."""
    train_images: tuple[int, ...] | None = None
    """Numbers of training images per task; None takes the recipe's."""

    def tuned_tasks(self) -> dict[str, TaskRecipe]:
        """The tasks to fine-tune, by name."""
        return {} if self.section is None else dict(getattr(self.recipe, self.section))

    @property
    def total_steps(self) -> int:
        """Steps of training and of all fine-tunings."""
        return self.recipe.total_steps + self.tuning_steps

    @property
    def tuning_steps(self) -> int:
        """Steps of all fine-tunings."""
        starts, output = 1 + self.scratch, self.recipe.output
        if self.checkpoints and output.checkpoint_every:
            saved = -(-self.recipe.total_steps // output.checkpoint_every)
            starts += saved if output.keep is None else min(saved, output.keep)
        sizes = 1 if self.train_images is None else len(self.train_images)
        return starts * sizes * len(self.tuned_tasks()) * self.recipe.finetune.steps

    def to_line(self) -> str:
        """The job as one line of JSON for a worker."""
        return json.dumps({**asdict(self), "path": str(self.path)}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Job:
        """The inverse of `to_line`.

        Raises:
            UsageError: the recipe does not fit.
        """
        fields: dict[str, Any] = json.loads(line)
        sizes = fields["train_images"]
        return cls(
            **fields
            | {
                "path": Path(fields["path"]),
                "recipe": validate(fields["recipe"]),
                "train_images": None if sizes is None else tuple(sizes),
            }
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker reports when a job is done."""

    failure: str | None = None
    """Why it failed."""
    diverged: bool = False
    """Whether it failed because a loss was not finite."""

    def error(self) -> UsageError | None:
        """The failure as an error; None where there was none."""
        if self.failure is None:
            return None
        return (NonFiniteLoss if self.diverged else UsageError)(self.failure)
