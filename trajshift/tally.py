"""What a run counts: inner steps, gradient evaluations, losses, and each task's first bad step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trajshift.errors import NonFiniteLoss


class Tally:
    """Counters of one rank. Tensors stay on the device; nothing waits for it before `mean_losses` or `first_bad`.

    Attributes:
        inner_steps: cumulative inner steps per task, replays included.
        counts: `gradient_evaluations` of all tasks of this rank (an inner step or held-out pass 1, a
            Hessian-vector product 2) and counters of the meta-gradient.
        update_norm: norm of the last meta-update, a scalar tensor.
    """

    def __init__(self, device: torch.device) -> None:
        self.inner_steps = 0
        self.counts: Counter[str] = Counter()
        self.update_norm = torch.zeros((), device=device)
        self.loss_count = 0
        self._replaying = False
        self._device = device
        self.seat(0)

    def seat(self, learners: int) -> None:
        """Other learners took the rows: their sums start anew."""
        self.loss_sum = torch.zeros(learners, dtype=torch.float64, device=self._device)
        self.first_bad_step = torch.full((learners,), -1, dtype=torch.int64, device=self._device)
        self.loss_count = 0

    def inner_step(self, losses: Tensor, step: int) -> None:
        """All learners took a step with these losses `[T]`; `step` counts scheduled steps from 1."""
        self.inner_steps += 1
        self.counts["gradient_evaluations"] += len(losses)
        bad = ~torch.isfinite(losses) & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(bad, step)
        if not self._replaying:
            self.loss_sum += losses
            self.loss_count += 1

    def meta_update(self, delta: Tensor, counts: Counter[str]) -> None:
        """phi moved by delta `[P]`; reading the meta-gradients cost `counts`."""
        self.update_norm = torch.linalg.vector_norm(delta)
        self.counts += counts

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Steps inside are counted, but their losses are not averaged again."""
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False

    def mean_losses(self) -> list[float]:
        """Mean loss of each learner since the last call; the sums start anew."""
        means = (self.loss_sum / max(self.loss_count, 1)).tolist()
        self.loss_sum.zero_()
        self.loss_count = 0
        return means

    def first_bad(self, names: Sequence[str]) -> list[tuple[int, str]]:
        """(step, task) for each local task whose loss once was not finite."""
        steps = self.first_bad_step.tolist()
        return [(step, name) for step, name in zip(steps, names, strict=True) if step >= 0]

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
                f"the loss of task {names} is not finite at inner step {step} "
                f"(inner lr {inner_lr:g}, meta_lr {meta_lr:g}); lower a learning rate or set grad_clip"
            )
