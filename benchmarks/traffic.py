"""Counts what a piece of code computes and moves: floating-point operations and bytes, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, slots=True)
class Work:
    """What was counted."""

    flops: float
    """Of convolutions and matrix products, a multiplication and an addition being two."""
    bytes: float
    """Read and written by all operators, nothing fused: each reads its arguments once and writes its results once."""


def count(run: Callable[[], object]) -> Work:
    """Runs it once and counts."""
    with FlopCounterMode(display=False) as flops, _Traffic() as traffic:
        run()
    return Work(float(flops.get_total_flops()), float(traffic.bytes))


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            self.bytes += sum(_bytes(tensor) for tensor in (*read, *written))
        return out


def _bytes(tensor: Tensor) -> int:
    """Of its memory; what is expanded is read once."""
    spread = any(stride == 0 for stride in tensor.stride())
    held = tensor.untyped_storage().nbytes() if spread else tensor.numel() * tensor.element_size()
    return min(held, tensor.numel() * tensor.element_size())
