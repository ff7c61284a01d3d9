"""What an engine is, and the reference: one learner after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trajshift.errors import UsageError
from trajshift.rng import generator_state
from trajshift.training.meta_step import MetaStep, Moment


class Engine:
    """Runs the steps of a `MetaStep`; this one is the reference, and all others give the same numbers.

    Args:
        why: why no faster engine was chosen, for the user.
    """

    name = "loop"

    def __init__(self, why: str = "") -> None:
        self.why = why

    def begin(self, run: MetaStep) -> None:
        """A round starts; its learners may have changed."""

    def step(self, run: MetaStep) -> tuple[Tensor, bool]:
        """One inner step of all learners and what is due after it: losses `[T]`, whether phi moved."""
        return run.take(self.inner_steps)

    def inner_steps(self, run: MetaStep, moment: Moment) -> Tensor:
        """The inner step of every learner; the losses `[T]` before it."""
        losses = [run.inner_update(learner, moment) for learner in run.learners]
        return torch.stack(losses) if losses else run.theta.new_zeros(0)


@contextmanager
def without_draws(run: MetaStep) -> Iterator[None]:
    """Surrounds the learners' work in an engine that cannot seed each pass.

    Raises:
        UsageError: a model or loss drew from a global generator.
    """
    before = generator_state(run.device)
    yield
    if not torch.equal(before, generator_state(run.device)):
        raise UsageError(
            f"a model or loss drew random numbers at inner step {run.step + 1} and had not before; use engine=loop"
        )
