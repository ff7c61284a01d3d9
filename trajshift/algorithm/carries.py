"""Carries: what happens to the running theta once phi has moved by delta, inside a trajectory.

Shapes: T learners (rows) on this rank, P shared numbers each. Your own carry is a class with `__call__`:

```python
class HalfShift(Carry):
    def __call__(self, view, delta):
        view.theta.add_(delta, alpha=0.5)

MetaTrainer(model, tasks, "trajectory-shifting", meta=Meta(carry=HalfShift()))
```
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajshift.algorithm.protocols import CarryView
from trajshift.errors import UsageError
from trajshift.rng import key, normal


class Carry:
    """Base of all carries. A custom one moves `view.theta` and may keep state within a trajectory."""

    needs_gradients = False
    """Whether `view.gradients` `[T, P]` must hold the gradients of the last inner step."""
    needs_snapshot = False
    """Whether `view.replay` is called, for which each learner's state at the start of the round is kept."""
    recordable = False
    """Whether it does the same tensor work at every step, so that a CUDA graph can repeat it. Not inherited: each
    subclass must set it for itself."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.recordable = cls.__dict__.get("recordable", False)

    def begin(self, view: CarryView) -> None:
        """A trajectory starts: all rows of theta equal phi."""

    def __call__(self, view: CarryView, delta: Tensor) -> None:
        """phi has moved by delta `[P]`, `view.k` inner steps into the trajectory."""
        raise UsageError(f"{type(self).__name__} defines no __call__(); a carry must")

    def state(self) -> dict[str, Tensor]:
        """Tensors whose first dimension is T, for a checkpoint inside a trajectory."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, after `begin`."""


class Shift(Carry):
    """theta <- theta + delta (Algorithm 2, line 13): dU_k/dphi is taken as the identity (equation 3).

    Optimizer state that lives in parameter space moves too; averages of gradients (momentum) stay.
    """

    recordable = True

    def __call__(self, view: CarryView, delta: Tensor) -> None:
        """One broadcast add."""
        if view.stays_at_phi:
            view.theta.copy_(view.phi)  # sums would drift away from phi by rounding
            return
        view.theta.add_(delta)
        view.shift_optimizer_state(delta)


class Hold(Carry):
    """theta stays where it is (No Shifting, figure 8)."""

    recordable = True

    def __call__(self, view: CarryView, delta: Tensor) -> None:
        """Nothing."""


class RandomShift(Carry):
    """theta_t moves by ||delta|| in a random direction, one for each task (Random Shifting, figure 8)."""

    def __call__(self, view: CarryView, delta: Tensor) -> None:
        """Draws a direction for each row from (seed, task, step)."""
        size = torch.linalg.vector_norm(delta)
        for row, task in enumerate(view.tasks):
            draw = key(view.seed, task, "direction", view.step)
            direction = normal(draw, delta.numel(), device=delta.device, dtype=delta.dtype)
            direction *= view.mask
            view.theta[row].add_(direction * (size / torch.linalg.vector_norm(direction)))


class Replay(Carry):
    """theta <- U_k(phi): the trajectory is run again from the new phi (Ours Accurate, section 4.1)."""

    needs_snapshot = True

    def __call__(self, view: CarryView, delta: Tensor) -> None:
        """Takes k more inner steps of every task."""
        view.replay()


_BY_NAME: dict[str, type[Carry]] = {"shift": Shift, "hold": Hold, "random": RandomShift, "replay": Replay}


def build_carry(name: str) -> Carry:
    """A carry by its name in `trajshift.algorithm.methods.CARRIES`."""
    return _BY_NAME[name]()
