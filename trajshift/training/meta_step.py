"""One step of Algorithm 2 and the state it works on: phi, the rows of theta, and the choices that move them.

Engines drive a `MetaStep`; carries and meta-gradients see a Protocol of it (`trajshift.algorithm.protocols`).
Shapes: T learners on this rank, P shared numbers each, padding included. phi is `[P]`, theta `[T, P]`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trajshift.algorithm.carries import Carry, Hold, Shift
from trajshift.algorithm.meta_gradients import Displacement, MetaGradient
from trajshift.algorithm.methods import ResolvedMethod
from trajshift.algorithm.protocols import Product
from trajshift.distributed import World
from trajshift.learners.active_learners import ActiveLearners
from trajshift.learners.extra_passes import ExtraPasses
from trajshift.learners.initialization import Initialization
from trajshift.learners.learner import Learner
from trajshift.learners.parameter_matrix import Layout
from trajshift.models.kernels.flat_update import flat_update
from trajshift.settings import Inner
from trajshift.task import Batch
from trajshift.training.counters import Counters
from trajshift.training.meta_optimizer import MetaOptimizer, PlainMetaStep


@dataclass(frozen=True, slots=True)
class Moment:
    """Where in the schedule an inner step is taken. In a recorded step, number and lr are scalars on the device."""

    index: int
    """Scheduled inner steps before it, and the number of its training batches."""
    number: int | Tensor
    """Scheduled inner steps once it is done: index + 1."""
    lr: float | Tensor
    """Inner learning rate."""
    due: bool
    """Whether a meta-update follows."""
    carried: bool
    """Whether the trajectories continue after that; if not, the round ends here."""


Row = dict[str, Any]
"""A reading of an observer as JSON values: `step` (scheduled inner steps done), `k`, `task`, and what was measured."""


class Observer(Protocol):
    """Measures between an inner step and the meta-update, and changes no number of the run."""

    def to_snapshot(self, run: MetaStep) -> Collection[str]:
        """The tasks whose state at the start of the round that begins it will need."""
        ...

    def look(self, run: MetaStep) -> None:
        """All learners took an inner step."""
        ...

    def rows(self) -> list[Row]:
        """The readings since they were last taken."""
        ...

    def take(self) -> list[Row]:
        """As `rows`, and forgets them."""
        ...

    def load(self, rows: Iterable[Row]) -> None:
        """Puts saved readings back."""
        ...


Runner = Callable[["MetaStep", Moment], Tensor]
"""How an engine takes the inner step of every learner; returns the losses `[T]` before it."""


@dataclass(kw_only=True, eq=False)
class MetaStep:
    """The state of a run and the three things that move it: the inner step, the meta-update, the replay."""

    method: ResolvedMethod
    meta_gradient: MetaGradient
    carry: Carry
    meta_optimizer: MetaOptimizer
    inner: Inner
    active: ActiveLearners
    world: World
    phi: Tensor
    """`[P]`, moved in place."""
    horizon: int
    """K."""
    seed: int
    device: torch.device
    autocast: torch.dtype | None = None
    grad_clip: float | None = None
    overlap: bool = False
    renew: frozenset[str] = frozenset()
    observer: Observer | None = None
    step: int = 0
    """Scheduled inner steps done."""
    pending: Callable[[], Tensor] | None = None
    """With `overlap`: waits for the mean meta-gradient `[P]` that phi has yet to follow."""
    counters: Counters = field(init=False)

    def __post_init__(self) -> None:
        self.counters = Counters(self.device, self.layout.dtype)

    # -- the state of the run --------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """The round that the next inner step belongs to, from 0."""
        return self.step // self.horizon

    @property
    def k(self) -> int:
        """Inner steps that the running trajectories have taken; 0 at a round boundary."""
        return self.step % self.horizon

    @property
    def learners(self) -> list[Learner]:
        """The local learners of the running round, row by row."""
        return self.active.learners

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their tasks' names."""
        return self.active.names

    @property
    def theta(self) -> Tensor:
        """The running trajectories `[T, P]`."""
        return self.active.theta

    @property
    def gradients(self) -> Tensor:
        """The gradients `[T, P]` that the last inner step followed; `[T, 0]` if nothing needs them."""
        return self.active.gradients

    @property
    def layout(self) -> Layout:
        """Names, shapes and offsets of the shared parameters in a row."""
        return self.active.blueprint.layout

    @property
    def mask(self) -> Tensor:
        """`[P]` bool: True where a row holds a parameter, False in the padding."""
        return self.layout.mask(self.device)

    @property
    def inner_lr(self) -> float:
        """Inner learning rate alpha, before its schedule."""
        return self.inner.lr

    @property
    def momentum(self) -> float:
        """Momentum of the inner optimizer; 0 if it has none."""
        return float(self.inner.arguments.get("momentum", 0.0))

    @property
    def stays_at_phi(self) -> bool:
        """Whether no inner step moves the shared parameters, so that theta is phi."""
        return self.method.adapt == "head"

    @property
    def initialization(self) -> Initialization:
        """phi as named tensors (copies on the CPU), with the constants that all tasks share."""
        tensors = {name: view.cpu().contiguous().clone() for name, view in self.layout.views(self.phi).items()}
        blueprint = self.active.blueprint
        constants = blueprint.constants
        tensors |= {name: value.cpu().contiguous().clone() for name, value in sorted(constants.values.items())}
        about = {"method": self.method.name, "seed": self.seed, "step": self.step, "heads": list(blueprint.heads)}
        if constants.built:
            about["built"] = constants.built
        return Initialization(tensors, about, model=blueprint.factory)

    def moment(self, index: int) -> Moment:
        """The inner step after `index` scheduled ones."""
        after = (index + 1) % self.horizon
        lr = self.inner.lr_at(index % self.horizon / self.horizon)
        return Moment(index, index + 1, lr, due=after % self.method.meta_every == 0, carried=after != 0)

    # -- a round and its steps -------------------------------------------------------------------------------

    def begin_round(self) -> None:
        """theta_0 <- phi for every learner of the round; `renew` decides what else a reset renews."""
        self.active.check_modules()
        if self.active.assign(self.round):
            self.counters.seat(self.active.names)
        if self.step > 0:
            for learner in self.learners:
                learner.renew(self.renew, self.round)
        if self.carry.needs_snapshot:
            self.active.snapshot(self.active.names)
        elif self.observer is not None:
            self.active.snapshot(self.observer.to_snapshot(self))
        self.carry.begin(self)
        self._begin_trajectories()

    def _begin_trajectories(self) -> None:
        self.theta.copy_(self.phi)
        self.meta_gradient.begin(self.theta)

    def take(self, run: Runner) -> tuple[Tensor, bool]:
        """Lines 8 to 13 of Algorithm 2: one inner step of all learners, then the meta-update and its carry if due.

        Returns the losses `[T]` before the step and whether phi moved.
        """
        self._run = run
        moment = self.moment(self.step)
        losses = self.inner_step(moment, run)
        self.count()
        if self.observer is not None:
            self.observer.look(self)
        return losses, self.meta_update(moment, losses)

    def inner_step(self, moment: Moment, run: Runner) -> Tensor:
        """theta_k <- theta_{k-1} - alpha grad L_k(theta_{k-1}) for every task (line 9); the losses `[T]`."""
        if self.method.joint:
            self.meta_optimizer.lr = moment.lr
        losses = run(self, moment)
        if not self._is_flat(moment):  # a flat update sums the rows on its way
            self.counters.inner_step(losses, self.theta.sum(1), moment.number)
        self.meta_gradient.observe(self.theta, losses, self.gradients)
        return losses

    def inner_update(
        self, learner: Learner, moment: Moment, batch: Batch | None = None, *, seeded: bool = True
    ) -> Tensor:
        """One learner's inner step; its loss before it.

        Args:
            learner: bound to its row of theta.
            moment: of the step.
            batch: its training batch, where an engine has it already.
            seeded: sets the global generators first, so that dropout repeats; not for engines that run learners
                at the same time or record them.
        """
        if batch is None:
            batch = learner.batches.train(moment.index, seeded=seeded)
        if seeded:
            learner.seed_generators(moment.index)
        shared = not self.stays_at_phi or (self.meta_gradient.needs_gradients and moment.due)
        loss = learner.backward(batch, autocast=self.autocast, shared=shared)
        if self.meta_gradient.penalty:
            learner.add_proximal_gradient(self.phi, self.meta_gradient.penalty)
        if self.grad_clip is not None:
            learner.clip(self.grad_clip)
        if shared and self.active.keep_gradients:
            learner.gather()
        learner.step(moment.lr)
        learner.forget_gradients()
        return loss

    def count(self) -> None:
        """An inner step of all learners is done."""
        self.step += 1
        self.counters.count_step()

    # -- the meta-update -------------------------------------------------------------------------------------

    def meta_update(self, moment: Moment, losses: Tensor) -> bool:
        """phi <- phi - beta * mean MetaGrad (lines 11 to 13) if it is due; whether phi moved.

        With `overlap` the ranks sum it during the next inner step, after which phi follows. `losses` are those of
        the inner step.
        """
        if self._is_flat(moment):
            shift = moment.carried and isinstance(self.carry, Shift)
            norm, row_sums = flat_update(self.theta, self.phi, self.active.weights, self.meta_optimizer.lr, shift=shift)
            self.counters.inner_step(losses, row_sums, moment.number)
            self.counters.meta_update(norm)
            return True
        moved = self.pending is not None
        if self.pending is not None:
            self.move_phi(self.pending(), carried=True)
            self.pending = None
        if moment.due:
            gradient = self.mean_gradient()
            if self.overlap and moment.carried:
                self.pending = self.world.sum_later(gradient)
            else:
                self.move_phi(self.world.sum_(gradient), carried=moment.carried)
                moved = True
        return moved

    def _is_flat(self, moment: Moment) -> bool:
        """Whether a meta-update follows that is one pass over theta: mean displacement, plain step, shift or hold."""
        return (
            moment.due
            and type(self.meta_gradient) is Displacement
            and isinstance(self.meta_optimizer, PlainMetaStep)
            and type(self.carry) in (Shift, Hold)
            and not self.stays_at_phi
            and self.world.size == 1
            and not self.overlap
            and not any(learner.has_state_to_shift for learner in self.learners)
        )

    def passes(self) -> ExtraPasses:
        """What the meta-gradient sees: the learners as they are, and passes that do not change them."""
        return ExtraPasses(self.active, self.phi, self.step, self.autocast)

    def mean_gradient(self) -> Tensor:
        """The rank's part of the mean meta-gradient `[P]`, in its own memory."""
        passes = self.passes()
        gradient = self.meta_gradient.mean(passes, self.active.weights)
        self.counters.counts += passes.counts
        return gradient

    def move_phi(self, gradient: Tensor, *, carried: bool) -> None:
        """phi follows a mean meta-gradient `[P]` (line 12), and theta follows phi if it continues (line 13)."""
        delta = self.meta_optimizer.step(self.phi, gradient)
        self.counters.meta_update(torch.linalg.vector_norm(delta))
        if carried:
            self.carry(self, delta)
            self.meta_gradient.carried(self.theta)

    # -- what a carry may do ---------------------------------------------------------------------------------

    def shift_optimizer_state(self, delta: Tensor) -> None:
        """Moves the inner optimizers' state that lives in parameter space (averages, anchors) by delta `[P]`."""
        followers = [learner for learner in self.learners if learner.has_state_to_shift]
        if followers:
            views = self.layout.views(delta)
            for learner in followers:
                learner.shift_state(views)

    def shift_momentum(self, row: int, delta: Tensor) -> bool:
        """Adds delta `[P]` to the momentum of one learner's inner optimizer; False where it keeps none."""
        learner = self.learners[row]
        pairs = zip(learner.shared.values(), learner.pieces(delta), strict=True)
        buffers = [(learner.optimizer.state[parameter].get("momentum_buffer"), piece) for parameter, piece in pairs]
        for buffer, piece in buffers:
            if buffer is not None:
                buffer.add_(piece)
        return any(buffer is not None for buffer, _ in buffers)

    def batch_size(self, row: int) -> int:
        """Examples in a training batch of one learner."""
        return self.learners[row].batches.batch_size

    @contextmanager
    def hessian(self, row: int) -> Iterator[Product]:
        """Hessian of one learner's loss on its last training batch, as products with vectors, which are counted."""
        passes = self.passes()
        with passes.hessian(row) as product:
            yield product
        self.counters.counts.update(passes.counts)

    def replay(self) -> None:
        """Runs the trajectories again from phi: same start, same batches, as many steps as before."""
        self.active.restore()
        self._begin_trajectories()
        with self.counters.replaying():
            for index in range(self.step - self.k, self.step):
                self.inner_step(self.moment(index), self._run)
                self.counters.count_step()
