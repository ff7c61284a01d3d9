"""Carries: what happens to the running theta once phi has moved by delta, inside a trajectory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trajshift.errors import UsageError
from trajshift.rng import key, normal

if TYPE_CHECKING:
    from trajshift.training.trainer import MetaTrainer


class Carry:
    """Base of all carries. One of the user's own moves `trainer.theta` and may keep state within a trajectory."""

    needs_gradients = False
    """Whether `trainer.roster.gradients` `[T, P]` must hold the gradients of the last inner step."""

    def begin(self, trainer: MetaTrainer) -> None:
        """A trajectory starts: all rows of theta equal phi."""

    def __call__(self, trainer: MetaTrainer, delta: Tensor) -> None:
        """phi has moved by delta `[P]`, `trainer.k` inner steps into the trajectory."""
        raise UsageError(f"{type(self).__name__} defines no __call__(); a carry must")

    def state(self) -> dict[str, Tensor]:
        """Tensors whose first dimension is T, for a checkpoint inside a trajectory."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, after `begin`."""


class _Stateless(Carry):
    """A carry that is a function of trainer and delta."""

    def __init__(self, move: Callable[[MetaTrainer, Tensor], None]) -> None:
        self._move = move

    def __call__(self, trainer: MetaTrainer, delta: Tensor) -> None:
        self._move(trainer, delta)


def shift(trainer: MetaTrainer, delta: Tensor) -> None:
    """theta <- theta + delta (Algorithm 2, line 13): dU_k/dphi is taken as the identity (equation 3).

    Optimizer state that lives in parameter space moves too; gradients' averages (momentum) stay.
    """
    if trainer.method.adapt == "head":  # theta never left phi: a copy keeps it there, sums drift by rounding
        trainer.theta.copy_(trainer.phi)
        return
    trainer.theta.add_(delta)
    followers = [learner for learner in trainer.learners if learner.has_state_to_shift]
    if followers:
        views = trainer.layout.views(delta)
        for learner in followers:
            learner.shift_state(views)


def hold(trainer: MetaTrainer, delta: Tensor) -> None:
    """theta stays (No Shifting, figure 8)."""


def random(trainer: MetaTrainer, delta: Tensor) -> None:
    """theta_t moves by ||delta|| in a random direction, one for each task (Random Shifting, figure 8)."""
    size, mask = torch.linalg.vector_norm(delta), trainer.layout.mask(delta.device)
    for learner in trainer.learners:
        draw = key(trainer.seed, learner.task.name, "direction", trainer.step)
        direction = normal(draw, delta.numel(), device=delta.device, dtype=delta.dtype)
        direction *= mask
        trainer.theta[learner.row].add_(direction * (size / torch.linalg.vector_norm(direction)))


def replay(trainer: MetaTrainer, delta: Tensor) -> None:
    """theta <- U_k(phi): the trajectory is run again from the new phi (Ours Accurate, section 4.1)."""
    trainer.replay()


CARRIES: dict[str, Carry] = {
    name: _Stateless(move) for name, move in (("shift", shift), ("hold", hold), ("random", random), ("replay", replay))
}
