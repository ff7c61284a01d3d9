"""trajshift: the loop under trajectory shifting, phi moves at every step."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.harness import Steps, repeated
from benchmarks.workload import Workload, build_trainer
from trajshift import MetaTrainer


def advance(trainer: MetaTrainer) -> Steps:
    """Steps of a trainer: one inner step of all its learners each."""
    return repeated(trainer.advance)


def steps(*, engine: str, **workload: Any) -> Steps:
    """Steps of a new trainer."""
    return advance(build_trainer(Workload(**workload), engine=engine))


def alone(*, engine: str, **workload: Any) -> Steps:
    """Steps of a new trainer that exchanges nothing with the other processes that torchrun started."""
    os.environ["WORLD_SIZE"] = "1"
    return steps(engine=engine, **workload)


def rounds(**workload: Any) -> Steps:
    """Whole rounds of a new trainer: K inner steps each, in the reference loop."""
    trainer = build_trainer(Workload(**workload), engine="loop")
    take = advance(trainer)
    return lambda count: take(count * trainer.horizon)
