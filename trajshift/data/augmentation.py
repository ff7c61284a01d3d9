"""Random crop, flip and normalisation of a whole batch of images on its device.

Shapes: B images of C channels, H x W pixels, padded by p on each side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trajshift.data.sources import Source, as_source
from trajshift.errors import UsageError
from trajshift.rng import integers, seeded_cpu_generators, words
from trajshift.rng import key as hash_key
from trajshift.task import Batch, Task


def draw_crops(crop: int | Tensor, mirror: int | Tensor, place: Tensor, *, padding: int) -> Tensor:
    """Where each image is cropped and whether it is mirrored: int64 `[3, B]` of top, left (0 to 2 p) and mirror (0, 1).

    Each image has its own draw, a function of the keys and of its place in the batch; `place` is 0 to 2 B - 1. With
    `rng.words` `[S, 2]` for keys, `[S, 3, B]` for S batches.
    """
    corner = integers(crop, place, 2 * padding + 1).unflatten(-1, (-1, 2))
    mirrored = integers(mirror, place[: len(place) // 2], 2)
    return torch.stack((corner[..., 0], corner[..., 1], mirrored), dim=-2)


def crop_and_flip(images: Tensor, draw: Tensor, *, padding: int, flip: bool) -> Tensor:
    """Shift each image of `[B, C, H, W]` by up to `padding` pixels and mirror some, as `draw` `[3, B]` says.

    Pixels shifted in are zero, as in torchvision's `RandomCrop(size, padding)`. Crop and mirroring are one gather.
    """
    count, channels, height, width = images.shape
    top, left, mirrored = draw.unsqueeze(2).unbind(0)
    rows = top + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    if flip:
        columns = torch.where(mirrored == 1, width - 1 - columns, columns)
    columns = columns + left
    padded = F.pad(images, (padding,) * 4)
    pixels = (rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]).view(count, 1, height * width)
    return padded.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view(images.shape)


class ImageTransform:
    """Turns `(x [B, C, H, W], y)` into normalised float32 images, with random crop and flip when training.

    `x` is uint8 (0 to 255) or floating (0 to 1). It is augmented if there is a `key`, scaled to 0 to 1, repeated
    to `channels` if it is grey and normalised to `(x - mean) / std`, each a number or one per channel.

    Raises:
        UsageError: a negative padding or a std of zero; at a call, images of another shape than these.
    """

    draws_by_key = True
    """It draws from no global generator, so none has to be seeded for it."""

    def __init__(
        self,
        crop_padding: int = 0,
        flip: bool = False,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        channels: int | None = None,
    ) -> None:
        if crop_padding < 0:
            raise UsageError(f"crop_padding is {crop_padding}; use 0 for no random crop or a number of pixels")
        self.crop_padding, self.flip, self.channels = crop_padding, flip, channels
        self._mean, self._std = (_per_channel(name, value) for name, value in (("mean", mean), ("std", std)))
        if bool((self._std == 0).any()):
            raise UsageError("std is 0 in a channel; use positive numbers")
        self._constants: dict[tuple[torch.device, float], tuple[Tensor, Tensor]] = {}

    def __call__(self, batch: Batch, key: int | None) -> Batch:
        """The transformed batch; without a key nothing is random."""
        x, _ = batch
        if key is None or not self.random:
            return self.apply(batch, None)
        place = torch.arange(2 * len(x), device=x.device)
        return self.apply(batch, draw_crops(*crop_keys(key), place, padding=self.crop_padding))

    @property
    def random(self) -> bool:
        """Whether training images are augmented."""
        return self.crop_padding > 0 or self.flip

    def draws(self, keys: Sequence[tuple[int, int]], count: int, device: torch.device) -> Tensor:
        """What `apply` needs for S batches of `count` images, all at once: int64 `[S, 3, count]`.

        `keys` are those that `crop_keys` makes of each batch's.
        """
        crop, mirror = (words(part).to(device) for part in zip(*keys, strict=True))
        return draw_crops(crop, mirror, torch.arange(2 * count, device=device), padding=self.crop_padding)

    def apply(self, batch: Batch, draw: Tensor | None) -> Batch:
        """The transformed batch, cropped and flipped as `draw` `[3, B]` says; not at all for None."""
        x, y = batch
        if x.ndim != 4 or (self.channels not in (None, x.shape[1]) and x.shape[1] != 1):
            channels = self.channels or "C"
            raise UsageError(f"a batch of images has shape {list(x.shape)}; expected [B, {channels}, H, W]")
        statistics = max(len(self._mean), len(self._std))
        if statistics > 1 and statistics != (self.channels or x.shape[1]):
            raise UsageError(
                f"mean and std are given for {statistics} channels but images have {self.channels or x.shape[1]};"
                " give one number, or one per channel"
            )
        if draw is not None:
            x = crop_and_flip(x, draw, padding=self.crop_padding, flip=self.flip)
        scale, offset = self._scale_and_offset(x.device, 1.0 if x.is_floating_point() else 255.0)
        x = x.to(torch.float32)
        if self.channels is not None:
            x = x.expand(-1, self.channels, -1, -1)
        return x * scale + offset, y

    def _scale_and_offset(self, device: torch.device, white: float) -> tuple[Tensor, Tensor]:
        # Kept per device: a copy from the host in every batch would make the device wait.
        if (device, white) not in self._constants:
            scale, offset = 1.0 / (white * self._std), -self._mean / self._std
            self._constants[device, white] = (scale.float().to(device), offset.float().to(device))
        return self._constants[device, white]


def crop_keys(key: int) -> tuple[int, int]:
    """The two draws behind a batch's augmentation: where it is cropped, and which images are flipped."""
    return hash_key(key, "crop"), hash_key(key, "flip")


