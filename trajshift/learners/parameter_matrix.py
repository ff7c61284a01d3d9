"""The one matrix: row t holds the shared parameters theta of local learner t.

Shapes: T learners (rows) on this rank, P numbers a row. The parameters of each learner's module are views of
its row, so a reset is one broadcast copy, a mean one reduction and a shift one broadcast add. Padding stays zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from trajshift.errors import UsageError

_ALIGNMENT = 256  # bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One shared parameter: its offset in a row, its shape and its strides."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    numel: int


class Layout:
    """Names, shapes and offsets of the shared parameters in a row of P numbers.

    Entries start at multiples of 256 bytes. Dense strides (channels-last weights too) are kept.

    Raises:
        UsageError: no parameters, or parameters of different dtypes.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        if not parameters:
            raise UsageError("no parameter is shared by all tasks; check head and the sharing rule")
        dtypes = {parameter.dtype for parameter in parameters.values()}
        if len(dtypes) > 1:
            listed = ", ".join(sorted(str(dtype) for dtype in dtypes))
            raise UsageError(f"shared parameters have mixed dtypes ({listed}); convert the model to one")
        self.dtype = dtypes.pop()
        step = _ALIGNMENT // self.dtype.itemsize
        entries, offset = [], 0
        for name, parameter in parameters.items():
            stride = parameter.stride() if _is_dense(parameter) else parameter.contiguous().stride()
            entries.append(Entry(name, tuple(parameter.shape), tuple(stride), offset, parameter.numel()))
            offset += -(-parameter.numel() // step) * step
        self.entries: tuple[Entry, ...] = tuple(entries)
        self.size = offset
        """P, padding included."""
        self.count = sum(entry.numel for entry in entries)
        """Numbers of a row that are parameters, without padding."""

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """The named parameters as views of `row` `[P]`, each with its own shape and strides."""
        base = row.storage_offset()
        return {e.name: row.as_strided(e.shape, e.stride, base + e.offset) for e in self.entries}

    def flatten(self, parameters: Mapping[str, Tensor], *, out: Tensor) -> Tensor:
        """Copies named tensors into the row `out` `[P]`; padding is set to zero."""
        out.zero_()
        views = self.views(out)
        torch._foreach_copy_(list(views.values()), [parameters[name].to(out) for name in views])
        return out

    @lru_cache(maxsize=1)  # noqa: B019 - a layout lives as long as its run
    def mask(self, device: torch.device) -> Tensor:
        """`[P]` bool: True where a row holds a parameter, False in the padding."""
        mask = torch.zeros(self.size, dtype=torch.bool, device=device)
        for entry in self.entries:
            mask[entry.offset : entry.offset + entry.numel] = True
        return mask


def _is_dense(tensor: Tensor) -> bool:
    """Whether the strides cover `numel` numbers without gap or overlap, in any order of dimensions."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class Trajectories:
    """`theta` `[T, P]` and the modules whose parameters are views of it."""

    def __init__(self, layout: Layout, rows: int, device: torch.device) -> None:
        self.layout = layout
        self.theta = torch.zeros(rows, layout.size, dtype=layout.dtype, device=device)
        self.views = [layout.views(row) for row in self.theta]

    def bind(self, row: int, module: nn.Module) -> dict[str, nn.Parameter]:
        """Makes the shared parameters of `module` views of a row; their values are those of the row.

        The parameter objects stay the same (`p.data = view`), so tied weights and optimizers survive.
        Returns the shared parameters by name.
        """
        parameters = dict(module.named_parameters())
        bound = {}
        for name, view in self.views[row].items():
            parameters[name].data = view
            bound[name] = parameters[name]
        return bound

    def check_parameters(self, row: int, module: nn.Module, trained: Mapping[str, nn.Parameter], task: str) -> None:
        """Rejects a module whose parameters are not those in training, or are no longer views of their row.

        Raises:
            UsageError: `.to()` gave a parameter memory of its own, or `load_state_dict(assign=True)` replaced it.
        """
        present = dict(module.named_parameters())
        for name, parameter in trained.items():
            view = self.views[row].get(name)
            moved = view is not None and (parameter.data_ptr(), parameter.stride()) != (view.data_ptr(), view.stride())
            if moved or present.get(name) is not parameter:
                raise UsageError(
                    f"parameter {name!r} of task {task!r} no longer shares memory with the parameter matrix; "
                    "do not call .to() or load_state_dict(assign=True) on a module in training"
                )
