"""Images brought to one form, uint8 `[N, C, H, W]` of one size, once and before training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trajshift.errors import UsageError

MAX_SIZE = 4096
"""Pixels; a larger size is taken to be a mistake."""


def image_tensor(image: Any) -> Tensor:
    """A Pillow image as uint8 `[C, H, W]`: one channel if it is grey, else red, green, blue (alpha is dropped).

    Raises:
        UsageError: more than 8 bits per channel, which Pillow would clip.
    """
    if image.mode[0] in "IF":
        raise UsageError(f"an image has Pillow mode {image.mode!r}, more than 8 bits; convert it to 8 bits first")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    array = np.array(image if image.mode == mode else image.convert(mode))
    return torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1).contiguous()


def prepare_images(images: Tensor, *, size: int | None = None, channels: int | None = None) -> Tensor:
    """Images uint8 `[N, C, H, W]` brought to `size` pixels and `channels` channels, once, before training.

    The shorter side becomes `size` (bilinear, antialiased) and the middle `size` x `size` is cut out. One channel
    is repeated, three become one with the weights of ITU-R BT.601.

    Raises:
        UsageError: another change of the number of channels, or a size outside 1 to `MAX_SIZE`.
    """
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise UsageError(f"images were asked for at size {size}; use 1 to {MAX_SIZE} pixels")
    if channels == 1 and images.shape[1] == 3:
        grey = torch.einsum("nchw,c->nhw", images.float(), torch.tensor([0.299, 0.587, 0.114]))
        images = grey.round().to(torch.uint8)[:, None]
    if size is not None and tuple(images.shape[-2:]) != (size, size):
        images = torch.cat([_resize(chunk, size) for chunk in images.split(1024)])
    if channels is not None and images.shape[1] != channels:
        if images.shape[1] != 1:
            raise UsageError(f"images have {images.shape[1]} channels, which cannot become {channels}")
        images = images.repeat(1, channels, 1, 1)
    return images


def _resize(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    # In float32: the uint8 kernel rounds its weights, and after each of its two passes.
    large = F.interpolate(images.float(), shape, mode="bilinear", antialias=True, align_corners=False)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    cut = large[:, :, top : top + size, left : left + size]
    return cut.round().clamp(0, 255).to(torch.uint8)
