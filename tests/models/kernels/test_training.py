"""The loop with fused kernels: near PyTorch's own, and with second derivatives where a method needs them."""

from __future__ import annotations

import torch

from benchmarks.traffic import launches
from tests.helpers.graphs import tasks
from tests.helpers.kernels import DEVICE, distance
from trajshift import Execution, Inner, MetaTrainer
from trajshift.models.kernels.switch import eager_kernels
from trajshift.models.resnet import SmallResNet


def trainer(method: str) -> MetaTrainer:
    return MetaTrainer(
        lambda task: SmallResNet(task, blocks=1, width=16),
        tasks(),
        method,
        horizon=2,
        rounds=5,
        batch_size=3,
        inner=Inner(lr=0.01),
        execution=Execution(device=DEVICE, engine="loop"),
    )


def test_a_step_is_near_pytorchs() -> None:
    fused = trainer("trajectory-shifting")
    with eager_kernels():
        plain = trainer("trajectory-shifting")
    assert [fused.describe()["kernels"], plain.describe()["kernels"]] == ["fused", "eager"]
    with launches() as launched:
        ours = fused.advance().losses
    with launches() as none:
        theirs = plain.advance().losses
    assert launched
    assert not none
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert distance(fused.theta - fused.phi, plain.theta - plain.phi) < 1e-2
    for left, right in zip(fused.learners, plain.learners, strict=True):
        for (name, one), other in zip(left.module.named_buffers(), right.module.buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)


def test_the_hessian_of_imaml_is_taken_of_the_eager_network() -> None:
    made = trainer("imaml")
    with launches() as launched:
        made.advance()
        made.advance()
    assert launched
    assert bool(made.phi.isfinite().all())
