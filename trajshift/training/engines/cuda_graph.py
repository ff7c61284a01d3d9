"""Whole steps as CUDA graphs: batches, all forward and backward passes, inner steps, the meta-update and the shift.

A recorded step repeats kernels at fixed addresses with fixed arguments, so all that changes from step to step lies in
tensors on the device: a clock, and tables that are filled ahead for `AHEAD` steps at once.

The loop's decisions (a meta-update or not, a carry or not) make three kinds of step. Each is taken once
as it is, then recorded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trajshift.algorithm.meta_gradients import Displacement, LastGradient
from trajshift.data.augmentation import ImageTransform, crop_keys
from trajshift.data.batches import TaskBatches, lies_on
from trajshift.data.sources import ArraySource, MappedSource, as_source
from trajshift.errors import UsageError
from trajshift.task import Batch
from trajshift.training.engines.loop import Engine, without_draws
from trajshift.training.meta_optimizer import PlainStep

if TYPE_CHECKING:
    from trajshift.learners.learner import Learner
    from trajshift.training.trainer import MetaTrainer

AHEAD = 128
"""Steps for which indices, augmentation and learning rates are put on the device at once."""
LANES = 8
"""Streams on which learners run side by side. On one H200 the paper's eight tasks take 21.2 ms on 8, 22.6 on 4, 40.6
on one (results/speed)."""
SMALL = 4_000_000
"""Bytes of a batch as stored (128 images of 3 x 84 x 84 pixels: 2.7 million) up to which they do. A larger one fills
the device by itself, and every lane holds the activations of its own learner. Reasoned, not measured."""
_WARMUP = 3
"""Steps taken without recording wherever addresses are new."""

Body = Callable[[], None]


class Recorder(Protocol):
    """Records device work without doing it."""

    lanes: int
    """How many there are."""

    def record(self, body: Body) -> Body:
        """What does the work of `body` whenever called; `body` runs once, its work does not.

        Raises:
            RuntimeError: the body waits for the device, or does something else that cannot be recorded.
        """
        ...

    def forget(self) -> None:
        """All that was recorded is gone."""
        ...

    def warm(self) -> AbstractContextManager[None]:
        """Surrounds a step that is not recorded."""
        ...

    def lane(self, number: int) -> AbstractContextManager[None]:
        """Work inside may run beside that of other lanes."""
        ...

    def join(self) -> None:
        """What follows waits for all lanes."""
        ...


class CudaRecorder:
    """CUDA graphs that share one memory pool, over several streams."""

    def __init__(self, device: torch.device, lanes: int = LANES) -> None:
        self._device = device
        self.forget()
        self.lanes = lanes
        self._lanes = [torch.cuda.Stream(device) for _ in range(lanes)]
        self._used: set[int] = set()
        self._capture = torch.cuda.Stream(device)

    def record(self, body: Body) -> Body:
        """As `Recorder`."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._capture):
                body()
        except RuntimeError:
            torch.cuda.set_stream(stream)  # a recording that fails stays on its own
            raise
        return graph.replay

    def forget(self) -> None:
        """As `Recorder`; a pool of memory whose graphs are gone cannot be used again."""
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def warm(self) -> Iterator[None]:
        """On the stream that will record, as its first use of libraries must not be recorded."""
        self._capture.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._capture):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._capture)

    @contextmanager
    def lane(self, number: int) -> Iterator[None]:
        """One of the streams."""
        self._used.add(number)
        stream = self._lanes[number]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """The current stream waits for the lanes used; one that is not part of the recording must not be waited for."""
        for number in sorted(self._used):
            torch.cuda.current_stream(self._device).wait_stream(self._lanes[number])
        self._used.clear()


