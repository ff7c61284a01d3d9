"""The plane of section 4.1: the vectorised twin against the loop, and the whole experiment."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import Steps, interleave, ratio, spread, threads, timed
from benchmarks.report import Report, show, show_time
from benchmarks.sides.ours import advance
from benchmarks.workload import FOREVER
from trajshift import Inner, Meta, MetaTrainer
from trajshift.experiments.landscape import grid, tasks, updates
from trajshift.experiments.landscape.experiment import run_experiment
from trajshift.experiments.landscape.himmelblau import Point
from trajshift.experiments.landscape.measure import Settings
from trajshift.utils.progress import duration
from trajshift.utils.table import Table

METHOD, HORIZON, META_LR, INNER_LR, MOMENTUM = "trajectory-shifting", 100, 0.1, 0.05, 0.9
"""Of section 4.1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured."""

    side: int
    """Starts of the twin on a side of the grid."""
    steps: int
    rounds: int
    experiment: Settings


FULL = Plan(side=41, steps=100, rounds=20, experiment=Settings())
TOY = Plan(
    side=3,
    steps=2,
    rounds=2,
    experiment=Settings(
        horizon=20, rounds=2, side=5, picture_side=5, starts_side=3, optima_side=3, sets=2, bias_sets=3, processes=1
    ),
)


def measure(*, toy: bool) -> Report:
    """Both parts."""
    plan = TOY if toy else FULL
    starts = grid(plan.side)
    with threads(1):
        sides = {"loop": timed(advance(loop(starts[0]))), "twin": timed(twin(starts))}
        seconds = interleave(sides, steps=plan.steps, rounds=plan.rounds, title="landscape")
    per_start = [one / len(starts) for one in seconds["twin"]]
    gain = ratio(seconds["loop"], per_start)
    alone, together, each = (show_time(spread(values)) for values in (seconds["loop"], seconds["twin"], per_start))
    rows = [["loop", "1", alone, alone, "1"], ["vectorised twin", f"{len(starts):,}", together, each, show(gain)]]
    report = Report(title="The plane of section 4.1 (CPU)", samples=seconds)
    caption = f"{METHOD}, 8 tasks in the plane, K = {HORIZON}, float64, one thread; a step moves all tasks, then phi."
    report.tables.append(Table(["side", "starts", "a step", "a step of one start", "times as fast"], rows, caption))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run_experiment(Path(folder), settings=plan.experiment)
        spent = time.perf_counter() - began
    caption = f"`trajshift experiment landscape`, {plan.experiment.processes} processes, figures and page included."
    report.tables.append(Table(["experiment", "wall time"], [["figures 4 and 5", duration(spent)]], caption))
    report.samples["experiment"] = [spent]
    return report


def loop(start: torch.Tensor) -> MetaTrainer:
    """The loop of `MetaTrainer` from one start `[2]`."""
    return MetaTrainer(
        Point,
        tasks().as_tasks(),
        METHOD,
        horizon=HORIZON,
        rounds=FOREVER,
        inner=Inner(lr=INNER_LR, options={"momentum": MOMENTUM}),
        meta=Meta(lr=META_LR),
        batch_size=1,
        shared=("theta",),
        renew=["optimizer"],
        initialization={"theta": start},
    )


def twin(starts: torch.Tensor) -> Steps:
    """Meta-updates of the twin from all starts `[N, 2]`, one after each inner step."""
    run = updates(METHOD, starts, horizon=HORIZON, inner_lr=INNER_LR, meta_lr=META_LR, momentum=MOMENTUM)

    def take(count: int) -> None:
        for _ in range(count):
            next(run)

    return take
