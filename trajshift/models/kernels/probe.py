"""The smallest kernel, which tells whether Triton works on a device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_one(x):
    tl.store(x, tl.load(x) + 1)


def compiles(device: torch.device) -> bool:
    """Runs the kernel; any error from Triton is passed on."""
    x: Tensor = torch.zeros(1, dtype=torch.int32, device=device)
    _add_one[(1,)](x)
    return True
