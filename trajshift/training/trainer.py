"""What a user works with: a `MetaTrainer` built from options and tasks, iterated one inner step at a time.

The step itself is `trajshift.training.meta_step`. Shapes: T learners on this rank, P shared numbers each, padding
included.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from trajshift.algorithm.methods import Method, ResolvedMethod
from trajshift.distributed import World, set_threads
from trajshift.errors import UsageError
from trajshift.learners.active_learners import ActiveLearners
from trajshift.learners.initialization import Initialization
from trajshift.learners.inner_optimizer import optimizer_class
from trajshift.learners.learner import Learner
from trajshift.learners.modules import Factory
from trajshift.learners.parameter_matrix import Layout
from trajshift.models.kernels.switch import EAGER, FUSED, fused_kernels, fused_on
from trajshift.rng import repeatable
from trajshift.settings import Execution, Inner, Meta, check_sections, refuse_unknown_arguments
from trajshift.task import Task
from trajshift.training.approximation_error import ApproximationErrorMeter, joined
from trajshift.training.engines.choose import choose_engine
from trajshift.training.meta_step import MetaStep
from trajshift.training.resolve_options import (
    choose_autocast,
    choose_meta_optimizer,
    choose_method,
    choose_model,
    choose_renewals,
    choose_tasks,
)


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
        method: a preset of `trajshift.METHODS`, or your own `Method`.
        horizon: K, inner steps between resets.
        rounds: M, trajectories per task.
        inner: the inner optimizer, its learning rate (alpha) and schedule.
        meta: the meta-learning rate (beta), phi's optimizer, and what replaces the preset's choices.
        execution: device, engine, number format and processes.
        batch_size: examples per task and inner step.
        seed: decides phi, heads, batches and all other draws.
        head: dotted name(s) of the head; None finds `fc`, `head`, `heads` or `classifier`.
        shared: name patterns of the shared parameters; None shares all with equal name and shape but the head.
        renew: what a reset renews besides theta: `heads`, `optimizer`, `statistics`. Nothing, as published.
        tasks_per_round: tasks sampled at each reset; None takes all. A task that was not in the last round
            starts with fresh optimizer state.
        initialization: where phi starts; None draws it from the seed.
        heldout: fraction of each training set kept for held-out batches, where the method needs them.
        error_meter: measures the shift's approximation error; None does not.

    Raises:
        UsageError: an argument that does not fit, explained in one sentence.
    """

    def __init__(
        self,
        model: Factory | nn.Module,
        tasks: Sequence[Task] | Mapping[str, Task],
        method: str | Method = "trajectory-shifting",
        *,
        horizon: int = 1000,
        rounds: int = 200,
        inner: Inner = Inner(),
        meta: Meta = Meta(),
        execution: Execution = Execution(),
        batch_size: int = 128,
        seed: int = 0,
        head: str | Sequence[str] | None = None,
        shared: Sequence[str] | None = None,
        renew: Collection[str] = (),
        tasks_per_round: int | None = None,
        initialization: Initialization | Mapping[str, Tensor] | None = None,
        heldout: float = 0.2,
        error_meter: ApproximationErrorMeter | None = None,
        **unknown: NoReturn,
    ) -> None:
        refuse_unknown_arguments("MetaTrainer", unknown, set(signature(MetaTrainer).parameters) - {"unknown"})
        check_sections(inner=inner, meta=meta, execution=execution)
        if rounds < 1:
            raise UsageError(f"rounds is {rounds}; use at least 1")
        optimizer_class(inner.optimizer)  # fails here rather than at the first step
        world = World.current(str(execution.device))
        device = world.place(execution.device)
        if execution.threads is not None:
            set_threads(world, execution.threads)
        chosen, meta_gradient, carry = choose_method(
            method, horizon=horizon, metagrad=meta.gradient, options=dict(meta.gradient_options),
            meta_every=meta.every, carry=meta.carry, adapt=meta.adapt, batch=meta.batch,
        )  # fmt: skip
        listed = choose_tasks(tasks, chosen)
        blueprint, phi = choose_model(
            model, listed, head=head, shared=shared, seed=seed, initialization=initialization, device=device,
            channels_last=execution.channels_last,
        )  # fmt: skip
        meta_optimizer = choose_meta_optimizer(
            chosen, phi, blueprint, inner,
            horizon=horizon, meta_lr=meta.lr, optimizer=meta.optimizer, options=dict(meta.options),
        )  # fmt: skip
        active = ActiveLearners(
            listed, blueprint, inner, world,
            seed=seed, batch_size=batch_size, tasks_per_round=tasks_per_round,
            heldout=heldout if meta_gradient.needs_heldout else 0.0,
            adapt_shared=chosen.adapt == "all",
            keep_gradients=meta_gradient.needs_gradients or carry.needs_gradients,
            workers=execution.workers, device=device,
        )  # fmt: skip
        self.rounds = rounds
        self.meta_step = MetaStep(
            method=chosen, meta_gradient=meta_gradient, carry=carry, meta_optimizer=meta_optimizer, inner=inner,
            active=active, world=world, phi=phi, horizon=horizon, seed=seed, device=device,
            autocast=choose_autocast(execution.autocast), grad_clip=inner.grad_clip, overlap=execution.overlap,
            renew=choose_renewals(renew), observer=error_meter,
        )  # fmt: skip
        self.kernels = FUSED if fused_on(device) else EAGER
        """`fused` or `eager`: they differ in the last bits, so a resumed run takes what it began with."""
        self._asked = execution.engine
        self.engine = choose_engine(self._asked, self.meta_step)
        world.same(self.initialization.digest(), "the first phi")
        for doubt in blueprint.doubts if world.rank == 0 else ():
            print(f"warning: {doubt}", file=sys.stderr)

    # -- the state of the run --------------------------------------------------------------------------------

    @property
    def method(self) -> ResolvedMethod:
        """The method with all its choices resolved."""
        return self.meta_step.method

    @property
    def horizon(self) -> int:
        """K, inner steps between resets."""
        return self.meta_step.horizon

    @property
    def total_steps(self) -> int:
        """Scheduled inner steps of the whole run: rounds * horizon."""
        return self.rounds * self.horizon

    @property
    def step(self) -> int:
        """Scheduled inner steps done."""
        return self.meta_step.step

    @property
    def round(self) -> int:
        """The round that the next inner step belongs to, from 0."""
        return self.meta_step.round

    @property
    def k(self) -> int:
        """Inner steps that the running trajectories have taken; 0 at a round boundary."""
        return self.meta_step.k

    @property
    def meta_lr(self) -> float:
        """beta; in joint training the inner learning rate of the next step."""
        run = self.meta_step
        return run.moment(run.step).lr if run.method.joint else run.meta_optimizer.lr  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """The device of phi and of all learners."""
        return self.meta_step.device

    @property
    def layout(self) -> Layout:
        """Names, shapes and offsets of the shared parameters in a row."""
        return self.meta_step.layout

    @property
    def phi(self) -> Tensor:
        """The shared initialization `[P]`."""
        return self.meta_step.phi

    @property
    def theta(self) -> Tensor:
        """The running trajectories `[T, P]`."""
        return self.meta_step.theta

    @property
    def learners(self) -> list[Learner]:
        """The local learners of the running round, row by row."""
        return self.meta_step.learners

    @property
    def initialization(self) -> Initialization:
        """phi as named tensors (copies on the CPU)."""
        return self.meta_step.initialization

    # -- the loop --------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Event]:
        """Runs from the current step to the end, one event per inner step."""
        while self.step < self.total_steps:
            yield self.advance()

    def advance(self) -> Event:
        """One inner step of all learners, and the meta-update if one is due (Algorithm 2, lines 6 to 13)."""
        run = self.meta_step
        with repeatable(run.device), fused_kernels(self.kernels == FUSED):
            if run.k == 0:
                run.begin_round()
                self.engine.begin(run)
            losses, moved = self.engine.step(run)
            if run.k in (1, 0):  # a forward that replaces a parameter is caught before its round ends
                run.active.check_modules()
        round, k = divmod(run.step - 1, run.horizon)
        return Event(run.step, round, k + 1, run.counters.inner_steps, run.tasks, losses, moved)

    def describe(self) -> dict[str, Any]:
        """The resolved choices, as JSON values, to be printed at the start and kept with the run."""
        run, method = self.meta_step, self.method
        blueprint = run.active.blueprint
        return {
            "method": method.name,
            "metagrad": method.metagrad,
            "meta_every": method.meta_every,
            "carry": method.carry,
            "adapt": method.adapt,
            "batch": method.batch,
            "meta_lr": self.meta_lr,
            "horizon": self.horizon,
            "rounds": self.rounds,
            "tasks": list(run.active.tasks),
            "shared_parameters": self.layout.count,
            "shared": [entry.name for entry in self.layout.entries],
            "heads": list(blueprint.heads),
            "ranks": run.world.size,
            "engine": self.engine.name,
            **({"engine_because": self.engine.why} if self.engine.why else {}),
            "channels_last": blueprint.channels_last,
            "kernels": self.kernels,
        }

    # -- metrics and tasks -----------------------------------------------------------------------------------

    def metrics(self) -> dict[str, Any]:
        """The state of the run, gathered from all ranks; call it on every rank.

        `step`, `round`, `k`; `inner_steps` (cumulative, per task, replays included), `gradient_evaluations`
        (over all tasks), `meta_update_norm` and for each task its mean `loss` since the last call and its `distance`
        ||theta - phi||. With an error meter also `approximation_errors`, the readings since the last call, and
        `gauge_evaluations`, the inner steps that all readings cost, which no other count includes.
        """
        run = self.meta_step
        distances = torch.linalg.vector_norm(run.theta - run.phi, dim=1).tolist()
        losses = run.counters.mean_losses()
        local = {n: {"loss": loss, "distance": d} for n, loss, d in zip(run.tasks, losses, distances, strict=True)}
        readings = run.observer.take() if run.observer is not None else []
        gathered = run.world.gather((local, dict(run.counters.counts), readings))
        tasks = {name: row for rows, _, _ in gathered for name, row in rows.items()}
        counts = sum((Counter(counts) for _, counts, _ in gathered), Counter())
        return {
            "step": run.step,
            "round": max(run.step - 1, 0) // run.horizon,
            "k": max(run.step - 1, 0) % run.horizon + 1,
            "inner_steps": run.counters.inner_steps,
            **dict(sorted(counts.items())),
            "meta_update_norm": float(run.counters.update_norm),
            "tasks": {name: tasks[name] for name in run.active.tasks if name in tasks},
            **({"approximation_errors": joined(read for _, _, read in gathered)} if run.observer is not None else {}),
        }

    def check_finite(self) -> None:
        """Stops at the first loss or parameter that was not finite; call it on every rank.

        Raises:
            NonFiniteLoss: names the task, the step and the learning rates.
        """
        run = self.meta_step
        run.counters.refuse(run.world.gather(run.counters.first_bad()), inner_lr=run.inner.lr, meta_lr=self.meta_lr)

    def set_tasks(self, tasks: Sequence[Task] | Mapping[str, Task]) -> None:
        """Replaces the source tasks from the next round on; those that stay keep head, statistics and optimizer state.

        Raises:
            UsageError: in the middle of a round, too few or too many tasks for the method, or a task that does not
                fit: it lacks a shared parameter, stays with another number of outputs, or cannot run on the engine
                that was asked for.
        """
        run = self.meta_step
        if run.k != 0:
            raise UsageError(
                f"tasks join and leave only at a round boundary, but step {run.step} is at k = {run.k}; "
                "call set_tasks after the last step of a round"
            )
        listed = choose_tasks(tasks, run.method)
        run.active.blueprint.admit(listed, run.seed)
        run.active.replace_tasks(listed)
        run.theta.copy_(run.phi)
        run.counters.seat(run.tasks)
        self.engine = choose_engine(self._asked, run)
