"""Batches as a pure function of the step, against explicit epochs."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trajshift.data.augmentation import image_task
from trajshift.data.batches import TaskBatches
from trajshift.errors import UsageError
from trajshift.rng import key, permutation
from trajshift.task import Task


def task(n: int = 50, name: str = "a", **options: Any) -> Task:
    x = (torch.arange(n * 48).reshape(n, 3, 4, 4) * 7 % 256).to(torch.uint8)
    data = (x, torch.arange(n) % 5)
    return image_task(name, data, data, outputs=5, crop_padding=1, flip=True, **options)


def epochs(n: int, name: str, split: str, seed: int, count: int) -> list[int]:
    """The first examples visited, epoch after epoch."""
    visited: list[int] = []
    while len(visited) < count:
        epoch = len(visited) // n
        visited += permutation(key(seed, name, split, epoch), n).tolist()
    return visited[:count]


@pytest.mark.parametrize(("n", "size"), [(50, 16), (48, 16), (16, 16), (7, 16), (1, 4), (5, 1)])
def test_epochs_without_replacement_run_across_batches(n: int, size: int) -> None:
    batches = TaskBatches(task(n), seed=3, batch_size=size)
    assert batches.size == n
    got = [batches.indices(step) for step in range(12)]
    assert all(indices.shape == (size,) and indices.dtype == torch.int64 for indices in got)
    visited = torch.cat(got).tolist()
    assert visited == epochs(n, "a", "train", 3, 12 * size)
    for epoch in range(len(visited) // n):
        assert sorted(visited[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_batch_1000_is_the_same_run_to_or_asked_for() -> None:
    running = TaskBatches(task(), seed=0, batch_size=16)
    for step in range(1001):
        last = running.train(step)
    asked = TaskBatches(task(), seed=0, batch_size=16).train(1000)
    assert all(torch.equal(a, b) for a, b in zip(last, asked, strict=True))
    again = running.train(4)
    assert torch.equal(again[0], TaskBatches(task(), seed=0, batch_size=16).train(4)[0])


def test_batch_1000_is_the_same_in_another_process_and_thread_count() -> None:
    program = (
        "import torch; torch.set_num_threads(2)\n"
        "from tests.data.test_batches import TaskBatches, task\n"
        "x, y = TaskBatches(task(), seed=0, batch_size=16).train(1000)\n"
        "print(x.numpy().tobytes().hex()[:4000], y.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    x, y = TaskBatches(task(), seed=0, batch_size=16).train(1000)
    assert done.stdout.strip() == f"{x.numpy().tobytes().hex()[:4000]} {y.tolist()}"


def test_another_task_another_seed_another_step() -> None:
    alone = TaskBatches(task(), seed=0, batch_size=16).train(5)[0]
    both = {name: TaskBatches(task(name=name), seed=0, batch_size=16) for name in ("b", "a")}
    for step in range(6):
        drawn = {name: batches.train(step)[0] for name, batches in both.items()}
    assert torch.equal(drawn["a"], alone)
    assert not torch.equal(drawn["b"], alone)
    assert not torch.equal(TaskBatches(task(), seed=1, batch_size=16).train(5)[0], alone)


def test_the_global_generators_are_neither_used_nor_moved() -> None:
    batches = TaskBatches(task(), seed=0, batch_size=16, heldout=0.2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = batches.train(3)[0]
    batches.heldout(1)
    list(batches.test())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(batches.train(3)[0], first)


def test_training_is_augmented_and_test_is_not() -> None:
    plain = task()
    assert plain.transform is not None
    batches = TaskBatches(plain, seed=0, batch_size=16)
    raw = plain.train.fetch(batches.indices(2))
    x, y = batches.train(2)
    assert torch.equal(y, raw[1])
    assert torch.equal(x, plain.transform(raw, key(0, "a", "augment", "train", 2))[0])
    assert not torch.equal(x, plain.transform(raw, None)[0])


@pytest.mark.parametrize("size", [7, 25, 50, 500])
def test_the_test_set_comes_whole_and_in_order(size: int) -> None:
    plain = task()
    assert plain.transform is not None
    parts = list(TaskBatches(plain, seed=0, batch_size=16).test(size))
    assert [len(y) for _, y in parts] == [min(size, 50 - start) for start in range(0, 50, size)]
    x, y = plain.transform(plain.test.fetch(torch.arange(50)), None)
    assert torch.equal(torch.cat([part[0] for part in parts]), x)
    assert torch.equal(torch.cat([part[1] for part in parts]), y)


@pytest.mark.parametrize(("share", "count"), [(0.2, 10), (0.5, 25), (0.001, 1), (0.97, 48)])
def test_held_out_examples_are_never_trained_on(share: float, count: int) -> None:
    batches = TaskBatches(task(), seed=4, batch_size=16, heldout=share)
    order = permutation(key(4, "a", "split"), 50).tolist()
    assert batches.size == 50 - count
    trained = Counter(torch.cat([batches.indices(step) for step in range(50 - count)]).tolist())
    assert trained == dict.fromkeys(order[: 50 - count], 16)
    held = torch.cat([batches.indices(step, "heldout") for step in range(count)])
    assert Counter(held.tolist()) == dict.fromkeys(order[50 - count :], 16)
    inner = epochs(count, "a", "heldout", 4, 16 * count)
    assert held.tolist() == [order[50 - count :][place] for place in inner]
    assert not torch.equal(batches.heldout(0)[1], batches.heldout(1)[1]) or count == 1


def test_splits_that_leave_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="leaves none to train on"):
        TaskBatches(task(1), seed=0, batch_size=4, heldout=0.1)
    with pytest.raises(UsageError, match=r"heldout is 1\.0"):
        TaskBatches(task(), seed=0, batch_size=4, heldout=1.0)
    with pytest.raises(UsageError, match="holds no examples out"):
        TaskBatches(task(), seed=0, batch_size=4).heldout(0)
    with pytest.raises(UsageError, match="the training set of task 'a' has no examples"):
        TaskBatches(Task(name="a", train=[]), seed=0, batch_size=4)
    with pytest.raises(UsageError, match="task 'a' has no test examples"):
        TaskBatches(Task(name="a", train=torch.ones(3)), seed=0, batch_size=4).test()
    with pytest.raises(UsageError, match="batch_size is 0"):
        TaskBatches(task(), seed=0, batch_size=0)


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, -1, 1]])
def test_labels_out_of_range_are_refused(labels: list[int]) -> None:
    x = torch.zeros(3, 1, 2, 2)
    good, bad = (x, torch.tensor([0, 1, 1])), (x, torch.tensor(labels))
    message = f"task 'a' has labels from {min(labels)} to {max(labels)} but outputs=2"
    for train, test in ((bad, good), (good, bad)):
        with pytest.raises(UsageError, match=message):
            TaskBatches(Task(name="a", train=train, test=test, outputs=2), seed=0, batch_size=3)
    rows = [(x[0], label) for label in labels]
    with pytest.raises(UsageError, match=message):
        TaskBatches(Task(name="a", train=rows, outputs=2), seed=0, batch_size=3).train(0)
    free = Task(name="a", train=bad, outputs=2, loss=lambda module, batch: batch[0].sum())
    TaskBatches(free, seed=0, batch_size=3).train(0)


def test_a_task_may_set_its_batch_size_and_any_pytree_goes_through() -> None:
    def shout(batch: dict[str, Tensor], draw: int | None) -> dict[str, Any]:
        return {**batch, "random": draw is not None}

    text = {"ids": torch.arange(40).reshape(10, 4), "weight": torch.ones(10), "y": torch.zeros(10, dtype=torch.long)}
    words = Task(name="words", train=text, test=text, outputs=2, batch_size=3, transform=shout)
    batches = TaskBatches(words, seed=0, batch_size=64, dtype=torch.float64)
    batch = batches.train(0)
    assert batch["ids"].shape == (3, 4)
    assert batch["ids"].dtype == torch.int64
    assert batch["weight"].dtype == torch.float64
    assert batch["random"]
    assert [len(part["y"]) for part in batches.test(4)] == [4, 4, 2]
    assert not any(part["random"] for part in batches.test())


def test_data_sets_that_draw_random_numbers_are_deterministic() -> None:
    class Noisy(torch.utils.data.Dataset[tuple[Tensor, float]]):
        def __len__(self) -> int:
            return 11

        def __getitem__(self, index: int) -> tuple[Tensor, float]:
            return index + torch.rand(2), float(np.random.rand())

    first, second = (TaskBatches(Task(name="a", train=Noisy()), seed=0, batch_size=4) for _ in range(2))
    for step in range(6):
        expected = first.train(step)
    assert torch.equal(second.train(5)[0], expected[0])
    assert torch.equal(second.train(5)[1], expected[1])
    assert not torch.equal((second.train(5)[0] % 1)[0], (second.train(4)[0] % 1)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_batch_on_the_gpu() -> None:
    here = TaskBatches(task(), seed=0, batch_size=16, heldout=0.2)
    there = TaskBatches(task(), seed=0, batch_size=16, heldout=0.2, device="cuda")
    for step in (0, 3, 1000):
        for split in ("train", "heldout"):
            assert there.indices(step, split).device.type == "cuda"
            assert torch.equal(there.indices(step, split).cpu(), here.indices(step, split))
            x, y = getattr(there, split)(step)
            assert torch.equal(x.cpu(), getattr(here, split)(step)[0])
            assert y.device.type == "cuda"


@pytest.mark.parametrize(
    ("examples", "form"),
    [
        ([{"image": torch.ones(2), "fine_label": 1}] * 4, "mappings with 'image', 'fine_label'"),
        ([(torch.ones(2), 1, 7)] * 4, "3 entries each"),
        ((torch.ones(4, 2), torch.arange(4), torch.arange(4)), "3 entries each"),
        ({"x": torch.ones(4, 2), "y": torch.arange(4)}, "mappings with 'x', 'y'"),
    ],
)
def test_examples_that_the_loss_cannot_take_apart_are_refused(examples: Any, form: str) -> None:
    with pytest.raises(UsageError, match=f"the training set of task 'a' has examples that are {form}; give pairs"):
        TaskBatches(Task(name="a", train=examples), seed=0, batch_size=2)
    own = Task(name="a", train=examples, loss=lambda module, batch: torch.zeros(()))
    TaskBatches(own, seed=0, batch_size=2).train(0)
    pairs = Task(name="a", train=examples, transform=lambda batch, draw: (torch.ones(2), torch.ones(2)))
    TaskBatches(pairs, seed=0, batch_size=2).train(0)
