"""How good a point is as an initialization: the mean loss of the tasks along an optimizer started there."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from trajshift.errors import UsageError, nearest
from trajshift.experiments.landscape import himmelblau
from trajshift.experiments.landscape.himmelblau import Landscape, as_points

OPTIMIZERS = ("adam", "sgd")
_DECAY_1, _DECAY_2, _EPSILON = 0.9, 0.999, 1e-8  # torch.optim.Adam's defaults


def quality_map(
    points: Tensor | np.ndarray,
    steps: int,
    lr: float,
    optimizer: str = "adam",
    *,
    tasks: Landscape | None = None,
) -> Tensor:
    """Mean loss over the tasks along gradient descent from each point: `[..., N, steps]`, lower is better.

    Entry k is the loss *before* the (k+1)-th step, so entry 0 is the loss at the point and entry k the quality after
    k steps. A point whose trajectory overflows has entries that are not finite.

    Args:
        points: `[..., N, 2]`.
        steps: entries of each curve.
        lr: learning rate.
        optimizer: `adam` (torch.optim.Adam's defaults) or `sgd` (plain).
        tasks: None for the published ones.

    Raises:
        UsageError: a wrong shape, an unknown optimizer, steps below one, or lr that is not positive.
    """
    if optimizer not in OPTIMIZERS:
        raise UsageError(f"unknown optimizer {optimizer!r}{nearest(optimizer, OPTIMIZERS)}")
    if steps < 1:
        raise UsageError(f"steps is {steps}; use at least 1")
    if not (lr > 0.0 and math.isfinite(lr)):
        raise UsageError(f"lr is {lr}; use a positive number")
    landscape = tasks or himmelblau.tasks()
    theta = landscape.spread(as_points(points))
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    losses = []
    for step in range(1, steps + 1):
        loss, gradient = landscape.both_at(theta)
        losses.append(loss.mean(0))
        if optimizer == "sgd":
            theta.sub_(gradient, alpha=lr)
            continue
        first.lerp_(gradient, 1.0 - _DECAY_1)
        second.mul_(_DECAY_2).addcmul_(gradient, gradient, value=1.0 - _DECAY_2)
        size = second.sqrt().div_(math.sqrt(1.0 - _DECAY_2**step)).add_(_EPSILON)
        theta.addcdiv_(first, size, value=-lr / (1.0 - _DECAY_1**step))
    return torch.stack(losses, dim=-1)
