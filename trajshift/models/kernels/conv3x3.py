"""3x3 convolutions with few channels, with our own kernels on a GPU where cuDNN is far from the memory bound.

At 16 to 16 channels, 84 x 84 pixels and batch 128 cuDNN's repeatable algorithm for the gradient of the weights takes
629 microseconds on one H200, the forward pass 95 and the gradient of the input 108, where moving each tensor once takes
14 (results/speed). With 32 channels only the gradient of the weights has a kernel here.

Under autocast PyTorch casts a float32 weight to bfloat16 and gets a bfloat16 gradient, which it casts back; here the
float32 sums are the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trajshift.models.kernels.switch import has_hooks, may_fuse, no_second_derivative

_CHANNELS = (16, 32)
"""Channels of the output; the input has as many, or at most 16. With more, cuDNN does well."""
_LOW = (torch.bfloat16, torch.float16)
_PARTIAL = 3 * 2**20
"""The most numbers that all programs together store as partial sums: 12 MB, a quarter of the L2 cache."""
_PROGRAMS = 1280
"""The most programs: ten on each of 132 multiprocessors, as many as their registers allow."""
_SHORTEST = 256
"""The fewest pixels of a program."""
_TILES = 660
"""The most programs of `convolution`: five on each of 132 multiprocessors, as many as their shared memory allows."""


def conv3x3(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x) for `[B, C, H, W]`."""
    if not _fusable(conv, x):
        return conv(x)
    return _Conv3x3.apply(x, conv.weight, _dtype(x))


def _dtype(x: Tensor) -> torch.dtype:
    """What the convolution is computed in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _fusable(conv: nn.Conv2d, x: Tensor) -> bool:
    cout, cin = conv.weight.shape[:2]
    return (
        may_fuse(x)
        and torch.is_grad_enabled()
        and conv.weight.requires_grad
        and x.ndim == 4
        and x.shape[1] == cin  # a kernel would read out of bounds where PyTorch raises an error
        and x.device == conv.weight.device
        and x.is_floating_point()
        and type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and not has_hooks(conv)
        and cout in _CHANNELS
        and (cin <= 16 or cin == 32)
        and conv.weight.dtype in (torch.float32, _dtype(x))
        and _dtype(x) in _LOW
        and 0 < x.numel() // cin * max(cin, cout) < 2**31
    )


def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient `[Cout, Cin, 3, 3]`, float32 and channels-last, of x and the output's gradient (both channels-last).

    Shapes: `[B, Cin, H, W]`, `[B, Cout, H, W]`. The order of all sums depends on the shapes alone.
    """
    from trajshift.models.kernels import conv_kernels as kernels

    images, cin, height, width = x.shape
    cout, pixels = gradient.shape[1], images * height * width
    size = 9 * cout * cin
    block = 64 if cin <= 16 else 32
    most = min(_PROGRAMS, _PARTIAL // size, -(-pixels // _SHORTEST))
    share = block * -(-pixels // (block * most))
    programs = -(-pixels // share)
    partial = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    kernels.weight_gradient[(programs, cout // 16)](
        x, gradient, partial, height, width, pixels, share,
        CIN=cin, COUT=cout, CI=16 if cin <= 16 else 32, CO=16, BLOCK=block,
        num_warps=1, num_stages=1,  # copies past the L1 cache, which pipelining makes, would read x and g three times
    )  # fmt: skip
    total = torch.empty(cout, 3, 3, cin, dtype=torch.float32, device=x.device)
    columns = 16
    kernels.total[(-(-size // columns),)](partial, total, programs, size, COLUMNS=columns, CHUNK=256, num_warps=8)
    return total.permute(0, 3, 1, 2)


def convolution(x: Tensor, weight: Tensor, *, flip: bool = False) -> Tensor:
    """The convolution `[B, 16, H, W]` of x `[B, C, H, W]`, C <= 16; with `flip`, of an output's gradient its input's.

    Both channels-last; `weight` is `[16, C, 3, 3]` in the dtype of x.
    """
    from trajshift.models.kernels import conv_kernels as kernels

    images, channels, height, width = x.shape
    pixels, block = images * height * width, 128
    share = block * -(-pixels // (block * _TILES))
    out = x.new_empty(images, height, width, 16).permute(0, 3, 1, 2)
    kernels.convolution[(-(-pixels // share),)](
        x, weight, out, height, width, pixels, share,
        K=channels, N=16, KPAD=16, FLIP=flip, BLOCK=block, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = x.dtype, weight.dtype
        x = x.to(dtype, memory_format=torch.channels_last)
        low = weight.to(dtype, memory_format=torch.channels_last)
        ctx.save_for_backward(x, low)
        if len(low) == 16 and x.shape[1] <= 16:
            return convolution(x, low)
        with torch.autocast(x.device.type, enabled=False):
            return torch.conv2d(x, low, padding=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        no_second_derivative("a 3x3 convolution")
        x, low = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0] and low.shape[:2] == (16, 16):
            grad_x = convolution(gradient, low, flip=True).to(ctx.dtypes[0])
        elif ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                gradient, x, low, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, False, False)
            )[0].to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(x, gradient).to(ctx.dtypes[1])
        return grad_x, grad_weight, None
