"""The meta-gradients: which direction phi moves.

Shapes: T learners (rows) on this rank, P numbers a row. Each class follows its equation: `begin` at the start
of a trajectory, `observe` after every inner step of all learners, `read` at a meta-update. Several meta-updates
may read one trajectory; the state then continues, so that with carry `shift` the path grows from 1 to K steps as
in Algorithm 2. Your own meta-gradient is a class with `read`:

```python
class SignOfDisplacement(MetaGradient):
    def read(self, view):
        return torch.sign(view.phi - view.theta)

MetaTrainer(model, tasks, "trajectory-shifting", meta=Meta(gradient=SignOfDisplacement()))
```
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from trajshift.algorithm.conjugate_gradient import conjugate_gradient
from trajshift.algorithm.protocols import MetaGradientView, Product
from trajshift.errors import UsageError


class MetaGradient:
    """Base of all meta-gradients: keeps no state, needs no gradients, adds no penalty."""

    needs_gradients = False
    """Whether `observe` or `read` uses rows of gradients `[T, P]`."""
    needs_heldout = False
    """Whether batches that are never trained on are needed."""
    penalty = 0.0
    """Strength lambda of the inner penalty lambda/2 ||theta - phi||^2."""
    recordable = False
    """Whether it does the same tensor work at every step, so that a CUDA graph can repeat it. Not inherited: each
    subclass must set it for itself."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.recordable = cls.__dict__.get("recordable", False)

    def begin(self, theta: Tensor) -> None:
        """A trajectory starts: all rows of theta `[T, P]` equal phi."""

    def observe(self, theta: Tensor, losses: Tensor, gradients: Tensor) -> None:
        """All learners took an inner step: theta `[T, P]` after it, losses `[T]` and gradients `[T, P]` before it."""

    def carried(self, theta: Tensor) -> None:
        """theta `[T, P]` was moved along with phi; no learner took a step."""

    def read(self, view: MetaGradientView) -> Tensor:
        """The meta-gradients `[T, P]`; phi moves against their mean."""
        raise UsageError(f"{type(self).__name__} defines no read(); a meta-gradient must")

    def mean(self, view: MetaGradientView, weights: Tensor) -> Tensor:
        """`weights` `[T]` times the meta-gradients: `[P]`."""
        return weights @ self.read(view)

    def state(self) -> dict[str, Tensor]:
        """Tensors whose first dimension is T, for a checkpoint."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""


class Displacement(MetaGradient):
    """MetaGrad = phi - theta_k (Reptile, Nichol et al., 2018; Algorithm 2 of Shin et al., 2021)."""

    recordable = True

    def read(self, view: MetaGradientView) -> Tensor:
        """phi - theta `[T, P]`."""
        return view.phi - view.theta

    def mean(self, view: MetaGradientView, weights: Tensor) -> Tensor:
        """The same mean without a `[T, P]` temporary: sum(w) phi - w theta."""
        return torch.addmv(weights.sum() * view.phi, view.theta.T, weights, alpha=-1.0)


class LastGradient(MetaGradient):
    """MetaGrad = gradient of the task's loss at the end of its trajectory (FOMAML, Finn et al., 2017).

    With `batch="train"` it is the gradient that the last inner step followed (no extra pass, as in the paper's
    text); with `batch="heldout"` it is taken at theta_k on batches that are never trained on (published code).
    """

    needs_gradients = True

    def __init__(self, *, batch: str = "train") -> None:
        self.batch = batch
        self.needs_heldout = batch == "heldout"
        self.recordable = type(self) is LastGradient and batch == "train"

    def read(self, view: MetaGradientView) -> Tensor:
        """Gradients `[T, P]`."""
        return view.gradients if self.batch == "train" else view.gradients_at_end("heldout")


class PathLength(MetaGradient):
    """Gradient of the length of the path (theta_i, f(theta_i)) with the identity as Jacobian (Leap).

    MetaGrad = -p sum_i (theta_{i+1} - theta_i + (f_{i+1} - f_i) grad f_i) / ||gamma_{i+1} - gamma_i||^(2-p), with
    gamma = (theta, f); p = 1 is the length (`norm`), p = 2 the energy. The stabilizer replaces a rise of the
    loss by a fall of the same size. Flennerhag et al., ICLR 2019, equation 8. f_{i+1} is the loss of the next
    inner step; where a meta-update comes first, it is measured by a pass on the last batch.
    """

    def __init__(self, *, norm: bool = True, loss: bool = True, stabilizer: bool = True) -> None:
        self.norm = norm
        self.loss = loss
        self.stabilizer = stabilizer
        self.needs_gradients = loss

    def begin(self, theta: Tensor) -> None:
        """No segment yet."""
        self._previous = theta.clone()
        self._sum = torch.zeros_like(theta)
        self._segment = torch.zeros_like(theta) if self.loss else None
        self._gradients = torch.zeros_like(theta) if self.loss else None
        self._start_loss = theta.new_zeros(len(theta))
        self._pending = theta.new_zeros(len(theta))

    def observe(self, theta: Tensor, losses: Tensor, gradients: Tensor) -> None:
        """Closes the last segment with this step's loss and opens the next one."""
        losses = losses.to(theta.dtype)
        if self._segment is None or self._gradients is None:
            self._add(theta - self._previous, theta.new_zeros(len(theta)), None)
        else:
            self._close(losses)
            torch.sub(theta, self._previous, out=self._segment)
            self._gradients.copy_(gradients)
            self._start_loss = losses
            self._pending.fill_(1.0)
        self._previous.copy_(theta)

    def carried(self, theta: Tensor) -> None:
        """A carry's move is not part of the path."""
        self._previous.copy_(theta)

    def read(self, view: MetaGradientView) -> Tensor:
        """The sum over all segments so far `[T, P]`."""
        if self.loss:
            self._close(view.losses().to(self._sum.dtype))
        return self._sum

    def _close(self, end_losses: Tensor) -> None:
        assert self._segment is not None
        rise = (end_losses - self._start_loss) * self._pending
        self._add(self._segment, -rise.abs() if self.stabilizer else rise, self._gradients)
        self._segment.zero_()
        self._pending.zero_()

    def _add(self, segment: Tensor, rise: Tensor, gradients: Tensor | None) -> None:
        direction = segment if gradients is None else torch.addcmul(segment, gradients, rise[:, None])
        if not self.norm:
            self._sum.sub_(direction, alpha=2.0)
            return
        length = torch.sqrt(segment.square().sum(1) + rise.square())
        self._sum.addcmul_(direction, torch.where(length > 0.0, 1.0 / length, 0.0)[:, None], value=-1.0)

    def state(self) -> dict[str, Tensor]:
        """The open segment and the sum of the closed ones."""
        state = {
            "previous": self._previous,
            "sum": self._sum,
            "start_loss": self._start_loss,
            "pending": self._pending,
        }
        if self._segment is not None and self._gradients is not None:
            state |= {"segment": self._segment, "gradients": self._gradients}
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._previous, self._sum = state["previous"], state["sum"]
        self._start_loss, self._pending = state["start_loss"], state["pending"]
        self._segment, self._gradients = state.get("segment"), state.get("gradients")


