"""Small models and tasks that the tests of the loop share. All in float64 unless said otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.options import build
from trajshift import METHODS, Inner, MetaTrainer, Task
from trajshift.training.engines.parallel import Parallel

DOUBLE = torch.float64
MOMENTUM = {"momentum": 0.9, "weight_decay": 5e-4}


class SideBySide(Parallel):
    """Does not try the loop's way too."""

    def __init__(self, threads: int = 2) -> None:
        super().__init__(threads)
        self.side_by_side = True


class ConvNet(nn.Module):
    """Convolution, BatchNorm, pooling, dropout, and a head of the task's size; takes images of any size."""

    def __init__(self, task: Task, *, width: int = 4, dropout: float = 0.0, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, dtype=dtype),
            nn.BatchNorm2d(width, dtype=dtype),
            nn.Softplus(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        self.fc = nn.Linear(4 * width, task.outputs or 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x.mean(dim=1, keepdim=True)))


def image_data(count: int, classes: int, size: int = 6, channels: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise whose mean tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    noise = torch.randn(count, channels, size, size, generator=generator, dtype=DOUBLE)
    return noise + labels[:, None, None, None] / classes, labels


def image_tasks(classes: Iterable[int] = (2, 3, 5), **options: Any) -> list[Task]:
    """One task for each number of classes."""
    return [
        Task(name=f"images{t}", train=image_data(12 + t, n, seed=t, **options), outputs=n)
        for t, n in enumerate(classes)
    ]


class Text(nn.Module):
    """An embedding, an LSTM and a decoder tied to the embedding, for batches that are dicts; a head beside them."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, dtype=DOUBLE)
        self.lstm = nn.LSTM(4, 4, batch_first=True, dtype=DOUBLE)
        self.decoder = nn.Linear(4, 7, bias=False, dtype=DOUBLE)
        self.decoder.weight = self.embedding.weight
        self.head = nn.Linear(4, task.outputs or 2, dtype=DOUBLE)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = self.lstm(self.embedding(tokens))
        return self.decoder(states), self.head(states[:, -1])


def text_loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Next-token prediction plus classification."""
    tokens = batch["tokens"]
    following, classes = module(tokens[:, :-1])
    return F.cross_entropy(following.flatten(0, 1), tokens[:, 1:].flatten()) + F.cross_entropy(classes, batch["label"])


def text_tasks(classes: Iterable[int] = (2, 3)) -> list[Task]:
    """Dict batches of tokens `[B, 5]` and labels `[B]`."""
    listed = []
    for t, n in enumerate(classes):
        generator = torch.Generator().manual_seed(t)
        data = {"tokens": torch.randint(0, 7, (9, 5), generator=generator), "label": torch.arange(9) % n}
        listed.append(Task(name=f"text{t}", train=data, outputs=n, loss=text_loss))
    return listed


def make(method: str, tasks: list[Task], model: Callable[[Task], nn.Module] | nn.Module = ConvNet, **options: Any):
    """A trainer with few, short rounds and SGD with momentum and weight decay; one task where only one is allowed."""
    chosen: dict[str, Any] = {"horizon": 4, "rounds": 2, "batch_size": 5, "inner": Inner(lr=0.05, options=MOMENTUM)}
    return build(model, tasks[:1] if METHODS[method].single else tasks, method, **chosen | options)


def run(trainer: MetaTrainer, steps: int | None = None) -> MetaTrainer:
    """Takes `steps` inner steps, or all that are left."""
    for _ in range(trainer.total_steps - trainer.step if steps is None else steps):
        trainer.advance()
    return trainer


def everything(trainer: MetaTrainer) -> dict[str, Tensor]:
    """All numbers that a run has: phi, theta, heads, statistics, optimizer state; copies."""
    tensors = {"phi": trainer.phi, "theta": trainer.theta}
    for learner in trainer.learners:
        tensors |= {f"{learner.task.name}/{name}": tensor for name, tensor in learner.state()[0].items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(left: MetaTrainer, right: MetaTrainer) -> None:
    """All numbers of two runs agree to 1e-9, on whichever devices they are."""
    ends = everything(left), everything(right)
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor.cpu(), ends[1][name].cpu(), rtol=1e-9, atol=1e-9, msg=name)


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of named tensors agree to the last bit (NaN equals nothing)."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def named_theta(trainer: MetaTrainer, task: str) -> dict[str, Tensor]:
    """One task's shared parameters by name; copies."""
    row = [learner.task.name for learner in trainer.learners].index(task)
    return {name: view.clone() for name, view in trainer.layout.views(trainer.theta[row]).items()}
