"""The benchmarks count the bytes of fused kernels, which PyTorch's dispatcher does not see."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.traffic import launches
from tests.helpers.kernels import DEVICE
from trajshift.models.kernels.norm_relu import norm_relu


def test_a_fused_batchnorm_moves_its_tensor_eight_times() -> None:
    x = torch.randn(4, 16, 8, 8, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()
    gradient, bn = torch.randn_like(x), nn.BatchNorm2d(16).to(DEVICE)

    with launches() as noted:
        norm_relu(bn, x).backward(gradient)
    whole = x.numel() * 4
    assert len(noted) == 4
    assert 8 * whole <= sum(noted) <= 8 * whole + 4000  # sums and vectors of channels besides
