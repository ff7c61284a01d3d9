"""A residual network and a convolutional one train with fused kernels as they do without, to rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.kernels import DEVICE, distance
from trajshift import models
from trajshift.models.kernels.switch import eager_kernels, fused_kernels
from trajshift.models.resnet import SmallResNet
from trajshift.task import Task


def built(name: str) -> nn.Module:
    torch.manual_seed(1)
    task = Task(name="task", train=None, outputs=5, input_shape=(3, 8, 8))
    residual = name == "residual"
    module = SmallResNet(task, blocks=1, width=16) if residual else models.build_model(name, task, width=16, depth=2)
    return module.to(DEVICE, memory_format=torch.channels_last)


def step(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Loss, gradients and statistics of one batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, 8, 8, generator=generator).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype is not None):
        loss = module(x.to(next(module.parameters()).dtype)).float().square().mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"loss": loss.detach(), **gradients, **dict(module.named_buffers())}


@pytest.mark.parametrize("name", ["residual", "conv"])
def test_a_step_in_float32_is_the_eager_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it would round to 11 bits what differs in the last
    module = built(name)
    with eager_kernels():
        eager = step(copy.deepcopy(module), None)
    found = step(module, None)
    assert any(not torch.equal(found[label], eager[label]) for label in eager) or DEVICE.type == "cpu"
    for label, value in found.items():
        assert distance(value, eager[label]) < 1e-4, label


def test_a_step_in_low_precision_is_as_near_to_float64_as_the_eager_one() -> None:
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    module = built("residual")
    truth = step(copy.deepcopy(module).double(), None)
    with fused_kernels(False):
        eager = step(copy.deepcopy(module), dtype)
    found = step(module, dtype)
    errors = [(distance(found[n], truth[n]), distance(eager[n], truth[n])) for n in truth if truth[n].ndim == 4]
    # A few numbers near zero fall on the other side of a ReLU: which ones is chance, and they make most of the error.
    assert sum(ours for ours, _ in errors) <= 2.5 * sum(plain for _, plain in errors)
    assert int(found["bn1.num_batches_tracked"]) == 1
