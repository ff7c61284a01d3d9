"""How many inner steps a method needs to be as good as Reptile is at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trajshift.evaluation.comparison import AVERAGE, Curve, Summary, curves
from trajshift.evaluation.evaluation_row import FINAL, EvaluationRow

NOT_REACHED = "not reached"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepsToMatch:
    """Of one method, the first checkpoint whose mean over seeds is at least as good as the reference's last."""

    label: str
    steps: dict[str, int | None]
    """Target, or `AVERAGE` -> cumulative inner steps per task; None where no checkpoint is as good."""
    by_seed: dict[str, list[int | None]]
    """The same for every seed that the reference has too, against the reference's end in that seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepsToMatchTable:
    """All methods against one."""

    reference: str
    """Label of the Reptile run; of several the one that ends best on average."""
    budget: int
    """Inner steps of the reference."""
    goals: dict[str, float]
    """Target, or `AVERAGE` -> mean over seeds at the reference's end."""
    lines: tuple[StepsToMatch, ...]

    def header(self) -> list[str]:
        """Column names for `cells`."""
        return ["method", *self.goals]

    def cells(self) -> list[list[str]]:
        """Inner steps, and in brackets how many times fewer (or more, below 1) than the reference's budget."""
        return [[line.label, *(self._show(line.steps[name]) for name in self.goals)] for line in self.lines]

    def seed_cells(self) -> list[list[str]]:
        """The fewest and the most inner steps that a seed needs; no lines if there is only one seed."""
        several = [line for line in self.lines if any(len(seeds) > 1 for seeds in line.by_seed.values())]
        return [[f"{line.label}, seeds", *(_range(line.by_seed[name]) for name in self.goals)] for line in several]

    def _show(self, steps: int | None) -> str:
        return NOT_REACHED if steps is None else f"{steps:,} ({self.budget / steps:.3g}x)"


def _range(seeds: Sequence[int | None]) -> str:
    """`100 to 400`; a seed that does not get there comes last."""
    ordered = sorted(seeds, key=lambda steps: (steps is None, steps or 0))
    texts = ["never" if steps is None else f"{steps:,}" for steps in (*ordered[:1], *ordered[-1:])]
    return " to ".join(dict.fromkeys(texts)) or "-"


def steps_to_match_table(
    rows: Sequence[EvaluationRow], final: Summary, method: str = "reptile"
) -> StepsToMatchTable | None:
    """The table from rows with checkpoints; None without a finished run of `method`, or with no checkpoint at all.

    A number of inner steps is an upper bound: the true number is between the checkpoint before and it. `steps` compares
    means over the seeds that the reference has finished; how far these disagree is in `by_seed`.
    """
    found = [line for line in final.lines if line.method == method and line.average is not None]
    # steps need checkpoints: what was fine-tuned only at the end says nothing about when
    trained = [row for row in rows if row.start.is_meta_trained]
    chosen = [row for row in trained if row.train_images == final.train_images and row.steps in final.steps]
    if not found or all(row.start == FINAL for row in chosen):
        return None
    sign = 1.0 if final.percent else -1.0
    best = max(found, key=lambda line: sign * line.average.mean if line.average else 0.0)
    goals = {name: best.targets[name].mean for name in final.targets if name in best.targets}
    if len(final.targets) > 1 and best.average is not None:
        goals[AVERAGE] = best.average.mean
    chosen = [row for row in chosen if row.seed in best.seeds]
    points = [(row.inner_steps, row) for row in chosen]
    of_seed = [[point for point in points if point[1].seed == seed] for seed in sorted(best.seeds)]
    steps, by_seed = {}, {}
    for name in goals:
        target = None if name == AVERAGE else name
        steps[name] = _first(curves(points, metric=final.metric, target=target), sign, goals[name])
        by_seed[name] = [
            _first_in_seed(curves(few, metric=final.metric, target=target), sign, best.label) for few in of_seed
        ]
    return StepsToMatchTable(
        reference=best.label,
        budget=best.inner_steps,
        goals=goals,
        lines=tuple(
            StepsToMatch(
                label=label,
                steps={name: steps[name].get(label) for name in goals},
                by_seed={name: [one[label] for one in by_seed[name] if label in one] for name in goals},
            )
            for label in dict.fromkeys(row.label for row in chosen)
        ),
    )


def _first(found: Sequence[Curve], sign: float, goal: float) -> dict[str, int | None]:
    """Of every method the inner steps of the first mean over all its seeds that is as good as the goal."""
    first: dict[str, int | None] = {}
    for curve in found:
        whole = max(y.count for y in curve.y)
        points = [(x, y.mean) for x, y in zip(curve.x, curve.y, strict=True) if x > 0 and y.count == whole]
        reached = [x for x, mean in points if sign * (mean - goal) >= -1e-12]
        first[curve.label] = int(reached[0]) if reached else None
    return first


def _first_in_seed(found: Sequence[Curve], sign: float, reference: str) -> dict[str, int | None]:
    """The same against where the reference ends in one seed's curves; nothing where it has none."""
    goal = next((curve.y[-1].mean for curve in found if curve.label == reference), None)
    return {} if goal is None else _first(found, sign, goal)
