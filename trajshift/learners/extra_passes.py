"""Passes that a meta-gradient may ask for. None changes a learner or a random generator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trajshift.algorithm.conjugate_gradient import hessian_product
from trajshift.algorithm.protocols import Product
from trajshift.learners.active_learners import ActiveLearners
from trajshift.learners.learner import Learner, reentrant_checkpoints_named
from trajshift.models.kernels.switch import eager_kernels
from trajshift.rng import seeded


class ExtraPasses:
    """`MetaGradientView` (`trajshift.algorithm.protocols`) of the running round's learners, at their current theta.

    Args:
        step: scheduled inner steps done; the last one used the training batches `step - 1`.

    Attributes:
        counts: `gradient_evaluations`: one for each pass, two for each Hessian-vector product.
    """

    def __init__(self, roster: ActiveLearners, phi: Tensor, step: int, autocast: torch.dtype | None) -> None:
        self.phi = phi
        self.theta = roster.theta
        self.gradients = roster.gradients
        self.counts: Counter[str] = Counter()
        self._roster = roster
        self._batch = step - 1
        self._autocast = autocast

    @contextmanager
    def _pass(self, learner: Learner) -> Iterator[None]:
        self.counts["gradient_evaluations"] += 1
        draw, frozen = learner.draw_of(self._batch), learner.frozen.values()
        named = reentrant_checkpoints_named(learner.task.name)
        with named, untouched(learner.module, draw, learner.device, frozen):
            yield

    def losses(self) -> Tensor:
        """Losses `[T]` on the last training batches."""
        losses = self.theta.new_zeros(len(self.theta))
        for learner in self._roster.learners:
            with torch.no_grad(), self._pass(learner):
                losses[learner.row] = learner.forward(learner.batches.train(self._batch), self._autocast)
        return losses

    def gradients_at_end(self, split: str) -> Tensor:
        """Gradients `[T, P]` on the last training batches (`train`) or on held-out ones (`heldout`)."""
        for learner in self._roster.learners:
            draw = learner.batches.heldout if split == "heldout" else learner.batches.train
            with self._pass(learner):
                learner.differentiate(learner.forward(draw(self._batch), self._autocast))
            learner.gather()
            learner.forget_gradients()
        return self.gradients

    @contextmanager
    def hessian(self, row: int) -> Iterator[Product]:
        """Products with the Hessian of one learner's loss on its last training batch."""
        learner = self._roster.learners[row]
        with self._pass(learner):
            with eager_kernels():  # fused ones have no second derivative
                loss = learner.forward(learner.batches.train(self._batch), self._autocast)
            product = hessian_product(loss, list(learner.shared.values()), learner.pieces)

            def counted(v: Tensor) -> Tensor:
                self.counts["gradient_evaluations"] += 2
                return product(v)

            yield counted


@contextmanager
def untouched(
    module: nn.Module, draw: int, device: torch.device, frozen: Iterable[nn.Parameter] = ()
) -> Iterator[None]:
    """Runs passes without lasting effect: buffers (BatchNorm statistics, counters) and generators are restored.

    The module sees copies of its buffers, and of the task's own `frozen` parameters, meanwhile, so the originals are
    not even written to.
    """
    kept = [(parameter, parameter.data) for parameter in frozen]
    saved = [(part, name, b) for part in module.modules() for name, b in part._buffers.items() if b is not None]
    try:
        for part, name, buffer in saved:
            part._buffers[name] = buffer.clone()
        for parameter, value in kept:
            parameter.data = value.clone()
        with seeded(draw, device):
            yield
    finally:
        for parameter, value in kept:
            parameter.data = value
        for part, name, buffer in saved:
            part._buffers[name] = buffer