class Clock:
    """Where the step stands, on the device.

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
        """Puts the clock before scheduled step number `step` (from 0); `rates` are those of the table's steps."""
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
        """Of the augmentation from step `_next` on, as far as they were computed ahead."""

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
        """Hashes the keys of one more step of the next tables: all at once would let the device wait 20 ms."""
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
        or_loop: go on with the loop where a step cannot be recorded after all, such as that of a model which reads a
            value on the host; False stops the run.
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
    def obstacle(trainer: MetaTrainer) -> str | None:
        """Why this run cannot be recorded, or None."""
        method, roster = trainer.method, trainer.roster
        if trainer.world.size > 1 or trainer.overlap:
            return "several ranks talk between steps"
        if type(trainer.metagrad) not in (Displacement, LastGradient) or trainer.metagrad.needs_heldout:
            return f"meta-gradient {method.metagrad} ({method.batch}) is not made of recorded steps alone"
        if method.carry not in ("shift", "hold"):
            return f"carry {method.carry} is not the same work at every step"
        if trainer.gauge is not None:
            return "the approximation error is measured meanwhile"
        if "optimizer" in trainer.renew or roster.rows < len(roster.local):
            return "each round has new learners"
        if trainer.inner.flat or not _recordable(trainer):
            return f"optimizer {trainer.inner.optimizer} is not one fused kernel"
        for task in roster.tasks.values():
            if not lies_on(trainer.device, as_source(task.train)):
                return f"the examples of task {task.name!r} are not held on the device"
            if task.transform is not None and type(task.transform) is not ImageTransform:
                return f"the transform of task {task.name!r} is not trajshift's own"
        return None

    def begin(self, trainer: MetaTrainer) -> None:
        """Forgets what was recorded where a tensor lies elsewhere now."""
        addresses = _addresses(trainer)
        if addresses == self._addresses:
            return
        self._addresses, self._warm = addresses, _WARMUP
        self._met.clear()
        self._steps.clear()
        self._recorder.forget()
        self._clock = Clock(trainer.device)
        self._losses = trainer.theta.new_zeros(len(trainer.learners))
        self._feeds = [Feed(learner.batches, _transform(learner.task.transform)) for learner in trainer.learners]
        self._launches = longest_first([_cost(learner) for learner in trainer.learners], self._recorder.lanes)
        self._expected = -1

    def step(self, trainer: MetaTrainer) -> tuple[Tensor, bool]:
        """Takes the recorded step, or records it first."""
        jumped = trainer.step != self._expected
        if jumped:
            self.begin(trainer)  # a checkpoint may have put tensors elsewhere
        if jumped or trainer.step % AHEAD == 0:
            self._fill(trainer)
        after = (trainer.step + 1) % trainer.horizon
        kind = due, _ = (after % (trainer.method.meta_every or 1) == 0, after != 0)
        body = self._body(trainer, *kind)
        if self._warm or kind not in self._met:  # its first use of libraries must not be recorded
            self._met.add(kind)
            self._warm_up(trainer, body)
        elif kind in self._steps or self._record(trainer, kind, body):
            self._steps[kind]()
        else:
            return trainer.engine.step(trainer)
        if trainer.method.joint:
            trainer.outer.lr = trainer.inner.lr_at(trainer.k / trainer.horizon)
        trainer.step += 1
        trainer.tally.count_step()
        for feed in self._feeds:
            feed.look_ahead()  # the device is at work meanwhile
        self._expected = trainer.step
        return self._losses.clone(), due

    def _warm_up(self, trainer: MetaTrainer, body: Body) -> None:
        """Takes the step without recording it."""
        with without_draws(trainer), self._recorder.warm():
            body()
        self._warm = max(0, self._warm - 1)
        self._addresses = _addresses(trainer)  # the inner optimizers have made their state now

    def _record(self, trainer: MetaTrainer, kind: tuple[bool, bool], body: Body) -> bool:
        """Records the step, or leaves the rest to the loop; a recording that failed has done nothing on the device.

        What the failed step has computed goes with its traceback when this returns: the loop's steps are on another
        stream, and must not meet nodes of autograd that are left of it.
        """
        try:
            self._steps[kind] = self._recorder.record(body)
        except RuntimeError as error:
            first_line = str(error.__context__ or error).partition("\n")[0]
            reason = f"a step cannot be recorded as a CUDA graph ({first_line})"
            for learner in trainer.learners:
                learner.forget_gradients()
            if not self._or_loop:
                raise UsageError(f"engine graph: {reason}; use engine=auto or engine=loop") from error
            warnings.warn(f"{reason}; the run goes on with engine loop", stacklevel=3)
            trainer.engine = Engine(why=reason)
            return False
        return True

    def _fill(self, trainer: MetaTrainer) -> None:
        first = trainer.step - trainer.step % AHEAD
        rates = [trainer.inner.lr_at(step % trainer.horizon / trainer.horizon) for step in range(first, first + AHEAD)]
        self._clock.set(trainer.step, rates)
        for feed in self._feeds:
            feed.fill(first)

    def _body(self, trainer: MetaTrainer, due: bool, carried: bool) -> Body:
        """A step as `MetaTrainer.take_step` does it, from the clock and the tables."""
        clock = self._clock

        def body() -> None:
            clock.read()
            if trainer.method.joint:
                trainer.outer.lr = clock.lr  # type: ignore[assignment]  # the device reads it
            losses = {}
            for row, lane in self._launches:
                with self._recorder.lane(lane):
                    batch = self._feeds[row].batch(clock)
                    losses[row] = trainer.follow_gradient(trainer.learners[row], batch, lr=clock.lr, ends=due)
            self._recorder.join()
            torch.stack([losses[row] for row in range(len(losses))], out=self._losses)
            trainer.observe(self._losses, clock.step)
            if due:
                trainer.move_phi(trainer.mean_gradient(), carry=carried)
            clock.advance()

        return body


