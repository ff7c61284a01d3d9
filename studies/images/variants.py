"""`trajshift` with one thing changed for which recipes have no field (candidates of results/images/README.md).

    python -m studies.images.variants VARIANT train ...       # what follows VARIANT is a command line of trajshift

Each variant replaces methods of the trainer or its step for as long as its context lasts. They are experiments that
brought no gain, kept so that their rows can be reproduced, not examples to follow: a custom choice replaces nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from math import log
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from studies.command import new_app, run_app
from trajshift import Event, Inner, MetaTrainer, UsageError
from trajshift.errors import nearest
from trajshift.learners.learner import Learner
from trajshift.training.meta_step import MetaStep, Moment

COSINE = Inner(lr=1.0, schedule="cosine").lr_at
"""Falls from 1 to 0 as its argument rises from 0 to 1."""
STARTS = (0, 20, 60, 140, 300, 620, 1260)
"""Inner steps before the rounds of `growing_horizon`."""


@contextmanager
def replaced(owner: type, **members: Any) -> Iterator[None]:
    """Replaces members of a class, and restores them at the end."""
    before = {name: vars(owner)[name] for name in members}
    try:
        for name, member in members.items():
            setattr(owner, name, member)
        yield
    finally:
        for name, member in before.items():
            setattr(owner, name, member)


def before_each_step(prepare: Callable[[MetaTrainer], None]) -> AbstractContextManager[None]:
    """Calls `prepare` before every inner step of every trainer."""
    advance = MetaTrainer.advance

    def prepared(self: MetaTrainer) -> Event:
        prepare(self)
        return advance(self)

    return replaced(MetaTrainer, advance=prepared)


def falling_meta_lr() -> AbstractContextManager[None]:
    """The meta-learning rate falls to 0 along a cosine over the whole run."""
    base: dict[int, float | Tensor] = {}

    def prepare(trainer: MetaTrainer) -> None:
        optimizer = trainer.meta_step.meta_optimizer
        optimizer.lr = base.setdefault(id(trainer), optimizer.lr) * COSINE(trainer.step / trainer.total_steps)

    return before_each_step(prepare)


def falling_inner_lr() -> AbstractContextManager[None]:
    """The inner learning rate falls to 0 along a cosine over the whole run, not over each round."""
    base: dict[int, float] = {}

    def prepare(trainer: MetaTrainer) -> None:
        step = trainer.meta_step
        lr = base.setdefault(id(trainer), step.inner.lr) * COSINE(trainer.step / trainer.total_steps)
        step.inner = replace(step.inner, lr=lr)

    return before_each_step(prepare)


def heads_first() -> AbstractContextManager[None]:
    """In the first 100 inner steps only the new heads move."""
    inner_update = MetaStep.inner_update

    def update(self: MetaStep, learner: Learner, moment: Moment, *more: Any, **options: Any) -> Tensor:
        if moment.index >= 100:
            return inner_update(self, learner, moment, *more, **options)
        batch = learner.batches.train(moment.index)
        learner.seed_generators(moment.index)
        loss: Tensor = learner.backward(batch, autocast=self.autocast, shared=False)
        learner.step(moment.lr)
        learner.forget_gradients()
        return loss

    return replaced(MetaStep, inner_update=update)


def weights_by_loss() -> AbstractContextManager[None]:
    """A task's weight in the mean is its loss (running mean over some 50 steps) as a share of the loss by chance."""
    meta_update = MetaStep.meta_update
    recent: dict[str, Tensor] = {}

    def weighted(self: MetaStep, moment: Moment, losses: Tensor) -> bool:
        for name, loss in zip(self.tasks, losses, strict=True):
            recent[name] = torch.lerp(recent.get(name, loss), loss, 0.02)
        tasks = self.active.tasks
        shares = torch.stack([recent[name] / log(tasks[name].outputs or 2) for name in self.tasks])
        self.active.weights.copy_(shares / shares.sum())
        return meta_update(self, moment, losses)

    return replaced(MetaStep, meta_update=weighted)


def growing_horizon() -> AbstractContextManager[None]:
    """Rounds of 20, 40, 80, 160, 320, 640 and 740 inner steps instead of equal ones."""
    moment = MetaStep.moment

    def unequal(self: MetaStep, index: int) -> Moment:
        return replace(moment(self, index), carried=index + 1 not in STARTS)

    k = property(lambda self: self.step - max(start for start in STARTS if start <= self.step))
    return replaced(MetaStep, k=k, moment=unequal)


VARIANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    function.__name__.replace("_", "-"): function
    for function in (falling_meta_lr, falling_inner_lr, heads_first, weights_by_loss, growing_horizon)
}

# -- the command -----------------------------------------------------------------------------------------------

app = new_app()
_LIST = "\n\n".join(f"{name}: {function.__doc__}" for name, function in VARIANTS.items())


@app.command(
    help=f"Run a command line of trajshift with one thing changed. VARIANT is:\n\n{_LIST}",
    context_settings={"ignore_unknown_options": True},
)
def variants(
    variant: Annotated[str, typer.Argument(metavar="VARIANT", help="What is changed.")],
    words: Annotated[list[str], typer.Argument(metavar="train ...", help="The command line of trajshift.")],
) -> None:
    """Runs trajshift under a variant."""
    if variant not in VARIANTS:
        raise UsageError(f"there is no variant {variant!r}{nearest(variant, VARIANTS)}")
    from trajshift.cli.main import main

    sys.argv = ["trajshift", *words]
    with VARIANTS[variant]():
        main()


if __name__ == "__main__":
    run_app(app, "studies.images.variants")
