"""Carries: what happens to the running theta once phi has moved by delta, inside a trajectory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trajshift.data.hashing import key, normal

if TYPE_CHECKING:
    from trajshift.loop import MetaTrainer


def shift(trainer: MetaTrainer, delta: Tensor) -> None:
    """theta <- theta + delta (Algorithm 2, line 13): dU_k/dphi is taken as the identity (equation 3).

    Optimizer state that lives in parameter space moves too; gradients' averages (momentum) stay.
    """
    if trainer.method.adapt == "head":  # theta never left phi: a copy keeps it there, sums drift by rounding
        trainer.theta.copy_(trainer.phi)
        return
    trainer.theta.add_(delta)
    views = trainer.layout.views(delta)
    for learner in trainer.learners:
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


CARRIES = {"shift": shift, "hold": hold, "random": random, "replay": replay}
