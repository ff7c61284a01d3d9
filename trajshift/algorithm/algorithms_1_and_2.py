"""Algorithms 1 and 2 of Shin et al. (ICML 2021) in plain PyTorch: read this first, beside the paper.

One module and one optimizer for each of the T tasks, phi as named tensors, nothing tuned for speed.
`trajshift.training` computes the same numbers on one parameter matrix with any engine; the tests compare the two to
1e-10. The numbers in comments are line numbers in the paper. Both algorithms yield k after every inner step, so that a
caller can inspect and stop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]
"""The shared parameters by name. Everything else in a module (its head, BatchNorm statistics) belongs to its task."""


@dataclass
class LocalLearner:
    """What trains on one task t."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    """On the module's parameters; its learning rate is alpha."""
    loss: Callable[[nn.Module, int], Tensor]
    """`loss(module, step)`: the loss on the training batch of inner step number `step`, from 0."""
    weight: float
    """Share of the task in the mean over tasks: 1 / T in the paper."""

    def theta(self, names: Parameters) -> Parameters:
        """The shared parameters themselves, not copies."""
        return {name: self.module.get_parameter(name).data for name in names}


MetaGradient = Callable[[Parameters, LocalLearner], Parameters]


def displacement(phi: Parameters, learner: LocalLearner) -> Parameters:
    """MetaGrad(phi; theta) = phi - theta (Reptile)."""
    return {name: phi[name] - theta for name, theta in learner.theta(phi).items()}


def last_gradient(phi: Parameters, learner: LocalLearner) -> Parameters:
    """MetaGrad(phi; theta_K) = the gradient that the last inner step followed (FOMAML)."""
    return {name: learner.module.get_parameter(name).grad for name in phi}  # type: ignore[misc]  # backward() set it


def algorithm_1(
    phi: Parameters,
    learners: Sequence[LocalLearner],
    *,
    meta_lr: float,
    horizon: int,
    rounds: int,
    meta_gradient: MetaGradient = displacement,
) -> Iterator[int]:
    """Previous meta-learning algorithms: phi moves once in `horizon` (K) inner steps, `rounds` (M) times."""
    for m in range(rounds):  # 5
        reset(phi, learners)  # 7
        for k in range(1, horizon + 1):  # 8
            inner_step(learners, m * horizon + k - 1)  # 9
            if k == horizon:
                move(phi, meta_update(phi, learners, meta_lr, meta_gradient))  # 12
            yield k


def algorithm_2(
    phi: Parameters,
    learners: Sequence[LocalLearner],
    *,
    meta_lr: float,
    horizon: int,
    rounds: int,
    meta_gradient: MetaGradient = displacement,
    carry: str = "shift",
    direction: Callable[[int, int], Parameters] | None = None,
) -> Iterator[int]:
    """Continual trajectory shifting: phi moves at every inner step and the running trajectories with it.

    `carry` replaces line 13 by an ablation: `hold` (No Shifting), `random` (Random Shifting; `direction(t, step)` draws
    a direction for task t, of any norm) or `replay` (Ours Accurate: the trajectory is run again from the new phi).
    """
    for m in range(rounds):  # 5
        reset(phi, learners)  # 6
        start = copy.deepcopy([(one.module.state_dict(), one.optimizer.state_dict()) for one in learners])
        for k in range(1, horizon + 1):  # 7
            step = m * horizon + k - 1
            inner_step(learners, step)  # 8 to 10
            delta = meta_update(phi, learners, meta_lr, meta_gradient)  # 11
            move(phi, delta)  # 12
            if k == horizon:  # the reset that follows overwrites theta
                pass
            elif carry == "shift":
                for learner in learners:
                    move(learner.theta(phi), delta)  # 13
            elif carry == "random":
                assert direction is not None
                for t, learner in enumerate(learners):
                    drawn = direction(t, step)
                    move(learner.theta(phi), drawn, scale=float(norm(delta) / norm(drawn)))
            elif carry == "replay":
                for learner, (module, optimizer) in zip(learners, copy.deepcopy(start), strict=True):
                    learner.module.load_state_dict(module)
                    learner.optimizer.load_state_dict(optimizer)
                reset(phi, learners)
                for again in range(m * horizon, step + 1):
                    inner_step(learners, again)
            yield k


def reset(phi: Parameters, learners: Sequence[LocalLearner]) -> None:
    """theta_0 <- phi for every task; heads, statistics and optimizer state stay, as in the published code."""
    for learner in learners:
        for name, theta in learner.theta(phi).items():
            theta.copy_(phi[name])


def inner_step(learners: Sequence[LocalLearner], step: int) -> None:
    """theta_k <- theta_{k-1} - alpha grad L_k(theta_{k-1}), or a step of any other optimizer, for every task."""
    for learner in learners:
        learner.optimizer.zero_grad()
        learner.loss(learner.module, step).backward()
        learner.optimizer.step()


def meta_update(
    phi: Parameters, learners: Sequence[LocalLearner], meta_lr: float, meta_gradient: MetaGradient
) -> Parameters:
    """Delta = -beta * (weighted) mean of the meta-gradients over the tasks."""
    gradients = [(learner.weight, meta_gradient(phi, learner)) for learner in learners]
    return {name: -meta_lr * torch.stack([w * g[name] for w, g in gradients]).sum(0) for name in phi}


def move(parameters: Parameters, delta: Parameters, scale: float = 1.0) -> None:
    """Adds `scale` times delta in place."""
    for name, parameter in parameters.items():
        parameter.add_(delta[name], alpha=scale)


def norm(parameters: Parameters) -> Tensor:
    """The Euclidean norm over all parameters."""
    return torch.linalg.vector_norm(torch.cat([parameter.flatten() for parameter in parameters.values()]))
