"""One pool of workers gives what this process would give."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from tests.helpers.waiting import PATIENCE, wait_until
from trajshift.data.augmentation import ImageTransform
from trajshift.data.batches import Request, TaskBatches
from trajshift.data.loader import PrefetchLoader, workers_alive
from trajshift.errors import UsageError
from trajshift.task import Task

# Python 3.12 and later warn of any fork once torch has threads; the workers use none of them.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

Pairs = tuple[Tensor, Tensor]


class Images(Dataset[tuple[Tensor, int]]):
    """Random images, further distorted by every global generator; tells which process made them."""

    def __init__(self, n: int, worst: int = 1) -> None:
        self.n, self.worst = n, worst

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(1, 4, 4) * float(np.random.rand()) * random.random()
        return index + noise, self.worst if index == self.n - 1 else index % 2


class Process(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(os.getpid())


def make(workers: int, sizes: dict[str, int] | None = None) -> tuple[dict[str, TaskBatches], PrefetchLoader]:
    batches = {}
    for name, n in (sizes or {"a": 23, "b": 9}).items():
        task = Task(name=name, train=Images(n), test=Images(7), outputs=2, transform=ImageTransform(1, True))
        batches[name] = TaskBatches(task, seed=5, batch_size=6, heldout=0.3)
    arrays = torch.zeros(8, 1, 4, 4), torch.arange(8) % 2
    memory = Task(name="memory", train=arrays, outputs=2, transform=ImageTransform(1))
    batches["memory"] = TaskBatches(memory, seed=5, batch_size=6)
    return batches, PrefetchLoader(batches, workers)


@pytest.fixture(scope="module")
def pool() -> Iterator[tuple[dict[str, TaskBatches], PrefetchLoader]]:
    batches, stream = make(2)
    yield batches, stream
    stream.close()


def check(pool: tuple[dict[str, TaskBatches], PrefetchLoader], asked: list[tuple[str, str, int]]) -> None:
    inline, _ = make(0)
    for name, split, step in asked:
        got: Pairs = getattr(pool[0][name], split)(step)
        expected: Pairs = getattr(inline[name], split)(step)
        assert torch.equal(got[0], expected[0]), (name, split, step)
        assert torch.equal(got[1], expected[1]), (name, split, step)


def in_order(steps: range, names: tuple[str, ...] = ("a", "b", "memory")) -> list[tuple[str, str, int]]:
    return [(name, "train", step) for step in steps for name in names]


def test_workers_equal_no_workers_bit_for_bit(pool: Any) -> None:
    check(pool, in_order(range(8)))


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(in_order(range(3)) + in_order(range(1, 4)), id="replay"),
        pytest.param(in_order(range(1000, 1002)), id="resume"),
        pytest.param(in_order(range(2)) + in_order(range(2, 5), ("b",)), id="a task left"),
        pytest.param([("a", "train", 4), ("a", "train", 4), ("b", "train", 4), ("a", "train", 5)], id="twice"),
        pytest.param([("a", "train", 4), ("a", "heldout", 4), ("b", "train", 4), ("b", "heldout", 1)], id="held out"),
    ],
)
def test_any_other_order_gives_the_same_batches(pool: Any, asked: list[tuple[str, str, int]]) -> None:
    check(pool, asked)


def test_a_declared_order_is_followed(pool: Any) -> None:
    pool[1].follow([("b", "train"), ("b", "heldout")])
    check(pool, [("b", split, step) for step in range(3) for split in ("train", "heldout")])
    check(pool, in_order(range(3, 5)))
    pool[1].follow([("a", "train"), ("b", "train"), ("memory", "train")])


def test_the_test_set_is_streamed_too(pool: Any) -> None:
    inline, _ = make(0)
    pool[0]["a"].train(0)
    for size in (3, 500):
        got, expected = list(pool[0]["a"].test(size)), list(inline["a"].test(size))
        assert (
            [len(y) for _, y in got] == [len(y) for _, y in expected] == [min(size, 7 - i) for i in range(0, 7, size)]
        )
        assert all(torch.equal(one[0], other[0]) for one, other in zip(got, expected, strict=True))
    check(pool, in_order(range(1, 3)))


def test_a_test_pass_may_be_interrupted_by_training(pool: Any) -> None:
    inline, _ = make(0)
    for number, (got, expected) in enumerate(zip(pool[0]["a"].test(2), inline["a"].test(2), strict=True)):
        assert torch.equal(got[0], expected[0])
        check(pool, [("b", "train", number)])


def test_global_generators_are_left_alone(pool: Any) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for _, stream in (pool, make(0)):
        stream.get("a", 50)
        stream.get("a", 3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_workers_stay_and_close_ends_them() -> None:
    batches = {"a": TaskBatches(Task(name="a", train=Process()), seed=0, batch_size=2)}
    stream = PrefetchLoader(batches, 1)
    makers = {int(process) for step in (0, 1, 7, 3) for process in stream.get("a", step)}
    assert len(makers) == 1
    assert os.getpid() not in makers
    stream.close()
    wait_until(lambda: not _runs(*makers), "the worker's end")
    assert {int(process) for process in batches["a"].train(8)} == {os.getpid()}


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_workers_get_pickles_whatever_the_task_holds() -> None:
    task = Task(name="a", train=Images(9), outputs=2, loss=lambda module, batch: batch[0].sum())
    raw = TaskBatches(task, seed=0, batch_size=4).raw
    request = Request("a", "train", 3, 4)
    got, expected = pickle.loads(pickle.dumps(raw)).fetch(request), raw.fetch(request)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_nothing_is_started_for_arrays_in_memory() -> None:
    task = Task(name="a", train=torch.arange(8.0), test=torch.arange(3.0))
    batches = {"a": TaskBatches(task, seed=0, batch_size=2)}
    stream = PrefetchLoader(batches, 2)
    assert torch.equal(stream.get("a", 3), TaskBatches(task, seed=0, batch_size=2).train(3))
    assert stream._loader is None


def test_what_a_worker_refuses_is_said_in_one_sentence() -> None:
    task = Task(name="a", train=Images(6, worst=2), outputs=2)
    stream = PrefetchLoader({"a": TaskBatches(task, seed=0, batch_size=6)}, 1)
    with pytest.raises(UsageError, match=r"^task 'a' has labels from 0 to 2 but outputs=2; use class numbers 0 to 1$"):
        stream.take(Request("a", "train", 0, 6))
    stream.close()
    with pytest.raises(UsageError, match="workers is -1"):
        PrefetchLoader({}, -1)


FORGETFUL = """
import torch
from trajshift.data.batches import TaskBatches
from trajshift.data.loader import PrefetchLoader
from trajshift.task import Task

