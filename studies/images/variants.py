"""`trajshift` with one thing changed that no recipe has a field for (candidates of results/images/README.md).

Command: python studies/images/variants.py VARIANT train ...         # the variants are the functions below, with dashes
"""

from __future__ import annotations

import sys
from dataclasses import replace
from math import log
from typing import Any

import torch
from torch import Tensor

from trajshift.cli.main import main
from trajshift.learners.learner import Learner
from trajshift.settings import Inner
from trajshift.training.step import MetaStep, Moment, Runner

COSINE = Inner(lr=1.0, schedule="cosine").lr_at
STEPS = 2000
"""Inner steps of a candidate's run."""
STARTS = (0, 20, 60, 140, 300, 620, 1260)
inner_step, inner_update, mean_gradient = MetaStep.inner_step, MetaStep.inner_update, MetaStep.mean_gradient


def falling_meta_lr() -> None:
    """The meta-learning rate falls to 0 along a cosine over the whole run."""
    base: dict[int, float] = {}

    def step(self: MetaStep, moment: Moment, run: Runner) -> Tensor:
        optimizer = self.meta_optimizer
        optimizer.lr = base.setdefault(id(self), optimizer.lr) * COSINE(moment.index / STEPS)
        return inner_step(self, moment, run)

    MetaStep.inner_step = step  # type: ignore[method-assign]


def falling_inner_lr() -> None:
    """The inner learning rate falls to 0 along a cosine over the whole run, not over each round."""

    def step(self: MetaStep, learner: Learner, moment: Moment, *more: Any, **options: Any) -> Tensor:
        slower = replace(moment, lr=moment.lr * COSINE(moment.index / STEPS))
        return inner_update(self, learner, slower, *more, **options)

    MetaStep.inner_update = step  # type: ignore[method-assign, assignment]


def heads_first() -> None:
    """In the first 100 inner steps the new heads move alone."""

    def step(self: MetaStep, learner: Learner, moment: Moment, *more: Any, **options: Any) -> Tensor:
        if moment.index >= 100:
            return inner_update(self, learner, moment, *more, **options)
        batch = learner.batches.train(moment.index)
        learner.seed_generators(moment.index)
        loss: Tensor = learner.backward(batch, autocast=self.autocast, shared=False)
        learner.step(moment.lr)
        learner.forget_gradients()
        return loss

    MetaStep.inner_update = step  # type: ignore[method-assign, assignment]


def weights_by_loss() -> None:
    """A task's weight in the mean is its loss (running mean over some 50 steps) as a share of that of chance."""
    recent: dict[str, Tensor] = {}

    def step(self: MetaStep, learner: Learner, moment: Moment, *more: Any, **options: Any) -> Tensor:
        loss = inner_update(self, learner, moment, *more, **options)
        name = learner.task.name
        recent[name] = torch.lerp(recent.get(name, loss), loss, 0.02)
        return loss

    def mean(self: MetaStep) -> Tensor:
        tasks = self.active.tasks
        shares = torch.stack([recent[name] / log(tasks[name].outputs or 2) for name in self.tasks])
        self.active.weights.copy_(shares / shares.sum())
        return mean_gradient(self)

    MetaStep.inner_update = step  # type: ignore[method-assign, assignment]
    MetaStep.mean_gradient = mean  # type: ignore[method-assign]


def growing_horizon() -> None:
    """Rounds of 20, 40, 80, 160, 320, 640 and 740 inner steps instead of equal ones."""
    MetaStep.k = property(  # type: ignore[method-assign, assignment]
        lambda self: self.step - max(start for start in STARTS if start <= self.step)
    )


VARIANTS = {
    function.__name__.replace("_", "-"): function
    for function in (falling_meta_lr, falling_inner_lr, heads_first, weights_by_loss, growing_horizon)
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        print(f"variants.py: name one of {', '.join(VARIANTS)}, then trajshift's words", file=sys.stderr)
        sys.exit(2)
    VARIANTS[sys.argv.pop(1)]()
    main()
