"""What a meta-gradient may see of the learners: never the trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

Product = Callable[[Tensor], Tensor]
Hessian = AbstractContextManager[Product]
"""Entered, it gives `v [P] -> H v [P]`; left, it frees the graph."""


class Probe(Protocol):
    """What a meta-gradient may ask for at the moment it is read. No pass leaves a trace in any learner."""

    phi: Tensor
    """`[P]`."""
    theta: Tensor
    """`[T, P]`."""
    gradients: Tensor
    """`[T, P]`, the gradients that the last inner step followed."""
    counts: Counter[str]
    """What the reading costs: `gradient_evaluations` and counters of the meta-gradient's own."""

    def losses(self) -> Tensor:
        """Losses `[T]` of the current theta on the last training batches."""
        ...

    def gradients_at_end(self, split: str) -> Tensor:
        """Gradients `[T, P]` at the current theta on batches of `train` (the last ones) or `heldout`."""
        ...

    def hessian(self, row: int) -> Hessian:
        """Hessian of one learner's training loss at its theta, as products with vectors."""
        ...
