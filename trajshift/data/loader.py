"""One pool of DataLoader workers for every task whose examples are not held in memory.

A request names a batch, and its content is a function of that name alone; the pool only fetches ahead. It is
given the order in which batches will be requested and starts over when something else is requested, so
replay, resume and sampled tasks change the speed but never a bit of the results.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import c_bool
from functools import partial
from itertools import count
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any
from weakref import finalize

import torch
from torch.utils.data import DataLoader, Dataset

from trajshift.data.batches import RawBatches, Request, TaskBatches
from trajshift.errors import UsageError
from trajshift.task import Batch


class _RequestQueue:
    """What the loader will fetch: it pulls requests some way ahead, and those pulled are recorded in `sent`."""

    def __init__(self) -> None:
        self.requests: Iterator[Request] = iter(())
        self.sent: deque[Request] = deque()

    def __iter__(self) -> Iterator[Request]:
        for request in self.requests:
            self.sent.append(request)
            yield request


class _Requests(Dataset[Any]):
    """The data set the workers see: indexed by request, one batch each, or what is wrong with it."""

    def __init__(self, raw: Mapping[str, RawBatches]) -> None:
        self._raw = dict(raw)

    def __getitem__(self, request: Request) -> Batch | UsageError:
        try:
            return self._raw[request.name].fetch(request)
        except UsageError as error:
            return error  # raised in the parent; the loader would bury its sentence in a traceback


class PrefetchLoader:
    """Fetches the batches of many tasks ahead, in `workers` processes; with none, when they are asked for.

    From then on the `TaskBatches` given here get what is not in memory from this loader. It expects, step by step,
    one training batch of each such task in the order of `batches`, until `follow` tells it another order.

    Raises:
        UsageError: fewer than 0 workers.
    """

    def __init__(self, batches: Mapping[str, TaskBatches], workers: int) -> None:
        if workers < 0:
            raise UsageError(f"workers is {workers}; use 0 for none, or a number of processes")
        self._raw = {task.name: task.raw for task in batches.values()}
        self._sizes = {task.name: task.batch_size for task in batches.values()}
        self._served: dict[tuple[str, str], int] = {}
        self._plan = _RequestQueue()
        self._fetched: Iterator[Any] | None = None
        self._loader: DataLoader[Any] | None = None
        if workers and any(raw.streams(split) for raw in self._raw.values() for split in ("train", "test")):
            ending = RawValue(c_bool, False)
            finalize(self, _let_end, ending, os.getpid())
            self._loader = DataLoader(
                _Requests(self._raw),
                batch_size=None,
                sampler=self._plan,
                collate_fn=_unchanged,
                num_workers=workers,
                persistent_workers=True,
                pin_memory=any(task.device.type == "cuda" for task in batches.values()),
                worker_init_fn=partial(_outlive_signals, ending),
                generator=torch.Generator(),  # else every start draws from the global generator
            )
        self.follow([(name, "train") for name in self._raw])
        for task in batches.values():
            task.stream = self

    def follow(self, lanes: Sequence[tuple[str, str]]) -> None:
        """From now on expect, step by step, one batch of each `(task name, split)` in this order.

        Batches outside these lanes, and a batch requested twice in a row, are fetched in this process and do not
        change the plan.
        """
        self._lanes = [(name, split) for name, split in lanes if self._raw[name].streams(split)]

    def get(self, name: str, step: int, split: str = "train") -> Batch:
        """The raw batch `step` of a task."""
        return self.take(Request(name, split, step, self._sizes[name]))

    def take(self, request: Request) -> Batch:
        """The raw batch that `request` names."""
        lane = (request.name, request.split)
        if lane not in self._lanes or self._served.get(lane) == request.step:
            return self._raw[request.name].fetch(request)
        self._served[lane] = request.step
        return self._next(request, self._steps_from(request))

    def run(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """The raw batches of all `requests` in order, fetched ahead; the plan starts over afterwards."""
        for number, request in enumerate(requests):
            if self._raw[request.name].streams(request.split):
                yield self._next(request, iter(requests[number:]))
            else:
                yield self._raw[request.name].fetch(request)

    def close(self) -> None:
        """Ends the workers; later batches are fetched in this process."""
        self._loader = self._fetched = None

    def _next(self, request: Request, plan: Iterator[Request]) -> Batch:
        if self._loader is None:
            return self._raw[request.name].fetch(request)
        sent = self._plan.sent
        if self._fetched is None or not sent or sent[0] != request:
            self._plan.requests = plan
            sent.clear()
            self._fetched = iter(self._loader)  # the same workers; what they are fetching is dropped
        sent.popleft()
        with workers_alive("lower workers or free some memory", fetching=True):
            batch = next(self._fetched)
        if isinstance(batch, UsageError):
            raise batch
        return batch

    def _steps_from(self, request: Request) -> Iterator[Request]:
        lanes = self._lanes
        for place in count(lanes.index((request.name, request.split))):
            cycle, lane = divmod(place, len(lanes))
            name, split = lanes[lane]
            yield Request(name, split, request.step + cycle, self._sizes[name])


@contextmanager
def workers_alive(advice: str, *, fetching: bool = False) -> Iterator[None]:
    """Around whatever runs while a loader has workers, one of which may be killed; `fetching`, where batches come.

    Raises:
        UsageError: a worker was killed; ends with `advice`.
    """
    try:
        try:
            yield
        except (ConnectionError, EOFError):
            if not fetching:
                raise
            time.sleep(1)  # the pipe broke first; torch's signal handler, which names the worker, raises here
            raise
    except (RuntimeError, ConnectionError, EOFError) as error:
        # What a live worker raised begins with "Caught"; what has nothing to do with workers is passed on too.
        told = str(error).startswith("DataLoader worker (pid")
        broken = fetching and not isinstance(error, RuntimeError) and not str(error).startswith("Caught ")
        if not (told or broken):
            raise
        text = "a process that loads images was killed, most likely because memory ran out"
        raise UsageError(f"{text}; {advice}") from error


def _unchanged(batch: Batch) -> Batch:
    return batch


def _let_end(ending: Any, owner: int) -> None:
    if os.getpid() == owner:  # not in a worker, which has a copy of the loader
        ending.value = True


def _outlive_signals(ending: Any, worker: int) -> None:
    """A terminal or a scheduler signals the whole process group, but the parent still needs batches to end its step.

    Once the loader is gone, SIGTERM ends a worker: that is what torch sends if its own message was lost.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if ending.value:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
