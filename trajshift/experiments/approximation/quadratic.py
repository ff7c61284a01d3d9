"""The approximation error where it is known: on quadratic losses the inner map U_k is affine.

For L(theta) = (theta - c)' A (theta - c) / 2 and SGD with momentum mu, z = (theta - c, v) goes to M z with

    M = [[I - alpha A, -alpha mu I], [A, mu I]],

so shifts d_1, ..., d_{k-1} leave error(k) = || E' sum_{i<k} (M^k - M^(k-i)) E d_i ||, with E d = (d, 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trajshift.settings import Inner, Meta
from trajshift.task import Task
from trajshift.training.approximation_error import ApproximationErrorMeter
from trajshift.training.trainer import MetaTrainer

DIMENSION, TASKS = 6, 3
POINTS = 22
"""Values of k, about equally far apart on a logarithmic axis, at which the loop is measured."""


@dataclass(frozen=True, slots=True)
class Check:
    """Errors of one optimizer, the mean over tasks."""

    momentum: float
    exact: np.ndarray
    """At k = 2, 3, ..., K."""
    ks: np.ndarray
    """Where it was measured too."""
    measured: np.ndarray

    @property
    def horizon(self) -> int:
        """K."""
        return len(self.exact) + 1

    @property
    def deviation(self) -> float:
        """The largest difference, relative to the exact error."""
        exact = self.exact[self.ks - 2]
        return float(np.max(np.abs(self.measured - exact) / exact))


class _Point(nn.Module):
    """The shared parameters are the point itself."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(DIMENSION, dtype=torch.float64))


def closed_form_check(
    *, momentum: float, alpha: float = 0.02, beta: float = 0.05, horizon: int = 200, seed: int = 0
) -> Check:
    """Runs trajectory shifting on random quadratics with an error meter, and the closed form on the shifts it made."""
    generator = np.random.default_rng(seed)
    root = generator.standard_normal((TASKS, DIMENSION, DIMENSION))
    matrices = root @ root.transpose(0, 2, 1) / DIMENSION + 0.2 * np.eye(DIMENSION)
    centres = generator.standard_normal((TASKS, DIMENSION))
    ks = np.unique(np.geomspace(2, horizon, POINTS).round().astype(int))
    meter = ApproximationErrorMeter(lambda k: k in ks, every_task=True)
    trainer = MetaTrainer(
        lambda task: _Point(), [_task(t, matrices[t], centres[t]) for t in range(TASKS)], "trajectory-shifting",
        horizon=horizon, rounds=1, inner=Inner(lr=alpha, options={"momentum": momentum}), meta=Meta(lr=beta),
        batch_size=1, seed=seed, shared=("theta",), error_meter=meter,
    )  # fmt: skip
    path = [trainer.phi[:DIMENSION].clone()]
    for _ in trainer:
        path.append(trainer.phi[:DIMENSION].clone())
    shifts = torch.diff(torch.stack(path), dim=0).numpy()
    measured = np.array([row["error"] for row in meter.take()]).reshape(-1, TASKS).mean(1)
    exact = np.mean([_errors(matrix, shifts, alpha, momentum) for matrix in matrices], axis=0)
    return Check(momentum, exact, ks, measured)


def _task(index: int, matrix: np.ndarray, centre: np.ndarray) -> Task:
    a, c = torch.from_numpy(matrix), torch.from_numpy(centre)
    none = torch.zeros(1, 1)

    def loss(module: nn.Module, batch: object) -> Tensor:
        theta = dict(module.named_parameters())["theta"]
        return (theta - c) @ a @ (theta - c) / 2

    return Task(name=f"quadratic{index}", train=(none, none), loss=loss)


def _errors(matrix: np.ndarray, shifts: np.ndarray, alpha: float, momentum: float) -> np.ndarray:
    """error(k) for k = 2, ..., K, from K shifts `[K, D]`."""
    d, eye = len(matrix), np.eye(len(matrix))
    step = np.block([[eye - alpha * matrix, -alpha * momentum * eye], [matrix, momentum * eye]])
    powers = [np.eye(2 * d)]
    for _ in range(len(shifts)):
        powers.append(step @ powers[-1])
    top = np.stack(powers)[:, :d, :d]
    return np.array(
        [
            np.linalg.norm(np.einsum("nij,nj->i", top[k] - top[k - 1 : 0 : -1], shifts[: k - 1]))
            for k in range(2, len(shifts) + 1)
        ]
    )
