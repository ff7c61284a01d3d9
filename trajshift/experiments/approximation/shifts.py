"""Shifts that try to be better than the identity: estimates of dU_k/dphi (equation 3) and of dv_k/dphi.

With SGD and momentum mu (v <- mu v + g, theta <- theta - alpha v) an inner step's Jacobian is

    dv_k     = mu dv_{k-1} + H dtheta_{k-1}
    dtheta_k = dtheta_{k-1} - alpha dv_k,         dtheta_0 = delta, dv_0 = 0.

To zeroth order in alpha h, dtheta_k = delta and dv_k = c_k H delta with c_k = (1 - mu^k) / (1 - mu): a translation
does not change the velocity, up to a term of order h min(k, 1 / (1 - mu)). To first order
dtheta_k = (I - alpha S_k H) delta with S_k = c_1 + ... + c_k, about k / (1 - mu) for k much above 1 / (1 - mu): the
contraction of k steps at the rate alpha / (1 - mu). What the identity leaves out of the velocity, c_k H delta, moves
theta over later steps by alpha mu / (1 - mu) c_k H delta: as much as mu / (1 - mu) further steps would contract.
Shapes: T learners, P shared numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trajshift.algorithm.carries import Carry
from trajshift.algorithm.protocols import CarryView
from trajshift.errors import UsageError

EVERY = 10
"""Inner steps between two Hessian-vector products of one learner."""


def steepness(mu: float, k: int) -> float:
    """c_k = (1 - mu^k) / (1 - mu): how many gradients a velocity that starts from zero is worth after k steps."""
    return (1.0 - mu**k) / (1.0 - mu)


def curvature(view: CarryView, row: int, direction: Tensor) -> Tensor:
    """H times a direction `[P]`, on the learner's last training batch; two gradient evaluations, counted."""
    with view.hessian(row) as product:
        return product(direction)


class ScalarShift(Carry):
    """theta_t <- theta_t + s_t delta with s_t = exp(-alpha sum_i c_i r_i): dU_k/dphi as a multiple of the identity.

    r = delta' H delta / delta' delta is the curvature along the shift, measured every `EVERY` inner steps by one
    Hessian-vector product and taken for that of all steps since the last; negative values count as zero.
    """

    def begin(self, view: CarryView) -> None:
        """No contraction yet."""
        self._exponents = view.theta.new_zeros(len(view.theta))

    def __call__(self, view: CarryView, delta: Tensor) -> None:
        """Shifts every row by its own multiple of delta `[P]`."""
        if view.k % EVERY == 0:
            mu, size = view.momentum, torch.clamp_min(delta @ delta, torch.finfo(delta.dtype).tiny)
            worth = sum(steepness(mu, k) for k in range(view.k - EVERY + 1, view.k + 1))
            for row in range(len(view.theta)):
                along = (delta @ curvature(view, row, delta)) / size
                self._exponents[row] += view.inner_lr * worth * along.clamp_min(0.0)
        view.theta.addcmul_(torch.exp(-self._exponents)[:, None], delta)

    def state(self) -> dict[str, Tensor]:
        """The exponents `[T]`."""
        return {"exponents": self._exponents}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._exponents = state["exponents"]


class DiagonalShift(Carry):
    """theta_t <- theta_t + exp(-alpha/(1-mu) sum_i B g_i^2) delta: dU_k/dphi as a diagonal, without extra passes.

    B g^2, with g the gradient of a mean over B examples, approximates the diagonal of the Fisher matrix, and that
    the Hessian's. Momentum is counted at its long-run rate from the first step on.
    """

    needs_gradients = True

    def begin(self, view: CarryView) -> None:
        """No contraction yet."""
        self._exponents = torch.zeros_like(view.theta)

    def __call__(self, view: CarryView, delta: Tensor) -> None:
        """Shifts every number of every row by its own multiple of delta `[P]`."""
        rate = view.inner_lr / (1.0 - view.momentum)  # at which SGD with momentum descends in the long run
        for row, gradient in enumerate(view.gradients):
            self._exponents[row].addcmul_(gradient, gradient, value=rate * view.batch_size(row))
        view.theta.addcmul_(torch.exp(-self._exponents), delta)

    def state(self) -> dict[str, Tensor]:
        """The exponents `[T, P]`."""
        return {"exponents": self._exponents}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._exponents = state["exponents"]


class VelocityShift(Carry):
    """theta_t <- theta_t + delta and v_t <- v_t + c_k H delta: what dv_k/dphi adds, with the identity for theta.

    The outstanding correction is kept as directions, which evolve from step to step as under SGD, and is applied every
    `EVERY` inner steps by two Hessian-vector products. Needs SGD with momentum.
    """

    def begin(self, view: CarryView) -> None:
        """No correction is outstanding yet."""
        # Equal rows: a checkpoint stores state task by task.
        self._velocity, self._theta = torch.zeros_like(view.theta), torch.zeros_like(view.theta)

    def __call__(self, view: CarryView, delta: Tensor) -> None:
        """Shifts every row by delta `[P]`, and applies the correction if it is due."""
        view.theta.add_(delta)
        mu, k = view.momentum, view.k
        self._velocity *= mu
        self._theta.sub_(self._velocity, alpha=view.inner_lr)
        self._velocity.add_(delta, alpha=steepness(mu, k))
        self._theta.sub_(delta, alpha=view.inner_lr * self.contraction(mu, k))
        if k % EVERY == 0:
            for row in range(len(view.theta)):
                self._pay(view, row, delta)
            self._velocity.zero_()
            self._theta.zero_()

    def contraction(self, mu: float, k: int) -> float:
        """S_k, or zero where theta's own contraction is left out."""
        return 0.0

    def _pay(self, view: CarryView, row: int, delta: Tensor) -> None:
        owed = curvature(view, row, self._theta[row])
        # Where alpha h k is above 1 the first order is no estimate: it must not outweigh the identity.
        length = torch.linalg.vector_norm(owed).clamp_min(torch.finfo(owed.dtype).tiny)
        view.theta[row] += owed * (EVERY * torch.linalg.vector_norm(delta) / length).clamp_max(1.0)
        if not view.shift_momentum(row, curvature(view, row, self._velocity[row])) and view.momentum:
            raise UsageError(f"{type(self).__name__} needs SGD; set inner.optimizer=sgd, or drop the carry")

    def state(self) -> dict[str, Tensor]:
        """The outstanding corrections, `[T, P]` each."""
        return {"velocity": self._velocity, "theta": self._theta}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._velocity, self._theta = state["velocity"], state["theta"]


class TangentShift(VelocityShift):
    """theta_t <- theta_t + (I - alpha S_k H) delta and v_t <- v_t + c_k H delta: the Jacobian to first order."""

    def contraction(self, mu: float, k: int) -> float:
        """S_k = c_1 + ... + c_k."""
        return sum(steepness(mu, i) for i in range(1, k + 1))


SHIFTS: dict[str, type[Carry]] = {
    "scalar": ScalarShift,
    "diagonal": DiagonalShift,
    "tangent": TangentShift,
    "velocity": VelocityShift,
}
"""The estimates by name; the identity is the library's own carry `shift`."""
