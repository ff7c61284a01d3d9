"""Shifts that try to be better than the identity: estimates of dU_k/dphi (equation 3) and of dv_k/dphi.

With SGD and momentum mu (v <- mu v + g, theta <- theta - alpha v) an inner step's Jacobian is

    dv_k     = mu dv_{k-1} + H dtheta_{k-1}
    dtheta_k = dtheta_{k-1} - alpha dv_k,         dtheta_0 = delta, dv_0 = 0.

To zeroth order in alpha h, dtheta_k = delta and dv_k = c_k H delta with c_k = (1 - mu^k) / (1 - mu): a translation
leaves the velocity alone but for a term of order h min(k, 1 / (1 - mu)). To first order
dtheta_k = (I - alpha sum_{i<=k} c_i H) delta, and sum_{i<=k} c_i is about k / (1 - mu) for k much above
1 / (1 - mu): the contraction of k steps at the rate alpha / (1 - mu). The velocity term adds, over the steps to
come, what about mu / (1 - mu) such steps contract. Shapes: T learners, P shared numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trajshift.carry import Carry
from trajshift.errors import UsageError
from trajshift.learner import Learner
from trajshift.probe import RosterProbe

if TYPE_CHECKING:
    from trajshift.loop import MetaTrainer

EVERY = 10
"""Inner steps between two Hessian-vector products of one learner."""


def momentum(trainer: MetaTrainer) -> float:
    """mu of the inner optimizer; 0 for one that has none."""
    return float(trainer.inner.options.get("momentum", 0.0))


def rate(trainer: MetaTrainer) -> float:
    """alpha / (1 - mu), the rate at which SGD with momentum descends in the long run."""
    return trainer.inner.lr / (1.0 - momentum(trainer))


def curvature(trainer: MetaTrainer, learner: Learner, direction: Tensor) -> Tensor:
    """H times a direction `[P]`, on the learner's last training batch; two gradient evaluations, counted."""
    probe = RosterProbe(trainer.roster, trainer.phi, trainer.step, trainer.autocast)
    with probe.hessian(learner.row) as product:
        curved = product(direction)
    trainer.tally.counts.update(probe.counts)
    return curved


class ScalarShift(Carry):
    """theta_t <- theta_t + s_t delta with s_t = exp(-alpha/(1-mu) sum of r): dU_k/dphi as a multiple of the identity.

    r = delta' H delta / delta' delta is the curvature along the shift, measured every `EVERY` inner steps by one
    Hessian-vector product; negative values count as zero.
    """

    def begin(self, trainer: MetaTrainer) -> None:
        """No contraction yet."""
        self._exponents = trainer.theta.new_zeros(len(trainer.theta))

    def __call__(self, trainer: MetaTrainer, delta: Tensor) -> None:
        """Shifts every row by its own multiple of delta `[P]`."""
        if trainer.k % EVERY == 0:
            size = torch.clamp_min(delta @ delta, torch.finfo(delta.dtype).tiny)
            for learner in trainer.learners:
                along = (delta @ curvature(trainer, learner, delta)) / size
                self._exponents[learner.row] += EVERY * rate(trainer) * along.clamp_min(0.0)
        trainer.theta.addcmul_(torch.exp(-self._exponents)[:, None], delta)

    def state(self) -> dict[str, Tensor]:
        """The exponents `[T]`."""
        return {"exponents": self._exponents}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._exponents = state["exponents"]


class DiagonalShift(Carry):
    """theta_t <- theta_t + exp(-alpha/(1-mu) sum_i B g_i^2) delta: dU_k/dphi as a diagonal, without extra passes.

    B g^2, with g the gradient of a mean over B examples, stands for the diagonal of the Fisher matrix, and that
    for the Hessian's.
    """

    needs_gradients = True

    def begin(self, trainer: MetaTrainer) -> None:
        """No contraction yet."""
        self._exponents = torch.zeros_like(trainer.theta)

    def __call__(self, trainer: MetaTrainer, delta: Tensor) -> None:
        """Shifts every number of every row by its own multiple of delta `[P]`."""
        gradients = trainer.roster.gradients
        for learner in trainer.learners:
            row, scale = learner.row, rate(trainer) * learner.batches.batch_size
            self._exponents[row].addcmul_(gradients[row], gradients[row], value=scale)
        trainer.theta.addcmul_(torch.exp(-self._exponents), delta)

    def state(self) -> dict[str, Tensor]:
        """The exponents `[T, P]`."""
        return {"exponents": self._exponents}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._exponents = state["exponents"]


class _Collected(Carry):
    """The identity shift at once, and every `EVERY` inner steps a correction for the shifts since the last one."""

    def begin(self, trainer: MetaTrainer) -> None:
        """Nothing to correct yet."""
        self._collected = torch.zeros_like(trainer.theta)  # equal rows: a checkpoint stores state task by task

    def __call__(self, trainer: MetaTrainer, delta: Tensor) -> None:
        """Shifts every row by delta `[P]`, and corrects if it is time."""
        trainer.theta.add_(delta)
        self._collected += delta
        if trainer.k % EVERY == 0:
            for learner in trainer.learners:
                collected = self._collected[learner.row]
                self.correct(trainer, learner, collected, curvature(trainer, learner, collected))
            self._collected.zero_()

    def correct(self, trainer: MetaTrainer, learner: Learner, collected: Tensor, curved: Tensor) -> None:
        """Uses the collected shift `[P]` and H times it, `curved` `[P]`."""
        raise AssertionError("a subclass corrects")

    def state(self) -> dict[str, Tensor]:
        """The collected shift `[T, P]`."""
        return {"collected": self._collected}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._collected = state["collected"]


class TangentShift(_Collected):
    """theta_t <- theta_t + (I - alpha sum_{i<=k} c_i H) delta: dU_k/dphi to first order, H that of the last batch.

    The correction is at most as long as the shift: where alpha h k is above 1 the first order is no estimate.
    """

    def correct(self, trainer: MetaTrainer, learner: Learner, collected: Tensor, curved: Tensor) -> None:
        """Takes the first-order contraction off the row."""
        mu = momentum(trainer)
        steps = sum((1.0 - mu**i) / (1.0 - mu) for i in range(1, trainer.k + 1))
        correction = trainer.inner.lr * steps * curved
        longest = torch.linalg.vector_norm(collected) / torch.linalg.vector_norm(correction)
        trainer.theta[learner.row] -= correction * longest.clamp_max(1.0)


class VelocityShift(_Collected):
    """theta_t <- theta_t + delta and v_t <- v_t + c_k H delta: what dv_k/dphi adds with the identity for theta.

    Needs SGD with momentum.
    """

    def correct(self, trainer: MetaTrainer, learner: Learner, collected: Tensor, curved: Tensor) -> None:
        """Adds to the momentum buffers of the shared parameters."""
        mu = momentum(trainer)
        views = trainer.layout.views(curved)
        for name, parameter in learner.shared.items():
            buffer = learner.optimizer.state[parameter].get("momentum_buffer")
            if buffer is None:
                raise UsageError("VelocityShift needs SGD with momentum; set inner.options.momentum, or drop the carry")
            buffer.add_(views[name], alpha=(1.0 - mu**trainer.k) / (1.0 - mu))


SHIFTS: dict[str, type[Carry]] = {
    "scalar": ScalarShift,
    "diagonal": DiagonalShift,
    "tangent": TangentShift,
    "velocity": VelocityShift,
}
"""The estimates by name; the identity is the library's own carry `shift`."""
