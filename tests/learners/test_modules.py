"""What a model may be: one module of its own for each call, that can be copied, with all shapes known."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.learners.test_constants import TASKS, losses, train
from trajshift import Task, UsageError, finetune


class Net(nn.Module):
    """A body, given or its own, and a head."""

    def __init__(self, task: Task, body: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU()) if body is None else body
        self.head = nn.Linear(16, task.outputs or 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())


def same_object() -> Callable[[Task], nn.Module]:
    body = backbone()
    return lambda task: Net(task, body)


def same_memory() -> Callable[[Task], nn.Module]:
    """Other objects, other parameters, one storage."""
    weight = torch.zeros(16, 8)

    def build(task: Task) -> nn.Module:
        net = Net(task)
        net.body[0].weight = nn.Parameter(weight[:])
        return net

    return build


def kept_per_task() -> Callable[[Task], nn.Module]:
    kept: dict[str, nn.Module] = {}
    return lambda task: kept.setdefault(task.name, Net(task))


def same_statistics() -> Callable[[Task], nn.Module]:
    body = backbone().requires_grad_(False)
    return lambda task: Net(task, body)


@pytest.mark.parametrize("made", [same_object, same_memory, kept_per_task, same_statistics])
def test_memory_that_two_calls_would_train_is_refused_before_anything_runs(
    made: Callable[[], Callable[[Task], nn.Module]],
) -> None:
    with pytest.raises(UsageError, match="returned the same parameter 'body"):
        train(made())
    with pytest.raises(UsageError, match=r"called twice for task 'a'.*copy\.deepcopy"):
        finetune(None, TASKS[0], model=made(), steps=5, batch_size=8)


def test_a_copy_in_every_call_gives_the_same_result_each_time() -> None:
    body = backbone()
    results = [
        finetune(None, TASKS[0], model=lambda task: Net(task, copy.deepcopy(body)), steps=5, batch_size=8).metrics
        for _ in range(3)
    ]
    assert results[0] == results[1] == results[2]


def test_a_frozen_body_may_be_one_object() -> None:
    body = nn.Sequential(nn.Linear(8, 16), nn.ReLU()).requires_grad_(False)
    before = copy.deepcopy(body.state_dict())

    class Adapted(Net):
        def __init__(self, task: Task) -> None:
            super().__init__(task, body)
            self.adapter = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.adapter(self.body(x)))

    trainer = train(Adapted)
    losses(trainer)
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())


@pytest.mark.parametrize("from_call", [1, 5])
def test_a_forward_that_replaces_its_parameter_is_caught_in_the_first_round(from_call: int) -> None:
    class Replaces(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Replaces.calls += 1
            if Replaces.calls >= from_call:
                self.body[0].weight = nn.Parameter(self.body[0].weight.detach().clone())
            return super().forward(x)

    trainer = train(Replaces, horizon=10, rounds=1)
    with pytest.raises(UsageError, match="no longer shares memory with the parameter matrix"):
        losses(trainer)
    assert trainer.step <= 10


# -- modules given as the model, lazy layers -------------------------------------------------------------------


def _lock(net: Any) -> None:
    net.body.lock = threading.Lock()


def _activation(net: Any) -> None:
    net.body.last = net(torch.zeros(2, 8))


@pytest.mark.parametrize(("spoil", "attribute"), [(_lock, r"'?body\.lock"), (_activation, r"'?body\.last")])
def test_a_module_that_cannot_be_copied_names_the_attribute(spoil: Callable[[nn.Module], None], attribute: str) -> None:
    net = Net(TASKS[0])
    spoil(net)
    with pytest.raises(UsageError, match=rf"cannot be copied for each task: its attribute {attribute}.*factory"):
        train(net, head="head")  # type: ignore[arg-type]


def test_reentrant_checkpoints_are_explained() -> None:
    class Checkpointed(Net):
        reentrant = True

        def forward(self, x: Tensor) -> Tensor:
            h = self.body[0](x)
            return self.head(checkpoint(self.body[1], h, use_reentrant=self.reentrant))

    with pytest.raises(UsageError, match=r"task 'a' calls torch\.utils\.checkpoint.*use_reentrant=False"):
        losses(train(Checkpointed, method="imaml"))
    Checkpointed.reentrant = False
    assert len(losses(train(Checkpointed, method="imaml"))) == 16


def test_a_lazy_layer_is_refused_by_name_and_the_remedy_works() -> None:
    def lazy(task: Task) -> nn.Module:
        return Net(task, nn.LazyLinear(16))

    for call in (lambda: train(lazy), lambda: finetune(None, TASKS[0], model=lazy, steps=1)):
        with pytest.raises(UsageError, match=r"'body\.weight'.*lazy layer"):
            call()

    def ready(task: Task) -> nn.Module:
        net = lazy(task)
        net(torch.zeros(1, 8))
        return net

    assert len(losses(train(ready))) == 16