def lanes_for(trainer: MetaTrainer) -> int:
    """How many learners of a run that can be recorded should run side by side."""
    sizes = []
    for task in trainer.roster.tasks.values():
        source = as_source(task.train)
        assert isinstance(source, (ArraySource, MappedSource))
        sizes.append((task.batch_size or trainer.roster.batch_size) * (source.bytes // len(source)))
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
    """Of an inner step, in units that all learners share: the pixels of its batch, or its bytes without images."""
    shape, source = learner.task.input_shape, learner.batches.raw.source("train")
    assert isinstance(source, ArraySource)
    each = math.prod(shape[-2:]) if shape else source.bytes // len(source)
    return learner.batches.batch_size * each


def _transform(transform: object) -> ImageTransform | None:
    return transform if isinstance(transform, ImageTransform) else None


def _recordable(trainer: MetaTrainer) -> bool:
    """Whether the inner optimizer reads its learning rate on the device, and the meta-optimizer none at all."""
    probe = trainer.inner.build([torch.nn.Parameter(torch.zeros(1, device=trainer.device))])
    fused = isinstance(probe, torch.optim.SGD) and all(group["fused"] for group in probe.param_groups)
    return fused and (trainer.method.joint or isinstance(trainer.outer, PlainStep))


def _addresses(trainer: MetaTrainer) -> tuple[int, ...]:
    """Of all tensors that a recorded step uses."""
    return tuple(tensor.data_ptr() for tensor in _state(trainer))


def _state(trainer: MetaTrainer) -> Iterator[Tensor]:
    yield from (trainer.phi, trainer.theta, trainer.roster.gradients, trainer.roster.weights)
    yield from (trainer.tally.loss_sum, trainer.tally.first_bad_step, trainer.tally.update_norm)
    for learner in trainer.learners:
        yield from learner.state()[0].values()
        source = learner.batches.raw.source("train")
        yield from tree_leaves(source.tree) if isinstance(source, ArraySource) else ()
    yield from trainer.outer.state()[0].values()
