"""The pieces of the study, each a function of numbers alone, so that pieces may run in several processes.

Shapes: S sets of tasks, N starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajshift.algorithm.methods import resolve
from trajshift.experiments.landscape.himmelblau import Landscape, grid, stack, tasks
from trajshift.experiments.landscape.quality import quality_map
from trajshift.experiments.landscape.resting import Optima, optima
from trajshift.experiments.landscape.vectorized_loop import Run, Watch, run, updates

METHODS = ("trajectory-shifting", "accurate", "no-shifting", "random-shifting", "reptile", "fomaml", "leap")
"""The methods compared, in the order of tables and figures."""
STARTS = ((13.0, 7.0), (-2.0, -2.0), (-2.0, 12.0), (12.0, -2.0), (12.0, 12.0))
"""Fixed starts of figure 5(c), chosen to show what the paper describes, and 5(d), a square around the centre."""
GOOD = 0.1
"""A final phi is good if its quality is among this best part of the domain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the paper (section 4.1), and sizes of the run."""

    horizon: int = 100
    """K."""
    rounds: int = 3
    """M, for the methods that move phi at every step; the others get as many meta-updates, K * M."""
    inner_lr: float = 0.05
    meta_lr: float = 0.1
    momentum: float = 0.9
    test_lr: float = 0.1
    """Learning rate of the Adam steps that measure quality; there are as many as the horizon."""
    side: int = 41
    """Points on a side of the grid behind quality, published optima and short-horizon bias."""
    optima_side: int = 21
    """The same for the optima of random sets; those of the published set are from the finer grid."""
    picture_side: int = 121
    """The same for the contours."""
    starts_side: int = 11
    """The same for the starts of the comparison."""
    sets: int = 20
    """Random sets of tasks of the comparison and of the optima, seeds 0, 1, ..."""
    bias_sets: int = 100
    """Random sets of tasks behind the short-horizon bias."""
    short: int = 5
    """k of figure 5(a)."""
    processes: int = 2

    @property
    def updates(self) -> int:
        """Meta-updates of each method: K * M."""
        return self.horizon * self.rounds

    def learning(self) -> dict[str, Any]:
        """Arguments of `updates`."""
        return {name: asdict(self)[name] for name in ("horizon", "inner_lr", "meta_lr", "momentum")}

    def marks(self) -> tuple[int, ...]:
        """Meta-updates at which phi of two methods is compared: 0, 5, 10, 25, 50, K and K * M."""
        known = (5, 10, 25, 50, self.horizon, self.updates)
        return (0, *sorted({mark for mark in known if mark <= self.updates}))


class Limit(NamedTuple):
    """When a run ends."""

    unit: str
    """`meta-updates` or `inner steps`."""
    amount: int


class End(NamedTuple):
    """Where the starts of one method ended, for S sets of tasks."""

    phi: Tensor
    """`[S, N, 2]`."""
    quality: Tensor
    """`[S, N]` after as many test steps as the horizon."""
    left: Tensor
    """`[S, N]`, outside the domain at some meta-update."""
    overflowed: Tensor
    """`[S, N]`."""
    marked: Tensor
    """`[marks, S, N, 2]`, phi at some meta-updates."""
    updates: int
    inner_steps: int


def random_sets(seeds: Sequence[int]) -> Landscape:
    """Random sets of tasks, stacked."""
    return stack([tasks(seed=seed) for seed in seeds])


def end_quality(phi: Tensor, landscape: Landscape, settings: Settings) -> Tensor:
    """Quality after as many test steps as the horizon: `[..., N]`."""
    return quality_map(phi, settings.horizon + 1, settings.test_lr, tasks=landscape)[..., -1]


def finish(method: str, landscape: Landscape, starts: Tensor, limit: Limit, settings: Settings) -> End:
    """Runs a method until the last meta-update within the limit.

    If trajectories restart for every meta-update, up to one trajectory of the budget may be left.
    """
    watch, marked, steps, phi, done = Watch(), [], 0, torch.empty(0), 0
    marks = settings.marks() if limit.unit == "meta-updates" else ()
    for number, one in enumerate(updates(method, starts, tasks=landscape, **settings.learning())):
        if limit.unit == "inner steps" and one.inner_steps > limit.amount:
            break
        phi, steps, done = *one, number
        watch.see(phi)
        if number in marks:
            marked.append(phi)
        if limit.amount == (steps if limit.unit == "inner steps" else number):
            break
    return End(
        phi, end_quality(phi, landscape, settings), watch.left, watch.overflowed,
        torch.stack(marked) if marked else phi.new_zeros(0), done, steps,
    )  # fmt: skip


def compare(method: str, seeds: Sequence[int], unit: str, settings: Settings) -> End:
    """One method from a coarse grid on random sets of tasks, at equal meta-updates or equal inner steps (K * M)."""
    limit = Limit(unit, settings.updates)
    return finish(method, random_sets(seeds), grid(settings.starts_side), limit, settings)


def yardstick(landscape: Landscape, settings: Settings) -> Tensor:
    """The quality that the best tenth of the domain has, and that of its worst finite point: `[2, ...]`."""
    quality = end_quality(grid(settings.side), landscape, settings)
    ranked = quality.nan_to_num(nan=torch.inf).sort(dim=-1).values
    good = ranked[..., max(0, round(GOOD * quality.shape[-1]) - 1)]
    return torch.stack((good, quality.nan_to_num(nan=0.0, posinf=0.0).amax(-1)))


def yardsticks(seeds: Sequence[int | None], settings: Settings) -> Tensor:
    """`yardstick` of random sets: `[2, S]`; None: published."""
    return torch.stack([yardstick(tasks(seed=seed), settings) for seed in seeds], dim=1)


def published(method: str, settings: Settings) -> End:
    """One method from the fine grid on the published tasks, at equal meta-updates."""
    landscape = stack([tasks()])
    return finish(method, landscape, grid(settings.side), Limit("meta-updates", settings.updates), settings)


def horizon_bias(seeds: Sequence[int | None], settings: Settings) -> Tensor:
    """Quality after K steps of the grid's best phi for k steps, k = 0..K: `[S, K+1]` (figure 4(c)); None: published."""
    curves = []
    for seed in seeds:
        quality = quality_map(
            grid(settings.side), settings.horizon + 1, settings.test_lr, tasks=tasks(seed=seed)
        ).nan_to_num(nan=torch.inf)
        curves.append(quality[quality.argmin(0), -1])
    return torch.stack(curves)


def resting_points(k: int, seed: int | None, settings: Settings) -> Optima:
    """The meta-level optima of Reptile with trajectories of k steps on one set of tasks; None: published."""
    side = settings.side if seed is None else settings.optima_side
    return optima(
        k, starts=grid(side), tasks=tasks(seed=seed),
        inner_lr=settings.inner_lr, meta_lr=settings.meta_lr, momentum=settings.momentum,
    )  # fmt: skip


def trajectories(method: str, settings: Settings) -> Run:
    """phi of one method from the fixed starts on the published tasks, K * M meta-updates."""
    every = resolve(method, horizon=settings.horizon).meta_every
    return run(method, torch.tensor(STARTS, dtype=torch.float64), rounds=settings.rounds * every, **settings.learning())


def contour(settings: Settings) -> Tensor:
    """Quality over the published domain `[side, side]`, rows from low y to high: the ground of figures 5(c, d)."""
    quality = end_quality(grid(settings.picture_side), tasks(), settings)
    return quality.view(settings.picture_side, settings.picture_side)
