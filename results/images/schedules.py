"""`trajshift` with the meta-learning rate or the inner one falling over the whole run (candidates of README.md).

Command: python results/images/schedules.py META,INNER train ...         # each constant or cosine
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from trajshift.cli import main
from trajshift.inner import Inner
from trajshift.loop import MetaTrainer

META, INNER = (Inner(lr=1.0, schedule=name).lr_at for name in sys.argv.pop(1).split(","))
follow_gradient, take_step = MetaTrainer.follow_gradient, MetaTrainer.take_step
base: dict[int, float] = {}


def slower_learner(self: MetaTrainer, learner: Any, batch: Any, *, lr: float, ends: bool) -> Tensor:
    """One inner step of a learner at the rate of its place in the run."""
    return follow_gradient(self, learner, batch, lr=lr * INNER(self.step / self.total_steps), ends=ends)


def slower_phi(self: MetaTrainer) -> tuple[Tensor, bool]:
    """One step of all, and a meta-update at the rate of its place in the run."""
    self.outer.lr = base.setdefault(id(self), self.outer.lr) * META(self.step / self.total_steps)
    return take_step(self)


MetaTrainer.follow_gradient = slower_learner  # type: ignore[method-assign, assignment]
MetaTrainer.take_step = slower_phi  # type: ignore[method-assign]
main()
