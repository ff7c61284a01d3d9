"""Crop, flip and normalisation against a loop over images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trajshift.data.augmentation import ImageTransform, crop_and_flip, draw_crops, image_task
from trajshift.errors import UsageError
from trajshift.rng import integers, key, words


def one_by_one(images: np.ndarray, draw: int, padding: int, flip: bool) -> np.ndarray:
    """The slow twin: pads, cuts and mirrors each image by itself."""
    result = np.empty_like(images)
    height, width = images.shape[-2:]

    def number(purpose: str, place: int, high: int) -> int:
        return int(integers(key(draw, purpose), torch.tensor([place]), high)[0])

    for index, image in enumerate(images):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        top = number("crop", 2 * index, 2 * padding + 1)
        left = number("crop", 2 * index + 1, 2 * padding + 1)
        cut = padded[:, top : top + height, left : left + width]
        result[index] = cut[:, :, ::-1] if flip and number("flip", index, 2) == 1 else cut
    return result


def cropped(images: torch.Tensor, number: int, *, padding: int, flip: bool) -> torch.Tensor:
    keys = key(number, "crop"), key(number, "flip")
    draw = draw_crops(*keys, torch.arange(2 * len(images)), padding=padding)
    together = draw_crops(*(words([3, one]) for one in keys), torch.arange(2 * len(images)), padding=padding)
    assert torch.equal(together[1], draw)  # for many batches at once
    assert together.shape == (2, 3, len(images))
    return crop_and_flip(images, draw, padding=padding, flip=flip)


@pytest.mark.parametrize("shape", [(33, 3, 8, 8), (5, 1, 6, 9), (1, 2, 3, 3)])
@pytest.mark.parametrize(("padding", "flip"), [(0, True), (2, False), (4, True)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_crop_and_flip_equals_the_loop(shape: tuple[int, ...], padding: int, flip: bool, dtype: torch.dtype) -> None:
    images = torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    fast = cropped(images, 77, padding=padding, flip=flip)
    assert fast.dtype == dtype
    assert fast.is_contiguous()
    assert np.array_equal(fast.numpy(), one_by_one(images.numpy(), 77, padding, flip))


def test_every_shift_and_both_sides_occur_alike() -> None:
    count, padding = 9000, 1
    images = torch.zeros(count, 1, 4, 4, dtype=torch.uint8)
    images[:, :, 1, 1] = 1
    places = cropped(images, 3, padding=padding, flip=True).flatten(1).argmax(1).bincount(minlength=16)
    rows = places.view(4, 4)
    assert (rows[:3].sum(1) - count / 3).abs().max() < 200
    assert rows[3].sum() == 0
    # Column 1 shifted by up to one, or mirrored to column 2 and shifted: columns 0..3 as 1 : 2 : 2 : 1.
    expected = torch.tensor([1, 2, 2, 1]) * count / 6
    assert (rows.sum(0) - expected).abs().max() < 200


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    whole = cropped(images, 5, padding=2, flip=True)
    assert torch.equal(cropped(images[:7], 5, padding=2, flip=True), whole[:7])
    assert not torch.equal(cropped(images, 6, padding=2, flip=True), whole)


def test_normalisation() -> None:
    x = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    expected = (x / 255 - mean[:, None, None]) / std[:, None, None]
    y = torch.arange(4)
    transform = ImageTransform(crop_padding=2, flip=True, mean=mean.tolist(), std=std.tolist())
    for images in (x, x / 255):
        z, labels = transform((images, y), None)
        assert z.dtype == torch.float32
        assert labels is y
        torch.testing.assert_close(z, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(ImageTransform()((x, y), None)[0], (x / 255 - 0.5) / 0.5, rtol=0, atol=1e-6)


def test_padding_is_black_before_normalising() -> None:
    white = torch.full((64, 1, 4, 4), 255, dtype=torch.uint8)
    z, _ = ImageTransform(crop_padding=1, mean=0.25, std=0.5)((white, torch.zeros(64)), 1)
    assert set(z.flatten().tolist()) == {-0.5, 1.5}


def test_grey_images_are_repeated() -> None:
    x = torch.randint(0, 256, (4, 1, 5, 5), dtype=torch.uint8)
    z, _ = ImageTransform(crop_padding=1, channels=3)((x, torch.zeros(4)), 9)
    single, _ = ImageTransform(crop_padding=1)((x, torch.zeros(4)), 9)
    assert z.shape == (4, 3, 5, 5)
    assert z.is_contiguous()
    assert all(torch.equal(z[:, channel], single[:, 0]) for channel in range(3))


def test_bad_transforms_and_images_are_refused() -> None:
    with pytest.raises(UsageError, match="crop_padding is -1"):
        ImageTransform(crop_padding=-1)
    with pytest.raises(UsageError, match="std is 0"):
        ImageTransform(std=[0.5, 0.0, 0.5])
    with pytest.raises(UsageError, match="mean is nan"):
        ImageTransform(mean=float("nan"))
    batch = torch.zeros(2, 2, 4, 4), torch.zeros(2)
    with pytest.raises(UsageError, match=r"expected \[B, 3, H, W\]"):
        ImageTransform(channels=3)(batch, None)
    with pytest.raises(UsageError, match=r"expected \[B, C, H, W\]"):
        ImageTransform()((torch.zeros(2, 4, 4), torch.zeros(2)), None)
    with pytest.raises(UsageError, match="3 channels but images have 2"):
        ImageTransform(mean=[0.1, 0.2, 0.3])(batch, None)


def test_image_task() -> None:
    x, y = torch.randint(0, 256, (6, 1, 5, 7), dtype=torch.uint8), torch.arange(6) % 2
    task = image_task("a", (x, y), [(x[0], 1)], outputs=2, channels=3, crop_padding=1, batch_size=4, weight=2.0)
    assert task.input_shape == (3, 5, 7)
    assert (task.outputs, task.kind, task.batch_size, task.weight) == (2, "classification", 4, 2.0)
    assert task.transform is not None
    assert task.transform((x, y), 0)[0].shape == (6, 3, 5, 7)
    with pytest.raises(UsageError, match=r"training images of shape \[1, 5, 7\] but test images of shape \[1, 5, 6\]"):
        image_task("a", (x, y), (x[..., :6], y), outputs=2)
    with pytest.raises(UsageError, match="not pairs of an image"):
        image_task("a", (x.flatten(1), y), outputs=2)
    with pytest.raises(UsageError, match="2 channels, which cannot become 3"):
        image_task("a", (x.expand(-1, 2, -1, -1), y), outputs=2, channels=3)