def _per_channel(name: str, value: float | Sequence[float]) -> Tensor:
    numbers = torch.tensor(value, dtype=torch.float64).reshape(-1, 1, 1)
    if not bool(numbers.isfinite().all()) or not len(numbers):
        raise UsageError(f"{name} is {value}; use a number or one per channel")
    return numbers


def image_task(
    name: str,
    train: Any,
    test: Any = None,
    *,
    outputs: int,
    kind: str = "classification",
    crop_padding: int = 0,
    flip: bool = False,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    channels: int | None = None,
    weight: float = 1.0,
    batch_size: int | None = None,
) -> Task:
    """A task on images `(x [B, C, H, W], y [B])`, of classes unless `kind` says otherwise.

    Images are augmented by `ImageTransform`.
    `train` and `test` are anything `as_source` takes. `channels` repeats grey images to that number. The shape
    of one example is taken from the first.

    Raises:
        UsageError: examples that are not images, or test images of another shape than the training images.
    """
    source = as_source(train, what=f"the training set of task {name!r}")
    shape = _image_shape(name, source, channels)
    if test is not None:
        test = as_source(test, what=f"the test set of task {name!r}")
        if _image_shape(name, test, channels) != shape:
            raise UsageError(
                f"task {name!r} has training images of shape {list(shape)} but test images of shape"
                f" {list(_image_shape(name, test, channels))}; resize them to one size"
            )
    transform = ImageTransform(crop_padding, flip, mean, std, channels)
    return Task(
        name=name,
        train=source,
        test=test,
        outputs=outputs,
        kind=kind,
        transform=transform,
        weight=weight,
        batch_size=batch_size,
        input_shape=shape,
    )


def _image_shape(name: str, source: Source, channels: int | None) -> tuple[int, ...]:
    with seeded_cpu_generators(0):
        batch = source.fetch(torch.tensor([0]))
    if (
        not isinstance(batch, (tuple, list))
        or len(batch) != 2
        or not isinstance(batch[0], Tensor)
        or batch[0].ndim != 4
    ):
        raise UsageError(f"task {name!r} has examples that are not pairs of an image [C, H, W] and a label")
    own, *pixels = batch[0].shape[1:]
    if channels is not None and own not in (1, channels):
        raise UsageError(f"task {name!r} has images of {own} channels, which cannot become {channels}")
    return (own if channels is None else channels, *pixels)
