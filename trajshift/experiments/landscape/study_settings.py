"""The study's sizes, and what its rows are results for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trajshift.algorithm.methods import resolve
from trajshift.experiments.landscape.measure import Limit, Settings
from trajshift.utils.processes import Key

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySettings:
    """Sizes of the study."""

    settings: Settings = field(default_factory=Settings)
    """Of a run; its meta_lr is where tuning begins."""
    tuning_seeds: tuple[int, ...] = tuple(range(1000, 1008))
    """Sets of tasks that meta_lr is chosen on."""
    tuning_side: int = 11
    """Starts on a side of their grid."""
    long: int = 100
    """The long budget over the short one."""

    def limits(self) -> tuple[Limit, ...]:
        """The budgets compared."""
        short = self.settings.updates
        return Limit("meta-updates", short), Limit("inner steps", short), Limit("inner steps", self.long * short)


def limit_of(method: str, limit: Limit, settings: Settings) -> Limit:
    """The same budget in meta-updates, where that is exact: only replays make inner steps uneven."""
    chosen = resolve(method, horizon=settings.horizon)
    if limit.unit == "meta-updates" or chosen.carry == "replay":
        return limit
    return Limit("meta-updates", limit.amount // chosen.meta_every)


def key_of(phase: str, method: str, limit: Limit, *seed: int) -> Key:
    """What a row is a result for."""
    return (phase, method, limit.unit, limit.amount, *seed)
