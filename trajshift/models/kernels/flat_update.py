"""The meta-update of trajectory shifting with the plain meta-step: mean displacement, phi's step, the shift of theta.

Shapes: T learners (rows), P numbers a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trajshift.models.kernels.switch import may_fuse

_BLOCK = 1024
_MOST_ROWS = 32
"""The most rows for which the kernel's loops over rows are unrolled."""


def flat_update(
    theta: Tensor, phi: Tensor, weights: Tensor, lr: float | Tensor, *, shift: bool
) -> tuple[Tensor, Tensor]:
    """phi += delta and, with `shift`, theta += delta, for delta = -lr sum_t w_t (phi - theta_t) (Algorithm 2).

    Args:
        theta: `[T, P]`, contiguous.
        phi: `[P]`.
        weights: `[T]`.
        lr: the meta learning rate beta.
        shift: False leaves theta as it is.

    Returns:
        ||delta||, a scalar, and the sum of each row of theta before the shift, `[T]`: not finite where a number of the
        row is not.
    """
    if may_fuse(theta) and theta.dtype is torch.float32 and theta.is_contiguous() and len(theta) <= _MOST_ROWS:
        return _fused(theta, phi, weights, lr, shift)
    sums = theta.sum(1)
    gradient = torch.addmv(weights.sum() * phi, theta.T, weights, alpha=-1.0)
    delta = gradient.mul_(-lr)
    phi += delta
    if shift:
        theta += delta
    return torch.linalg.vector_norm(delta), sums


def _fused(theta: Tensor, phi: Tensor, weights: Tensor, lr: float | Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    from trajshift.models.kernels import flat_kernels as kernels

    rows, size = theta.shape
    programs = -(-size // _BLOCK)
    partial = theta.new_empty(rows + 1, programs)
    kernels.meta_step[(programs,)](
        theta, phi, weights, partial, lr, size, T=rows, BLOCK=_BLOCK, SHIFT=shift, num_warps=4
    )
    sums = partial.sum(1)
    return sums[rows].sqrt(), sums[:rows]