task = Task(name="a", train=[(torch.zeros(1, 2, 2), 1)] * 9, outputs=2)
batches = TaskBatches(task, seed=0, batch_size=3)
stream = PrefetchLoader({"a": batches}, 1)
print(len(batches.train(0)[0]))
"""


CYCLE = """
stream.itself = stream
del stream, batches.stream, batches
import gc
gc.collect()
"""


@pytest.mark.parametrize("then", ["", CYCLE], ids=["open", "collected in a cycle"])
def test_a_process_that_leaves_its_stream_open_ends(then: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORGETFUL + then], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


class Killed(Images):
    """Ends the worker that makes one of its examples, as a system without memory does."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.n - 1 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # torch's, which counts descriptors then
def test_a_killed_worker_is_one_sentence() -> None:
    task = Task(name="a", train=Killed(12), outputs=2)
    batches = TaskBatches(task, seed=5, batch_size=6)
    stream = PrefetchLoader({"a": batches}, 1)
    with pytest.raises(UsageError, match=r"a process that loads images was killed.*; lower workers"):
        list(map(batches.train, range(2)))
    stream.close()
    batches = TaskBatches(replace(task, train=Process()), seed=5, batch_size=1)
    stream = PrefetchLoader({"a": batches}, 1)
    worker = int(batches.train(0))
    with pytest.raises(UsageError, match=r"was killed.*; buy more$"), workers_alive("buy more"):
        kill_and_wait(worker)
    stream.close()


@pytest.mark.parametrize(("error", "fetching"), [(EOFError("cut off"), False), (EOFError("Caught EOFError in"), True)])
def test_what_a_data_set_raises_is_no_killed_worker(error: EOFError, fetching: bool) -> None:
    with pytest.raises(EOFError, match=r"cut off|Caught"), workers_alive("buy more", fetching=fetching):
        raise error


def kill_and_wait(worker: int) -> None:
    os.kill(worker, signal.SIGKILL)
    time.sleep(PATIENCE)  # torch interrupts it
