"""How far a carried trajectory is from the one it approximates (equation 5), measured by running tasks again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from trajshift.errors import UsageError
from trajshift.learners.learner import Learner
from trajshift.training.meta_step import MetaStep, Row


class ApproximationErrorMeter:
    """Runs tasks again from the current phi, with the same batches, and compares; no number of the run changes.

    A reading has `step` (scheduled inner steps done), `k`, `task`, `error` ||U_k(phi + d_1 + ... + d_{k-1}) -
    theta_k||, taken before phi moves by d_k, and `distance` ||theta_k - phi||. After k steps it costs k inner steps of
    the task, counted as `gauge_evaluations` and nowhere else.
    Readings accumulate until they are taken.

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
        """A meter that measures one task after every so many inner steps of a round.

        Raises:
            UsageError: fewer than 1 step, or more than a round has.
        """
        if not 1 <= steps <= horizon:
            raise UsageError(f"error_every is {steps}; use a number of inner steps from 1 to the horizon, {horizon}")
        return cls(lambda k: k % steps == 0)

    def to_snapshot(self, run: MetaStep) -> Sequence[str]:
        """The tasks to measure in the round that begins; those of other ranks too."""
        return self._chosen(run, run.round)

    def _chosen(self, run: MetaStep, round: int) -> Sequence[str]:
        names = run.active.sampled(round)
        return names if self._every_task else [names[round % len(names)]]

    def look(self, run: MetaStep) -> None:
        """Measures, if a measurement is due; called between an inner step and the meta-update."""
        done, k = run.step, (run.step - 1) % run.horizon + 1
        if not self._when(k):
            return
        chosen = self._chosen(run, (done - 1) // run.horizon)
        for learner in run.active.learners:
            # A run that was resumed inside a round and had no meter before has no snapshot of this round.
            if learner.task.name in chosen and learner.task.name in run.active.snapshots:
                theta = run.active.theta[learner.row]
                exact = self._run_again(run, learner, k)
                lengths = torch.linalg.vector_norm(torch.stack((exact - theta, theta - run.phi)), dim=1)
                self._readings.append((done, k, learner.task.name, lengths))
                run.counters.counts["gauge_evaluations"] += k

    def _run_again(self, run: MetaStep, learner: Learner, k: int) -> Tensor:
        """U_k(phi) `[P]`; the learner and its row are restored."""
        row, last_gradient = run.active.theta[learner.row], run.active.gradients[learner.row]
        theta, gradient = row.clone(), last_gradient.clone()
        tensors, numbers = learner.state()
        kept = {label: tensor.clone() for label, tensor in tensors.items()}
        learner.load(*run.active.snapshots[learner.task.name])
        row.copy_(run.phi)
        for index in range(run.step - k, run.step):
            run.inner_update(learner, run.moment(index))
        exact = row.clone()
        row.copy_(theta)
        last_gradient.copy_(gradient)
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
