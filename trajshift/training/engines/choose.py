"""Engines: ways of running the loop's inner steps. Each gives the numbers of the reference, `trainer.py`.

`loop` is the reference itself. `parallel` runs the tasks side by side in threads of one core each (CPU). `graph`
replays whole steps as CUDA graphs. `auto` takes the fastest that can run what was asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trajshift.errors import UsageError, nearest
from trajshift.settings import ENGINES
from trajshift.training.engines.cuda_graph import CudaRecorder, Graph, lanes_for
from trajshift.training.engines.loop import Engine
from trajshift.training.engines.parallel import Parallel
from trajshift.utils.cpu_memory import keep_memory

if TYPE_CHECKING:
    from trajshift.training.trainer import MetaTrainer

__all__ = ["Engine", "Graph", "Parallel", "choose"]


def choose(engine: str | Engine, trainer: MetaTrainer) -> Engine:
    """The engine for a trainer whose roster stands; `auto` never fails.

    Raises:
        UsageError: an unknown name, or an engine that cannot run this, with the reason.
    """
    if isinstance(engine, Engine):
        return engine
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}{nearest(engine, ENGINES)}")
    if engine == "loop":
        return Engine()
    auto = engine == "auto"
    if auto and trainer.device.type == "cpu":
        keep_memory()
    graph = trainer.device.type == "cuda" if auto else engine == "graph"
    found = _graph(trainer, or_loop=auto) if graph else _parallel(trainer)
    if isinstance(found, Engine):
        return found
    if not auto:
        raise UsageError(f"engine {engine} is not for this run: {found}; use engine=auto")
    return Engine(why=found)


def _parallel(trainer: MetaTrainer) -> Engine | str:
    threads = torch.get_num_threads()
    if trainer.device.type != "cpu":
        return f"it is for the CPU and the device is {trainer.device}"
    if threads < 2:
        return "it needs 2 CPU threads and has 1"
    tasks = trainer.roster.rows
    shifts = -(-tasks // threads)
    if tasks < threads or tasks < 0.75 * shifts * threads:
        return f"{tasks} tasks do not fill {threads} threads"
    return _draws(trainer) or Parallel(threads)


def _graph(trainer: MetaTrainer, *, or_loop: bool) -> Engine | str:
    if trainer.device.type != "cuda":
        return f"it is for CUDA and the device is {trainer.device}"
    obstacle = Graph.obstacle(trainer) or _draws(trainer)
    return obstacle or Graph(CudaRecorder(trainer.device, lanes_for(trainer)), or_loop=or_loop)


def _draws(trainer: MetaTrainer) -> str | None:
    for name in trainer.roster.local:
        if trainer.roster.draws(name):
            return f"the model of task {name!r} draws random numbers (dropout), which the tasks must do one by one"
    return None
