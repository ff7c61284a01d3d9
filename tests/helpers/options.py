"""A `MetaTrainer` from options by their short names, which spares the tests the sections they stand in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from trajshift.settings import SECTIONS, SHORT_NAMES
from trajshift.task import Task
from trajshift.training.trainer import MetaTrainer

NAMES = SHORT_NAMES | {"meta_optimizer": "meta.optimizer", "meta_options": "meta.options"}


def build(
    model: Callable[[Task], nn.Module] | nn.Module,
    tasks: Sequence[Task] | Mapping[str, Task],
    method: Any = "trajectory-shifting",
    **options: Any,
) -> MetaTrainer:
    """A trainer; `options` are arguments of `MetaTrainer` and fields of its sections, such as meta_lr."""
    return MetaTrainer(model, tasks, method, **in_sections(options))


def in_sections(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with each that has a short name put into its section."""
    found = {name: value for name, value in options.items() if name not in NAMES}
    for name, value in options.items():
        if name in NAMES:
            section, _, field = NAMES[name].partition(".")
            found[section] = replace(found.get(section, SECTIONS[section]()), **{field: value})
    return found
