"""The meta-update: how phi follows the mean meta-gradient. A step returns how far phi actually moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trajshift.learners.inner_optimizer import build_optimizer, load_state_tensors, set_lr, state_tensors
from trajshift.learners.parameter_matrix import Layout


class PlainMetaStep:
    """phi <- phi - beta * mean meta-gradient (Algorithm 2, lines 11 and 12)."""

    def __init__(self, meta_lr: float) -> None:
        self.lr: float | Tensor = meta_lr

    def step(self, phi: Tensor, gradient: Tensor) -> Tensor:
        """Moves phi `[P]` in place; returns delta `[P]`. `gradient` is overwritten."""
        delta = gradient.mul_(-self.lr)
        phi += delta
        return delta

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nothing is remembered between steps."""
        return {}, {}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Nothing to load."""


class OptimizerMetaStep:
    """phi is moved by a `torch.optim` optimizer that is fed the mean meta-gradient."""

    def __init__(
        self,
        phi: Tensor,
        layout: Layout,
        optimizer: str | Callable[..., Optimizer],
        meta_lr: float,
        options: dict[str, Any],
    ) -> None:
        self.lr: float | Tensor = meta_lr
        self._layout = layout
        self._names = [entry.name for entry in layout.entries]
        self._parameters = [nn.Parameter(view) for view in layout.views(phi).values()]
        self._optimizer = build_optimizer(optimizer, self._parameters, lr=meta_lr, **options)

    def step(self, phi: Tensor, gradient: Tensor) -> Tensor:
        """Moves phi `[P]` in place; returns delta `[P]`, the difference of phi after and before."""
        before = phi.clone()
        for parameter, view in zip(self._parameters, self._layout.views(gradient).values(), strict=True):
            parameter.grad = view
        set_lr(self._optimizer, self.lr)
        self._optimizer.step()
        return torch.sub(phi, before, out=before)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizer's state, tensors and numbers by name."""
        return state_tensors(self._optimizer, self._names)

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """The inverse of `state`."""
        load_state_tensors(self._optimizer, self._names, tensors, numbers)


MetaOptimizer = PlainMetaStep | OptimizerMetaStep
