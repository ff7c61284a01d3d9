"""Inner steps needed to reach Reptile's final accuracy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trajshift.evaluation.comparison import AVERAGE, summary_table
from trajshift.evaluation.evaluation_row import FINAL, SCRATCH, EvaluationRow, StartingPoint
from trajshift.evaluation.steps_to_match import NOT_REACHED, StepsToMatchTable, steps_to_match_table

STEPS = (100, 200, 400)
Curves = dict[str, dict[str, list[float]]]


def made(values: Curves, metric: str = "accuracy", method: str | None = None) -> list[EvaluationRow]:
    """Rows of two seeds around label -> target -> value at each of `STEPS`."""
    return [
        EvaluationRow(
            start=FINAL if step == STEPS[-1] else StartingPoint.at_step(step), inner_steps=step, method=method or label,
            label=label, seed=seed, target=target, steps=1, setting=target,
            metrics={metric: value + (0.01, -0.01)[seed]},
        )
        for label, by_target in values.items()
        for target, curve in by_target.items()
        for step, value in zip(STEPS, curve, strict=True)
        for seed in (0, 1)
    ]  # fmt: skip


def table(rows: list[EvaluationRow]) -> StepsToMatchTable:
    found = steps_to_match_table(rows, summary_table(rows))
    assert found is not None
    return found


SHIFT_WINS: Curves = {
    "shift": {"a": [0.5, 0.7, 0.8], "b": [0.6, 0.62, 0.5]},
    "reptile": {"a": [0.3, 0.6, 0.7], "b": [0.1, 0.3, 0.6]},
    "mtl": {"a": [0.1, 0.2, 0.3], "b": [0.1, 0.2, 0.61]},
}


def test_the_first_checkpoint_at_least_as_good_counts() -> None:
    found = table(made(SHIFT_WINS))
    assert (found.reference, found.budget) == ("reptile", 400)
    assert found.goals == pytest.approx({"a": 0.7, "b": 0.6, AVERAGE: 0.65})
    steps = {line.label: line.steps for line in found.lines}
    assert steps["shift"] == {"a": 200, "b": 100, AVERAGE: 200}
    assert steps["reptile"] == {"a": 400, "b": 400, AVERAGE: 400}
    assert steps["mtl"] == {"a": None, "b": 400, AVERAGE: None}
    assert found.header() == ["method", "a", "b", AVERAGE]
    assert found.cells()[0] == ["shift", "200 (2x)", "100 (4x)", "200 (2x)"]
    assert found.cells()[2] == ["mtl", NOT_REACHED, "400 (1x)", NOT_REACHED]
    assert found.seed_cells()[0] == ["shift, seeds", "200", "100", "200"]
    assert found.seed_cells()[2] == ["mtl, seeds", "never", "400", "never"]


def test_every_seed_is_held_against_the_reference_in_that_seed() -> None:
    """Seed 0 of shift is as good at once, seed 1 never; their means are at the end."""
    rows = made({"shift": {"a": [0.3, 0.4, 0.7]}, "reptile": {"a": [0.3, 0.6, 0.7]}})
    for place, row in enumerate(rows):
        if row.label == "shift":
            accuracy = {0: 0.9, 1: {400: 0.5}.get(row.inner_steps, 0.1)}[row.seed]
            rows[place] = replace(row, metrics={"accuracy": accuracy})
    shift, reptile = table(rows).lines
    assert shift.steps == {"a": 400}
    assert shift.by_seed == {"a": [100, None]}
    assert reptile.by_seed == {"a": [400, 400]}
    assert table(rows).seed_cells() == [["shift, seeds", "100 to never"], ["reptile, seeds", "400"]]
    alone = table([row for row in rows if row.seed == 0])
    assert alone.seed_cells() == []


def test_a_seed_that_is_not_finished_has_no_end_to_reach() -> None:
    """Reptile's seed 1 was fine-tuned from its first checkpoint alone, which is no goal."""
    rows = made(SHIFT_WINS)
    half = [row for row in rows if (row.label, row.seed) != ("reptile", 1) or row.inner_steps == 100]
    found = table(half)
    assert found.goals == pytest.approx({"a": 0.71, "b": 0.61, AVERAGE: 0.66})
    assert found.lines == table([row for row in rows if row.seed == 0]).lines


def test_a_mean_counts_where_all_seeds_are() -> None:
    """Seed 1 of shift, the worse one, ends at step 100: what seed 0 alone reaches later is no mean over seeds."""
    rows = made(SHIFT_WINS)
    half = [row for row in rows if (row.label, row.seed) != ("shift", 1) or row.inner_steps == 100]
    shift = table(half).lines[0]
    assert shift.steps == {"a": None, "b": 100, AVERAGE: None}


def test_a_loss_is_better_the_lower() -> None:
    values: Curves = {"shift": {"a": [0.9, 0.4, 0.3]}, "reptile": {"a": [0.9, 0.6, 0.5]}}
    found = table(made(values, "mse"))
    assert {line.label: line.steps for line in found.lines} == {"shift": {"a": 200}, "reptile": {"a": 400}}


def test_of_several_reptiles_the_best_is_the_goal() -> None:
    values: Curves = {"reptile meta_lr=1": {"a": [0.1, 0.2, 0.3]}, "reptile meta_lr=3": {"a": [0.1, 0.2, 0.4]}}
    found = table(made(values, method="reptile"))
    assert found.reference == "reptile meta_lr=3"
    assert [line.steps["a"] for line in found.lines] == [None, 400]


def test_rows_without_meta_training_and_other_sizes_do_not_count() -> None:
    rows = made(SHIFT_WINS)
    scratch = [
        replace(row, start=SCRATCH, label="scratch", method="scratch", inner_steps=0)
        for row in rows
        if row.label == "shift" and row.start == FINAL
    ]
    few = [replace(row, train_images=5, metrics={"accuracy": 1.0}) for row in rows]
    found = table(rows + few + scratch)
    assert found == table(rows)


def test_without_reptile_or_checkpoints_there_is_no_table() -> None:
    rows = made(SHIFT_WINS)
    others = [row for row in rows if row.label != "reptile"]
    assert steps_to_match_table(others, summary_table(others)) is None
    ends = [row for row in rows if row.start == FINAL]
    assert steps_to_match_table(ends, summary_table(ends)) is None
