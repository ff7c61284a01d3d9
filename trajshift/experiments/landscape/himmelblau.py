"""Eight rotated copies of Himmelblau's function around (5, 5): losses, gradients, and tasks for `MetaTrainer`.

Shapes: T = 8 tasks, N points; `...` is empty for one set of tasks and `[S]` for S sets stacked. Inside, points are
coordinate-first, `[2, T, ..., N]`, so that every operation runs along N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from trajshift.errors import UsageError, nearest
from trajshift.rng import key, uniform
from trajshift.task import Batch, Task

DOMAIN = (-5.0, 15.0)
"""Both coordinates of the paper's plots."""
COUNT = 8
ANGLES = (0.91924315, 1.11506543, 4.41522871, 5.9905629, 3.90302512, 4.01772722, 3.13728475, 0.28030319)
"""Rotations behind the published figures, in radians."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Constants of first (u^2 + v - 11)^2 + second (u + v^2 - 7)^2, where (u, v) = R(angle) (p - centre) / scale."""

    scale: float
    first: float
    second: float


VARIANTS = {"published": Shape(3.0, 0.73845121, 0.9954126), "printed": Shape(1.0, 1.0 / 3.0, 1.0 / 3.0)}
"""What was run for the figures, and the formula as printed in section 4.1."""


class Landscape:
    """The losses of eight tasks, or of several such sets side by side (`stack`).

    Args:
        shape: the template's constants.
        centres: `[8, 2]`, where the template's centre is moved to.
        angles: `[8, ...]` in radians.
        names: one for each angle, in the order of `angles.flatten()`; they name the tasks' random draws.
    """

    def __init__(self, shape: Shape, centres: Tensor, angles: Tensor, names: Sequence[str]) -> None:
        self.shape = shape
        self.centres = centres
        self.angles = angles
        self.names = tuple(names)
        cos, sin = torch.cos(angles)[..., None] / shape.scale, torch.sin(angles)[..., None] / shape.scale
        x, y = (coordinate.view(-1, *[1] * angles.dim()) for coordinate in centres.T)
        self._cos, self._sin = cos, sin
        self._u, self._v = sin * y - cos * x, -sin * x - cos * y

    def __len__(self) -> int:
        return len(self.centres)

    @property
    def sets(self) -> tuple[int, ...]:
        """`()`, or the number of stacked sets."""
        return tuple(self.angles.shape[1:])

    # -- fast: everything at once ----------------------------------------------------------------------------

    def losses(self, points: Tensor | np.ndarray) -> Tensor:
        """The loss of every task at points `[..., N, 2]`: `[8, ..., N]`."""
        return self.loss_at(self.spread(as_points(points)))

    def gradients(self, points: Tensor | np.ndarray) -> Tensor:
        """The gradient of every task's loss at points `[..., N, 2]`: `[8, ..., N, 2]`."""
        return self.gradient_at(self.spread(as_points(points))).movedim(0, -1)

    def spread(self, points: Tensor) -> Tensor:
        """Points `[..., N, 2]` for every task: `[2, 8, ..., N]`."""
        if points.dim() > 2 and points.shape[:-2] != self.sets:
            raise UsageError(
                f"points have the shape {list(points.shape)}, but {list(self.sets)} sets of tasks are stacked; "
                "pass [N, 2], or one [N, 2] for each set"
            )
        between = (1,) * (len(self.sets) - (points.dim() - 2))
        shared = points.movedim(-1, 0).reshape(2, 1, *between, *points.shape[:-1])
        return shared.expand(2, len(self), *self.sets, -1).contiguous()

    def loss_at(self, theta: Tensor) -> Tensor:
        """Each task's loss at its own points `[2, 8, ..., N]`: `[8, ..., N]`."""
        _, _, a, b = self._residuals(theta)
        return a.square_().mul_(self.shape.first).addcmul_(b, b, value=self.shape.second)

    def gradient_at(self, theta: Tensor) -> Tensor:
        """Each task's gradient at its own points `[2, 8, ..., N]`, in the same shape."""
        return self._gradient(theta, *self._residuals(theta))

    def both_at(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """`loss_at` and `gradient_at` in one pass."""
        u, v, a, b = self._residuals(theta)
        loss = a.square().mul_(self.shape.first).addcmul_(b, b, value=self.shape.second)
        return loss, self._gradient(theta, u, v, a, b)

    def _gradient(self, theta: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Overwrites the residuals a and b."""
        a *= 2.0 * self.shape.first
        b *= 2.0 * self.shape.second
        along_u, along_v = torch.addcmul(b, a, u, value=2.0), torch.addcmul(a, b, v, value=2.0)
        gradient = torch.empty_like(theta)
        torch.mul(along_u, self._cos, out=gradient[0]).addcmul_(along_v, self._sin)
        torch.mul(along_v, self._cos, out=gradient[1]).addcmul_(along_u, self._sin, value=-1.0)
        return gradient

    def _residuals(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, v, u^2 + v - 11 and u + v^2 - 7."""
        x, y = theta
        u = torch.addcmul(self._u, x, self._cos).addcmul_(y, self._sin, value=-1.0)
        v = torch.addcmul(self._v, x, self._sin).addcmul_(y, self._cos)
        return u, v, torch.addcmul(v, u, u).sub_(11.0), torch.addcmul(u, v, v).sub_(7.0)

    # -- slow: for `MetaTrainer` -----------------------------------------------------------------------------

    def as_tasks(self) -> list[Task]:
        """The same losses for a `MetaTrainer` on `Point` models; the data are a dummy."""
        dummy = (torch.zeros(8, 1, dtype=torch.float64), torch.zeros(8, 1, dtype=torch.float64))
        centres = [centre.tolist() for centre in self.centres for _ in range(math.prod(self.sets))]
        return [
            Task(name=name, train=dummy, loss=partial(_loss, self.shape, centre, angle))
            for name, centre, angle in zip(self.names, centres, self.angles.flatten().tolist(), strict=True)
        ]


class Point(nn.Module):
    """A model whose only parameter is the point itself: `MetaTrainer(Point, ..., shared=("theta",))`."""

    def __init__(self, task: Task | None = None) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))


