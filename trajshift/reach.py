"""How many inner steps a method needs to be as good as Reptile is at its end; torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trajshift.comparison import FINAL, UNTRAINED, Row, Summary, curves

AVERAGE = "average"
NOT_REACHED = "not reached"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """Of one method, the first checkpoint whose mean over seeds is at least as good as the reference's last."""

    label: str
    steps: dict[str, int | None]
    """Target, or `average` -> cumulative inner steps per task; None where no checkpoint is as good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReachTable:
    """All methods against one."""

    reference: str
    """Label of the Reptile run; of several the one that ends best on average."""
    budget: int
    """Inner steps of the reference."""
    goals: dict[str, float]
    """Target, or `average` -> mean over seeds at the reference's end."""
    lines: tuple[Reach, ...]

    def header(self) -> list[str]:
        """Column names for `cells`."""
        return ["method", *self.goals]

    def cells(self) -> list[list[str]]:
        """Inner steps, and in brackets how many times fewer (or more, below 1) than the reference's budget."""
        return [[line.label, *(self._show(line.steps[name]) for name in self.goals)] for line in self.lines]

    def _show(self, steps: int | None) -> str:
        return NOT_REACHED if steps is None else f"{steps:,} ({self.budget / steps:.3g}x)"


def reach_table(rows: Sequence[Row], final: Summary, method: str = "reptile") -> ReachTable | None:
    """The table from rows with checkpoints; None without a finished run of `method`, or with no checkpoint at all.

    A number of inner steps is an upper bound: the truth lies between the checkpoint before and it. Means alone
    decide, so where intervals are wide the number is loose.
    """
    found = [line for line in final.lines if line.method == method and line.average is not None]
    # steps need checkpoints: what was fine-tuned at the end alone says nothing about when
    trained = [row for row in rows if row["checkpoint"] not in UNTRAINED and "error" not in row]
    chosen = [row for row in trained if row.get("train_images") == final.train_images and row["steps"] in final.steps]
    if not found or all(row["checkpoint"] == FINAL for row in chosen):
        return None
    sign = 1.0 if final.percent else -1.0
    best = max(found, key=lambda line: sign * line.average.mean if line.average else 0.0)
    goals = {name: best.targets[name].mean for name in final.targets if name in best.targets}
    if len(final.targets) > 1 and best.average is not None:
        goals[AVERAGE] = best.average.mean
    first: dict[str, dict[str, int | None]] = {row["label"]: dict.fromkeys(goals) for row in chosen}
    for name, goal in goals.items():
        for curve in curves(chosen, "inner_steps", metric=final.metric, target=None if name == AVERAGE else name):
            reached = [x for x, y in zip(curve.x, curve.y, strict=True) if x > 0 and sign * (y.mean - goal) >= -1e-12]
            first[curve.label][name] = int(reached[0]) if reached else None
    return ReachTable(
        reference=best.label,
        budget=best.inner_steps,
        goals=goals,
        lines=tuple(Reach(label=label, steps=steps) for label, steps in first.items()),
    )
