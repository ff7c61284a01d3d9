"""Which tasks hold a row of the matrix: those of the round on this rank; and the saved state of the others.

A task has one home rank for the whole run, so its head and statistics are never sent to another. Only the tasks of the
running round hold a row, a module and optimizer state; the others keep head and statistics on the CPU.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trajshift.data.batches import TaskBatches
from trajshift.data.loader import PrefetchLoader
from trajshift.distributed import World, balance
from trajshift.errors import UsageError
from trajshift.learners.constants import drawn as changed
from trajshift.learners.learner import Learner
from trajshift.learners.modules import fresh_module, head_key
from trajshift.learners.parameter_matrix import Trajectories
from trajshift.learners.sharing import Blueprint
from trajshift.rng import generator_state, key, permutation, seeded
from trajshift.settings import Inner
from trajshift.task import Task, move

Snapshot = tuple[dict[str, Tensor], dict[str, Any]]


class ActiveLearners:
    """The learners of the running round on this rank, row by row.

    Attributes:
        learners: row r of `theta` `[T, P]` belongs to `learners[r]`.
        gradients: `[T, P]`; with `keep_gradients` False `[T, 0]`.
        weights: `[T]`, the learners' share in the mean over all tasks of the round on all ranks.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        blueprint: Blueprint,
        inner: Inner,
        world: World,
        *,
        seed: int,
        batch_size: int,
        tasks_per_round: int | None,
        heldout: float,
        adapt_shared: bool,
        keep_gradients: bool,
        workers: int,
        device: torch.device,
    ) -> None:
        self.tasks = _checked(tasks, tasks_per_round)
        self.blueprint = blueprint
        self.inner = inner
        self.world = world
        self.seed = seed
        self.tasks_per_round = tasks_per_round
        self.batch_size = batch_size
        self.heldout = heldout
        self.adapt_shared = adapt_shared
        self.keep_gradients = keep_gradients or inner.flat
        self.workers = workers
        self.device = device
        self.home = self._homes({})
        self.blueprint.constants.moving |= self._moving()
        self.waiting: dict[str, dict[str, Tensor]] = {}
        self.learners: list[Learner] = []
        self.weights = torch.zeros(0, dtype=blueprint.layout.dtype, device=device)
        self.snapshots: dict[str, Snapshot] = {}
        self._stream: PrefetchLoader | None = None
        self._allocate()

    def _homes(self, kept: dict[str, int]) -> dict[str, int]:
        if self.world.size == 1:
            return dict.fromkeys(self.tasks, 0)
        return balance({name: self._cost(task) for name, task in self.tasks.items()}, self.world.size, kept)

    def _cost(self, task: Task) -> float:
        """Floating-point operations of one traced forward pass of a whole batch."""
        with FlopCounterMode(display=False) as counter:
            self._trial(task)
        return float(counter.get_total_flops())

    def draws(self, name: str) -> bool:
        """Whether a training pass of the task draws from a global generator, as dropout does.

        The pass has gradients, as those of training: a model may ask for `torch.is_grad_enabled()`.
        """
        with seeded(0, self.device):
            before = generator_state(self.device)
            _, loss = self._trial(self.tasks[name])
            if loss.requires_grad:
                loss.sum().backward()
            return not torch.equal(before, generator_state(self.device))

    def _moving(self) -> set[str]:
        """Frozen parameters that a training pass of a task changes, as it does the average of weights in a teacher."""
        found: set[str] = set()
        frozen = self.blueprint.constants.frozen
        for name in self.local if frozen else ():
            with seeded(0, self.device):
                module, _ = self._trial(self.tasks[name])
            before = fresh_module(self.blueprint.factory, self.tasks[name], head_key(self.seed, name))
            found |= changed(before, module) & frozen
        return found.union(*self.world.gather(found)) if frozen else found

    def _trial(self, task: Task) -> tuple[nn.Module, Tensor]:
        """A training pass of a temporary module on the first batch, drawn on the CPU so that no source moves."""
        raw = self._batches(task, torch.device("cpu")).train(0, seeded=False)
        module = fresh_module(self.blueprint.factory, task, head_key(self.seed, task.name)).to(self.device)
        with torch.enable_grad():
            return module, task.compute_loss(module, move(raw, self.device))

    def _batches(self, task: Task, device: torch.device) -> TaskBatches:
        return TaskBatches(
            task, seed=self.seed, batch_size=self.batch_size,
            device=device, heldout=self.heldout, dtype=self.blueprint.layout.dtype,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """The most tasks that run on this rank in a round."""
        return min(len(self.local), self.tasks_per_round or len(self.tasks))

    @property
    def local(self) -> list[str]:
        """Names of the tasks whose home is this rank, in the run's order."""
        return [name for name in self.tasks if self.home[name] == self.world.rank]

    def sampled(self, round: int) -> list[str]:
        """The tasks of a round on all ranks, in the run's order: a pure function of seed and round."""
        names = list(self.tasks)
        if self.tasks_per_round is None:
            return names
        order = permutation(key(self.seed, "tasks", round), len(names))
        return [names[index] for index in sorted(order[: self.tasks_per_round].tolist())]

    # -- rows ------------------------------------------------------------------------------------------------

    def _allocate(self) -> None:
        self._trajectories = Trajectories(self.blueprint.layout, self.rows, self.device)
        columns = self.blueprint.layout.size if self.keep_gradients else 0
        self._gradients = self._trajectories.theta.new_zeros(self.rows, columns)

    @property
    def theta(self) -> Tensor:
        """`[T, P]`, a view of the rows in use."""
        return self._trajectories.theta[: len(self.learners)]

    @property
    def gradients(self) -> Tensor:
        """`[T, P]`, a view of the rows in use."""
        return self._gradients[: len(self.learners)]

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks that hold a row, row by row."""
        return tuple(learner.task.name for learner in self.learners)

    def assign(self, round: int) -> bool:
        """Gives rows to the tasks of a round; returns whether any changed. Rows follow the run's order of tasks."""
        everywhere = self.sampled(round)
        names = [name for name in everywhere if self.home[name] == self.world.rank]
        total = sum(self.tasks[name].weight for name in everywhere)
        shares = [self.tasks[name].weight / total for name in names]
        if len(shares) != len(self.weights):
            self.weights = torch.zeros(len(shares), dtype=self.blueprint.layout.dtype, device=self.device)
        self.weights.copy_(torch.tensor(shares, dtype=torch.float64))
        if names == list(self.names):
            return False
        seated = {learner.task.name: learner for learner in self.learners}
        for name, learner in seated.items():
            if name not in names:
                self.waiting[name] = {label: t.to("cpu", copy=True) for label, t in learner.own_tensors().items()}
        self.learners = []  # frees the memory of the learners that leave before new ones allocate theirs
        seated = {name: seated[name] for name in names if name in seated}
        self._seat([seated[name] if name in seated else self._enter(name) for name in names])
        return True

    def resume(self, seated: Sequence[str], round: int | None) -> None:
        """Gives rows to the tasks of a running round, or (round None, at a boundary) of the round that ended."""
        if round is not None:
            self.assign(round)
        else:
            self._seat([self._enter(name) for name in seated])

    def _seat(self, learners: list[Learner]) -> None:
        self.learners = learners
        for row, learner in enumerate(learners):
            learner.bind(self._trajectories, self._gradients if self.keep_gradients else None, row)
        if self._stream is not None:
            self._stream.close()
        if self.workers:
            self._stream = PrefetchLoader({learner.task.name: learner.batches for learner in learners}, self.workers)

    def _enter(self, name: str) -> Learner:
        task = self.tasks[name]
        learner = Learner(
            task, self._batches(task, self.device), self.blueprint, self.inner,
            seed=self.seed, adapt_shared=self.adapt_shared, device=self.device,
        )  # fmt: skip
        if name in self.waiting:
            learner.load_own_tensors(self.waiting.pop(name))
        return learner

    def replace_tasks(self, tasks: Sequence[Task]) -> None:
        """Replaces the tasks from the next round on; those that stay keep head and statistics and take the new data."""
        self.tasks = _checked(tasks, self.tasks_per_round)
        self.home = self._homes({name: rank for name, rank in self.home.items() if name in self.tasks})
        self.waiting = {name: tensors for name, tensors in self.waiting.items() if name in self.tasks}
        self._allocate()
        staying = [learner for learner in self.learners if learner.task.name in self.tasks]
        for learner in staying:
            task = self.tasks[learner.task.name]
            if task is not learner.task:
                learner.take(task, self._batches(task, self.device))
        self._seat(staying)

    def check_modules(self) -> None:
        """Rejects modules whose parameters no longer share memory with the parameter matrix, or changed if frozen."""
        self.blueprint.constants.check()
        for learner in self.learners:
            learner.check_module()

    # -- replay ----------------------------------------------------------------------------------------------

    def snapshot(self, names: Collection[str]) -> None:
        """Saves all that belongs to these tasks at the start of a round: head, statistics, optimizer state."""
        self.snapshots = {}
        for learner in (learner for learner in self.learners if learner.task.name in names):
            tensors, numbers = learner.state()
            self.snapshots[learner.task.name] = (
                {label: t.clone() for label, t in tensors.items()},
                dict(numbers),
            )

    def restore(self) -> None:
        """Restores the snapshot."""
        for learner in self.learners:
            learner.load(*self.snapshots[learner.task.name])


def _checked(tasks: Sequence[Task], tasks_per_round: int | None) -> dict[str, Task]:
    """The tasks by name, enough of them for a round."""
    if tasks_per_round is not None and not 1 <= tasks_per_round <= len(tasks):
        raise UsageError(
            f"tasks_per_round is {tasks_per_round}; use a number from 1 to {len(tasks)}, the number of tasks"
        )
    return {task.name: task for task in tasks}
