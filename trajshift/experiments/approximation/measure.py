"""error(k) = ||U_k(phi + d_1 + ... + d_{k-1}) - theta_k|| along one trajectory of every task (equation 5)."""

from __future__ import annotations
from collections.abc import Sequence
import torch
from torch import Tensor
from trajshift.carry import Carry
from trajshift.metagrad import MetaGradient, Probe


class Prescribed(MetaGradient):
    """Shifts given beforehand: after inner step k phi moves by `shifts[k - 1]`, with meta_lr 1."""

    def __init__(self, shifts: Tensor) -> None:
        self._shifts = shifts

    def begin(self, theta: Tensor) -> None:
        """From the first shift on."""
        self._k = 0

    def observe(self, theta: Tensor, losses: Tensor, gradients: Tensor) -> None:
        """One step further."""
        self._k += 1

    def read(self, probe: Probe) -> Tensor:
        """Minus the shift, for every row."""
        return -self._shifts[self._k - 1].expand_as(probe.theta)
