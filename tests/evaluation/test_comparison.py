"""Statistics, tables and the saved rows, against scipy, published numbers and worked examples."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from trajshift.errors import UsageError
from trajshift.evaluation.comparison import (
    curves,
    pick_metric,
    summary_table,
    summary_tables,
)
from trajshift.evaluation.evaluation_row import FINAL, INITIAL_WEIGHTS, SCRATCH, EvaluationRow, StartingPoint
from trajshift.evaluation.statistics import compare, holm, interval, paired_test
from trajshift.runs.collect_rows import read_evaluation
from trajshift.runs.labels import label_runs
from trajshift.utils.files import append_row, read_jsonl

# -- statistics --------------------------------------------------------------------------------------------------

# Student (1908), "The probable error of a mean": additional hours of sleep under two drugs, ten patients. The paired
# comparison is the example of R's t.test: t = -4.0621, df = 9, p = 0.002833, 95% interval -2.4598858 to -0.7001142.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_interval_equals_the_printed_quantile() -> None:
    # t(0.975, 4) = 2.776 in every table; mean 3, s = sqrt(2.5).
    estimate = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert estimate.mean == 3.0
    assert estimate.half_width == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=2e-4)
    # Two degrees of freedom have a closed form: t(p) = (2p - 1) sqrt(2 / (4 p (1 - p))).
    p = 0.975
    closed = (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    three = interval([1.0, 2.0, 6.0])
    assert three.half_width == pytest.approx(closed * np.std([1, 2, 6], ddof=1) / math.sqrt(3), rel=1e-12)


def test_interval_equals_scipy() -> None:
    values = np.random.default_rng(0).normal(size=7)
    low, high = stats.t.interval(0.9, 6, loc=values.mean(), scale=stats.sem(values))
    estimate = interval(list(values), confidence=0.9)
    assert (estimate.low, estimate.high) == (pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12))


def test_one_seed_has_no_interval_and_none_is_refused() -> None:
    assert interval([0.7]) == interval([0.7])
    assert interval([0.7]).half_width is None
    assert interval([0.7]).low is None
    with pytest.raises(UsageError, match="at least one value"):
        interval([])
    with pytest.raises(UsageError, match="finite"):
        interval([0.1, math.nan])


def test_paired_test_equals_the_published_sleep_example() -> None:
    test = paired_test(dict(enumerate(DRUG_1)), dict(enumerate(DRUG_2)))
    assert test.t == pytest.approx(-4.0621, abs=5e-5)
    assert test.p == pytest.approx(0.002833, abs=5e-7)
    assert test.difference is not None
    assert test.difference.low == pytest.approx(-2.4598858, abs=5e-8)
    assert test.difference.high == pytest.approx(-0.7001142, abs=5e-8)
    reference = stats.ttest_rel(DRUG_1, DRUG_2)
    assert (test.t, test.p) == (pytest.approx(reference.statistic), pytest.approx(reference.pvalue))


def test_paired_test_takes_common_seeds_only() -> None:
    test = paired_test({0: 1.0, 1: 2.0, 2: 4.0, 9: 100.0}, {2: 1.0, 1: 1.5, 0: 0.0, 7: -100.0})
    reference = stats.ttest_rel([1.0, 2.0, 4.0], [0.0, 1.5, 1.0])
    assert (test.count, test.p) == (3, pytest.approx(reference.pvalue))


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({5: 1.0}, "no seed in common"),
        ({0: 0.5}, "one seed in common"),
        ({0: 0.5, 1: 1.5, 2: 2.5}, "same at every seed"),
    ],
)
def test_pairs_without_a_test_say_why(second: dict[int, float], reason: str) -> None:
    test = paired_test({0: 1.0, 1: 2.0, 2: 3.0}, second)
    assert test.p is None
    assert reason in str(test.reason)


def test_equal_methods_have_p_one() -> None:
    same = {0: 0.1, 1: 0.2, 2: 0.4}
    assert paired_test(same, dict(same)).p == 1.0


def test_holm_worked_example() -> None:
    # Holm (1979) by hand: 0.01 * 4, 0.03 * 2 after 0.02 * 3 = 0.06 (kept monotone), 0.04 * 1 raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(UsageError, match="between 0 and 1"):
        holm([1.5])


def test_holm_rejects_exactly_what_the_step_down_rule_rejects() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        p = rng.uniform(size=6) ** 3
        rejected, alive = np.zeros(6, dtype=bool), True
        for rank, index in enumerate(np.argsort(p)):
            alive = alive and p[index] <= 0.05 / (6 - rank)
            rejected[index] = alive
        assert (np.array(holm(list(p))) <= 0.05).tolist() == rejected.tolist()


def test_compare_corrects_one_family_and_leaves_untestable_pairs_out() -> None:
    rng = np.random.default_rng(2)
    values = {name: dict(enumerate(rng.normal(size=5))) for name in "abc"} | {"d": {77: 1.0}}
    tests = {(t.first, t.second): t for t in compare(values)}
    assert len(tests) == 6
    testable = [t for t in tests.values() if t.p is not None]
    assert len(testable) == 3
    assert [t.p_holm for t in testable] == pytest.approx(holm([t.p for t in testable if t.p is not None]))
    assert tests["a", "d"].p_holm is None
    assert [(t.first, t.second) for t in compare(values, reference="b")] == [("b", "a"), ("b", "c"), ("b", "d")]
    with pytest.raises(UsageError, match="no method 'z'"):
        compare(values, reference="z")


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert interval([1.0]).mean == 1.0
    with pytest.raises(UsageError, match=r"trajshift\[report\]"):
        interval([1.0, 2.0])


# -- tables ------------------------------------------------------------------------------------------------------


def row(label: str, seed: int, target: str, accuracy: float | None, **more: Any) -> EvaluationRow:
    base = {
        "checkpoint": "scratch" if label == "scratch" else "initialization",
        "inner_steps": 0 if label == "scratch" else 2000,
        "method": label,
        "label": label,
        "seed": seed,
        "target": target,
        "train_images": None,
        "images": 100,
        "steps": 300,
        "setting": f"s-{target}",
    }
    result = (
        {"error": "the loss at step 3 is nan"} if accuracy is None else {"accuracy": accuracy, "loss": 1 - accuracy}
    )
    return EvaluationRow.from_json(base | result | more)


def changed(row: EvaluationRow, **more: Any) -> EvaluationRow:
    """The row with other fields, by their names in the file."""
    return EvaluationRow.from_json(row.to_json() | more)


def table(values: dict[str, dict[str, list[float | None]]]) -> list[EvaluationRow]:
    return [
        row(label, seed, target, value)
        for label, targets in values.items()
        for target, by_seed in targets.items()
        for seed, value in enumerate(by_seed)
    ]


VALUES: dict[str, dict[str, list[float | None]]] = {
    "shift": {"cars": [0.50, 0.55, 0.60], "birds": [0.30, 0.31, 0.35]},
    "reptile": {"cars": [0.40, 0.52, 0.50], "birds": [0.30, 0.28, 0.31]},
    "scratch": {"cars": [0.20, 0.22, 0.21], "birds": [0.10, 0.12, 0.14]},
}


def test_targets_are_averaged_within_a_seed_before_interval_and_test() -> None:
    summary = summary_table(table(VALUES))
    shift, reptile = ([0.40, 0.43, 0.475], [0.35, 0.40, 0.405])
    line = summary.lines[0]
    assert line.average is not None
    low, high = stats.t.interval(0.95, 2, loc=np.mean(shift), scale=stats.sem(shift))
    assert (line.average.low, line.average.high) == (pytest.approx(low), pytest.approx(high))
    assert line.average.count == 3  # seeds, not seeds x targets
    test = next(t for t in summary.tests if (t.first, t.second) == ("shift", "reptile"))
    assert test.p == pytest.approx(stats.ttest_rel(shift, reptile).pvalue)
    assert test.count == 3
    assert len(summary.tests) == 3
    assert [line.label for line in summary.lines] == ["shift", "reptile", "scratch"]


def test_text_of_the_table() -> None:
    summary = summary_table(table(VALUES))
    assert summary.header() == ["method", "cars", "birds", "average", "seeds", "inner steps"]
    assert summary.cells()[0] == ["shift", "55.00 ± 12.42", "32.00 ± 6.57", "43.50 ± 9.38", "3", "2,000"]
    assert [len(cells) for cells in summary.test_cells()] == [len(summary.test_header())] * 3
    assert summary.title == "test accuracy in % after 300 fine-tuning steps with all training images per target"


def test_one_seed_is_shown_without_interval_and_said_so() -> None:
    summary = summary_table([r for r in table(VALUES) if r.seed == 0])
    assert summary.cells()[0][1] == "50.00"
    assert all(test.p is None for test in summary.tests)
    assert any("one seed" in note for note in summary.notes)


def test_an_incomplete_seed_leaves_the_average_and_a_failure_all_of_it() -> None:
    rows = [r for r in table(VALUES) if (r.label, r.seed, r.target) != ("shift", 2, "birds")]
    summary = summary_table(rows)
    assert summary.lines[0].seeds == (0, 1)
    assert summary.lines[0].targets["cars"].count == 3
    assert any("lacks targets at seed 2" in note for note in summary.notes)
    failed = table(VALUES | {"reptile": {"cars": [0.4, None, 0.5], "birds": [0.30, 0.28, 0.31]}})
    summary = summary_table(failed)
    reptile = summary.lines[1]
    assert reptile.average is None
    assert "cars" not in reptile.targets
    assert reptile.targets["birds"].count == 3
    assert any("reptile failed on cars at seed 1" in note for note in summary.notes)
    assert [(t.first, t.second) for t in summary.tests] == [("shift", "scratch")]


def test_unlike_settings_and_budgets_are_said() -> None:
    rows = [changed(r, setting="other", inner_steps=999) if r.label == "reptile" else r for r in table(VALUES)]
    notes = " ".join(summary_table(rows).notes)
    assert "not like for like" in notes
    assert "unequal budgets of 999 and 2,000" in notes


def test_two_results_for_one_seed_are_refused() -> None:
    with pytest.raises(UsageError, match="two results at seed 0 on cars"):
        summary_table([*table(VALUES), row("shift", 0, "cars", 0.9)])


def test_no_rows_and_metrics() -> None:
    with pytest.raises(UsageError, match="train_images=10"):
        summary_table(table(VALUES), train_images=10)
    with_metrics = [
        replace(row("shift", 0, "cars", 0.5), metrics=metrics)
        for metrics in ({"mse": 1.0, "loss": 1.0}, {"mse": 2.0, "loss": 2.0}, {"accuracy": 0.5, "loss": 2.0})
    ]
    assert pick_metric(with_metrics[:2]) == "mse"
    assert pick_metric(with_metrics[::2]) == "loss"


def test_tables_by_size_and_few_data_curve() -> None:
    sizes = [
        changed(r, train_images=n, images=n, accuracy=r.metrics["accuracy"] * n / 100)
        for r in table(VALUES)
        for n in (10, 50)
    ]
    rows = [*sizes, *table(VALUES)]
    assert [summary.train_images for summary in summary_tables(rows)] == [None, 50, 10]
    curve = curves([(r.images, r) for r in rows], metric="accuracy", target="cars")[0]
    assert curve.x == (10.0, 50.0, 100.0)
    assert [point.mean for point in curve.y] == pytest.approx([0.055, 0.275, 0.55])
    assert curves([(r.train_images, r) for r in rows], metric="accuracy")[0].x == (10.0, 50.0)


def test_curve_against_inner_steps_averages_within_seeds_and_needs_all_targets() -> None:
    early = [changed(r, checkpoint=500, inner_steps=500, accuracy=r.metrics["accuracy"] / 2) for r in table(VALUES)]
    early = [r for r in early if (r.seed, r.target) != (2, "cars")]
    curve = curves([(r.inner_steps, r) for r in [*early, *table(VALUES)]], metric="accuracy")[0]
    assert curve.x == (500.0, 2000.0)
    assert [point.count for point in curve.y] == [2, 3]
    assert curve.y[0].mean == pytest.approx((0.40 + 0.43) / 4)


def test_a_failed_fine_tuning_leaves_a_gap_in_the_curve_as_in_the_table() -> None:
    """The other seeds alone would flatter the method."""
    early = [changed(r, checkpoint=500, inner_steps=500) for r in table({"shift": {"cars": [0.5, None, 0.6]}})]
    late = table({"shift": {"cars": [0.7, 0.8, 0.9]}})
    (curve,) = curves([(r.inner_steps, r) for r in [*early, *late]], metric="accuracy")
    assert curve.x == (2000.0,)
    assert curve.y[0].mean == pytest.approx(0.8)


def test_labels_name_what_sets_runs_apart() -> None:
    base = {"method": "reptile", "meta_lr": 1.0, "seed": 0, "output.name": "a", "tasks.mnist.flip": False}
    runs = {
        "a": base,
        "b": base | {"seed": 1, "output.name": "b", "data.root": "/else"},
        "c": base | {"meta_lr": 3.0},
        "d": base | {"method": "mtl", "tasks.svhn.flip": False},
    }
    assert label_runs(runs) == {
        "a": "reptile meta_lr=1",
        "b": "reptile meta_lr=1",
        "c": "reptile meta_lr=3",
        "d": "mtl",
    }
    fewer = {"a": base | {"tasks.svhn.flip": True}, "b": base}
    assert label_runs(fewer) == {"a": "reptile tasks=mnist+svhn", "b": "reptile tasks=mnist"}


# -- saved rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [SCRATCH, INITIAL_WEIGHTS, FINAL, StartingPoint.at_step(5)])
@pytest.mark.parametrize("accuracy", [0.5, None])
def test_a_row_comes_back_from_json(start: StartingPoint, accuracy: float | None) -> None:
    made = replace(row("shift", 3, "cars", accuracy), start=start, phi="0ccd")
    saved = json.loads(json.dumps(made.to_json()))
    assert EvaluationRow.from_json(saved) == made
    assert EvaluationRow.from_json(saved).to_json() == saved
    assert (saved["checkpoint"] == 5) == (start.step == 5)
    assert start.is_meta_trained == (start not in (SCRATCH, INITIAL_WEIGHTS))


def test_rows_of_version_0_1_keep_their_keys_and_their_order() -> None:
    files = list((Path(__file__).parents[1] / "data" / "run-0.1").rglob("evaluation.jsonl"))
    assert len(files) == 4
    for file in files:
        lines = file.read_text().splitlines()
        assert [json.dumps(row.to_json()) for row in read_evaluation(file.parent)] == lines


def test_a_half_written_last_line_is_left_out_and_then_cut(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.jsonl"
    assert read_evaluation(tmp_path) == []
    append_row(file, {"a": 1})
    with open(file, "a") as stream:
        stream.write('{"a": 2, "b"')
    assert read_jsonl(file) == [{"a": 1}]
    append_row(file, {"a": 3})
    assert read_jsonl(file) == [{"a": 1}, {"a": 3}]
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"a": 1}, {"a": 3}]


def append_many(file: Path, writer: int) -> None:
    for number in range(200):
        append_row(file, {"writer": writer, "number": number})


def test_two_commands_may_add_rows_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_many, args=(tmp_path / "rows.jsonl", writer)) for writer in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert sorted((row["writer"], row["number"]) for row in rows) == [(w, n) for w in range(2) for n in range(200)]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"a"', "line 2: .*delimiter"),
        ("5", "line 2 is not a mapping"),
        ("{}", "checkpoint in line 2 is None"),
        ("UNKNOWN", "line 2: checkpoint 'none' is not a starting point"),
    ],
)
def test_damage_inside_is_named(tmp_path: Path, line: str, word: str) -> None:
    good = '{"checkpoint": 5, "target": "a", "steps": 1, "seed": 0, "inner_steps": 5, "method": "mtl"}'
    line = line.replace("UNKNOWN", good.replace("5,", '"none",', 1))
    file = tmp_path / "evaluation.jsonl"
    file.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UsageError, match=rf"evaluation\.jsonl is damaged \(.*{word}"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_no_number_is_a_failure_with_a_name(bad: float) -> None:
    """One NaN stopped every table; now its row is a failed fine-tuning, and the others are compared as before."""

    def row(seed: int, target: str, mse: float) -> EvaluationRow:
        metrics = {"mse": mse, "loss": mse}
        return EvaluationRow(
            start=FINAL, inner_steps=1, method="m", label="m", seed=seed, target=target, steps=3, metrics=metrics
        )

    rows = [row(0, "a", 1.0), row(1, "a", 3.0), row(0, "b", bad)]
    assert rows[2].metrics == {}
    assert "test mse of 'b'" in str(rows[2].error)
    assert EvaluationRow.from_json(rows[2].to_json()) == rows[2]
    summary = summary_table(rows)
    assert summary.lines[0].targets["a"].mean == 2.0
    assert "b" not in summary.lines[0].targets
    assert any("b" in note for note in summary.notes)
