"""Images of one split that are decoded when indexed, whatever they are stored in."""

from __future__ import annotations

from abc import abstractmethod
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from trajshift.data.resize import image_tensor, prepare_images
from trajshift.data.sources import shuffled_by_class
from trajshift.errors import UsageError, first_line
from trajshift.rng import key


class DecodedImages(Dataset[tuple[Tensor, int]]):
    """Images of one split, decoded and brought to one shape when indexed, each with its class number."""

    def __init__(self, what: str, targets: Tensor, size: int | None, channels: int | None) -> None:
        self.what, self.targets = what, targets
        self.numbers = torch.arange(len(targets))
        self._size, self._channels = size, channels
        self.shape = self._decode(0).shape

    @abstractmethod
    def _image(self, number: int) -> Any:
        """The Pillow image `number`; None where there is none."""

    @abstractmethod
    def _place(self, number: int) -> str | None:
        """The file of image `number`, if it has one."""

    @property
    def commit(self) -> str | None:
        """The commit of the repository on the hub that the images are from; None for local files."""
        return None

    @property
    def listing(self) -> str | None:
        """A digest of the names and sizes of the image files; None where images are not files."""
        return None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        number = int(self.numbers[place])
        image = self._decode(number)
        if image.shape != self.shape:
            raise UsageError(
                f"{self.what}: image {number} has shape {list(image.shape)} but the first {list(self.shape)};"
                " set size to resize all, and channels if some are grey"
            )
        return image, int(self.targets[place])

    def select(self, places: Tensor, targets: Tensor) -> DecodedImages:
        """Only the images at `places` (int64 `[n]`), with these class numbers."""
        chosen = copy(self)
        chosen.numbers, chosen.targets = self.numbers[places], targets
        return chosen

    def _decode(self, number: int) -> Tensor:
        try:
            decoded = self._image(number)
        except UsageError:
            raise
        except Exception as error:  # what Pillow raises for bytes that are not an image depends on the format
            known = not type(error).__name__.startswith("Unidentified")  # else Pillow names an object in memory
            reason = first_line(error) if known else "not a format that Pillow knows"
            place = self._place(number)
            named = f"{place}: " if place else ""
            raise UsageError(f"{self.what}: image {number} is broken ({named}{reason}); repair or drop it") from error
        if decoded is None:
            raise UsageError(f"{self.what}: image {number} is missing; drop the row")
        try:
            return prepare_images(image_tensor(decoded)[None], size=self._size, channels=self._channels)[0]
        except UsageError as error:
            raise UsageError(f"{self.what}: image {number}: {error}") from error


@dataclass(frozen=True, slots=True)
class OpenedImages:
    """The splits of a data set, opened and checked; no image but the first is decoded yet."""

    splits: dict[str, DecodedImages]
    """`train` and, where the data set has such a split, `test`."""
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Doubts about the data, one sentence each."""


def divided(images: DecodedImages, share: float) -> dict[str, DecodedImages]:
    """Images of one split to train and to test on, `share` of each class for testing."""
    classes = shuffled_by_class(images.targets, key("share for testing"))
    held = [own[: round(share * len(own))] for own in classes] if 0 < share < 1 else []
    if not any(map(len, held)):
        raise UsageError(
            f"{images.what}: test is {share}, which holds no image out; use a share such as 0.2, or a split"
        )
    places = {
        "train": torch.cat([own[len(few) :] for own, few in zip(classes, held, strict=True)]).sort().values,
        "test": torch.cat(held).sort().values,
    }
    return {name: images.select(chosen, images.targets[chosen]) for name, chosen in places.items()}


def check_test_classes(splits: dict[str, DecodedImages], class_names: tuple[str, ...]) -> None:
    """Refuse test images of a class that has no training image.

    Raises:
        UsageError: names the first such class and counts its test images.
    """
    if "test" not in splits:
        return
    counts = [torch.bincount(splits[split].targets, minlength=len(class_names)) for split in ("train", "test")]
    absent = torch.nonzero((counts[0] == 0) & (counts[1] > 0)).flatten().tolist()
    if absent:
        others = f" (and {len(absent) - 1} other classes)" if absent[1:] else ""
        raise UsageError(
            f"{splits['test'].what}: class {class_names[absent[0]]!r} has {counts[1][absent[0]]} test images but no"
            f" training image{others}; add training images of it, remove its test images, or set test to a share"
            " such as 0.2"
        )
