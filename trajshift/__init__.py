"""Learn one initialization from many heterogeneous, many-shot tasks, and fine-tune from it.

The public names are resolved on first use (PEP 562), so `import trajshift` does not import torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trajshift.errors import UsageError
    from trajshift.finetune import finetune
    from trajshift.initialization import Initialization, load_initialization
    from trajshift.inner import Inner
    from trajshift.loop import MetaTrainer
    from trajshift.presets import METHODS
    from trajshift.task import Task

__version__ = "0.1.0"

__all__ = [
    "MetaTrainer",
    "Inner",
    "Task",
    "Initialization",
    "load_initialization",
    "finetune",
    "METHODS",
    "UsageError",
    "__version__",
]

_HOMES = {
    "MetaTrainer": "loop",
    "Inner": "inner",
    "Task": "task",
    "Initialization": "initialization",
    "load_initialization": "initialization",
    "finetune": "finetune",
    "METHODS": "presets",
    "UsageError": "errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps a public name that is also a module's name: an import would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
