"""Residual networks (He et al., 2016): the paper's for small images, and ResNet18/34.

Small images: ResNet20/32/44/56 with widths 16/32/64 and shortcuts without parameters, as in section 4.2 of
Shin et al. (2021). ResNet18/34: the ImageNet networks; every parameter and buffer has torchvision's name and
shape, so torchvision's weights load unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trajshift.models.kernels.conv3x3 import conv3x3
from trajshift.models.kernels.norm_relu import norm_relu
from trajshift.models.sizes import head, image_channels, init_convolutions, positive
from trajshift.task import Task


class _Spread(torch.autograd.Function):
    """Slices and pads as `ZeroPad` says; its gradient is one copy into zeros, where autograd's own makes three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: int, after: int, stride: int) -> Tensor:
        ctx.before, ctx.stride, ctx.shape, ctx.layout = before, stride, x.shape, _layout(x)
        return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, before, after))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        whole = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=ctx.layout).zero_()
        kept = gradient.narrow(1, ctx.before, ctx.shape[1])
        whole[:, :, :: ctx.stride, :: ctx.stride] = kept
        return whole, None, None, None


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


class ZeroPad(nn.Module):
    """The shortcut without parameters (option A): every `stride`-th position, missing channels zero."""

    def __init__(self, missing: int, stride: int) -> None:
        super().__init__()
        self.before = missing // 2
        self.after = missing - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, C + missing, ceil(H / stride), ceil(W / stride)]`."""
        return _Spread.apply(x, self.before, self.after, self.stride)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: `[B, C, H, W] -> [B, width, ceil(H/stride), ceil(W/stride)]`."""

    def __init__(self, channels: int, width: int, stride: int, *, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if (stride, channels) != (1, width):
            self.downsample = (
                nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
                if project
                else ZeroPad(width - channels, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = norm_relu(self.bn1, conv3x3(self.conv1, x))
        return norm_relu(self.bn2, conv3x3(self.conv2, x), shortcut)


def _stage(channels: int, width: int, blocks: int, stride: int, *, project: bool) -> nn.Sequential:
    first = BasicBlock(channels, width, stride, project=project)
    return nn.Sequential(first, *(BasicBlock(width, width, 1, project=project) for _ in range(blocks - 1)))


class SmallResNet(nn.Module):
    """ResNet of depth `6 * blocks + 2` for small images: `[B, C, H, W]` of any size to `[B, outputs]`."""

    def __init__(self, task: Task, *, blocks: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(image_channels(task), width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, 1, project=False)
        self.layer2 = _stage(width, 2 * width, blocks, 2, project=False)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2, project=False)
        init_convolutions(self)
        self.fc = head(task, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Logits or targets `[B, outputs]`."""
        x = norm_relu(self.bn1, conv3x3(self.conv1, x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.mean(x, dim=(2, 3)))


class ResNet(nn.Module):
    """ResNet for large images: `[B, C, H, W]` to `[B, outputs]`; designed for 224x224, takes any size."""

    def __init__(self, task: Task, *, blocks: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(image_channels(task), 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, blocks[0], 1, project=True)
        self.layer2 = _stage(64, 128, blocks[1], 2, project=True)
        self.layer3 = _stage(128, 256, blocks[2], 2, project=True)
        self.layer4 = _stage(256, 512, blocks[3], 2, project=True)
        init_convolutions(self)
        self.fc = head(task, 512)

    def forward(self, x: Tensor) -> Tensor:
        """Logits or targets `[B, outputs]`."""
        x = F.max_pool2d(norm_relu(self.bn1, self.conv1(x)), 3, 2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.mean(x, dim=(2, 3)))


def resnet20(task: Task, *, width: int = 16) -> SmallResNet:
    """ResNet20 for small images, the paper's network; `width` is the first stage's."""
    return SmallResNet(task, blocks=3, width=positive("resnet20", "width", width))


def resnet32(task: Task, *, width: int = 16) -> SmallResNet:
    """ResNet32 for small images; `width` is the first stage's."""
    return SmallResNet(task, blocks=5, width=positive("resnet32", "width", width))


def resnet44(task: Task, *, width: int = 16) -> SmallResNet:
    """ResNet44 for small images; `width` is the first stage's."""
    return SmallResNet(task, blocks=7, width=positive("resnet44", "width", width))


def resnet56(task: Task, *, width: int = 16) -> SmallResNet:
    """ResNet56 for small images; `width` is the first stage's."""
    return SmallResNet(task, blocks=9, width=positive("resnet56", "width", width))


def resnet18(task: Task) -> ResNet:
    """ResNet18 with torchvision's parameter names."""
    return ResNet(task, blocks=(2, 2, 2, 2))


def resnet34(task: Task) -> ResNet:
    """ResNet34 with torchvision's parameter names."""
    return ResNet(task, blocks=(3, 4, 6, 3))
