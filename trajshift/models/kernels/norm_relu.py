"""relu(BatchNorm(x) + shortcut) as one operation, fused on a GPU.

PyTorch's BatchNorm for bfloat16 channels-last tensors loads two bytes a thread. Forward and backward, with the ReLU, a
tensor passes through memory thirteen times, sixteen with a shortcut; fused, eight and eleven times, sixteen bytes a
thread.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trajshift.models.kernels.switch import has_hooks, may_fuse, no_second_derivative

_BLOCK = 4096
TILE, PROGRAMS, WARPS = 4096, 256, 8
"""Numbers per tile, most programs and warps of the kernels that sum: of seven shapes tried on one H200 with 16, 32
and 64 channels the fastest or within 2% of it (results/speed)."""
PARTIAL = 8192
"""Partial sums that the last program loads at once."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_counters: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
"""Of each module, int32 `[1]` and zero between kernels. A module's own passes never overlap."""


def norm_relu(bn: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """relu(bn(x) + shortcut) of `[B, C, H, W]`, with bn's running statistics updated as bn itself does it.

    Fused or not, float32 sums and statistics; the fused one rounds once, at the end.
    """
    if _fusable(bn, x, shortcut):
        return _NormRelu.apply(x, shortcut, bn.weight, bn.bias, bn)
    out = bn(x)
    return F.relu(out if shortcut is None else out.add_(shortcut), inplace=True)


def _fusable(bn: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None) -> bool:
    channels = bn.num_features
    return (
        may_fuse(x)
        and x.ndim == 4
        and x.shape[1] == channels  # a kernel would read out of bounds where PyTorch raises an error
        and type(bn) is nn.BatchNorm2d
        and bn.training
        and bn.affine
        and bn.weight.dtype is torch.float32
        and bn.weight.device == x.device
        and bn.track_running_stats
        and bn.momentum is not None
        and not has_hooks(bn)
        and x.dtype in _DTYPES
        and 16 <= channels <= 512
        and channels & (channels - 1) == 0
        and channels < x.numel() < 2**31
        and x.is_contiguous(memory_format=torch.channels_last)
        and (shortcut is None or (shortcut.shape, shortcut.dtype, shortcut.device) == (x.shape, x.dtype, x.device))
    )


def _counter(bn: nn.Module, device: torch.device) -> Tensor:
    found = _counters.get(bn)
    if found is None or found.device != device:
        found = _counters[bn] = torch.zeros(1, dtype=torch.int32, device=device)
    return found


class _Launch:
    """How the kernels of one tensor are launched; depends on its shape alone, so that the order of sums is fixed."""

    def __init__(self, x: Tensor) -> None:
        self.channels = x.shape[1]
        self.size = x.numel()
        self.rows = self.size // self.channels
        self.tile_rows = TILE // self.channels
        self.programs = min(PROGRAMS, -(-self.rows // self.tile_rows))
        self.blocks = -(-self.size // _BLOCK)
        self.partial = x.new_empty(self.programs, 2, self.channels, dtype=torch.float32)

    def vectors(self, count: int) -> list[Tensor]:
        """Float32 vectors `[C]`, `count` of them."""
        return list(self.partial.new_empty(count, self.channels).unbind())

    @property
    def reducing(self) -> dict[str, int]:
        """Compile-time numbers of a kernel that sums."""
        chunk = PARTIAL // self.channels
        return {"C": self.channels, "ROWS": self.tile_rows, "CHUNK": chunk, "num_warps": WARPS}

    @property
    def elementwise(self) -> dict[str, int]:
        """Compile-time numbers of the others."""
        return {"C": self.channels, "BLOCK": _BLOCK, "num_warps": 4}


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, bn: nn.BatchNorm2d
    ) -> Tensor:
        from trajshift.models.kernels import norm_kernels as kernels

        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        launch, counter = _Launch(x), _counter(bn, x.device)
        mean, scale, inverse = launch.vectors(3)
        kernels.statistics[(launch.programs,)](
            x, launch.partial, counter, mean, scale, inverse, weight, bias, bn.running_mean, bn.running_var,
            bn.num_batches_tracked, launch.rows, bn.eps, bn.momentum, **launch.reducing,
        )  # fmt: skip
        out, added = torch.empty_like(x), shortcut is not None
        kernels.apply[(launch.blocks,)](
            x, shortcut if added else x, out, mean, scale, bias, launch.size, ADD=added, **launch.elementwise
        )
        ctx.save_for_backward(x, out if added else x, bias, mean, scale, inverse)
        ctx.added, ctx.counter = added, counter
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from trajshift.models.kernels import norm_kernels as kernels

        no_second_derivative("BatchNorm with ReLU")
        x, out, bias, mean, scale, inverse = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        launch = _Launch(x)
        grad_weight, grad_bias, along, across = launch.vectors(4)
        masked = torch.empty_like(x) if ctx.added else gradient
        kernels.gradient_sums[(launch.programs,)](
            x, out, gradient, masked, launch.partial, ctx.counter, mean, scale, inverse, bias, grad_weight, grad_bias,
            along, across, launch.rows, ADDED=ctx.added, **launch.reducing,
        )  # fmt: skip
        grad_x = torch.empty_like(x)
        kernels.gradient_of_input[(launch.blocks,)](
            x, masked, grad_x, mean, scale, bias, along, across, launch.size, MASKED=ctx.added, **launch.elementwise
        )
        return grad_x, masked if ctx.added else None, grad_weight, grad_bias, None
