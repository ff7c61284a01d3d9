"""The loop of `MetaTrainer` for thousands of starting points at once.

It uses the library's presets and meta-gradients and repeats only the loop and the carries, with N points side by side
where `MetaTrainer` has one phi. Tests compare the two.

Shapes: T tasks, N starts; `...` is empty, or `[S]` for stacked sets of tasks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trajshift.algorithm import meta_gradients as metagrads
from trajshift.algorithm.methods import Method, ResolvedMethod, resolve
from trajshift.algorithm.protocols import Hessian
from trajshift.errors import UsageError
from trajshift.experiments.landscape import himmelblau
from trajshift.experiments.landscape.himmelblau import DOMAIN, Landscape, as_points
from trajshift.learners.parameter_matrix import Layout
from trajshift.rng import bits, key, words

OFFERED = (
    "trajectory-shifting",
    "accurate",
    "no-shifting",
    "random-shifting",
    "reptile",
    "fomaml",
    "fomaml++",
    "leap",
)
"""Presets that make sense in the plane."""
_ROW = Layout({"theta": torch.zeros(2, dtype=torch.float64)}).size
"""P of a point in `MetaTrainer`, padding included: its random draws depend on it."""


class Update(NamedTuple):
    """All starts after one meta-update."""

    phi: Tensor
    """`[..., N, 2]`."""
    inner_steps: int
    """Cumulative inner steps per task, replays included, as `MetaTrainer` counts them."""


class Run(NamedTuple):
    """All meta-updates of a run; entry 0 is the start."""

    phi: Tensor
    """`[U+1, ..., N, 2]`."""
    inner_steps: Tensor
    """`[U+1]` int64."""


def run(method: str | Method, starts: Tensor | np.ndarray, *, rounds: int = 3, **settings: Any) -> Run:
    """Meta-learns from every start at once; `settings` are those of `updates`.

    ```python
    reptile = run("reptile", grid(), rounds=300)
    ours = run("trajectory-shifting", torch.tensor([[0.0, 10.0]]))
    ```
    """
    done = list(updates(method, starts, rounds=rounds, **settings))
    return Run(torch.stack([one.phi for one in done]), torch.tensor([one.inner_steps for one in done]))


def updates(
    method: str | Method,
    starts: Tensor | np.ndarray,
    *,
    tasks: Landscape | None = None,
    horizon: int = 100,
    rounds: int | None = None,
    inner_lr: float = 0.05,
    meta_lr: float = 0.1,
    momentum: float = 0.9,
    seed: int = 0,
    metagrad_options: dict[str, Any] | None = None,
    **choices: Any,
) -> Iterator[Update]:
    """The start, then every meta-update, one at a time. A start that overflows stays so and does not affect the others.

    Args:
        method: one of `OFFERED`, or your own `Method`.
        starts: `[N, 2]`, or `[S, N, 2]` for stacked tasks.
        tasks: None for the published ones.
        horizon: K, inner steps between resets.
        rounds: M; None never ends.
        inner_lr: alpha, of SGD whose momentum buffer is new each round.
        meta_lr: beta.
        momentum: of the inner SGD.
        seed: decides the directions of random shifting.
        metagrad_options: arguments of the meta-gradient by name.
        choices: `meta_every`, `carry`, `metagrad` and `batch` replace the preset's.

    Raises:
        UsageError: an argument that does not fit, explained in one sentence.
    """
    chosen = _offered(method, horizon, choices)
    if rounds is not None and rounds < 1:
        raise UsageError(f"rounds is {rounds}; use at least 1")
    for name, value in (("inner_lr", inner_lr), ("meta_lr", meta_lr)):
        if not (value > 0.0 and math.isfinite(value)):
            raise UsageError(f"{name} is {value}; use a positive number")
    if not 0.0 <= momentum < 1.0:
        raise UsageError(f"momentum is {momentum}; use a number from 0 to below 1")
    first = as_points(starts, "starts")
    bad = int((~torch.isfinite(first)).any(-1).sum())
    if bad:
        raise UsageError(f"{bad} of {first[..., 0].numel()} starts are not finite; leave them out")
    metagrad = metagrads.build_meta_gradient(chosen.metagrad, chosen.batch, metagrad_options or {})
    rates = _Rates(inner_lr, meta_lr, momentum)
    return _Twin(tasks or himmelblau.tasks(), first, chosen, metagrad, rates, seed).run(horizon, rounds)


def _offered(method: str | Method, horizon: int, choices: dict[str, Any]) -> ResolvedMethod:
    chosen = resolve(method, horizon=horizon, **choices)
    reason = None
    if chosen.adapt == "head":
        reason = "it adapts a head, and a point in the plane has none"
    elif chosen.metagrad == "implicit":
        reason = "its conjugate gradients solve for one point at a time"
    if reason:
        raise UsageError(f"method {chosen.name} is not available here: {reason}; use one of {', '.join(OFFERED)}")
    return chosen


class _Rates(NamedTuple):
    inner_lr: float
    meta_lr: float
    momentum: float


class _Twin:
    """phi `[2, ..., N]`, theta, momentum and gradient `[2, T, ..., N]`."""

    def __init__(
        self,
        landscape: Landscape,
        starts: Tensor,
        method: ResolvedMethod,
        metagrad: metagrads.MetaGradient,
        rates: _Rates,
        seed: int,
    ) -> None:
        self.landscape = landscape
        self.method = method
        self.metagrad = metagrad
        self.rates = rates
        self.seed = seed
        self.observes = type(self.metagrad).observe is not metagrads.MetaGradient.observe
        self.theta = landscape.spread(starts)
        self.phi = self.theta[:, 0].clone()
        self.velocity = torch.zeros_like(self.theta)
        self.gradient = self.velocity
        self.step = self.inner_steps = 0

    def run(self, horizon: int, rounds: int | None) -> Iterator[Update]:
        """Algorithms 1 and 2, as `MetaTrainer.advance` has them."""
        every = self.method.meta_every
        yield self._update()
        for _ in count() if rounds is None else range(rounds):
            self._begin()
            if self.method.carry == "random":
                self.directions = self._directions(horizon)
            for k in range(1, horizon + 1):
                self._inner_step()
                self.step += 1
                if k % every == 0:
                    delta = self._meta_update()
                    if k < horizon:
                        self._carry(delta, k)
                    yield self._update()

    def _update(self) -> Update:
        return Update(self.phi.movedim(0, -1).clone(), self.inner_steps)

    def _begin(self) -> None:
        self.theta.copy_(self.phi[:, None])
        self.velocity.zero_()
        self.metagrad.begin(_rows(self.theta))

    def _inner_step(self) -> None:
        losses = None
        if self.observes:
            losses, self.gradient = self.landscape.both_at(self.theta)
        else:
            self.gradient = self.landscape.gradient_at(self.theta)
        self.velocity.mul_(self.rates.momentum).add_(self.gradient)
        self.theta.sub_(self.velocity, alpha=self.rates.inner_lr)
        self.inner_steps += 1
        if losses is not None:
            self.metagrad.observe(_rows(self.theta), losses.flatten(), _rows(self.gradient))

    def _meta_update(self) -> Tensor:
        rows = self.metagrad.read(_View(self))
        delta = rows.T.reshape(self.theta.shape).mean(1).mul_(-self.rates.meta_lr)
        self.phi += delta
        return delta

    def _carry(self, delta: Tensor, k: int) -> None:
        """What `trajshift.algorithm.carries` does to one theta, for all of them."""
        if self.method.carry == "shift":
            self.theta += delta[:, None]
        elif self.method.carry == "random":
            self.theta += self.directions[k - 1] * torch.linalg.vector_norm(delta, dim=0)
        elif self.method.carry == "replay":
            self._begin()
            for _ in range(k):
                self._inner_step()
        self.metagrad.carried(_rows(self.theta))

    def _directions(self, horizon: int) -> Tensor:
        """The draws of `MetaTrainer` for a round: unit vectors `[K, 2, T, ..., 1]`, the same for all starts."""
        steps = range(self.step + 1, self.step + horizon + 1)
        keys = [key(self.seed, name, "direction", step) for step in steps for name in self.landscape.names]
        towards = _normals(keys)
        towards /= torch.linalg.vector_norm(towards, dim=0)
        return towards.view(2, horizon, *self.landscape.angles.shape, 1).transpose(0, 1)


def _normals(keys: list[int]) -> Tensor:
    """The first two numbers of `normal(key, P)` for many keys at once: `[2, keys]`."""
    half = _ROW // 2
    drawn = bits(words(keys), torch.tensor([0, 1, half, half + 1])).T.to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log((drawn[:2] + 1.0) * 2.0**-32))
    return radius * torch.cos(drawn[2:] * (2.0 * math.pi * 2.0**-32))


class _View:
    """What the library's meta-gradients ask for: every task of every start is a row."""

    def __init__(self, twin: _Twin) -> None:
        self._twin = twin
        self.phi = _rows(twin.phi[:, None].expand_as(twin.theta))
        self.theta, self.gradients = _rows(twin.theta), _rows(twin.gradient)
        self.counts: Counter[str] = Counter()

    def losses(self) -> Tensor:
        """`[T * ... * N]`."""
        return self._twin.landscape.loss_at(self._twin.theta).flatten()

    def gradients_at_end(self, split: str) -> Tensor:
        """`[T * ... * N, 2]`; these tasks have no batches, so held-out and training ones are the same."""
        return _rows(self._twin.landscape.gradient_at(self._twin.theta))

    def hessian(self, row: int) -> Hessian:
        """Never asked for."""
        raise AssertionError("implicit meta-gradients are refused before a run")


