"""Whole steps as CUDA graphs: batches, all forward and backward passes, inner steps, the meta-update and the shift.

A recorded step repeats kernels at fixed addresses with fixed arguments, so all that changes from step to step is in
tensors on the device: a clock, and tables that are filled ahead for `AHEAD` steps at once.

The loop's decisions (a meta-update or not, a carry or not) make three kinds of step. Each is run once
without recording, then recorded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trajshift.data.augmentation import ImageTransform, crop_keys
from trajshift.data.batches import TaskBatches, lies_on
from trajshift.data.sources import ArraySource, MappedSource, as_source
from trajshift.errors import UsageError, first_line
from trajshift.learners.inner_optimizer import optimizer_for
from trajshift.learners.learner import Learner
from trajshift.task import Batch
from trajshift.training.engines.loop import Engine, without_draws
from trajshift.training.engines.recorder import LANES, Body, Recorder
from trajshift.training.meta_optimizer import PlainMetaStep
from trajshift.training.meta_step import MetaStep, Moment

AHEAD = 128
"""Steps for which indices, augmentation and learning rates are put on the device at once."""
SMALL = 4_000_000
"""Bytes of a batch as stored (128 images of 3 x 84 x 84 pixels: 2.7 million) up to which they run side by side. A
larger one fills the device by itself, and every lane keeps the activations of its own learner. An estimate, not
measured."""
_WARMUP = 3
"""Steps taken without recording whenever addresses have changed."""


class Clock:
    """The position of the step in the schedule, on the device.

    Attributes:
        row: int64 `[1]`, the row of all tables that the step reads.
        step: int64 scalar, scheduled inner steps done.
        lr: float32 scalar, the inner learning rate; the kernel of the fused optimizer reads no other type.
    """

    def __init__(self, device: torch.device) -> None:
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.lr = torch.zeros((), dtype=torch.float32, device=device)
        self._rates = torch.zeros(AHEAD, dtype=torch.float32, device=device)

    def set(self, step: int, rates: list[float]) -> None:
        """Sets the clock to just before scheduled step number `step` (from 0); `rates` belong to the table's steps."""
        self.row.fill_(step % AHEAD)
        self.step.fill_(step)
        self._rates.copy_(torch.tensor(rates))

    def read(self) -> None:
        """The step begins."""
        self.lr.copy_(self.at(self._rates))
        self.step += 1

    def advance(self) -> None:
        """The step is done."""
        self.row += 1

    def at(self, table: Tensor) -> Tensor:
        """The table's entry for this step."""
        return table.index_select(0, self.row).squeeze(0)


