"""BatchNorm with ReLU: the fused operation against float64, no further from it than PyTorch's own."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.kernels import DEVICE, FULL_SIZE, SLACK, distance
from trajshift.models.kernels.norm_relu import norm_relu
from trajshift.models.kernels.switch import eager_kernels

CASES = list(product((16, 32, 64, 128), (False, True), (torch.float32, torch.bfloat16)))


def data(channels: int, dtype: torch.dtype, *, size: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, nn.BatchNorm2d]:
    """x about 3, a shortcut, and a BatchNorm with weights; float64 on the CPU gives the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, channels, size, size + 1)
    x, shortcut = (torch.randn(shape, generator=generator) for _ in range(2))
    bn = nn.BatchNorm2d(channels)
    with torch.no_grad():
        bn.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
        bn.bias.copy_(torch.randn(channels, generator=generator))
    placed = [
        t.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        for t in (2 * x + 3, shortcut)
    ]
    return placed[0], placed[1], bn.to(DEVICE)


def results(bn: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None) -> dict[str, Tensor]:
    out = norm_relu(bn, x, shortcut)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.device, out.dtype)
    inputs = {"x": x, "weight": bn.weight, "bias": bn.bias} | ({} if shortcut is None else {"shortcut": shortcut})
    found = dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), weights), strict=True))
    return {"out": out.detach(), **found, **{n: b.clone() for n, b in bn.named_buffers()}}


def exact(bn: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None) -> dict[str, Tensor]:
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, shortcut)]
    return results(copy.deepcopy(bn).double(), wide[0], wide[1])


@pytest.mark.parametrize(("channels", "add", "dtype"), CASES)
def test_it_is_as_exact_as_pytorch(channels: int, add: bool, dtype: torch.dtype) -> None:
    x, shortcut, bn = data(channels, dtype)
    given = shortcut if add else None
    truth = exact(bn, x, given)
    with eager_kernels():
        eager = results(copy.deepcopy(bn), x, given)
    found = results(bn, x, given)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert value.dtype is eager[name].dtype
        assert value.stride() == eager[name].stride() or value.ndim < 4
        allowed = SLACK * distance(eager[name], truth[name]) + 2e-6
        assert distance(value, truth[name]) <= allowed, name


def test_three_batches_move_the_running_statistics_as_batchnorm_does() -> None:
    bn = nn.BatchNorm2d(16, momentum=0.3).to(DEVICE)
    plain = copy.deepcopy(bn)
    for seed in range(3):
        x, _, _ = data(16, torch.float32, seed=seed)
        norm_relu(bn, x)
        plain(x)
    assert int(bn.num_batches_tracked) == 3
    torch.testing.assert_close(bn.running_mean, plain.running_mean)
    torch.testing.assert_close(bn.running_var, plain.running_var)


def test_it_repeats_to_the_last_bit() -> None:
    runs = []
    for _ in range(2):
        x, shortcut, bn = data(16, torch.bfloat16, size=40)
        runs.append(results(bn, x, shortcut))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@FULL_SIZE
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize(("channels", "size"), [(16, 84), (32, 42), (64, 21), (512, 7)])
def test_the_papers_sizes(channels: int, size: int, add: bool) -> None:
    shape = (128, channels, size, size)
    x, shortcut = (
        torch.randn(shape, device=DEVICE).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    bn = nn.BatchNorm2d(channels).to(DEVICE)
    given = shortcut.requires_grad_() if add else None
    truth = exact(bn, x, given)
    with eager_kernels():
        eager = results(copy.deepcopy(bn), x.requires_grad_(), given)
    found, again = (results(copy.deepcopy(bn), x, given) for _ in range(2))
    for name, value in found.items():
        assert torch.equal(value, again[name]), name
        if name == "running_mean":  # exact to the spread of x, which is 1: a mean near zero has no scale of its own
            torch.testing.assert_close(value.double(), truth[name].double(), rtol=0.0, atol=1e-7)
        else:
            assert distance(value, truth[name]) <= SLACK * distance(eager[name], truth[name]) + 2e-5, name


def test_second_derivatives_need_the_eager_operation() -> None:
    x, _, bn = data(16, torch.float32)
    with pytest.raises(RuntimeError, match=r"no second derivative; run the forward pass inside .*eager_kernels"):
        torch.autograd.grad(norm_relu(bn, x).sum(), x, create_graph=True)
    with eager_kernels():
        (first,) = torch.autograd.grad(norm_relu(bn, x).square().sum(), x, create_graph=True)
        assert first.requires_grad


@pytest.mark.parametrize("case", ["eval", "contiguous", "channels", "momentum", "hook", "statistics", "double"])
def test_what_does_not_fit_is_left_to_pytorch(case: str) -> None:
    x, _, bn = data(24 if case == "channels" else 16, torch.float32)
    calls: list[str] = []
    if case == "eval":
        bn.eval()
    elif case == "momentum":
        bn.momentum = None
    elif case == "hook":
        bn.register_forward_hook(lambda *_: calls.append("hook"))
    elif case == "statistics":
        bn = nn.BatchNorm2d(16, track_running_stats=False).to(DEVICE)
    elif case == "double":
        x, bn = x.double(), bn.double()
    elif case == "contiguous":
        x = x.contiguous()
    out = norm_relu(copy.deepcopy(bn), x)
    assert out.grad_fn is not None
    assert "NormRelu" not in out.grad_fn.name()
    assert torch.equal(out, F.relu(bn(x)))
    assert bool(calls) == (case == "hook")


def test_another_number_of_channels_is_refused_as_pytorch_does() -> None:
    x, _, _ = data(32, torch.float32)
    with pytest.raises(RuntimeError):
        norm_relu(nn.BatchNorm2d(16).to(DEVICE), x)
