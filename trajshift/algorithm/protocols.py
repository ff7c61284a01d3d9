"""What a meta-gradient and a carry may see of a run: tensors, numbers and a few passes, never the trainer.

Shapes: T learners (rows) on this rank, P shared numbers each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

Product = Callable[[Tensor], Tensor]
Hessian = AbstractContextManager[Product]
"""A context manager: it yields `v [P] -> H v [P]` and frees the graph on exit."""


class MetaGradientView(Protocol):
    """What a meta-gradient may ask for while it is read. No pass changes any learner."""

    phi: Tensor
    """`[P]`."""
    theta: Tensor
    """`[T, P]`."""
    gradients: Tensor
    """`[T, P]`, the gradients that the last inner step followed; `[T, 0]` unless `needs_gradients`."""
    counts: Counter[str]
    """What `read` costs: `gradient_evaluations` and the meta-gradient's own counters."""

    def losses(self) -> Tensor:
        """Losses `[T]` of the current theta on the last training batches."""
        ...

    def gradients_at_end(self, split: str) -> Tensor:
        """Gradients `[T, P]` at the current theta on batches of `train` (the last ones) or `heldout`."""
        ...

    def hessian(self, row: int) -> Hessian:
        """Hessian of one learner's training loss at its theta, as products with vectors."""
        ...


class CarryView(Protocol):
    """What a carry may see and do, between an inner step of all learners and the next one."""

    phi: Tensor
    """`[P]`, where it is now; a carry reads it."""
    seed: int
    """The run's seed."""

    @property
    def theta(self) -> Tensor:
        """The running trajectories `[T, P]`; a carry moves them in place."""
        ...

    @property
    def gradients(self) -> Tensor:
        """The gradients `[T, P]` that the last inner step followed; `[T, 0]` unless `needs_gradients`."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, row by row."""
        ...

    @property
    def k(self) -> int:
        """Inner steps into the trajectory."""
        ...

    @property
    def step(self) -> int:
        """Scheduled inner steps done in the whole run."""
        ...

    @property
    def mask(self) -> Tensor:
        """`[P]` bool: True where a row holds a parameter, False in the padding, which must stay zero."""
        ...

    @property
    def inner_lr(self) -> float:
        """Inner learning rate alpha, before its schedule."""
        ...

    @property
    def momentum(self) -> float:
        """Momentum of the inner optimizer; 0 if it has none."""
        ...

    @property
    def stays_at_phi(self) -> bool:
        """Whether no inner step moves the shared parameters (adapt `head`), so that theta is phi."""
        ...

    def shift_optimizer_state(self, delta: Tensor) -> None:
        """Moves the inner optimizers' state that lives in parameter space (averages, anchors) by delta `[P]`."""
        ...

    def shift_momentum(self, row: int, delta: Tensor) -> bool:
        """Adds delta `[P]` to the momentum of one learner's inner optimizer; False where it keeps none."""
        ...

    def batch_size(self, row: int) -> int:
        """Examples in a training batch of one learner."""
        ...

    def hessian(self, row: int) -> Hessian:
        """Hessian of one learner's loss on its last training batch, as products with vectors, which are counted."""
        ...

    def replay(self) -> None:
        """Runs the trajectories again from phi: same start, same batches, as many steps. Needs `needs_snapshot`."""
        ...
