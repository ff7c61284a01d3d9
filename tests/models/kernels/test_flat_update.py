"""The meta-update in one kernel against today's operators."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.kernels import DEVICE, distance
from trajshift.algorithm.meta_gradients import Displacement
from trajshift.models.kernels.flat_update import flat_update
from trajshift.models.kernels.switch import eager_kernels
from trajshift.training.meta_optimizer import PlainMetaStep


def data(rows: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    theta, phi = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((rows, size), (size,)))
    weights = torch.rand(rows, generator=generator).to(DEVICE)
    return [theta, phi, weights / weights.sum()]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (8, 2624), (3, 1024)])
def test_it_is_as_exact_as_the_operators(rows: int, size: int, shift: bool) -> None:
    found, plain = data(rows, size), data(rows, size)
    truth = [tensor.double() for tensor in found]
    norm, sums = flat_update(*found, 0.25, shift=shift)
    with eager_kernels():
        flat_update(*plain, 0.25, shift=shift)
    exact_norm, exact_sums = flat_update(*truth, 0.25, shift=shift)
    for one, other, exact in zip(found, plain, truth, strict=True):
        assert distance(one, exact) <= 1.5 * distance(other, exact) + 1e-7
    torch.testing.assert_close(norm.double(), exact_norm, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(sums.double(), exact_sums, rtol=1e-4, atol=1e-3)


def test_without_the_kernel_it_is_the_loops_arithmetic_to_the_last_bit() -> None:
    theta, phi, weights = data(5, 700)

    class Probe:
        pass

    Probe.theta, Probe.phi = theta.clone(), phi.clone()
    delta = PlainMetaStep(0.3).step(Probe.phi, Displacement().mean(Probe, weights))
    Probe.theta.add_(delta)
    with eager_kernels():
        norm, _ = flat_update(theta, phi, weights, 0.3, shift=True)
    assert torch.equal(theta, Probe.theta)
    assert torch.equal(phi, Probe.phi)
    assert torch.equal(norm, torch.linalg.vector_norm(delta))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_row_that_is_not_finite_shows(value: float) -> None:
    theta, phi, weights = data(4, 3000)
    theta[2, 2000] = value
    _, sums = flat_update(theta, phi, weights, 0.1, shift=True)
    assert torch.isfinite(sums).tolist() == [True, True, False, True]


def test_it_repeats_to_the_last_bit() -> None:
    runs = []
    for _ in range(2):
        tensors = data(8, 5000)
        runs.append([*flat_update(*tensors, 0.1, shift=True), *tensors])
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))
