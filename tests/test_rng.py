"""Draws from torch, numpy and `random` are those of the seed, and the user's generators stay as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.learners.test_constants import TASKS, losses, make_task, train
from tests.learners.test_modules import Net
from trajshift import Execution, Task, finetune


class NumpyDrop(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(h * 0.5 if self.training and np.random.rand() < 0.5 else h)


class RandomDrop(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(h * 0.5 if self.training and random.random() < 0.5 else h)


class NumpyStart(Net):
    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.body[0].weight.data.copy_(torch.from_numpy(np.random.randn(16, 8) * 0.3))


class NoiseInTests(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + float(np.random.rand()) + random.random() + torch.rand(1))


def mixup(module: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    share, other = np.random.beta(1, 1), torch.randperm(len(x))
    logits = module(share * x + (1 - share) * x[other])
    return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[other])


def noise(batch: Any, key: int | None) -> Any:
    shift = np.random.randn() + random.random() + float(torch.rand(1))
    return (batch[0] + 0.1 * shift, batch[1])


def numbers(model: Callable[[Task], nn.Module], **more: Any) -> tuple[Any, ...]:
    tasks = [Task(name=t.name, train=t.train, test=t.test, outputs=3, input_shape=(8,), **more) for t in TASKS]
    trainer = train(model, tasks)
    tuned = finetune(trainer.initialization, tasks[0], model=model, steps=3, batch_size=8, evaluate_every=1)
    return losses(trainer), tuned.curve, tuned.metrics


CASES: list[Any] = [
    (NumpyDrop, {}),
    (RandomDrop, {}),
    (NumpyStart, {}),
    (NoiseInTests, {}),
    (Net, {"loss": mixup}),
    (Net, {"transform": noise}),
]


@pytest.mark.parametrize(("model", "more"), CASES)
def test_a_run_repeats_whatever_the_generators_were(model: Callable[[Task], nn.Module], more: dict[str, Any]) -> None:
    results = []
    for seed in (1, 2):
        np.random.seed(seed)
        random.seed(seed)
        torch.manual_seed(seed)
        before = np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1), torch.rand(1).item()
        results.append(numbers(model, **more))
        after = np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1), torch.rand(1).item()
        np.random.seed(seed)
        random.seed(seed)
        torch.manual_seed(seed)
        for draws in (before, after):
            again = np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1), torch.rand(1).item()
            assert again == draws
    assert results[0] == results[1]


@pytest.mark.parametrize("model", [NumpyDrop, RandomDrop])
def test_draws_do_not_depend_on_other_tasks(model: Callable[[Task], nn.Module]) -> None:
    both, alone = losses(train(model, rounds=1)), losses(train(model, TASKS[:1], rounds=1))
    assert [row[0] for row in both] == [row[0] for row in alone]


def test_a_transform_that_draws_sees_the_same_batch_in_an_extra_pass() -> None:
    task = Task(name="a", train=TASKS[0].train, outputs=3, transform=noise, input_shape=(8,))
    trainer = train(Net, [task])
    trainer.advance()
    batches = trainer.learners[0].batches
    first, again, other = (batches.train(step)[0] for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("model", "more"), [(NumpyDrop, {}), (RandomDrop, {}), (Net, {"transform": noise})])
def test_auto_runs_tasks_that_draw_one_after_another(model: Any, more: dict[str, Any], two_threads: None) -> None:
    tasks = [Task(name=t.name, train=t.train, outputs=3, input_shape=(8,), **more) for t in TASKS]
    auto, loop = (train(model, tasks, execution=Execution(engine=name)) for name in ("auto", "loop"))
    assert auto.engine.name == "loop"
    assert "draws random numbers" in auto.engine.why
    assert losses(auto) == losses(loop)


class OnlyWithGradients(Net):
    """Drops like a gate that asks whether gradients are wanted."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(F.dropout(h, 0.5, training=torch.is_grad_enabled()))


class InBackward(Net):
    """Draws in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        if h.requires_grad:
            h.register_hook(lambda g: g * (1 + 0.1 * torch.rand(())))
        return self.head(h)


@pytest.mark.parametrize("model", [OnlyWithGradients, InBackward])
def test_the_trial_for_draws_runs_as_training_does(model: Any, two_threads: None) -> None:
    auto, loop = (train(model, execution=Execution(engine=name)) for name in ("auto", "loop"))
    assert auto.engine.name == "loop"
    assert "draws random numbers" in auto.engine.why
    assert losses(auto) == losses(loop)


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_no_draw_keeps_the_parallel_engine(two_threads: None) -> None:
    trainer = train(Net, [make_task("a", 1), make_task("b", 2)], execution=Execution(engine="auto"))
    assert trainer.engine.name == "parallel"
