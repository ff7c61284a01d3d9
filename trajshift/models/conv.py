"""A small convolutional network for small images and for experiments on smoothness."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trajshift.errors import UsageError, nearest
from trajshift.models.kernels.conv3x3 import conv3x3
from trajshift.models.kernels.norm_relu import norm_relu
from trajshift.models.sizes import head, image_channels, init_convolutions, positive
from trajshift.task import Task

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "softplus": F.softplus}
_POOLS: dict[str, Callable[..., Tensor]] = {"max": F.max_pool2d, "avg": F.avg_pool2d}


class Block(nn.Module):
    """Convolution, BatchNorm, activation, pooling: `[B, C, H, W] -> [B, width, ceil(H / 2), ceil(W / 2)]`."""

    def __init__(self, channels: int, width: int, *, batch_norm: bool, activation: str, pool: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm)
        self.bn = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self._activation = _ACTIVATIONS[activation]
        self._pool = _POOLS[pool]

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; an odd size is rounded up, so that any number of blocks takes any image."""
        return self._pool(self._activate(conv3x3(self.conv, x)), 2, ceil_mode=True)

    def _activate(self, x: Tensor) -> Tensor:
        if isinstance(self.bn, nn.BatchNorm2d) and self._activation is F.relu:
            return norm_relu(self.bn, x)
        return self._activation(self.bn(x))


class ConvNet(nn.Module):
    """Blocks, mean over positions, linear head: images `[B, C, H, W]` of any size to `[B, outputs]`."""

    def __init__(self, task: Task, *, width: int, depth: int, batch_norm: bool, activation: str, pool: str) -> None:
        super().__init__()
        inputs = [image_channels(task)] + [width] * (depth - 1)
        self.blocks = nn.Sequential(
            *(Block(n, width, batch_norm=batch_norm, activation=activation, pool=pool) for n in inputs)
        )
        init_convolutions(self)
        self.fc = head(task, width)

    def forward(self, x: Tensor) -> Tensor:
        """Logits or targets `[B, outputs]`."""
        return self.fc(torch.mean(self.blocks(x), dim=(2, 3)))


def conv(
    task: Task,
    *,
    width: int = 32,
    depth: int = 3,
    batch_norm: bool = True,
    activation: str = "relu",
    pool: str = "max",
) -> ConvNet:
    """A small convolutional network.

    Args:
        task: sizes the first layer and the head.
        width: channels of every block.
        depth: number of blocks; each halves the image.
        batch_norm: False leaves BatchNorm out and gives the convolutions a bias.
        activation: `relu`, or `softplus`, which with `avg` makes the loss smooth.
        pool: `max` or `avg`.

    Raises:
        UsageError: a value out of range, or a task without image shape or outputs.
    """
    positive("conv", "width", width)
    positive("conv", "depth", depth)
    if not isinstance(batch_norm, bool):
        raise UsageError(f"model 'conv' has batch_norm {batch_norm!r}; use true or false")
    for option, value, known in (("activation", activation, _ACTIVATIONS), ("pool", pool, _POOLS)):
        if value not in known:
            raise UsageError(f"model 'conv' has {option} {value!r}{nearest(value, known)}")
    return ConvNet(task, width=width, depth=depth, batch_norm=batch_norm, activation=activation, pool=pool)