def _loss(shape: Shape, centre: Sequence[float], angle: float, module: nn.Module, batch: Batch) -> Tensor:
    theta = module.theta
    assert isinstance(theta, Tensor)
    x, y = theta[0] - centre[0], theta[1] - centre[1]
    u = (math.cos(angle) * x - math.sin(angle) * y) / shape.scale
    v = (math.sin(angle) * x + math.cos(angle) * y) / shape.scale
    return shape.first * (u**2 + v - 11.0) ** 2 + shape.second * (u + v**2 - 7.0) ** 2


def tasks(variant: str = "published", seed: int | None = None) -> Landscape:
    """The eight tasks of section 4.1.

    Args:
        variant: `published` divides the rotated coordinates by 3 and has the constants behind the figures;
            `printed` is the formula in the paper's text.
        seed: None for the published rotations, else rotations drawn uniformly.

    Raises:
        UsageError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise UsageError(f"unknown variant {variant!r}{nearest(variant, VARIANTS)}")
    turn = 2.0 * math.pi * torch.arange(COUNT, dtype=torch.float64) / COUNT
    centres = 5.0 + 7.0 * torch.stack((torch.sin(turn), torch.cos(turn)), dim=1)
    if seed is None:
        angles = torch.tensor(ANGLES, dtype=torch.float64)
    else:
        draws = uniform(key(seed, "landscape", "angles"), torch.arange(COUNT))
        angles = 2.0 * math.pi * draws.to(torch.float64)
    label = variant if seed is None else f"{variant}-{seed}"
    return Landscape(VARIANTS[variant], centres, angles, [f"{label}-{t}" for t in range(COUNT)])


def stack(sets: Sequence[Landscape]) -> Landscape:
    """Several sets of tasks side by side, to run on the same starts at once; shapes get a dimension S."""
    if len({one.shape for one in sets}) != 1:
        raise UsageError(f"{len(sets)} sets of tasks cannot be stacked; give at least one, all of the same variant")
    angles = torch.stack([one.angles for one in sets], dim=1)
    names = [name for of_task in zip(*(one.names for one in sets), strict=True) for name in of_task]
    return Landscape(sets[0].shape, sets[0].centres, angles, names)


def template(points: Tensor | np.ndarray, variant: str = "published") -> Tensor:
    """The function that the tasks are copies of, centred at (5, 5), at points `[N, 2]`: `[N]` (figure 4(a))."""
    zero = torch.zeros(1, dtype=torch.float64)
    return Landscape(VARIANTS[variant], torch.full((1, 2), 5.0, dtype=torch.float64), zero, ("template",)).losses(
        points
    )[0]


def grid(side: int = 41, span: tuple[float, float] = DOMAIN) -> Tensor:
    """A square grid over the domain, or another span of both coordinates: `[side^2, 2]`, x running fastest."""
    line = torch.linspace(*span, side, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack((x.flatten(), y.flatten()), dim=1)


def as_points(points: Tensor | np.ndarray, name: str = "points") -> Tensor:
    """A float64 tensor `[..., N, 2]`.

    Raises:
        UsageError: another shape.
    """
    tensor = torch.as_tensor(points, dtype=torch.float64)
    if tensor.dim() < 2 or tensor.shape[-1] != 2:
        raise UsageError(f"{name} have the shape {list(tensor.shape)}; pass [N, 2], one point per row")
    return tensor
