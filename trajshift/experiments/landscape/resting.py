"""Meta-level local optima (figures 5(a) and 5(b)): where Reptile with a fixed trajectory length comes to rest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trajshift.experiments.landscape.himmelblau import Landscape, as_points, grid
from trajshift.experiments.landscape.vectorized_loop import updates

_UNIT = 1e-3


class Optima(NamedTuple):
    """Where the starts ended up."""

    points: Tensor
    """`[F, 2]`, each phi that maps to itself once rounded: the red dots."""
    clusters: Tensor
    """`[F]` int64, the cluster of each point: chains of neighbours within the radius."""
    segments: Tensor
    """`[E, 2, 2]`, every meta-update made, from and to."""
    fates: dict[str, int]
    """Starts by what ended them: `settled`, `merged` (reached a phi visited before), `overflowed`, `unfinished`."""

    @property
    def cluster_count(self) -> int:
        """Number of clusters."""
        return len(self.clusters.unique())


def optima(
    k: int,
    *,
    starts: Tensor | None = None,
    tasks: Landscape | None = None,
    inner_lr: float = 0.05,
    meta_lr: float = 0.1,
    momentum: float = 0.9,
    limit: int = 1000,
    radius: float = 0.05,
) -> Optima:
    """Follows Reptile with trajectories of k steps from every start; phi is rounded to 1e-3 after every meta-update.

    A phi that maps to itself is an optimum. A trajectory that reaches a phi visited before, by any trajectory, ends
    there and adds none, so a start whose trajectory runs in a circle has no optimum.

    Args:
        k: inner steps behind each meta-update.
        starts: `[N, 2]`; None for the 41 x 41 grid.
        tasks: None for the published ones.
        inner_lr: alpha.
        meta_lr: beta.
        momentum: of the inner SGD.
        limit: largest number of meta-updates.
        radius: of the clusters.
    """
    active = _rounded(grid() if starts is None else as_points(starts, "starts"))
    visited = set(_keys(active))
    found: list[Tensor] = []
    segments: list[Tensor] = []
    fates = dict.fromkeys(("settled", "merged", "overflowed", "unfinished"), 0)
    for _ in range(limit):
        if not len(active):
            break
        steps = updates(
            "reptile", active * _UNIT, tasks=tasks, horizon=k, inner_lr=inner_lr, meta_lr=meta_lr, momentum=momentum
        )
        next(steps)
        moved = next(steps).phi / _UNIT
        finite = moved.isfinite().all(-1)
        fates["overflowed"] += int((~finite).sum())
        active, moved = active[finite], moved[finite].round()
        segments.append(torch.stack((active, moved), dim=1) * _UNIT)
        settled = (active == moved).all(-1)
        fates["settled"] += int(settled.sum())
        found.append(moved[settled] * _UNIT)
        active = moved[~settled]
        fresh = _fresh(active, visited)
        fates["merged"] += len(active) - len(fresh)
        active = active[fresh]
    fates["unfinished"] = len(active)
    points = torch.cat(found)
    return Optima(points, clusters(points, radius), torch.cat(segments), fates)


def _rounded(points: Tensor) -> Tensor:
    return (points / _UNIT).round()


def _keys(points: Tensor) -> list[tuple[float, ...]]:
    return [tuple(point) for point in points.tolist()]


def _fresh(points: Tensor, visited: set[tuple[float, ...]]) -> list[int]:
    """Rows of points seen for the first time; they count as visited from now on."""
    fresh = []
    for row, place in enumerate(_keys(points)):
        if place not in visited:
            visited.add(place)
            fresh.append(row)
    return fresh


def clusters(points: Tensor | np.ndarray, radius: float) -> Tensor:
    """The cluster `[F]` of each of the points `[F, 2]`: two within the radius are in the same, chains included."""
    points = as_points(points)
    near = torch.cdist(points, points) <= radius
    labels = torch.arange(len(points))
    while len(points):
        spread = torch.where(near, labels, len(points)).min(1).values
        if torch.equal(spread, labels):
            break
        labels = spread
    return labels.unique(return_inverse=True)[1]
