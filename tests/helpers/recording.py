"""A CUDA graph's rules on the CPU: operations are recorded with the addresses and numbers they were given, not done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.masked_fill_.Tensor)
"""Operations whose CUDA kernels read a value on the host."""


class _Recording(TorchDispatchMode):
    """Every operation below autograd, and what memory it wrote to that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        written = [
            leaf
            for argument, value in _arguments(func, args, kwargs)
            if (argument.alias_info is not None and argument.alias_info.is_write) or _hidden(func, argument)
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor)
        ]
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._made | self.before.keys():
                whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
                self.before[storage.data_ptr()] = (whole, whole.clone())
        result = func(*args, **kwargs)
        self._made |= _memory(result) - _memory((args, kwargs))
        # What was made is kept alive, so that no address is used twice.
        self.operations.append((func, args, kwargs, result))
        return result


def _hidden(func: Any, argument: Any) -> bool:
    """BatchNorm writes its statistics without saying so."""
    return func.overloadpacket is torch.ops.aten.native_batch_norm and argument.name.startswith("running")


def _memory(tree: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    schema = func._schema.arguments
    yield from zip(schema, args, strict=False)
    yield from ((argument, kwargs[argument.name]) for argument in schema if argument.name in kwargs)


class Recorder:
    """`trajshift.training.engines.cuda_graph.Recorder` without a device."""

    lanes = 2

    def __init__(self) -> None:
        self.records = 0
        self.replays = 0

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        self.records += 1
        recording = _Recording()
        try:
            with recording:
                body()
        finally:
            for tensor, value in recording.before.values():
                tensor.copy_(value)  # a recording does no work

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, kept in recording.operations:
                    result = func(*args, **kwargs)
                    for mine, old in zip(tree_leaves(result), tree_leaves(kept), strict=True):
                        if isinstance(old, Tensor) and mine is not old and mine.data_ptr() != old.data_ptr():
                            old.copy_(mine.view(old.shape))  # whose shape was changed in place later

        return replay

    def forget(self) -> None:
        self.records = 0

    @contextmanager
    def warm(self) -> Iterator[None]:
        yield

    @contextmanager
    def lane(self, number: int) -> Iterator[None]:
        yield

    def join(self) -> None:
        pass
