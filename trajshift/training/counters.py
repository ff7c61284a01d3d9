"""What a run counts: inner steps, gradient evaluations, losses, and each task's first bad step.

Shapes: T learners (rows) on this rank, P shared numbers each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trajshift.errors import NonFiniteLoss


class Counters:
    """Counters of one rank. Tensors stay on the device; nothing waits for it before `mean_losses` or `first_bad`.

    Attributes:
        inner_steps: cumulative inner steps per task, replays included.
        counts: `gradient_evaluations` of all tasks of this rank (an inner step or held-out pass 1, a
            Hessian-vector product 2) and counters of the meta-gradient.
        update_norm: norm of the last meta-update, a scalar tensor.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.inner_steps = 0
        self.counts: Counter[str] = Counter()
        self.update_norm = torch.zeros((), dtype=dtype, device=device)
        self.names: tuple[str, ...] = ()
        self.loss_sum = torch.zeros(0, dtype=torch.float64, device=device)
        self.loss_count: list[int] = []
        self.first_bad_step = torch.zeros(0, dtype=torch.int64, device=device)
        self._left: dict[str, Tensor] = {}
        self._replaying = False

    def seat(self, names: Sequence[str]) -> None:
        """Learners of these tasks now hold the rows; those that stay keep their sums, the others start from zero.

        So a task's numbers do not depend on which others share its rank.
        """
        before = {name: row for row, name in enumerate(self.names)}
        for name in before.keys() - set(names):
            step = self.first_bad_step[before[name]]
            earlier = self._left.get(name, step)
            self._left[name] = torch.where(earlier < 0, step, earlier)
        rows = [row for row, name in enumerate(names) if name in before]
        old = [before[names[row]] for row in rows]
        loss_sum, first_bad_step = self.loss_sum.new_zeros(len(names)), self.first_bad_step.new_full((len(names),), -1)
        loss_sum[rows], first_bad_step[rows] = self.loss_sum[old], self.first_bad_step[old]
        self.loss_count = [self.loss_count[before[name]] if name in before else 0 for name in names]
        self.names, self.loss_sum, self.first_bad_step = tuple(names), loss_sum, first_bad_step

    def count_step(self) -> None:
        """All learners took an inner step."""
        self.inner_steps += 1
        self.counts["gradient_evaluations"] += len(self.names)
        if not self._replaying:
            self.loss_count = [count + 1 for count in self.loss_count]

    def inner_step(self, losses: Tensor, row_sums: Tensor, step: int | Tensor) -> None:
        """The step led from losses `[T]` to rows of theta with these sums `[T]`; `step` counts scheduled steps from 1.

        Only tensors move.
        """
        # theta too: an overflowing gradient corrupts it, and through phi all others, before the next loss shows it.
        bad = ~(torch.isfinite(losses) & torch.isfinite(row_sums)) & (self.first_bad_step < 0)
        # not masked_fill_, which reads a tensor's value on the host
        self.first_bad_step.copy_(torch.where(bad, step, self.first_bad_step))
        if not self._replaying:
            self.loss_sum += losses

    def meta_update(self, norm: Tensor) -> None:
        """phi moved by a delta of this norm, a scalar."""
        self.update_norm.copy_(norm)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Steps inside are counted, but their losses are not averaged again."""
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False

    def mean_losses(self) -> list[float]:
        """Mean loss of each learner since the last call; resets the sums."""
        means = [total / max(count, 1) for total, count in zip(self.loss_sum.tolist(), self.loss_count, strict=True)]
        self.loss_sum.zero_()
        self.loss_count = [0] * len(self.loss_count)
        return means

    def first_bad(self) -> list[tuple[int, str]]:
        """(step, task) for each local task whose loss or parameters were ever not finite."""
        steps = torch.cat([self.first_bad_step, *(step[None] for step in self._left.values())]).tolist()
        return [(step, name) for step, name in zip(steps, (*self.names, *self._left), strict=True) if step >= 0]

    @staticmethod
    def refuse(found: Sequence[Sequence[tuple[int, str]]], *, inner_lr: float, meta_lr: float) -> None:
        """Raises for the earliest bad step over all ranks, if any.

        Raises:
            NonFiniteLoss: names the task(s), the step and the learning rates.
        """
        every = sorted(tuple(one) for local in found for one in local)
        if every:
            step = every[0][0]
            names = ", ".join(repr(name) for at, name in every if at == step)
            raise NonFiniteLoss(
                f"the loss or a parameter of task {names} is not finite at inner step {step} "
                f"(inner lr {inner_lr:g}, meta_lr {meta_lr:g}); lower a learning rate or set grad_clip"
            )
