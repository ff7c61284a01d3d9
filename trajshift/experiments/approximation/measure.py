"""error(k) = ||U_k(phi + d_1 + ... + d_{k-1}) - theta_k|| of every task along one trajectory (equation 5).

The trajectory is a run of the library's loop, one round long, with an error meter. Everything is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trajshift.algorithm.meta_gradients import MetaGradient
from trajshift.algorithm.protocols import MetaGradientView
from trajshift.experiments.approximation.measurement_plan import (
    OPTIMIZERS,
    PRESCRIBED,
    MeasurementPlan,
    Setting,
    networks,
)
from trajshift.experiments.approximation.shifts import SHIFTS
from trajshift.recipes.build_tasks import build_tasks
from trajshift.recipes.build_trainer import model_factory
from trajshift.recipes.recipe import Recipe
from trajshift.rng import key, normal
from trajshift.settings import Inner, Meta
from trajshift.task import Task
from trajshift.training.approximation_error import ApproximationErrorMeter
from trajshift.training.trainer import MetaTrainer

POWER_STEPS = 20
"""Steps of the power iteration for the Hessian's norm: from below, to a few percent."""


class Prescribed(MetaGradient):
    """Shifts known beforehand: with meta_lr 1, phi moves by `shifts[k - 1]` `[P]` after inner step k."""

    def __init__(self, shifts: Tensor) -> None:
        self._shifts = shifts

    def begin(self, theta: Tensor) -> None:
        """Starts again from the first shift."""
        self._k = 0

    def observe(self, theta: Tensor, losses: Tensor, gradients: Tensor) -> None:
        """Moves on to the next shift."""
        self._k += 1

    def read(self, view: MetaGradientView) -> Tensor:
        """Minus the shift, for every row `[T, P]`."""
        return -self._shifts[self._k - 1].expand_as(view.theta)


class Laboratory:
    """Tasks and networks of a recipe; `measure` runs one setting once."""

    def __init__(self, recipe: Recipe, plan: MeasurementPlan) -> None:
        self.recipe = recipe
        self.plan = plan
        self.tasks = build_tasks(recipe)
        self.networks = networks(recipe)

    def measure(self, setting: Setting, draw: int) -> dict[str, Any]:
        """Readings at every k of the plan, `curvature` (the Hessian's norm at the start, its mean over tasks).

        Numbers that are not finite become None.
        """
        meter = ApproximationErrorMeter(lambda k: k in self.plan.ks, every_task=True)
        trainer = self._trainer(setting, draw, meter, self._movement(setting, draw))
        trainer.advance()
        curvature = sum(_norm_of_hessian(trainer, row) for row in range(len(self.tasks))) / len(self.tasks)
        for _ in trainer:
            pass
        readings = [{name: _finite(value) for name, value in row.items()} for row in meter.take()]
        return {"readings": readings, "curvature": _finite(curvature), "parameters": trainer.layout.count}

    def _movement(self, setting: Setting, draw: int) -> Meta:
        """How phi moves, and theta with it."""
        if setting.shifts == PRESCRIBED:
            start = self._trainer(setting, draw, None, Meta())
            direction = normal(key(draw, "shifts"), len(start.phi), dtype=start.phi.dtype) * start.layout.mask(
                start.device
            )
            shift = direction * (setting.beta / torch.linalg.vector_norm(direction))
            return Meta(gradient=Prescribed(shift.expand(self.plan.horizon, -1)), lr=1.0)
        if setting.shifts == "recorded":
            carry = SHIFTS[setting.carry]() if setting.carry in SHIFTS else setting.carry
            return Meta(gradient=Prescribed(self._recorded(setting, draw)), lr=1.0, carry=carry)
        return Meta(lr=setting.beta)

    def _recorded(self, setting: Setting, draw: int) -> Tensor:
        """The shifts `[K, P]` of trajectory shifting itself, so that all carries are measured along the same ones."""
        trainer = self._trainer(setting, draw, None, Meta(lr=setting.beta))
        shifts, before = [], trainer.phi.clone()
        for _ in trainer:
            shifts.append(trainer.phi - before)
            before = trainer.phi.clone()
        return torch.stack(shifts)

    def _trainer(self, setting: Setting, draw: int, meter: ApproximationErrorMeter | None, meta: Meta) -> MetaTrainer:
        name, inner = OPTIMIZERS[setting.optimizer]
        return MetaTrainer(
            self._model(self.networks[setting.network]),
            self.tasks,
            "trajectory-shifting",
            horizon=self.plan.horizon,
            rounds=1,
            inner=Inner(optimizer=name, lr=setting.alpha, options=inner),
            meta=meta,
            batch_size=self.recipe.batch_size,
            seed=draw,
            head=self.recipe.head,
            shared=[self.recipe.shared] if isinstance(self.recipe.shared, str) else self.recipe.shared,
            error_meter=meter,
        )

    def _model(self, options: Mapping[str, Any]) -> Any:
        build = model_factory(self.recipe, options)

        def model(task: Task) -> nn.Module:
            return build(task).double()

        return model


def _norm_of_hessian(trainer: MetaTrainer, row: int) -> float:
    """The largest absolute eigenvalue of a task's Hessian on its first batch, by power iteration."""
    passes = trainer.meta_step.passes()
    vector = normal(key(0, "power iteration"), len(trainer.phi), dtype=trainer.phi.dtype)
    size = torch.zeros(())
    with passes.hessian(row) as product:
        for _ in range(POWER_STEPS):
            vector = product(vector)
            size = torch.linalg.vector_norm(vector)
            vector = vector / size
    return float(size)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
