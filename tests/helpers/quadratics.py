"""Quadratic tasks: the inner map U_k is affine, so everything has a closed form. Numpy only, but for the tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.helpers.options import build
from trajshift import Inner, MetaTrainer, Task

DIMENSION = 5
Array = np.ndarray


class Point(nn.Module):
    """The shared parameters are the point itself."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(DIMENSION, dtype=torch.float64))


def model(task: Task) -> Point:
    return Point()


def curvatures(tasks: int, seed: int = 0, scale: float = 1.0) -> tuple[Array, Array]:
    """Positive definite A `[T, D, D]` and centres c `[T, D]` of the losses (theta - c)' A (theta - c) / 2."""
    generator = np.random.default_rng(seed)
    root = generator.standard_normal((tasks, DIMENSION, DIMENSION))
    a = scale * (root @ root.transpose(0, 2, 1) / DIMENSION + 0.2 * np.eye(DIMENSION))
    return a, generator.standard_normal((tasks, DIMENSION))


def start(seed: int = 9) -> Array:
    """A first phi `[D]`."""
    return np.random.default_rng(seed).standard_normal(DIMENSION)


def point_tasks(losses: list[Callable[[Tensor], Tensor]], weights: Array | None = None) -> list[Task]:
    """One task for each function of the point; their data is a dummy."""
    dummy = (torch.zeros(8, 1, dtype=torch.float64), torch.zeros(8, 1, dtype=torch.float64))
    weights = np.ones(len(losses)) if weights is None else weights
    return [
        Task(name=f"q{t}", train=dummy, loss=lambda module, batch, f=f: f(module.theta), weight=float(weight))
        for t, (f, weight) in enumerate(zip(losses, weights, strict=True))
    ]


def tasks(a: Array, c: Array, weights: Array | None = None) -> list[Task]:
    """One task for each quadratic."""

    def quadratic(matrix: Tensor, centre: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda theta: (theta - centre) @ matrix @ (theta - centre) / 2

    pairs = zip(a, c, strict=True)
    return point_tasks([quadratic(torch.from_numpy(m), torch.from_numpy(x)) for m, x in pairs], weights)


def trainer(listed: list[Task], method: str, *, lr: float = 0.1, **options: Any) -> MetaTrainer:
    """A trainer on points that starts from `start()`, plain SGD inside unless `inner` is given."""
    begin = {"theta": torch.tensor(start())}
    chosen: dict[str, Any] = {"inner": Inner(lr=lr, options={}), "batch_size": 4, "initialization": begin}
    return build(model, listed, method, shared=("theta",), **chosen | options)


def phi_of(made: MetaTrainer) -> Array:
    """phi `[D]`."""
    return made.phi[:DIMENSION].numpy().copy()


def theta_of(made: MetaTrainer) -> Array:
    """theta `[T, D]`."""
    return made.theta[:, :DIMENSION].numpy().copy()


class Affine:
    """The steps of Algorithms 1 and 2 as matrices on z = (phi, theta_1, ..., theta_T, 1)."""

    def __init__(self, a: Array, c: Array, alpha: float, weights: Array | None = None) -> None:
        self.tasks, self.d = c.shape
        self.weights = np.full(self.tasks, 1.0 / self.tasks) if weights is None else weights / weights.sum()
        size = (self.tasks + 1) * self.d + 1
        self.inner, self.reset = np.eye(size), np.eye(size)
        for t in range(self.tasks):
            rows = self.slot(t + 1)
            self.inner[rows, rows] = np.eye(self.d) - alpha * a[t]
            self.inner[rows, -1] = alpha * a[t] @ c[t]
            self.reset[rows, rows] = 0.0
            self.reset[rows, self.slot(0)] = np.eye(self.d)

    def slot(self, index: int) -> slice:
        """Where phi (0) or theta_t (t + 1) lies in z."""
        return slice(index * self.d, (index + 1) * self.d)

    def meta(self, beta: float, *, shift: bool) -> Array:
        """phi moves by -beta * mean(phi - theta); with `shift` every theta moves along."""
        matrix = np.eye(len(self.inner))
        for moved in range(self.tasks + 1 if shift else 1):
            matrix[self.slot(moved), self.slot(0)] -= beta * np.eye(self.d)
            for t in range(self.tasks):
                matrix[self.slot(moved), self.slot(t + 1)] += beta * self.weights[t] * np.eye(self.d)
        return matrix

    def run(self, map_of_all_steps: Array, phi: Array) -> tuple[Array, Array]:
        """phi `[D]` and theta `[T, D]` after the map, from theta = phi."""
        z = map_of_all_steps @ np.append(np.tile(phi, self.tasks + 1), 1.0)
        return z[: self.d], z[self.d : -1].reshape(self.tasks, self.d)


def trajectory(a: Array, c: Array, phi: Array, alpha: float, k: int) -> Array:
    """theta_k = c + (I - alpha A)^k (phi - c), `[T, D]`."""
    return np.stack(
        [x + np.linalg.matrix_power(np.eye(len(x)) - alpha * m, k) @ (phi - x) for m, x in zip(a, c, strict=True)]
    )


def gradient(a: Array, c: Array, theta: Array) -> Array:
    """Gradients of all losses at theta `[T, D]`."""
    return np.einsum("tij,tj->ti", a, theta - c)


def value(a: Array, c: Array, theta: Array) -> Array:
    """All losses at theta `[T, D]`: `[T]`."""
    return np.einsum("ti,tij,tj->t", theta - c, a, theta - c) / 2


def leap(a: Array, c: Array, segments: list[tuple[Array, Array]], *, power: int, loss: bool, stabilizer: bool) -> Array:
    """Leap's meta-gradient `[T, D]` as the derivative of sum ||gamma_{i+1} - gamma_i||^p, by autograd.

    Its first-order form (Flennerhag et al., 2019, section 2.3): theta_i depends on phi with the identity as
    Jacobian, the next point of the path is held fixed.
    """
    total = torch.zeros(c.shape, dtype=torch.float64)
    matrix, centre = torch.from_numpy(a), torch.from_numpy(c)
    for begin, end in segments:
        x, target = torch.tensor(begin, requires_grad=True), torch.from_numpy(end)
        f = torch.einsum("ti,tij,tj->t", x - centre, matrix, x - centre) / 2
        f_end = torch.einsum("ti,tij,tj->t", target - centre, matrix, target - centre) / 2
        if stabilizer:
            f_end = torch.minimum(f_end, 2 * f.detach() - f_end)  # a rise is mirrored into a fall
        square = (target - x).square().sum(1) + (f_end - f).square() * float(loss)
        total += torch.autograd.grad((square ** (power / 2)).sum(), x)[0]
    return total.numpy()
