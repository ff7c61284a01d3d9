"""`higher` and `torchopt`: rounds of K inner steps of one task and a meta-update at the end, each in its own style.

First-order: phi moves towards the end of the trajectory (Reptile), nothing is differentiated through it. Unrolled: phi
follows the gradient of the loss at the end with respect to the start (MAML), through all K steps.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Steps, repeated
from benchmarks.workload import INNER_LR, META_LR, MOMENTUM, WEIGHT_DECAY, Workload, sgd
from trajshift.data.batches import TaskBatches


class _Round:
    """Model, batches and loss of the first task."""

    def __init__(self, workload: dict[str, Any]) -> None:
        given = Workload(**workload)
        task = given.build_tasks()[0]
        torch.manual_seed(0)
        self.model = given.build(task).train()
        self.horizon = given.horizon
        self._batches = TaskBatches(task, seed=0, batch_size=given.batch_size)
        self._step = 0

    def loss(self, model: nn.Module) -> Tensor:
        """On the next batch."""
        x, y = self._batches.train(self._step)
        self._step += 1
        return F.cross_entropy(model(x), y)

    @torch.no_grad()
    def towards(self, end: list[Tensor]) -> None:
        """phi <- phi + beta (theta_K - phi)."""
        for phi, theta in zip(self.model.parameters(), end, strict=True):
            phi.lerp_(theta, META_LR)

    @torch.no_grad()
    def against(self, gradients: tuple[Tensor, ...]) -> None:
        """phi <- phi - beta gradient."""
        for phi, gradient in zip(self.model.parameters(), gradients, strict=True):
            phi.sub_(gradient, alpha=META_LR)


def higher_first_order(**workload: Any) -> Steps:
    """`higher` with `track_higher_grads=False`."""
    import higher

    setting = _Round(workload)
    inner = sgd(setting.model.parameters())

    def one() -> None:
        with higher.innerloop_ctx(setting.model, inner, track_higher_grads=False) as (fast, optimizer):
            for _ in range(setting.horizon):
                optimizer.step(setting.loss(fast))
            setting.towards(list(fast.parameters()))

    return repeated(one)


def higher_unrolled(**workload: Any) -> Steps:
    """`higher` as for MAML."""
    import higher

    setting = _Round(workload)
    inner = sgd(setting.model.parameters())

    def one() -> None:
        with higher.innerloop_ctx(setting.model, inner, copy_initial_weights=False) as (fast, optimizer):
            for _ in range(setting.horizon):
                optimizer.step(setting.loss(fast))
            setting.against(torch.autograd.grad(setting.loss(fast), list(fast.parameters(time=0))))

    return repeated(one)


def torchopt_first_order(**workload: Any) -> Steps:
    """`torchopt.SGD`, its optimizer that is not differentiated through, on a copy."""
    import torchopt

    setting = _Round(workload)

    def one() -> None:
        fast = copy.deepcopy(setting.model)
        optimizer = torchopt.SGD(fast.parameters(), lr=INNER_LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        for _ in range(setting.horizon):
            optimizer.zero_grad()
            setting.loss(fast).backward()
            optimizer.step()
        setting.towards(list(fast.parameters()))

    return repeated(one)


def torchopt_unrolled(**workload: Any) -> Steps:
    """`torchopt.MetaSGD` as for MAML."""
    import torchopt

    setting = _Round(workload)
    phi = list(setting.model.parameters())

    def one() -> None:
        start = torchopt.extract_state_dict(setting.model, by="reference")
        optimizer = torchopt.MetaSGD(setting.model, lr=INNER_LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        for _ in range(setting.horizon):
            optimizer.step(setting.loss(setting.model))
        gradients = torch.autograd.grad(setting.loss(setting.model), phi)
        torchopt.recover_state_dict(setting.model, start)
        setting.against(gradients)

    return repeated(one)
