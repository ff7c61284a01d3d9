"""Constants of a model: frozen parameters, and buffers that are no statistics. No optimizer moves them.

Each has one of three owners. A value that comes from the initialization or from a random draw belongs to phi: all tasks
have the same. One that the factory gives every task alike is stored once. Any other belongs to its task.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trajshift.errors import UsageError
from trajshift.learners.initialization import is_statistic

Shapes = Mapping[str, tuple[int, ...]]


def constants(module: nn.Module) -> dict[str, Tensor]:
    """The frozen parameters of a module and its buffers that are no statistics, by name; not copies."""
    found = {name: parameter.data for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return found | {name: buffer for name, buffer in module.named_buffers() if not is_statistic(name)}


def drawn(one: nn.Module, other: nn.Module) -> frozenset[str]:
    """Names of the constants that differ between two modules which a factory made for one task from two draws."""
    first, second = constants(one), constants(other)
    return frozenset(n for n, t in first.items() if n in second and not _same(t, second[n]))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether shapes and values are the same; NaN is the same as NaN."""
    if one.shape != other.shape:
        return False
    other = other.to(one.device)
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


@dataclass(slots=True)
class Constants:
    """The constants that tasks have in common.

    Attributes:
        common: name to value in the first task's module, for those that every task has in the same shape.
        values: those kept with phi, on the device.
        from_phi: names in `values` that all tasks take whatever their factory made.
        moving: frozen parameters that a training pass changes (an average of weights): every task has its own.
    """

    common: dict[str, Tensor] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    values: dict[str, Tensor] = field(default_factory=dict)
    from_phi: set[str] = field(default_factory=set)
    moving: set[str] = field(default_factory=set)
    _sums: dict[str, int] = field(default_factory=dict)

    @classmethod
    def start(cls, first: nn.Module) -> Constants:
        """All constants of the first task's module; `compare` then removes what other tasks have not."""
        frozen = frozenset(name for name, p in first.named_parameters() if not p.requires_grad)
        common = constants(first)
        return cls(common, frozen, {name: common[name] for name in frozen})

    def compare(self, module: nn.Module, again: nn.Module) -> None:
        """Takes in one task's module, made twice, from two draws."""
        own = constants(module)
        self.common = {n: t for n, t in self.common.items() if n in own and own[n].shape == t.shape}
        self.from_phi |= drawn(module, again)
        self.from_phi &= self.common.keys()
        self.values = {
            name: value
            for name, value in self.common.items()
            if name in self.from_phi or (name in self.values and _same(value, own[name]))
        }

    @property
    def built(self) -> list[str]:
        """Names in `values` that the factory gives every task alike."""
        return sorted(self.values.keys() - self.from_phi)

    def take(self, name: str, value: Tensor) -> None:
        """Has all tasks take this value."""
        here = self.common[name]
        self.values[name] = value.to(here.device, here.dtype, copy=True).contiguous()
        self.from_phi.add(name)

    def to(self, device: torch.device) -> None:
        """Moves the values to a device."""
        self.values = {name: tensor.to(device) for name, tensor in self.values.items()}
        self._sums.clear()

    def place(self, module: nn.Module) -> frozenset[str]:
        """Puts the values into a task's module; returns the names of the parameters whose memory is that of all tasks.

        A constant of another shape, or that the task's factory made different, stays as it is.
        """
        parameters, mine, stored_once = dict(module.named_parameters()), constants(module), set()
        for name, value in self.values.items():
            if name not in mine or mine[name].shape != value.shape:
                continue
            if name not in self.from_phi and not _same(value, mine[name]):
                continue
            if name not in parameters:
                mine[name].copy_(value)
            elif name in self.moving:
                parameters[name].data = value.clone()
            else:
                parameters[name].data = value
                stored_once.add(name)
        return frozenset(stored_once)

    def load(self, saved: Mapping[str, Tensor], from_phi: Collection[str]) -> None:
        """The values and owners that a checkpoint has."""
        for name, tensor in saved.items():
            if name in self.values and self.values[name].shape == tensor.shape:
                self.values[name].copy_(tensor)
            elif name in self.common and self.common[name].shape == tensor.shape:
                device = next((value.device for value in self.values.values()), tensor.device)
                self.values[name] = tensor.to(device)
            else:
                raise UsageError(
                    f"the checkpoint belongs to another model: {name!r} of shape {tuple(tensor.shape)} has no place "
                    "here; use the model it was made with"
                )
        self.from_phi = set(from_phi) & self.values.keys()
        self._sums.clear()

    def check(self) -> None:
        """Rejects a frozen parameter that changed since the last call although tasks share its memory.

        Raises:
            UsageError: names it.
        """
        shared = [name for name in self.values if name in self.frozen and name not in self.moving]
        sums = {name: _bit_sum(self.values[name]) for name in shared}
        changed = [name for name in shared if self._sums.get(name, sums[name]) != sums[name]]
        if changed:
            raise UsageError(
                f"frozen parameter {changed[0]!r}, which all tasks share, changed during training; make it a buffer, "
                "or change it in every training pass from the first"
            )
        self._sums = sums


def _bit_sum(tensor: Tensor) -> int:
    """The sum of a tensor's words: exact, so neither threads nor devices change it."""
    word = {1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    return int(tensor.contiguous().reshape(-1).view(word).sum(dtype=torch.int64))
