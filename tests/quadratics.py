"""Quadratic tasks: the inner map U_k is affine, so everything has a closed form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from trajshift import Task

DIMENSION = 5


class Point(nn.Module):
    """The shared parameters are the point itself."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(DIMENSION, dtype=torch.float64))


def model(task: Task) -> Point:
    return Point()


def curvatures(tasks: int, seed: int = 0, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Positive definite A `[T, D, D]` and centres c `[T, D]` of the losses (theta - c)' A (theta - c) / 2."""
    generator = np.random.default_rng(seed)
    root = generator.standard_normal((tasks, DIMENSION, DIMENSION))
    a = scale * (root @ root.transpose(0, 2, 1) / DIMENSION + 0.2 * np.eye(DIMENSION))
    return a, generator.standard_normal((tasks, DIMENSION))


def tasks(a: np.ndarray, c: np.ndarray) -> list[Task]:
    """One task for each quadratic; its data is a dummy."""

    def loss_for(matrix: Tensor, centre: Tensor):
        def loss(module: Point, batch: object) -> Tensor:
            away = module.theta - centre
            return away @ matrix @ away / 2

        return loss

    dummy = (torch.zeros(4, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64))
    return [
        Task(name=f"q{t}", train=dummy, loss=loss_for(torch.from_numpy(a[t]), torch.from_numpy(c[t])))
        for t in range(len(a))
    ]
