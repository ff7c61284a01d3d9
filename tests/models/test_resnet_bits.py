"""The residual networks' ways of saving time keep every bit of their plain formulation, which is written out here."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trajshift import models
from trajshift.models.resnet import BasicBlock, ZeroPad
from trajshift.task import Task

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def plain_shortcut(pad: ZeroPad, x: Tensor) -> Tensor:
    return F.pad(x[:, :, :: pad.stride, :: pad.stride], (0, 0, 0, 0, pad.before, pad.after))


def plain_block(block: BasicBlock, x: Tensor) -> Tensor:
    part = block.downsample
    shortcut = x if part is None else plain_shortcut(part, x) if isinstance(part, ZeroPad) else part(x)
    out = F.relu(block.bn1(block.conv1(x)))
    return F.relu(block.bn2(block.conv2(out)) + shortcut)


def plain_network(module: nn.Module, x: Tensor) -> Tensor:
    x = F.relu(module.bn1(module.conv1(x)))
    if hasattr(module, "layer4"):
        x = F.max_pool2d(x, 3, 2, padding=1)
    for stage in (name for name, _ in module.named_children() if name.startswith("layer")):
        for block in module.get_submodule(stage):
            x = plain_block(block, x)
    return module.fc(torch.mean(x, dim=(2, 3)))


def built(name: str, layout: torch.memory_format) -> nn.Module:
    torch.manual_seed(1)
    module = models.build_model(name, Task(name="task", train=None, outputs=5, input_shape=(3, 16, 16)))
    return module.to(memory_format=layout)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_outputs_gradients_and_statistics_are_the_plain_ones(
    name: str, layout: torch.memory_format, autocast: bool, training: bool
) -> None:
    ours = built(name, layout).train(training)
    plain = copy.deepcopy(ours)
    x = torch.randn(6, 3, 33, 40)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outs = [ours(inputs[0]), plain_network(plain, inputs[1])]
    for out in outs:
        out.float().square().mean().backward()
    assert torch.equal(*outs)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for (label, left), right in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad), label
    for (label, left), right in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(left, right), label


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_shortcut_without_parameters_is_a_slice_and_a_pad(stride: int, layout: torch.memory_format) -> None:
    pad = ZeroPad(missing=3, stride=stride)
    x = torch.randn(2, 4, 7, 6).to(memory_format=layout)
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, plain = pad(left), plain_shortcut(pad, right)
    assert torch.equal(ours, plain)
    assert ours.stride() == plain.stride()
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (plain * weights).sum().backward()
    assert torch.equal(left.grad, right.grad)
    assert left.grad.stride() == left.stride()


def test_second_derivatives_are_the_plain_ones() -> None:
    """A product with the Hessian, as iMAML asks for."""
    ours = built("resnet20", torch.channels_last).double()
    plain = copy.deepcopy(ours)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    products = []
    for module, run in ((ours, ours), (plain, lambda batch: plain_network(plain, batch))):
        parameters = list(module.parameters())
        first = torch.autograd.grad(run(x).square().mean(), parameters, create_graph=True)
        generator = torch.Generator().manual_seed(2)
        along = sum((g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum() for g in first)
        products.append(torch.autograd.grad(along, parameters))
    for left, right in zip(*products, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    assert any(bool(product.abs().sum() > 0) for product in products[0])
