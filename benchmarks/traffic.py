"""Counts what a piece of code computes and moves: floating-point operations and bytes, operator by operator.

Triton kernels are not operators; each of ours counts as one that reads or writes every tensor it is given once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

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
    with FlopCounterMode(display=False) as flops, _Traffic() as traffic, launches() as launched:
        run()
    return Work(float(flops.get_total_flops()), float(traffic.bytes + sum(launched)))


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


_KERNELS = {
    "norm_kernels": ("statistics", "apply", "gradient_sums", "gradient_of_input"),
    "conv_kernels": ("weight_gradient", "total", "convolution"),
}


class _Counted:
    """A Triton kernel that records the bytes of its tensors whenever it is launched."""

    def __init__(self, kernel: Any, noted: list[int]) -> None:
        self._kernel, self._noted = kernel, noted

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launch = self._kernel[grid]

        def counted(*args: Any, **constants: Any) -> Any:
            tensors = {leaf.data_ptr(): leaf for leaf in args if isinstance(leaf, Tensor)}
            self._noted.append(sum(_bytes(tensor) for tensor in tensors.values()))
            return launch(*args, **constants)

        return counted


@contextmanager
def launches() -> Iterator[list[int]]:
    """Bytes of each kernel launched inside."""
    noted: list[int] = []
    with ExitStack() as stack:
        for module, names in _KERNELS.items() if find_spec("triton") is not None else ():
            kernels = import_module(f"trajshift.models.kernels.{module}")
            for name in names:
                stack.enter_context(patch.object(kernels, name, _Counted(getattr(kernels, name), noted)))
        yield noted


def _bytes(tensor: Tensor) -> int:
    """Bytes of its memory; an expanded dimension is read once."""
    spread = any(stride == 0 for stride in tensor.stride())
    held = tensor.untyped_storage().nbytes() if spread else tensor.numel() * tensor.element_size()
    return min(held, tensor.numel() * tensor.element_size())
