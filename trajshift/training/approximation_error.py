"""How far a carried trajectory is from the one it stands for (equation 5), measured by running tasks again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trajshift.errors import UsageError

if TYPE_CHECKING:
    from trajshift.learners.learner import Learner
    from trajshift.training.trainer import MetaTrainer


Row = dict[str, Any]
"""A reading as JSON values: `step` (scheduled inner steps done), `k`, `task`, `error`
||U_k(phi + d_1 + ... + d_{k-1}) - theta_k||, taken before phi moves by d_k, and `distance` ||theta_k - phi||."""


class ApproximationErrorMeter:
    """Runs tasks again from the phi of now, with the same batches, and compares; no number of the run changes.

    A reading after k steps costs k inner steps of the task, counted as `gauge_evaluations` and nowhere else.
    Readings pile up until they are taken.

    Args:
        when: `when(k)` says whether to measure after k inner steps of a round.
        every_task: measure every local task; otherwise one, in turn from round to round.
    """

    def __init__(self, when: Callable[[int], bool], *, every_task: bool = False) -> None:
        self._when = when
        self._every_task = every_task
        self._readings: list[tuple[int, int, str, Tensor]] = []

    @classmethod
    def every(cls, steps: int, horizon: int) -> ApproximationErrorMeter:
        """A gauge that measures one task after every so many inner steps of a round.

        Raises:
            UsageError: fewer than 1 step, or more than a round has.
        """
        if not 1 <= steps <= horizon:
            raise UsageError(f"error_every is {steps}; use a number of inner steps from 1 to the horizon, {horizon}")
        return cls(lambda k: k % steps == 0)

    def chosen(self, trainer: MetaTrainer, round: int) -> Sequence[str]:
        """The tasks to measure in a round; those of other ranks too."""
        names = trainer.roster.sampled(round)
        return names if self._every_task else [names[round % len(names)]]

    def look(self, trainer: MetaTrainer) -> None:
        """Measures, if it is time; called between an inner step and the meta-update."""
        done, k = trainer.step, (trainer.step - 1) % trainer.horizon + 1
        if not self._when(k):
            return
        chosen = self.chosen(trainer, (done - 1) // trainer.horizon)
        for learner in trainer.learners:
            # A run that was resumed inside a round, and had no gauge before, has no snapshot in this one.
            if learner.task.name in chosen and learner.task.name in trainer.roster.snapshots:
                theta = trainer.theta[learner.row]
                exact = self._run_again(trainer, learner, k)
                lengths = torch.linalg.vector_norm(torch.stack((exact - theta, theta - trainer.phi)), dim=1)
                self._readings.append((done, k, learner.task.name, lengths))
                trainer.tally.counts["gauge_evaluations"] += k

    def _run_again(self, trainer: MetaTrainer, learner: Learner, k: int) -> Tensor:
        """U_k(phi) `[P]`; the learner and its row are put back."""
        row = trainer.theta[learner.row]
        theta, gradient = row.clone(), trainer.roster.gradients[learner.row].clone()
        tensors, numbers = learner.state()
        kept = {label: tensor.clone() for label, tensor in tensors.items()}
        learner.load(*trainer.roster.snapshots[learner.task.name])
        row.copy_(trainer.phi)
        for step in range(trainer.step - k, trainer.step):
            trainer.step_of(learner, step)
        exact = row.clone()
        row.copy_(theta)
        trainer.roster.gradients[learner.row].copy_(gradient)
        learner.load(kept, numbers)
        return exact

    def rows(self) -> list[Row]:
        """The readings since they were last taken; waits for the device."""
        return [
            {"step": step, "k": k, "task": task, "error": lengths[0].item(), "distance": lengths[1].item()}
            for step, k, task, lengths in self._readings
        ]

    def take(self) -> list[Row]:
        """As `rows`, and forgets them."""
        rows = self.rows()
        self._readings = []
        return rows

    def load(self, rows: Iterable[Row]) -> None:
        """Puts saved readings back."""
        self._readings = [
            (row["step"], row["k"], row["task"], torch.tensor((row["error"], row["distance"]), dtype=torch.float64))
            for row in rows
        ]


def joined(parts: Iterable[list[Row]]) -> list[Row]:
    """The readings of all ranks, in the order of steps and names."""
    return sorted((row for rows in parts for row in rows), key=lambda row: (row["step"], row["task"]))
