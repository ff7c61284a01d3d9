"""Losses and metrics against numpy, for every shape that is allowed; the others are refused with a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.learners.test_constants import make_task
from tests.learners.test_modules import Net
from trajshift import MetaTrainer, Task, UsageError, finetune


class Gives(nn.Module):
    """Returns what it was given."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


def both(kind: str, output: Any, y: Tensor, outputs: int | None = None) -> tuple[float, dict[str, float]]:
    task = Task(name="t", train=None, kind=kind, outputs=outputs)
    module, batch = Gives(output), (torch.zeros(len(y), 1), y)
    metrics = {name: float(value) for name, value in task.compute_metrics(module, batch).items()}
    return float(task.compute_loss(module, batch)), metrics


def cross_entropy(logits: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over all places; classes on dimension 1."""
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-(probabilities * log).sum(1).mean())


GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("places", [(), (3,), (6,), (2, 5)])
def test_classification_with_numbers_one_hot_and_probabilities(places: tuple[int, ...]) -> None:
    classes = 3
    logits = torch.randn(7, classes, *places, generator=GENERATOR, dtype=torch.float64)
    y = torch.randint(0, classes, (7, *places), generator=GENERATOR)
    one_hot = torch.movedim(torch.nn.functional.one_hot(y, classes), -1, 1)
    truth = cross_entropy(logits.numpy(), one_hot.numpy())
    accuracy = float((logits.numpy().argmax(1) == y.numpy()).mean())
    for labels in (y, y.int(), y.to(torch.uint8), y.unsqueeze(1), one_hot, one_hot.float(), one_hot.double()):
        loss, metrics = both("classification", logits, labels, classes)
        assert loss == pytest.approx(truth)
        assert metrics == pytest.approx({"accuracy": accuracy, "loss": truth})
    soft = torch.softmax(torch.randn(7, classes, *places, generator=GENERATOR, dtype=torch.float64), 1)
    assert both("classification", logits, soft)[0] == pytest.approx(cross_entropy(logits.numpy(), soft.numpy()))


@pytest.mark.parametrize(
    ("output", "y"),
    [((9, 1), (9,)), ((9,), (9, 1)), ((9, 1), (9, 1)), ((9,), (9,)), ((9, 4), (9, 4)), ((9, 1, 4), (9, 4))],
)
def test_regression_compares_and_never_broadcasts(output: tuple[int, ...], y: tuple[int, ...]) -> None:
    out, target = torch.randn(output, generator=GENERATOR), torch.randn(y, generator=GENERATOR)
    truth = float(((out.numpy().ravel() - target.numpy().ravel()) ** 2).mean())
    loss, metrics = both("regression", out, target)
    assert loss == pytest.approx(truth)
    assert metrics == pytest.approx({"mse": truth, "loss": truth})


def test_integer_targets_of_a_regression() -> None:
    assert both("regression", torch.tensor([[1.5], [2.0]]), torch.tensor([1, 4]))[0] == pytest.approx((0.25 + 4.0) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.uint8])
def test_multilabel_against_numpy(dtype: torch.dtype) -> None:
    logits = torch.randn(50, 4, generator=GENERATOR, dtype=torch.float64)
    y = torch.rand(50, 4, generator=GENERATOR) < 0.3
    y[0], logits[0] = False, -1.0  # nothing set, nothing predicted
    p, t, said = 1 / (1 + np.exp(-logits.numpy())), y.numpy(), logits.numpy() > 0
    loss = float(-(t * np.log(p) + (1 - t) * np.log(1 - p)).mean())
    f1 = []
    for truth, guess in zip(t, said, strict=True):
        right = len(set(np.flatnonzero(truth)) & set(np.flatnonzero(guess)))
        total = truth.sum() + guess.sum()
        f1.append(1.0 if total == 0 else 2 * right / total)
    want = {"accuracy": float((said == t).mean()), "f1": float(np.mean(f1)), "loss": loss}
    assert both("multilabel", logits, y.to(dtype), 4)[1] == pytest.approx(want)


@pytest.mark.parametrize(
    ("kind", "output", "y", "sentence"),
    [
        ("regression", (9, 3), (9,), r"targets of shape \[9\] do not fit an output of shape \[9, 3\]"),
        ("regression", (9, 1), (9, 9), "do not fit"),
        ("regression", (1, 9), (9, 1), "do not fit"),
        ("multilabel", (9, 4), (9,), r"labels of shape \[9\] do not fit"),
        ("multilabel", (9, 4), (9, 1), "do not fit"),
        ("classification", (9, 1), (9,), "two or more classes"),
        ("classification", (9,), (9,), "two or more classes"),
        ("classification", (9, 4), (9,), "floating-point labels"),
        ("classification", (9, 5, 4), (9, 5), "classes on dimension 1"),
        ("classification", (9, 4), (9, 3), "do not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(kind: str, output: Any, y: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"task 't': .*{sentence}"):
        both(kind, torch.zeros(output), torch.zeros(y))


def test_integer_rows_with_several_labels_are_not_one_hot() -> None:
    with pytest.raises(UsageError, match=r"not one-hot.*multilabel"):
        both("classification", torch.zeros(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]]))


@pytest.mark.parametrize(
    ("kind", "y", "sentence"),
    [
        ("classification", torch.rand(48, 3), r"not probabilities .*kind='multilabel'"),
        ("classification", torch.zeros(48), "use integer class numbers"),
        ("classification", torch.zeros(48, 1), "use integer class numbers"),
        ("classification", torch.full((48, 3), torch.nan), "not probabilities"),
        ("multilabel", torch.zeros(48, 4), r"labels of shape \[48, 4\] but outputs=3"),
        ("multilabel", torch.arange(48) % 3, "outputs=3"),
        ("multilabel", torch.full((48, 3), 2), "labels from 2 to 2"),
        ("multilabel", torch.full((48, 3), torch.nan), "labels from nan"),
    ],
)
def test_values_are_checked_before_training(kind: str, y: Tensor, sentence: str) -> None:
    task = Task(name="t", train=(torch.randn(48, 8), y), outputs=3, kind=kind)
    with pytest.raises(UsageError, match=f"task 't' has .*{sentence}"):
        MetaTrainer(Net, [task], "reptile", horizon=2, rounds=1, batch_size=8).advance()
    with pytest.raises(UsageError, match=f"task 't' has .*{sentence}"):
        finetune(None, task, model=Net, steps=1, batch_size=8)


def test_multilabel_is_learned() -> None:
    x = torch.randn(256, 8, generator=GENERATOR)
    y = (x @ torch.randn(8, 3, generator=GENERATOR) > 0.5).long()
    task = Task(name="m", train=(x, y), test=(x, y), outputs=3, kind="multilabel", input_shape=(8,))
    trainer = MetaTrainer(Net, [task], "reptile", horizon=10, rounds=2, batch_size=16)
    list(trainer)
    tuned = finetune(trainer.initialization, task, steps=300, batch_size=32, lr=0.2)
    with torch.no_grad():
        said = tuned.module(x).numpy() > 0
    assert tuned.metrics["accuracy"] == pytest.approx(float((said == (y.numpy() == 1)).mean()))
    assert tuned.metrics["accuracy"] > 0.9
    assert tuned.metrics["f1"] > 0.8


# -- what a model returns --------------------------------------------------------------------------------------


class Output(NamedTuple):
    """As torchvision's Inception returns."""

    logits: Tensor
    aux_logits: Tensor | None


class ModelOutput(dict):  # type: ignore[type-arg]
    """As transformers' models return."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


def _wrapped(logits: Tensor) -> dict[str, Any]:
    return {
        "tuple": (logits,),
        "list": [logits],
        "namedtuple": Output(logits, None),
        "dict": {"features": logits * 2, "logits": logits},
        "segmentation": {"aux": logits * 2, "out": logits},
        "only": {"scores": logits},
        "ModelOutput": ModelOutput(logits=logits, hidden=logits * 2),
    }


@pytest.mark.parametrize("form", _wrapped(torch.zeros(1)))
def test_logits_are_taken_from_what_a_model_returns(form: str) -> None:
    class Wrapped(Net):
        def forward(self, x: Tensor) -> Any:
            return _wrapped(super().forward(x))[form]

    task = make_task("a", 1)
    results = [finetune(None, task, model=model, steps=5, batch_size=8).metrics for model in (Net, Wrapped)]
    assert results[0] == results[1]
    assert isinstance(_wrapped(torch.zeros(1))["dict"], Mapping)


@pytest.mark.parametrize("made", [lambda t: (t, t), lambda t: {"a": t, "b": t}, lambda t: None])
def test_other_outputs_are_refused_with_the_remedy(made: Any) -> None:
    with pytest.raises(UsageError, match=r"task 't': the model returned a .*return the logits alone"):
        both("classification", made(torch.zeros(4, 3)), torch.zeros(4, dtype=torch.int64))
