"""What is trained in the paper's regime, and on which images.

The GPU's machine has neither pydantic nor YAML, so nothing here reads a recipe: the tasks and options of small-images
are repeated here, and tests/studies/test_regime.py compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from trajshift.data.augmentation import image_task
from trajshift.data.npz import load_npz
from trajshift.errors import UsageError
from trajshift.models import build_model
from trajshift.settings import Finetune
from trajshift.task import Task

METHODS = ("trajectory-shifting", "reptile", "mtl", "no-shifting")
SOURCES = (
    "tinyimagenet_a", "tinyimagenet_b", "fashion_mnist", "gtsrb", "rsscn7", "kannada_mnist", "malaria", "clothing",
)  # fmt: skip
TUNING = "mnist"
"""The task that rates are chosen by: neither a source nor a target."""
TARGETS = ("cifar10", "dtd10", "sign_digits")
NEVER_FLIPPED = ("gtsrb", "kannada_mnist", "mnist", "sign_digits")
CHANNELS = 3
SIZE_FILE = "SIZE"
"""Beside packed images (`studies.regime.pack`): the size they were packed for."""

Size = int | None
"""Pixels; None leaves the images of each task at their own size."""


@dataclass(frozen=True, kw_only=True)
class Regime:
    """How long, on what batches and with which model; the tests have a smaller one."""

    horizon: int = 1000
    rounds: int = 20
    kept: tuple[int, ...] = (1, 2, 5, 10, 20)
    """Rounds after which phi is kept."""
    batch_size: int = 128
    model: str = "resnet20"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    autocast: str = "bfloat16"
    log_every: int = 100
    """Inner steps between two points of the loss curve."""
    tuning_rounds: int = 2
    """Rounds of the short runs that rates are chosen by."""
    finetune_steps: int = 300
    finetune_batch_size: int = 32
    finetune_images: int = 1000
    finetune_lrs: tuple[float, ...] = (0.03, 0.1)

    def factory(self) -> Callable[[Task], nn.Module]:
        """The model's factory, `factory(task) -> module`."""
        return lambda task: build_model(self.model, task, **self.model_options)

    def finetune(self, lr: float) -> Finetune:
        """How a phi is fine-tuned at one rate."""
        return Finetune(
            steps=self.finetune_steps, batch_size=self.finetune_batch_size, train_images=self.finetune_images, lr=lr
        )


REGIME = Regime()


def crop_padding(name: str, size: Size) -> int:
    """Pixels of padding before a random crop: as in results/images at 32 pixels and at native sizes."""
    return 8 if size is None and name == "rsscn7" else 4


def build_image_task(name: str, data: Path, size: Size) -> Task:
    """The task of a file `NAME.npz`.

    Raises:
        UsageError: a missing or malformed file, or images packed for another size.
    """
    packed = data / SIZE_FILE
    if packed.is_file() and packed.read_text().strip() != show_size(size):
        found = packed.read_text().strip()
        raise UsageError(f"the images in {data} were packed for size {found}, not {show_size(size)}; pack them again")
    images = load_npz(data / f"{name}.npz", size=size, channels=CHANNELS)
    return image_task(
        name,
        images.train,
        images.test,
        outputs=images.outputs,
        crop_padding=crop_padding(name, size),
        flip=name not in NEVER_FLIPPED,
        channels=CHANNELS,
    )


def parse_size(text: str) -> Size:
    """`native` or a number of pixels.

    Raises:
        UsageError: neither.
    """
    if text == "native":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"size is {text!r}; use native or a number of pixels, such as 32")
    return int(text)


def show_size(size: Size) -> str:
    """As `parse_size` reads it."""
    return "native" if size is None else str(size)
