"""Conjugate gradients and Hessian-vector products for iMAML. No Hessian is ever formed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trajshift.algorithm.protocols import Product


@dataclass(frozen=True, slots=True)
class Solution:
    """What conjugate gradients found."""

    x: Tensor
    """`[P]`."""
    steps: int
    """Products with A."""
    negative_curvature: int
    """1 where the iteration ended at p.Ap <= 0, else 0."""


def conjugate_gradient(product: Product, b: Tensor, *, steps: int, tolerance: float) -> Solution:
    """Solves A x = b from x = 0 for a symmetric positive definite A given by `product(v) = A v`.

    Stops once ||b - A x|| <= tolerance * ||b||, after `steps` products, or at a direction p with p.Ap <= 0,
    where the quadratic has no minimum: x is then the last iterate before it (b itself if there is none).
    Hestenes and Stiefel, 1952.
    """
    x = torch.zeros_like(b)
    residual = b.clone()
    direction = residual.clone()
    square = residual @ residual
    goal = (tolerance * torch.linalg.vector_norm(b)) ** 2
    for step in range(steps):
        if square <= goal:
            return Solution(x, step, 0)
        image = product(direction)
        curvature = direction @ image
        if curvature <= 0.0:
            return Solution(x if step else b.clone(), step + 1, 1)
        alpha = square / curvature
        x += alpha * direction
        residual -= alpha * image
        previous, square = square, residual @ residual
        direction = residual + (square / previous) * direction
    return Solution(x, steps, 0)


def hessian_product(loss: Tensor, parameters: Sequence[Tensor], views: Callable[[Tensor], Sequence[Tensor]]) -> Product:
    """`v [P] -> H v [P]` for the Hessian of `loss` with respect to `parameters`, by double backward.

    Args:
        loss: a scalar with its graph.
        parameters: what to differentiate by; one that the loss does not depend on has zero rows and columns.
        views: named pieces of a row `[P]`, in the order of `parameters`.
    """
    first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)

    def product(v: Tensor) -> Tensor:
        pairs = [(g, piece) for g, piece in zip(first, views(v), strict=True) if g is not None and g.requires_grad]
        out = torch.zeros_like(v)
        if not pairs:
            return out
        along = torch.stack([(g * piece).sum() for g, piece in pairs]).sum()
        second = torch.autograd.grad(along, parameters, retain_graph=True, allow_unused=True)
        for target, value in zip(views(out), second, strict=True):
            if value is not None:
                target.copy_(value)
        return out

    return product
