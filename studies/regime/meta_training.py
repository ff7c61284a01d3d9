"""One meta-training of the regime, timed, with phi kept after some rounds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from studies.regime.rates import Rates
from studies.regime.setting import Regime
from trajshift.learners.initialization import Initialization
from trajshift.settings import Execution, Inner, Meta
from trajshift.task import Task
from trajshift.training.trainer import MetaTrainer


class NoTimeLeft(Exception):
    """The time left is too short for the work that was started."""


@dataclass(kw_only=True)
class Trained:
    """The result of a meta-training."""

    phis: dict[int, Initialization] = field(default_factory=dict)
    """By inner steps."""
    curve: dict[str, Any] = field(default_factory=dict)
    """`step`, and by task the mean training `loss` since the point before."""
    engine: str = ""
    gradient_evaluations: int = 0
    seconds: float = 0.0
    """Wall time, set-up included."""
    step_seconds: float = 0.0
    """A step once the first points of the curve, with all captures and compilations, are past."""

    @property
    def steps(self) -> int:
        """Inner steps taken."""
        return int(self.curve["step"][-1])

    def timing(self) -> dict[str, float]:
        """The times as they stand in rows."""
        set_up = max(self.seconds - self.steps * self.step_seconds, 0.0)
        return {
            "seconds": round(self.seconds, 2),
            "set_up_seconds": round(set_up, 2),
            "step_seconds": round(self.step_seconds, 6),
        }


def meta_train(
    tasks: Sequence[Task],
    method: str,
    rates: Rates,
    regime: Regime,
    *,
    seed: int,
    device: str,
    rounds: int,
    kept: Sequence[int],
    fits: Callable[[float], bool] = lambda seconds: True,
) -> Trained:
    """Trains for some rounds and keeps phi after those of `kept`.

    `fits` is asked after every round but the last whether so many more seconds are there.

    Raises:
        NoTimeLeft: they are not.
        NonFiniteLoss: training diverged.
    """
    began = time.monotonic()
    trainer = MetaTrainer(
        regime.factory(),
        tasks,
        method,
        horizon=regime.horizon,
        rounds=rounds,
        inner=Inner(lr=rates.inner_lr),
        meta=Meta(lr=rates.meta_lr),
        execution=Execution(device=device, autocast=regime.autocast),
        batch_size=regime.batch_size,
        seed=seed,
    )
    result = Trained(engine=trainer.describe()["engine"], curve={"step": [], "loss": {task.name: [] for task in tasks}})
    warm: tuple[int, float] | None = None
    for event in trainer:
        ended = event.k == regime.horizon
        if event.step % regime.log_every == 0 or ended:
            result.gradient_evaluations = _log(trainer, result.curve)
            now = time.monotonic()
            result.step_seconds = (now - began) / event.step
            if warm is None:
                warm = (event.step, now)
            elif event.step > warm[0]:
                result.step_seconds = (now - warm[1]) / (event.step - warm[0])
        if ended and event.round + 1 in kept:
            result.phis[event.step] = trainer.initialization
        left = trainer.total_steps - event.step
        if ended and left and not fits(result.step_seconds * left):
            raise NoTimeLeft
    result.seconds = time.monotonic() - began
    return result


def _log(trainer: MetaTrainer, curve: dict[str, Any]) -> int:
    """Adds a point to the curve, which waits for the device; returns the gradient evaluations so far."""
    metrics = trainer.metrics()
    trainer.check_finite()
    curve["step"].append(metrics["step"])
    for name, values in curve["loss"].items():
        values.append(round(metrics["tasks"][name]["loss"], 4))
    return int(metrics["gradient_evaluations"])


def release(device: str) -> None:
    """Gives the memory of a trainer that is gone, with its graphs, back to the device."""
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()
