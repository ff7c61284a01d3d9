"""Heads that are found, and last layers that are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.learners.test_constants import TASKS, Stem, losses, make_task, train
from trajshift import Task, UsageError, finetune

UNEQUAL = [make_task("a", 1, 3), make_task("b", 2, 5)]


class HiddenFc(nn.Module):
    """The usual name of a head belongs to a hidden layer."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.body, self.fc, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, task.outputs or 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(torch.relu(self.body(x)))))


class TwoHeads(nn.Module):
    """As DeiT has them."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.head, self.head_dist = nn.Linear(16, task.outputs or 2), nn.Linear(16, task.outputs or 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.body(x))
        return self.head(h) + self.head_dist(h)


CASES = [(HiddenFc, "fc", "out"), (TwoHeads, "head", "head_dist")]


@pytest.mark.parametrize(("model", "found", "missed"), CASES)
def test_a_shared_layer_that_follows_the_outputs_is_reported(
    model: type[nn.Module], found: str, missed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(model)
    err = capsys.readouterr().err
    assert f"warning: all tasks share '{missed}.weight': its head is '{found}'" in err
    assert f"head={[found, missed]!r}" in err
    assert err.count("warning") == 1
    named = train(model, head=[found, missed])
    assert not [e.name for e in named.layout.entries if e.name.startswith(missed)]
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("model", "found", "missed"), CASES)
def test_with_unequal_outputs_it_is_refused(model: type[nn.Module], found: str, missed: str) -> None:
    with pytest.raises(UsageError, match=f"cannot tell which part .* is '{found}', but .* '{missed}.weight' follows"):
        train(model, UNEQUAL)
    assert len(losses(train(model, UNEQUAL, head=[found, missed]))) == 16


def test_fine_tuning_from_weights_of_a_wrong_head_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    weights = HiddenFc(TASKS[0]).state_dict()
    finetune(weights, TASKS[0], model=HiddenFc, steps=0)
    assert "warning: the initialization fills 'out.weight': its head is 'fc'" in capsys.readouterr().err
    finetune(weights, TASKS[0], model=HiddenFc, head="out", steps=0)
    assert "warning" not in capsys.readouterr().err


def test_a_usual_head_is_not_doubted(capsys: pytest.CaptureFixture[str]) -> None:
    for tasks in (TASKS, UNEQUAL):
        phi = train(Stem, tasks).initialization
        finetune(dict(phi), tasks[0], model=Stem, steps=0)
    assert capsys.readouterr().err == ""


def test_a_factory_that_takes_no_other_number_of_outputs_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def strict(task: Task) -> nn.Module:
        assert task.outputs == 3
        return HiddenFc(task)

    train(strict)
    assert capsys.readouterr().err == ""
