"""What is trained: tasks of random images, the paper's inner optimizer, one `MetaTrainer` for all benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from trajshift import Execution, Inner, Meta, MetaTrainer, Task
from trajshift.data.augmentation import image_task
from trajshift.models import build_model

INNER_LR = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
META_LR = 0.01
"""Of section 4.2."""
PADDING = 4
FOREVER = 10**6


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Equal tasks on the same random images; the sizes decide the cost, the content does not matter."""

    tasks: int = 8
    """T."""
    size: int = 32
    """Pixels on a side."""
    batch_size: int = 128
    model: str = "resnet20"
    width: int | None = None
    """Of the model; None for its own."""
    horizon: int = 1000
    """K."""
    bfloat16: bool = False
    """Autocast of the forward pass."""
    images: int = 2048
    """Of all tasks together, which share them."""
    classes: int = 10

    def options(self) -> dict[str, Any]:
        """As JSON values, for a side in its own process."""
        return asdict(self)

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of the forward pass, None for that of the parameters."""
        return torch.bfloat16 if self.bfloat16 else None

    def build(self, task: Task) -> nn.Module:
        """The model of a task."""
        return build_model(self.model, task, **({} if self.width is None else {"width": self.width}))

    def build_tasks(self, device: torch.device | str = "cpu") -> list[Task]:
        """T tasks whose images are on the device."""
        data = random_images(self.images, self.size, self.classes, device=device)
        return [
            image_task(f"task{t}", data, outputs=self.classes, crop_padding=PADDING, flip=True)
            for t in range(self.tasks)
        ]


TINY = Workload(tasks=2, model="conv", width=4, batch_size=4, size=8, images=16)
"""As small as possible."""


def sgd(parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.SGD:
    """The inner optimizer as ordinary PyTorch has it."""
    return torch.optim.SGD(parameters, lr=INNER_LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **options)


def random_images(
    count: int, size: int, classes: int, *, channels: int = 3, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 `[count, channels, size, size]` and labels int64 `[count]`, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (count, channels, size, size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device=device)
    return images, torch.randint(0, classes, (count,), generator=generator, device=device)


def own_bytes(trainer: MetaTrainer) -> int:
    """Row, gradient and momentum of a task, head included, of a trainer that has taken a step."""
    head = sum(parameter.numel() for parameter in trainer.learners[0].own.values())
    return 3 * (trainer.layout.size + head) * trainer.theta.element_size()


def engine_of(trainer: MetaTrainer) -> str:
    """Name of the engine that was chosen."""
    return trainer.engine.name


def build_trainer(
    workload: Workload,
    *,
    engine: str,
    device: torch.device | str = "cpu",
    method: str = "trajectory-shifting",
    tasks: Sequence[Task] | None = None,
) -> MetaTrainer:
    """A trainer of the workload's tasks, or of others, that runs as long as it is asked to."""
    return MetaTrainer(
        workload.build,
        tasks or workload.build_tasks(device),
        method,
        horizon=workload.horizon,
        rounds=FOREVER,
        inner=Inner(lr=INNER_LR, options={"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}),
        meta=Meta(lr=META_LR),
        execution=Execution(device=device, autocast=workload.autocast, engine=engine),
        batch_size=workload.batch_size,
    )
