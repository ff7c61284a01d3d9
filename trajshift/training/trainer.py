"""The one loop: Algorithms 1 and 2 of Shin et al. (2021), every baseline and every ablation.

Shapes: T learners on this rank, P shared numbers each, padding included. phi is `[P]`, theta `[T, P]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trajshift.algorithm.carries import Carry
from trajshift.algorithm.meta_gradients import MetaGradient
from trajshift.algorithm.methods import Method
from trajshift.distributed import World
from trajshift.errors import UsageError
from trajshift.learners.active_learners import ActiveLearners
from trajshift.learners.extra_passes import ExtraPasses
from trajshift.learners.initialization import Initialization
from trajshift.learners.inner_optimizer import Inner
from trajshift.learners.learner import Learner
from trajshift.learners.modules import Factory
from trajshift.rng import repeatable
from trajshift.task import Batch, Task
from trajshift.training.approximation_error import ApproximationErrorMeter, joined
from trajshift.training.choices import choose_meta_optimizer, choose_method, choose_model, choose_renewals, choose_tasks
from trajshift.training.counters import Counters
from trajshift.training.engines.choose import choose
from trajshift.training.engines.loop import Engine


@dataclass(frozen=True, slots=True)
class Event:
    """One inner step of all learners. Tensors stay on the device: reading one waits for it."""

    step: int
    """Scheduled inner steps done, 1 to rounds * horizon."""
    round: int
    """The round it belongs to, from 0."""
    k: int
    """Its place in the trajectory, 1 to horizon."""
    inner_steps: int
    """Cumulative inner steps per task, replays included."""
    tasks: tuple[str, ...]
    """The tasks on this rank, in the order of `losses`."""
    losses: Tensor
    """Training losses `[T]` before the step."""
    meta_updated: bool
    """Whether phi moved after this step."""


class MetaTrainer:
    """Learns phi; iterate over it, one `Event` per inner step.

    ```python
    trainer = MetaTrainer(model, tasks, "trajectory-shifting", horizon=1000, rounds=200)
    for event in trainer:
        ...
    trainer.initialization.save("initialization.safetensors")
    ```

    Args:
        model: `model(task) -> nn.Module`, called once per task, or a module whose `head` is renewed for each.
        tasks: the source tasks, names unique.
        method: a preset of `trajshift.METHODS`, or a `Method` of one's own.
        horizon: K, inner steps between resets.
        rounds: M, trajectories per task.
        meta_lr: beta; None takes the method's default.
        meta_every, carry, adapt, metagrad, batch: replace the preset's choices. metagrad
            and carry may be objects.
        metagrad_options: arguments of the meta-gradient by name (Leap's norm, iMAML's strength, ...).
        inner: the inner optimizer.
        meta_optimizer: None for the plain step, or a `torch.optim` class by name or callable on phi.
        meta_options: its further arguments.
        batch_size: examples per task and inner step.
        seed: decides phi, heads, batches and all other draws.
        head: dotted name(s) of the head; None finds `fc`, `head`, `heads` or `classifier`.
        shared: name patterns of the shared parameters; None shares all with equal name and shape but the head.
        renew: what a reset renews besides theta: `heads`, `optimizer`, `statistics`. Nothing, as published.
        tasks_per_round: tasks sampled at each reset; None takes all. A task that was not in the last round
            starts with fresh optimizer state.
        initialization: where phi starts; None draws it from the seed.
        heldout: fraction of each training set kept for held-out batches, where the method needs them.
        workers: processes that load map-style data sets.
        device: where everything lives.
        grad_clip: largest gradient norm of a task in an inner step.
        autocast: dtype of the forward pass, for instance torch.bfloat16; parameters keep theirs.
        gauge: measures the shift's approximation error meanwhile; None does not.
        channels_last: keeps convolutions' weights and activations channels-last; None where that is faster.
        overlap: let the ranks sum a meta-gradient while the next inner step runs; inside a round phi and theta then
            move one inner step late.
        engine: how the steps are run: `loop`, `parallel`, `graph` or `auto`, which takes the fastest that can.

    Raises:
        UsageError: whatever does not fit, in one sentence.
    """

    def __init__(
        self,
        model: Factory | nn.Module,
        tasks: Sequence[Task] | Mapping[str, Task],
        method: str | Method = "trajectory-shifting",
        *,
        horizon: int = 1000,
        rounds: int = 200,
        meta_lr: float | None = None,
        meta_every: int | None = None,
        carry: str | Carry | None = None,
        adapt: str | None = None,
        metagrad: str | MetaGradient | None = None,
        batch: str | None = None,
        metagrad_options: Mapping[str, Any] | None = None,
        inner: Inner | None = None,
        meta_optimizer: Any = None,
        meta_options: Mapping[str, Any] | None = None,
        batch_size: int = 128,
        seed: int = 0,
        head: str | Sequence[str] | None = None,
        shared: Sequence[str] | None = None,
        renew: Collection[str] = (),
        tasks_per_round: int | None = None,
        initialization: Initialization | Mapping[str, Tensor] | None = None,
        heldout: float = 0.2,
        workers: int = 0,
        device: str | torch.device = "cpu",
        grad_clip: float | None = None,
        autocast: torch.dtype | None = None,
        gauge: ApproximationErrorMeter | None = None,
        channels_last: bool | None = None,
        overlap: bool = False,
        engine: str | Engine = "auto",
    ) -> None:
        if rounds < 1:
            raise UsageError(f"rounds is {rounds}; use at least 1")
        if grad_clip is not None and grad_clip <= 0.0:
            raise UsageError(f"grad_clip is {grad_clip}; use a positive number, or None")
        self.world = World.current(str(device))
        self.device = self.world.place(device)
        self.seed = seed
        self.horizon = horizon
        self.rounds = rounds
        self.inner = inner or Inner(options={"momentum": 0.9})
        self.grad_clip = grad_clip
        self.autocast = autocast
        self.gauge = gauge
        self.renew = choose_renewals(renew)
        self.method, self.metagrad, self.carry = choose_method(
            method, horizon=horizon, metagrad=metagrad, options=dict(metagrad_options or {}),
            meta_every=meta_every, carry=carry, adapt=adapt, batch=batch,
        )  # fmt: skip
        listed = choose_tasks(tasks, self.method)
        self.blueprint, self.phi = choose_model(
            model, listed, self.method,
            head=head, shared=shared, seed=seed, initialization=initialization, device=self.device,
            channels_last=channels_last,
        )  # fmt: skip
        self.layout = self.blueprint.layout
        self.outer = choose_meta_optimizer(
            self.method, self.phi, self.blueprint, self.inner,
            horizon=horizon, meta_lr=meta_lr, optimizer=meta_optimizer, options=dict(meta_options or {}),
        )  # fmt: skip
        self.roster = ActiveLearners(
            listed, self.blueprint, self.inner, self.world,
            seed=seed, batch_size=batch_size, tasks_per_round=tasks_per_round,
            heldout=heldout if self.metagrad.needs_heldout else 0.0,
            adapt_shared=self.method.adapt == "all",
            keep_gradients=self.metagrad.needs_gradients or self.carry.needs_gradients,
            workers=workers, device=self.device,
        )  # fmt: skip
        self.step = 0
        self.overlap = overlap
        self.pending: Callable[[], Tensor] | None = None
        """With `overlap`: waits for the mean meta-gradient `[P]` that phi has yet to follow."""
        self.tally = Counters(self.device, self.layout.dtype)
        self._asked = engine
        self.engine = choose(engine, self)
        self.world.same(self.initialization.digest(), "the first phi")

    # -- where the run stands --------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Scheduled inner steps of the whole run: rounds * horizon."""
        return self.rounds * self.horizon

    @property
    def round(self) -> int:
        """The round that the next inner step belongs to, from 0."""
        return self.step // self.horizon

    @property
    def k(self) -> int:
        """Inner steps that the running trajectories have taken; 0 at a round boundary."""
        return self.step % self.horizon

    @property
    def meta_lr(self) -> float:
        """beta."""
        return self.outer.lr

    @property
    def theta(self) -> Tensor:
        """The running trajectories `[T, P]`."""
        return self.roster.theta

    @property
    def learners(self) -> list[Learner]:
        """The local learners of the running round, row by row."""
        return self.roster.learners

    @property
    def initialization(self) -> Initialization:
        """phi as named tensors (copies on the CPU)."""
        tensors = {name: view.cpu().contiguous().clone() for name, view in self.layout.views(self.phi).items()}
        about = {
            "method": self.method.name,
            "seed": self.seed,
            "step": self.step,
            "heads": list(self.blueprint.heads),
        }
        return Initialization(tensors, about, model=self.blueprint.factory)

    # -- the loop --------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Event]:
        """Runs from where it stands to the end, one event per inner step."""
        while self.step < self.total_steps:
            yield self.advance()

    def advance(self) -> Event:
        """One inner step of all learners, and the meta-update if one is due (Algorithm 2, lines 6 to 13)."""
        with repeatable(self.device), self.engine.running():
            if self.k == 0:
                self._reset()
            losses, due = self.engine.step(self)
        round, k = divmod(self.step - 1, self.horizon)
        return Event(self.step, round, k + 1, self.tally.inner_steps, self.roster.names, losses, due)

    def take_step(self) -> tuple[Tensor, bool]:
        """One inner step of all learners, then phi and what runs on follow if a meta-update is due."""
        losses = self._inner_step()
        if self.gauge is not None:
            self.gauge.look(self)
        moved = self.pending is not None
        if self.pending is not None:
            self.move_phi(self.pending(), carry=True)
            self.pending = None
        if self.k % (self.method.meta_every or 1) == 0:
            gradient = self.mean_gradient()
            if self.overlap and self.k != 0:
                self.pending = self.world.sum_later(gradient)
            else:
                self.move_phi(self.world.sum_(gradient), carry=self.k != 0)
                moved = True
        return losses, moved

    def _reset(self) -> None:
        """theta_0 <- phi for every learner of the round; what else is renewed was chosen by `renew`."""
        self.roster.check_modules()
        if self.roster.assign(self.round):
            self.tally.seat(self.roster.names)
        if self.step > 0:
            for learner in self.learners:
                learner.renew(self.renew, self.round)
        if self.method.carry == "replay":
            self.roster.snapshot(self.roster.names)
        elif self.gauge is not None:
            self.roster.snapshot(self.gauge.chosen(self, self.round))
        self.carry.begin(self)
        self._begin()
        self.engine.begin(self)

    def _begin(self) -> None:
        self.theta.copy_(self.phi)
        self.metagrad.begin(self.theta)

    def _inner_step(self) -> Tensor:
        """theta_k <- theta_{k-1} - alpha grad L_k(theta_{k-1}) for every task; the losses `[T]`."""
        if self.method.joint:
            self.outer.lr = self.inner.lr_at(self.k / self.horizon)
        losses = self.engine.learners_step(self)
        self.step += 1
        losses_T = torch.stack(losses) if losses else self.theta.new_zeros(0)
        self.tally.count_step()
        self.observe(losses_T, self.step)
        return losses_T

    def observe(self, losses: Tensor, step: int | Tensor) -> None:
        """All learners took inner step number `step` (from 1) from these losses `[T]`; moves tensors alone."""
        self.tally.inner_step(losses, self.theta, step)
        self.metagrad.observe(self.theta, losses, self.roster.gradients)

    def step_of(self, learner: Learner, step: int, batch: Batch | None = None, *, seeded: bool = True) -> Tensor:
        """One learner's inner step on training batch `step`, which may be at hand already; its loss before the step."""
        k = step % self.horizon
        if batch is None:
            batch = learner.batches.train(step)
        if seeded:
            learner.seed_generators(step)
        ends = (k + 1) % (self.method.meta_every or 1) == 0
        return self.inner_update(learner, batch, lr=self.inner.lr_at(k / self.horizon), ends=ends)

    def inner_update(self, learner: Learner, batch: Batch, *, lr: float | Tensor, ends: bool) -> Tensor:
        """One learner's inner step on a batch, before a meta-update if it `ends` a segment; its loss before that."""
        shared = self.method.adapt == "all" or (self.metagrad.needs_gradients and ends)
        loss = learner.backward(batch, autocast=self.autocast, shared=shared)
        if self.metagrad.penalty:
            learner.add_proximal_gradient(self.phi, self.metagrad.penalty)
        if self.grad_clip is not None:
            learner.clip(self.grad_clip)
        if shared and self.roster.keep_gradients:
            learner.gather()
        learner.step(lr)
        learner.forget_gradients()
        return loss

    def mean_gradient(self) -> Tensor:
        """The rank's part of the mean meta-gradient `[P]`, in memory of its own."""
        probe = ExtraPasses(self.roster, self.phi, self.step, self.autocast)
        gradient = self.metagrad.mean(probe, self.roster.weights)
        self.tally.counts += probe.counts
        return gradient

    def move_phi(self, gradient: Tensor, *, carry: bool) -> None:
        """phi <- phi + delta with delta = -beta * mean MetaGrad (lines 11 to 13); theta follows if it runs on."""
        delta = self.outer.step(self.phi, gradient)
        self.tally.meta_update(delta)
        if carry:
            self.carry(self, delta)
            self.metagrad.carried(self.theta)

    def replay(self) -> None:
        """Runs the trajectories again from phi: same start, same batches, as many steps as before."""
        start, end = self.step - self.k, self.step
        self.roster.restore()
        self._begin()
        with self.tally.replaying():
            self.step = start
            while self.step < end:
                self._inner_step()

    def describe(self) -> dict[str, Any]:
        """What was resolved, as JSON values, to be printed at the start and kept with the run."""
        return {
            "method": self.method.name,
            "metagrad": self.method.metagrad,
            "meta_every": self.method.meta_every,
            "carry": self.method.carry,
            "adapt": self.method.adapt,
            "batch": self.method.batch,
            "meta_lr": self.meta_lr,
            "horizon": self.horizon,
            "rounds": self.rounds,
            "tasks": list(self.roster.tasks),
            "shared_parameters": self.layout.count,
            "shared": [entry.name for entry in self.layout.entries],
            "heads": list(self.blueprint.heads),
            "ranks": self.world.size,
            "engine": self.engine.name,
            **({"engine_because": self.engine.why} if self.engine.why else {}),
            "channels_last": self.blueprint.channels_last,
        }

    # -- metrics and tasks -----------------------------------------------------------------------------------

    def metrics(self) -> dict[str, Any]:
        """Where the run stands, from all ranks; call it on every rank.

        `step`, `round`, `k`; `inner_steps` (cumulative, per task, replays included), `gradient_evaluations`
        (over all tasks), `meta_update_norm` and for each task its mean `loss` since the last call and its `distance`
        ||theta - phi||. With a gauge also `approximation_errors`, the readings since the last call, and
        `gauge_evaluations`, the inner steps that all readings cost, which no other count holds.
        """
        distances = torch.linalg.vector_norm(self.theta - self.phi, dim=1).tolist()
        losses = self.tally.mean_losses()
        local = {
            n: {"loss": loss, "distance": d} for n, loss, d in zip(self.roster.names, losses, distances, strict=True)
        }
        readings = self.gauge.take() if self.gauge is not None else []
        gathered = self.world.gather((local, dict(self.tally.counts), readings))
        tasks = {name: row for rows, _, _ in gathered for name, row in rows.items()}
        counts = sum((Counter(counts) for _, counts, _ in gathered), Counter())
        return {
            "step": self.step,
            "round": max(self.step - 1, 0) // self.horizon,
            "k": max(self.step - 1, 0) % self.horizon + 1,
            "inner_steps": self.tally.inner_steps,
            **dict(sorted(counts.items())),
            "meta_update_norm": float(self.tally.update_norm),
            "tasks": {name: tasks[name] for name in self.roster.tasks if name in tasks},
            **({"approximation_errors": joined(read for _, _, read in gathered)} if self.gauge is not None else {}),
        }

    def check_finite(self) -> None:
        """Stops at the first loss or parameter that was not finite; call it on every rank.

        Raises:
            NonFiniteLoss: names the task, the step and the learning rates.
        """
        self.tally.refuse(self.world.gather(self.tally.first_bad()), inner_lr=self.inner.lr, meta_lr=self.meta_lr)

    def set_tasks(self, tasks: Sequence[Task] | Mapping[str, Task]) -> None:
        """Other source tasks from the next round on; those that stay keep head, statistics and optimizer state.

        Raises:
            UsageError: in the middle of a round, too few or too many tasks for the method, or a task that does not
                fit: it lacks a shared parameter, stays with another number of outputs, or is none for the engine that
                was asked for.
        """
        if self.k != 0:
            raise UsageError(f"tasks join and leave at a round boundary, and step {self.step} is at k = {self.k}")
        listed = choose_tasks(tasks, self.method)
        self.blueprint.admit(listed, self.seed)
        self.roster.replace_tasks(listed)
        self.theta.copy_(self.phi)
        self.tally.seat(self.roster.names)
        self.engine = choose(self._asked, self)
