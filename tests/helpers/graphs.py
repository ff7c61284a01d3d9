"""Trainers whose steps are recorded, or compared with recorded ones, on the CPU and on a GPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from tests.helpers.options import build
from trajshift import Inner, MetaTrainer, Task
from trajshift.data.augmentation import image_task
from trajshift.models import build_model

STEPS = 50


def tasks() -> list[Task]:
    """Images of two sizes and class counts, augmented."""
    generator = torch.Generator().manual_seed(0)
    listed = []
    for name, size, classes, count in (("small", 6, 2, 30), ("large", 9, 3, 22)):
        x = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
        listed.append(image_task(name, (x, torch.arange(count) % classes), outputs=classes, crop_padding=1, flip=True))
    return listed


def trainer(engine: Any, listed: list[Task] | None = None, **options: Any) -> MetaTrainer:
    def double(task: Task) -> torch.nn.Module:
        return build_model("conv", task, width=4, depth=2).double()

    chosen: dict[str, Any] = {
        "method": "trajectory-shifting", "horizon": 12, "rounds": 20, "batch_size": 5,
        "inner": Inner(lr=0.03125, options={"momentum": 0.9, "weight_decay": 5e-4}, schedule="step", factor=0.5),
    }  # fmt: skip
    return build(double, listed or tasks(), engine=engine, **chosen | options)


MIXES: list[dict[str, Any]] = [
    {},
    {"method": "reptile"},
    {"method": "no-shifting", "meta_every": 3},
    {"method": "fomaml"},
    {"method": "anil"},
    {"method": "mtl"},
    {"grad_clip": 0.5, "renew": ("heads", "statistics")},
]


class Peeking(torch.nn.Module):
    """Reads a value on the host, which a recording forbids; and leaves gradients behind when it does."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.body = build_model("conv", task, width=4, depth=2).double()
        self.peeks = False
        self.last: weakref.ref[torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.last is None or self.last() is None, "what an earlier step computed is still there"
        out = self.body(x)
        self.last = weakref.ref(out)
        return out * float(out.detach().sum().sign().abs()) if self.peeks else out


def peeking(engine: Any, method: str, **options: Any) -> MetaTrainer:
    """A trainer, one step taken, one of whose models peeks from now on."""
    chosen = {"horizon": 12, "rounds": 20, "batch_size": 5, "inner": Inner(lr=0.03125, options={})}
    made = build(Peeking, tasks(), method, engine=engine, head="body.fc", **chosen | options)
    made.advance()
    made.learners[1].module.peeks = True
    return made
