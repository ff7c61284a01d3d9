"""3x3 convolutions: the fused gradient of the weights against float64, no further from it than PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.kernels import DEVICE, FULL_SIZE, SLACK, distance
from trajshift.models.kernels.conv3x3 import conv3x3, convolution, weight_gradient
from trajshift.models.kernels.switch import eager_kernels

LOW = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
"""The interpreter multiplies no matrices in bfloat16."""


def data(cin: int, cout: int, *, size: tuple[int, int] = (5, 7), images: int = 3) -> tuple[Tensor, nn.Conv2d]:
    """float32 images and a convolution, channels-last."""
    generator = torch.Generator().manual_seed(cin + cout)
    x = torch.randn(images, cin, *size, generator=generator).to(DEVICE, memory_format=torch.channels_last)
    torch.manual_seed(0)
    conv = nn.Conv2d(cin, cout, 3, padding=1, bias=False).to(DEVICE, memory_format=torch.channels_last)
    return x, conv


def results(conv: nn.Conv2d, x: Tensor, *, autocast: bool = True) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=LOW, enabled=autocast):
        out = conv3x3(conv, x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(LOW).to(out)
    weights = weights.contiguous(memory_format=torch.channels_last)
    grad_x, grad_weight = torch.autograd.grad(out, (x, conv.weight), weights)
    return {"out": out.detach(), "x": grad_x, "weight": grad_weight}


@pytest.mark.parametrize(
    ("cin", "cout", "size"),
    [(16, 16, (1, 1)), (16, 16, (1, 9)), (16, 16, (9, 1)), (16, 16, (9, 10))]
    + [(cin, cout, (5, 7)) for cin, cout in ((3, 16), (32, 32), (16, 32), (1, 16))],
)
def test_it_is_as_exact_as_pytorch(cin: int, cout: int, size: tuple[int, int]) -> None:
    x, conv = data(cin, cout, size=size)
    x = x.to(LOW).float()  # exact in both formats, as activations are
    truth = results(copy.deepcopy(conv).double(), x.double(), autocast=False)
    with eager_kernels():
        eager = results(conv, x)
    found = results(conv, x)
    for name in ("out", "x"):
        assert found[name].dtype is eager[name].dtype
        assert distance(found[name], truth[name]) <= SLACK * distance(eager[name], truth[name]) + 1e-6, name
    assert found["weight"].dtype is torch.float32
    assert found["weight"].stride() == conv.weight.stride()
    assert distance(found["weight"], truth["weight"]) <= 1e-5
    assert distance(found["weight"], truth["weight"]) <= SLACK * distance(eager["weight"], truth["weight"])


def test_many_programs_share_the_pixels() -> None:
    """More pixels than one program takes, and a rest."""
    x, conv = data(16, 16, size=(17, 18), images=2)
    x = x.to(LOW).float()
    truth = results(copy.deepcopy(conv).double(), x.double(), autocast=False)
    assert distance(results(conv, x)["weight"], truth["weight"]) <= 1e-5


@FULL_SIZE
@pytest.mark.parametrize(("cin", "cout", "size"), [(16, 16, 84), (3, 16, 84), (32, 32, 42), (16, 16, 32)])
def test_the_papers_sizes(cin: int, cout: int, size: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (128, cin, size, size)
    x = torch.randn(shape, generator=generator, device=DEVICE).to(LOW).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(128, cout, size, size, generator=generator, device=DEVICE).to(LOW)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    truth = torch.nn.grad.conv2d_weight(x.double(), (cout, cin, 3, 3), gradient.double(), padding=1)
    found = [weight_gradient(x, gradient) for _ in range(2)]
    assert torch.equal(*found)
    assert distance(found[0], truth) <= 1e-5
    if (cin, cout) == (16, 16):
        weight = torch.randn(16, 16, 3, 3, generator=generator, device=DEVICE).to(LOW)
        weight = weight.contiguous(memory_format=torch.channels_last)
        forward = torch.conv2d(x.double(), weight.double(), padding=1)
        back = torch.nn.grad.conv2d_input(x.shape, weight.double(), gradient.double(), padding=1)
        assert distance(convolution(x, weight), forward) <= 3e-3
        assert distance(convolution(gradient, weight, flip=True), back) <= 3e-3


def test_low_precision_without_autocast_and_frozen_input() -> None:
    x, conv = data(16, 16)
    low, given = copy.deepcopy(conv).to(LOW), x.to(LOW)
    out = conv3x3(low, given)
    assert "Conv3x3" in out.grad_fn.name()
    out.sum().backward()
    assert low.weight.grad.dtype is LOW
    assert given.grad is None


def test_it_repeats_to_the_last_bit() -> None:
    x, conv = data(16, 16, size=(12, 16))
    runs = [results(conv, x) for _ in range(2)]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_second_derivatives_need_the_eager_operation() -> None:
    x, conv = data(16, 16)
    x = x.to(LOW).requires_grad_()
    low = conv.to(LOW)
    with pytest.raises(RuntimeError, match="a 3x3 convolution was computed by a fused kernel"):
        torch.autograd.grad(conv3x3(low, x).sum(), x, create_graph=True)


@pytest.mark.parametrize("case", ["float32", "stride", "bias", "wide", "hook", "no_grad", "groups"])
def test_what_does_not_fit_is_left_to_pytorch(case: str) -> None:
    options = {
        "stride": {"stride": 2},
        "bias": {"bias": True},
        "groups": {"groups": 2},
    }.get(case, {})
    channels = 64 if case == "wide" else 16
    conv = nn.Conv2d(channels, channels, 3, **{"padding": 1, "bias": False} | options).to(DEVICE)
    x = torch.randn(2, channels, 4, 4, device=DEVICE)
    calls: list[str] = []
    if case == "hook":
        conv.register_forward_hook(lambda *_: calls.append("hook"))
    with (
        torch.autocast(DEVICE.type, dtype=LOW, enabled=case != "float32"),
        torch.set_grad_enabled(case != "no_grad"),
    ):
        out = conv3x3(conv, x)
        assert out.grad_fn is None or "Conv3x3" not in out.grad_fn.name()
        assert torch.equal(out, conv(x))
    assert bool(calls) == (case == "hook")


def test_images_of_other_channels_are_refused_as_pytorch_does() -> None:
    x, conv = data(16, 16)
    with torch.autocast(DEVICE.type, dtype=LOW), pytest.raises(RuntimeError, match="channels"):
        conv3x3(conv, x[:, :3])