class Implicit(MetaGradient):
    """MetaGrad = (I + H / lambda)^-1 g at theta_K, by conjugate gradients (iMAML, Rajeswaran et al., 2019).

    The inner loss gets the proximal term lambda/2 ||theta - phi||^2; H is the Hessian of the task's loss without
    it, on the last training batch; g is the gradient on held-out batches, or on the last training batch. The
    system solved is ((1 + damping) I + H / lambda) x = g. A direction of negative curvature ends the iteration
    and is counted.
    """

    needs_gradients = True

    def __init__(
        self,
        *,
        strength: float = 1.0,
        steps: int = 5,
        tolerance: float = 1e-6,
        damping: float = 0.0,
        batch: str = "heldout",
    ) -> None:
        if strength <= 0.0:
            raise UsageError(f"iMAML's strength (lambda) is {strength}; use a positive number")
        self.penalty = strength
        self.steps = steps
        self.tolerance = tolerance
        self.damping = damping
        self.batch = batch
        self.needs_heldout = batch == "heldout"

    def read(self, view: MetaGradientView) -> Tensor:
        """One linear system per learner: `[T, P]`."""
        right = view.gradients_at_end(self.batch)
        solved = torch.empty_like(right)
        for row in range(len(right)):
            with view.hessian(row) as product:
                solution = conjugate_gradient(
                    partial(self._system, product), right[row], steps=self.steps, tolerance=self.tolerance
                )
            solved[row] = solution.x
            view.counts.update(cg_steps=solution.steps, negative_curvature=solution.negative_curvature)
        return solved

    def _system(self, product: Product, v: Tensor) -> Tensor:
        return torch.add((1.0 + self.damping) * v, product(v), alpha=1.0 / self.penalty)


_BY_NAME: dict[str, type[MetaGradient]] = {
    "displacement": Displacement,
    "last_gradient": LastGradient,
    "path_length": PathLength,
    "implicit": Implicit,
}


def name_of(metagrad: MetaGradient) -> str | None:
    """The name of an object's class; None for a custom class."""
    return next((name for name, kind in _BY_NAME.items() if type(metagrad) is kind), None)


def build_meta_gradient(name: str, batch: str, options: dict[str, Any]) -> MetaGradient:
    """A meta-gradient by name.

    Raises:
        UsageError: an option it does not have.
    """
    takes_batch = name in ("last_gradient", "implicit")
    try:
        return _BY_NAME[name](**({"batch": batch} if takes_batch else {}), **options)
    except TypeError as error:
        raise UsageError(f"metagrad {name} does not accept {options}: {error}") from error
