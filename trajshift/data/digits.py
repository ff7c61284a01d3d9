"""Heterogeneous tasks made of the 1,797 optical digits of the UCI repository, which are shipped (see DIGITS.md).

Sources show the digits 0 to 5, targets 6 to 9, so they share neither a class nor an image. Sources differ in
label space, orientation, polarity and size: besides "which digit" there are "odd or even", "turned by how much"
and "mirrored or not". Targets have 20 to 40 training images; all other scans of their digits are test images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from trajshift.data.augmentation import image_task
from trajshift.data.npz import load_npz
from trajshift.data.resize import prepare_images
from trajshift.data.sources import ArraySource, ImageData
from trajshift.errors import UsageError, nearest
from trajshift.task import Task

_FILE = Path(__file__).with_name("digits.npz")


@dataclass(frozen=True, kw_only=True)
class _Variant:
    """How a task shows and labels the scans; each scan appears once per view (turn and mirroring)."""

    digits: tuple[int, ...]
    size: int
    """Height and width in pixels."""
    turns: tuple[int, ...] = (0,)
    """Quarter turns anticlockwise."""
    mirrored: tuple[bool, ...] = (False,)
    inverted: bool = False
    """Dark ink on white paper instead of white ink on black."""
    label: str = "digit"
    """`digit`, `parity`, `view` or `digit and view`."""
    per_digit: int | None = None
    """Scans of each digit to train on, the others being test images; None keeps the file's split."""

    @property
    def views(self) -> list[tuple[int, bool]]:
        return [(turn, mirrored) for turn in self.turns for mirrored in self.mirrored]

    def show(self, scans: Tensor) -> Tensor:
        """`[N, 1, 8, 8]` to `[views * N, 1, size, size]`, view by view."""
        shown = [torch.rot90(scans.flip(-1) if flip else scans, turn, (-2, -1)) for turn, flip in self.views]
        images = torch.cat(shown)
        return prepare_images(255 - images if self.inverted else images, size=self.size)

    def class_names(self) -> list[str]:
        names = ["mirrored" if flip else f"turned {90 * turn}" if turn else "upright" for turn, flip in self.views]
        return {
            "digit": [str(digit) for digit in self.digits],
            "parity": ["even", "odd"],
            "view": names,
            "digit and view": [f"{digit} {name}" for digit in self.digits for name in names],
        }[self.label]

    def classes(self, digits: Tensor) -> Tensor:
        """Digits `[N]` to class numbers `[views * N]`, view by view."""
        count = len(self.views)
        place = torch.tensor([self.digits.index(digit) for digit in digits.tolist()]).repeat(count)
        view = torch.arange(count).repeat_interleave(len(digits))
        return {
            "digit": place,
            "parity": digits.repeat(count) % 2,
            "view": view,
            "digit and view": place * count + view,
        }[self.label]


_LOW = (0, 1, 2, 3, 4, 5)
_SOURCES = {
    "upright": _Variant(digits=_LOW, size=12),
    "turned": _Variant(digits=_LOW, size=12, turns=(1,)),
    "upside-down": _Variant(digits=_LOW, size=16, turns=(2,), inverted=True),
    "mirrored": _Variant(digits=_LOW, size=8, mirrored=(True,)),
    "few-classes": _Variant(digits=(0, 1, 2), size=8, turns=(3,), inverted=True),
    "parity": _Variant(digits=_LOW, size=16, label="parity"),
    "which-turn": _Variant(digits=(2, 3, 4, 5), size=12, turns=(0, 1, 2, 3), label="view"),
    "which-side": _Variant(digits=(2, 3, 4, 5), size=16, mirrored=(False, True), inverted=True, label="view"),
}
# Only views that can be told apart: a mirrored 8 is an 8, and a 6 turned twice a 9.
_TARGETS = {
    "six-to-nine": _Variant(digits=(6, 7, 8, 9), size=16, inverted=True, per_digit=5),
    "digit-and-turn": _Variant(digits=(6, 7, 8, 9), size=12, turns=(0, 1), label="digit and view", per_digit=5),
    "digit-and-side": _Variant(digits=(6, 7, 9), size=12, mirrored=(False, True), label="digit and view", per_digit=5),
}


def digits_tasks(*names: str) -> dict[str, Task]:
    """The source tasks of these names, or all eight: digits 0 to 5, 2 to 6 classes, 8, 12 or 16 pixels.

    Raises:
        UsageError: a name that is not a source task's.
    """
    return _tasks("source", _SOURCES, names)


def digits_targets(*names: str) -> dict[str, Task]:
    """The target tasks of these names, or all three: digits 6 to 9, 4 to 8 classes, 20 to 40 training images.

    Raises:
        UsageError: a name that is not a target task's.
    """
    return _tasks("target", _TARGETS, names)


def digits_task(name: str, *, size: int | None = None, channels: int | None = None) -> Task:
    """One source or target task, grey, never flipped, randomly shifted by up to a pixel.

    Args:
        name: one of the names of `digits_tasks()` and `digits_targets()`.
        size: pixels; None takes the task's own size.
        channels: 1 or 3; None is 1.

    Raises:
        UsageError: an unknown name.
    """
    images = load_digits(name, size=size, channels=channels)
    # The crop shifts in black, which would draw lines on white paper.
    padding = 0 if _variant(name).inverted else 1
    return image_task(name, images.train, images.test, outputs=images.outputs, crop_padding=padding)


def load_digits(name: str, *, size: int | None = None, channels: int | None = None) -> ImageData:
    """The images of a digits task, as `load_npz` gives those of a file.

    Raises:
        UsageError: an unknown name.
    """
    variant = _variant(name)
    if size is not None:
        variant = replace(variant, size=size)
    class_names = tuple(variant.class_names())
    train, test = (
        ArraySource((prepare_images(variant.show(x), channels=channels), variant.classes(y)))
        for x, y in _parts(variant)
    )
    return ImageData(train=train, test=test, outputs=len(class_names), class_names=class_names)


def _variant(name: str) -> _Variant:
    known = _SOURCES | _TARGETS
    if name not in known:
        raise UsageError(f"unknown digits task {name!r}{nearest(name, known)}")
    return known[name]


def _tasks(role: str, known: dict[str, _Variant], names: tuple[str, ...]) -> dict[str, Task]:
    for name in names:
        if name not in known:
            raise UsageError(f"unknown digits {role} {name!r}{nearest(name, known)}")
    return {name: digits_task(name) for name in names or known}


def _parts(variant: _Variant) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test scans `[N, 1, 8, 8]` of the variant's digits, with their digits `[N]`."""
    x, y, is_training = _scans()
    chosen = torch.isin(y, torch.tensor(variant.digits))
    if variant.per_digit is not None:
        is_training = torch.zeros_like(chosen)
        for digit in variant.digits:
            members = torch.nonzero(y == digit).flatten()
            # Spread over the file, where scans of one writer are likely to be together.
            is_training[members[torch.arange(variant.per_digit) * len(members) // variant.per_digit]] = True
    training, test = chosen & is_training, chosen & ~is_training
    return (x[training], y[training]), (x[test], y[test])


@cache
def _scans() -> tuple[Tensor, Tensor, Tensor]:
    """All scans uint8 `[1797, 1, 8, 8]`, their digits, and which are in the file's training part."""
    data = load_npz(_FILE)
    splits = [source.fetch(torch.arange(len(source))) for source in (data.train, data.test) if source is not None]
    is_training = torch.arange(len(data.train) + len(splits[1][1])) < len(data.train)
    return torch.cat([x for x, _ in splits]), torch.cat([y for _, y in splits]), is_training
