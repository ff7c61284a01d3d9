"""Chooses the engine. Each gives the numbers of the reference, `loop`.

`loop` is the reference itself. `parallel` runs the tasks side by side in threads of one core each (CPU). `graph`
replays whole steps as CUDA graphs. `auto` picks the fastest that can run what was asked for.
"""

from __future__ import annotations

import torch

from trajshift.errors import UsageError, nearest
from trajshift.settings import ENGINES
from trajshift.training.engines.cuda_graph import Graph, lanes_for
from trajshift.training.engines.loop import Engine
from trajshift.training.engines.parallel import Parallel
from trajshift.training.engines.recorder import CudaRecorder
from trajshift.training.meta_step import MetaStep
from trajshift.utils.cpu_memory import keep_memory

__all__ = ["Engine", "Graph", "Parallel", "choose_engine"]


def choose_engine(engine: str | Engine, run: MetaStep) -> Engine:
    """The engine for a run whose learners have been built; `auto` never fails.

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
    if auto and run.device.type == "cpu":
        keep_memory()
    graph = run.device.type == "cuda" if auto else engine == "graph"
    found = _graph(run, or_loop=auto) if graph else _parallel(run)
    if isinstance(found, Engine):
        return found
    if not auto:
        raise UsageError(f"engine {engine} cannot run this: {found}; use engine=auto")
    return Engine(why=found)


def _parallel(run: MetaStep) -> Engine | str:
    threads = torch.get_num_threads()
    if run.device.type != "cpu":
        return f"it is for the CPU and the device is {run.device}"
    if threads < 2:
        return "it needs 2 CPU threads and has 1"
    tasks = run.active.rows
    shifts = -(-tasks // threads)
    if tasks < threads or tasks < 0.75 * shifts * threads:
        return f"{tasks} tasks do not fill {threads} threads"
    return _draws(run) or Parallel(threads)


def _graph(run: MetaStep, *, or_loop: bool) -> Engine | str:
    if run.device.type != "cuda":
        return f"it is for CUDA and the device is {run.device}"
    obstacle = Graph.obstacle(run) or _draws(run)
    return obstacle or Graph(CudaRecorder(run.device, lanes_for(run)), or_loop=or_loop)


def _draws(run: MetaStep) -> str | None:
    for name in run.active.local:
        if run.active.draws(name):
            return f"the model of task {name!r} draws random numbers (dropout), which the tasks must do one by one"
    return None