def _rows(points: Tensor) -> Tensor:
    """`[2, T, ..., N]` as the rows `[T * ... * N, 2]` of `MetaTrainer`."""
    return points.reshape(2, -1).T


class Fates(NamedTuple):
    """How many starts stayed in the domain, left it (at any meta-update) or overflowed."""

    stayed: int
    left: int
    overflowed: int


class Watch:
    """Follows phi over a run's meta-updates and records which starts left the domain and which overflowed."""

    def __init__(self) -> None:
        self.left = torch.zeros((), dtype=torch.bool)
        """`[..., N]`: finite, and outside at some meta-update."""
        self.overflowed = torch.zeros((), dtype=torch.bool)
        """`[..., N]`."""

    def see(self, phi: Tensor) -> None:
        """Takes phi `[..., N, 2]` after a meta-update."""
        low, high = DOMAIN
        self.overflowed = self.overflowed | ~torch.isfinite(phi).all(-1)
        self.left = (self.left | ((phi < low) | (phi > high)).any(-1)) & ~self.overflowed

    def fates(self) -> Fates:
        """Counts over all starts."""
        left, overflowed = int(self.left.sum()), int(self.overflowed.sum())
        return Fates(self.left.numel() - left - overflowed, left, overflowed)


def fates(phi: Tensor) -> Fates:
    """The fates of the starts of a run, from all its meta-updates `[U+1, ..., N, 2]`."""
    watch = Watch()
    for one in phi:
        watch.see(one)
    return watch.fates()
