"""Learn one initialization from many heterogeneous, many-shot tasks, and fine-tune from it.

The public names are resolved on first use (PEP 562), so `import trajshift` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trajshift.algorithm.carries import Carry
    from trajshift.algorithm.meta_gradients import MetaGradient
    from trajshift.algorithm.methods import METHODS, Method
    from trajshift.errors import UsageError
    from trajshift.evaluation.finetuning import FineTuned, finetune
    from trajshift.learners.initialization import Initialization, load_initialization
    from trajshift.settings import Execution, Finetune, Inner, Meta
    from trajshift.task import Task
    from trajshift.training.trainer import Event, MetaTrainer

__version__ = "0.1.0"

__all__ = [
    "MetaTrainer",
    "Event",
    "Inner",
    "Meta",
    "Execution",
    "Finetune",
    "Task",
    "Initialization",
    "load_initialization",
    "finetune",
    "FineTuned",
    "METHODS",
    "Method",
    "MetaGradient",
    "Carry",
    "UsageError",
    "__version__",
]

_HOMES = {
    "MetaTrainer": "training.trainer",
    "Event": "training.trainer",
    "Inner": "settings",
    "Meta": "settings",
    "Execution": "settings",
    "Finetune": "settings",
    "Task": "task",
    "Initialization": "learners.initialization",
    "load_initialization": "learners.initialization",
    "finetune": "evaluation.finetuning",
    "FineTuned": "evaluation.finetuning",
    "METHODS": "algorithm.methods",
    "Method": "algorithm.methods",
    "MetaGradient": "algorithm.meta_gradients",
    "Carry": "algorithm.carries",
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
