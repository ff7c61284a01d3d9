"""Small image tasks in float64 for tests of checkpoints and of many processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.options import build
from trajshift import Inner, MetaTrainer, Task, models
from trajshift.data.augmentation import image_task
from trajshift.task import classification_loss

HORIZON = 4
ROUNDS = 3
SGD = {"momentum": 0.9, "weight_decay": 5e-4}


def tasks(count: int) -> list[Task]:
    """Random images of different size, class count and weight; `count` of them, the first ones always the same."""
    return [_task(index) for index in range(count)]


def _task(index: int) -> Task:
    generator = torch.Generator().manual_seed(index)
    size, outputs = (6, 8)[index % 2], 2 + index % 3
    x = torch.randint(0, 256, (14 + index, 1, size, size), dtype=torch.uint8, generator=generator)
    y = torch.randint(0, outputs, (len(x),), generator=generator)
    return image_task(f"t{index}", (x, y), outputs=outputs, crop_padding=1, weight=1.0 + index % 2)


def model(task: Task, **options: Any) -> nn.Module:
    """A smooth convolutional net with BatchNorm in float64, so that rounding does not grow fast."""
    chosen = {"width": 4, "depth": 2, "activation": "softplus", "pool": "avg"} | options
    return models.build_model("conv", task, **chosen).double()


def trainer(listed: list[Task], method: str = "trajectory-shifting", **options: Any) -> MetaTrainer:
    """A trainer of 3 rounds of 4 steps."""
    chosen: dict[str, Any] = {"horizon": HORIZON, "rounds": ROUNDS, "batch_size": 5, "seed": 3}
    chosen["inner"] = Inner(lr=0.05, options=SGD)
    return build(options.pop("model", model), listed, method, **(chosen | options))


def run(made: MetaTrainer, until: int) -> list[Tensor]:
    """Takes inner steps up to the step `until`; returns the losses of each."""
    return [made.advance().losses for _ in range(until - made.step)]


def poisoned(name: str, how: str = "") -> Task:
    """Twenty images; on the first of them the loss (`loss`) or only its gradient (`gradient`) is not finite."""
    generator = torch.Generator().manual_seed(len(name))
    x, y = torch.randn(20, 1, 6, 6, generator=generator), torch.arange(20) % 2
    x[0, 0, 0, 0] = 9.0

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        value = classification_loss(module, batch)
        if how and bool((batch[0] == 9.0).any()):
            zero = 0.0 * sum(parameter.sum() for parameter in module.parameters())
            value = value + (torch.sqrt(zero) if how == "gradient" else zero / 0.0)
        return value

    return Task(name=name, train=(x, y), outputs=2, input_shape=(1, 6, 6), loss=loss)
