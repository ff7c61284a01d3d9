"""What an engine is: the loop's own way, to be overridden."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trajshift.errors import UsageError
from trajshift.rng import generator_state

if TYPE_CHECKING:
    from trajshift.training.trainer import MetaTrainer


class Engine:
    """The reference: one learner after another.

    Args:
        why: why no faster engine was chosen, to be told to the user.
    """

    name = "loop"

    def __init__(self, why: str = "") -> None:
        self.why = why

    @contextmanager
    def running(self) -> Iterator[None]:
        """Surrounds `MetaTrainer.advance`."""
        yield

    def begin(self, trainer: MetaTrainer) -> None:
        """A round starts; its learners may be other ones than before."""

    def step(self, trainer: MetaTrainer) -> tuple[Tensor, bool]:
        """One inner step of all learners and what is due after it: losses `[T]`, whether phi moved."""
        return trainer.take_step()

    def learners_step(self, trainer: MetaTrainer) -> list[Tensor]:
        """One inner step of every learner on training batch `trainer.step`: T losses before it."""
        return [trainer.step_of(learner, trainer.step) for learner in trainer.learners]


@contextmanager
def without_draws(trainer: MetaTrainer) -> Iterator[None]:
    """Surrounds the learners' work in an engine that cannot seed each pass.

    Raises:
        UsageError: a model or loss drew from a global generator.
    """
    before = generator_state(trainer.device)
    yield
    if not torch.equal(before, generator_state(trainer.device)):
        raise UsageError(
            f"a model or loss drew random numbers at inner step {trainer.step + 1} and had not before; use engine=loop"
        )