class Feed:
    """One task's training batches, made on the device from tables."""

    def __init__(self, batches: TaskBatches, transform: ImageTransform | None) -> None:
        self._batches, self._transform = batches, transform
        source = batches.raw.source("train")
        assert isinstance(source, ArraySource)
        self._source = source
        self._indices = torch.zeros(AHEAD, batches.batch_size, dtype=torch.int64, device=source.device)
        random = transform is not None and transform.random
        self._draws = self._indices.new_zeros(AHEAD, 3, batches.batch_size) if random else None
        self._next = 0
        self._keys: list[tuple[int, int]] = []
        """Keys of the augmentation from step `_next` on, as far as they were computed ahead."""

    def fill(self, first: int) -> None:
        """Fills the tables for the steps from `first`, a multiple of `AHEAD`."""
        size = self._batches.batch_size
        self._indices.copy_(self._batches.raw.indices(first // AHEAD, "train", AHEAD * size).view(AHEAD, size))
        if self._draws is not None and self._transform is not None:
            if self._next != first:
                self._next, self._keys = first, []
            while len(self._keys) < AHEAD:
                self.look_ahead()
            self._draws.copy_(self._transform.draws(self._keys, size, self._draws.device))
            self._next, self._keys = first + AHEAD, []

    def look_ahead(self) -> None:
        """Hashes the keys of one more step of the next tables: doing all at once would make the device wait 20 ms."""
        if self._draws is not None and len(self._keys) < AHEAD:
            step = self._next + len(self._keys)
            self._keys.append(crop_keys(self._batches.augmentation_key("train", step)))

    def batch(self, clock: Clock) -> Batch:
        """The batch of the clock's step."""
        batch = self._source.fetch(clock.at(self._indices))
        if self._transform is not None:
            batch = self._transform.apply(batch, None if self._draws is None else clock.at(self._draws))
        return self._batches.cast(batch)


class Graph(Engine):
    """Records the steps and replays them.

    Args:
        recorder: how.
        or_loop: continue as the loop does where a step cannot be recorded after all, such as that of a model which
            reads a value on the host; False stops the run.
    """

    name = "graph"

    def __init__(self, recorder: Recorder, *, or_loop: bool = False) -> None:
        super().__init__()
        self._recorder = recorder
        self._or_loop = or_loop
        self._met: set[tuple[bool, bool]] = set()
        self._steps: dict[tuple[bool, bool], Body] = {}
        self._addresses: tuple[int, ...] = ()
        self._warm = 0
        self._expected = -1

    @staticmethod
    def obstacle(run: MetaStep) -> str | None:
        """Why this run cannot be recorded, or None."""
        method, active = run.method, run.active
        if run.world.size > 1 or run.overlap:
            return "several ranks communicate between steps"
        if not run.meta_gradient.recordable:
            return f"meta-gradient {method.metagrad} ({method.batch}) needs more than the recorded steps"
        if not run.carry.recordable:
            return f"carry {method.carry} is not the same work at every step"
        if run.observer is not None:
            return "the approximation error is measured between steps"
        if "optimizer" in run.renew or active.rows < len(active.local):
            return "each round has new learners"
        if run.inner.flat or not _reads_its_rate_on_the_device(run):
            return f"optimizer {run.inner.optimizer} is not one fused kernel"
        for task in active.tasks.values():
            if not lies_on(run.device, as_source(task.train)):
                return f"the examples of task {task.name!r} are not held on the device"
            if task.transform is not None and type(task.transform) is not ImageTransform:
                return f"the transform of task {task.name!r} is not trajshift's own"
        return None

    def begin(self, run: MetaStep) -> None:
        """Discards the recordings if a tensor has moved."""
        if self.name != "graph":
            return
        addresses = _addresses(run)
        if addresses == self._addresses:
            return
        self._addresses, self._warm = addresses, _WARMUP
        self._met.clear()
        self._steps.clear()
        self._recorder.forget()
        self._clock = Clock(run.device)
        self._losses = run.theta.new_zeros(len(run.learners))
        self._feeds = [Feed(learner.batches, _transform(learner.task.transform)) for learner in run.learners]
        self._launches = longest_first([_cost(learner) for learner in run.learners], self._recorder.lanes)
        self._expected = -1

    def step(self, run: MetaStep) -> tuple[Tensor, bool]:
        """Takes the recorded step, or records it first."""
        if self.name != "graph":
            return super().step(run)
        jumped = run.step != self._expected
        if jumped:
            self.begin(run)  # loading a checkpoint may have moved tensors
        if jumped or run.step % AHEAD == 0:
            self._fill(run)
        moment = run.moment(run.step)
        kind = moment.due, moment.carried
        body = self._body(run, moment)
        if self._warm or kind not in self._met:  # its first use of libraries must not be recorded
            self._met.add(kind)
            self._warm_up(run, body)
        elif kind in self._steps or self._record(run, kind, body):
            self._steps[kind]()
        else:
            return super().step(run)
        run.count()
        for feed in self._feeds:
            feed.look_ahead()  # the device is at work meanwhile
        self._expected = run.step
        return self._losses.clone(), moment.due

    def _body(self, run: MetaStep, moment: Moment) -> Body:
        """The work of a step, from the clock and the tables."""
        clock = self._clock
        recorded = replace(moment, number=clock.step, lr=clock.lr)

        def body() -> None:
            clock.read()
            run.meta_update(recorded, run.inner_step(recorded, self._side_by_side))
            clock.advance()

        return body

    def _side_by_side(self, run: MetaStep, moment: Moment) -> Tensor:
        """The inner step of every learner, each on one of the lanes."""
        losses = {}
        for row, lane in self._launches:
            with self._recorder.lane(lane):
                batch = self._feeds[row].batch(self._clock)
                losses[row] = run.inner_update(run.learners[row], moment, batch, seeded=False)
        self._recorder.join()
        return torch.stack([losses[row] for row in range(len(losses))], out=self._losses)

    def _warm_up(self, run: MetaStep, body: Body) -> None:
        """Takes the step without recording it."""
        with without_draws(run), self._recorder.warm():
            body()
        self._warm = max(0, self._warm - 1)
        self._addresses = _addresses(run)  # the inner optimizers have made their state now

    def _record(self, run: MetaStep, kind: tuple[bool, bool], body: Body) -> bool:
        """Records the step, or leaves the rest to the loop; a recording that failed has done nothing on the device.

        What the failed step computed is freed with its traceback when this returns: the loop's steps run on another
        stream and must not find autograd nodes left over from it.
        """
        try:
            self._steps[kind] = self._recorder.record(body)
        except RuntimeError as error:
            reason = f"a step cannot be recorded as a CUDA graph ({first_line(error.__context__ or error)})"
            for learner in run.learners:
                learner.forget_gradients()
            if not self._or_loop:
                raise UsageError(f"engine graph: {reason}; use engine=auto or engine=loop") from error
            warnings.warn(f"{reason}; the run continues with engine loop", stacklevel=3)
            self.name, self.why = "loop", reason
            self._steps.clear()
            return False
        return True

    def _fill(self, run: MetaStep) -> None:
        first = run.step - run.step % AHEAD
        rates = [run.inner.lr_at(step % run.horizon / run.horizon) for step in range(first, first + AHEAD)]
        self._clock.set(run.step, rates)
        for feed in self._feeds:
            feed.fill(first)


def lanes_for(run: MetaStep) -> int:
    """How many learners of a run that can be recorded should run side by side."""
    sizes = []
    for task in run.active.tasks.values():
        source = as_source(task.train)
        assert isinstance(source, (ArraySource, MappedSource))
        sizes.append((task.batch_size or run.active.batch_size) * (source.bytes // len(source)))
    return LANES if max(sizes) <= SMALL else 1


def longest_first(costs: Sequence[float], lanes: int) -> list[tuple[int, int]]:
    """(row, lane) in the order to launch: the costliest first, each on the lane with the least work so far."""
    load = [0.0] * lanes
    launches = []
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        lane = load.index(min(load))
        load[lane] += costs[row]
        launches.append((row, lane))
    return launches


def _cost(learner: Learner) -> float:
    """Cost of an inner step, in units that all learners share: the pixels of its batch, or its bytes without images."""
    shape, source = learner.task.input_shape, learner.batches.raw.source("train")
    assert isinstance(source, ArraySource)
    each = math.prod(shape[-2:]) if shape else source.bytes // len(source)
    return learner.batches.batch_size * each


def _transform(transform: object) -> ImageTransform | None:
    return transform if isinstance(transform, ImageTransform) else None


def _reads_its_rate_on_the_device(run: MetaStep) -> bool:
    """Whether the inner optimizer reads its rate on the device, and the meta-optimizer needs none."""
    trial = optimizer_for(run.inner, [torch.nn.Parameter(torch.zeros(1, device=run.device))])
    fused = isinstance(trial, torch.optim.SGD) and all(group["fused"] for group in trial.param_groups)
    return fused and (run.method.joint or isinstance(run.meta_optimizer, PlainMetaStep))


def _addresses(run: MetaStep) -> tuple[int, ...]:
    """Addresses of all tensors that a recorded step uses."""
    return tuple(tensor.data_ptr() for tensor in _state(run))


def _state(run: MetaStep) -> Iterator[Tensor]:
    yield from (run.phi, run.theta, run.gradients, run.active.weights)
    yield from (run.counters.loss_sum, run.counters.first_bad_step, run.counters.update_norm)
    for learner in run.learners:
        yield from learner.state()[0].values()
        source = learner.batches.raw.source("train")
        yield from tree_leaves(source.tree) if isinstance(source, ArraySource) else ()
    yield from run.meta_optimizer.state()[0].values()
