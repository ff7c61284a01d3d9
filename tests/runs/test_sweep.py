"""Sweeps: what is run, what is chosen, and how far a grid is extended."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers.jobs import run_jobs_here
from trajshift.errors import UsageError
from trajshift.runs.collect_rows import read_evaluation
from trajshift.runs.job import Job
from trajshift.runs.sweep import Point, Result, beyond, choose, ends, grid_jobs, parse_grid, points_of, run_sweep
from trajshift.task import Task

PEAKS = {"reptile": 3.0, "leap": 0.02, "mtl": 0.1}
"""Of each method the rate with the best score, meta_lr or for joint training inner.lr."""

RECIPE = """
horizon: 10
rounds: 2
meta_lr: 0.5
tasks: {a: {source: "digits:upright"}}
tuning: {b: {source: "digits:parity"}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return str(tmp_path / "mine.yaml")


def score(point: Mapping[str, str]) -> float:
    """A parabola over the logarithm of the rate."""
    rate = point["inner.lr" if point["method"] == "mtl" else "meta_lr"]
    return 1 - 0.1 * math.log10(float(rate) / PEAKS[point["method"]]) ** 2


def collected(work: Mapping[Point, Job], failures: Mapping[Path, UsageError]) -> list[Result]:
    return [Result(point=point, value=score(dict(point)), seeds=1, inner_steps=20) for point in work]


def test_a_grid_is_extended_until_no_choice_lies_at_its_end(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peaks lie outside the grid on both sides; joint training climbs in its inner rate."""
    monkeypatch.setattr("trajshift.runs.sweep.run_jobs", lambda jobs, **options: {})
    monkeypatch.setattr("trajshift.runs.sweep.collect_results", collected)
    words = ["method=reptile,leap,mtl", "meta_lr=0.1,0.2,0.5", "inner.lr=0.01,0.02"]
    run_sweep(recipe, words, output=tmp_path, extend=True)
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert saved["choice"]["reptile"]["meta_lr"] in ("2", "5")  # 3 lies between them on the logarithmic scale
    assert saved["choice"]["leap"]["meta_lr"] == "0.02"
    assert (saved["choice"]["mtl"]["inner.lr"], saved["choice"]["mtl"]["meta_lr"]) == ("0.1", "null")
    tried = [result["point"] for result in saved["results"]]
    for method, field in (("reptile", "meta_lr"), ("leap", "meta_lr"), ("mtl", "inner.lr")):
        rates = sorted({float(point[field]) for point in tried if point["method"] == method})
        assert rates[0] < float(saved["choice"][method][field]) < rates[-1]
    assert (saved["recipe"], saved["horizon"]) == ("mine", 10)


def untested(name: str) -> Task:
    return Task(name=name, train=(torch.zeros(4, 3), torch.arange(4) % 2), outputs=2)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (["device=mps"], "device 'mps' is not available on this machine"),
        (["initialization=hub:resnet18"], "'hub:resnet18' names no weights"),
        ([f"tuning.b.source={__name__}:untested"], "task 'b' has no test examples"),
        (["tuning.b.source=npz:gone.npz"], "gone.npz: no such file"),
        (["tuning.b.source=npz:gone.npz", "tuning.c.source=digits:none"], "likewise digits:none"),
    ],
)
def test_what_is_missing_is_said_before_any_training(
    fields: list[str], sentence: str, recipe: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=sentence):
        run_sweep(recipe, ["meta_lr=1,2", *fields], output=tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def values_of(folder: Path) -> dict[str, float | None]:
    """The score of each run by its rate."""
    saved = json.loads((folder / "sweep.json").read_text())
    return {result["point"]["inner.lr"]: result["value"] for result in saved["results"]}


QUICK = ("horizon=4", "rounds=1", "finetune.steps=2", "output.tensorboard=false", "threads=1")


def test_finished_runs_are_scored_on_the_tasks_of_the_day(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same runs on another tuning task, then on the first one again: what was computed is found."""
    monkeypatch.setattr("trajshift.runs.sweep.run_jobs", run_jobs_here)
    run = partial(run_sweep, recipe, output=tmp_path / "out", jobs=1)
    run(["inner.lr=0.01,0.02", *QUICK])
    first = values_of(tmp_path / "out")
    run(["inner.lr=0.01,0.02", *QUICK, "tuning.b.source=digits:which-side"])
    second = values_of(tmp_path / "out")
    assert first.keys() == second.keys()
    rows = [row for path in (tmp_path / "out").glob("*lr*") for row in read_evaluation(path)]
    by_setting = {row.setting: {r.metrics["accuracy"] for r in rows if r.setting == row.setting} for row in rows}
    assert len(rows) == 4
    assert list(by_setting.values()) == [{*first.values()}, {*second.values()}]
    run(["inner.lr=0.01,0.02", *QUICK])
    assert values_of(tmp_path / "out") == first
    assert len([row for path in (tmp_path / "out").glob("*lr*") for row in read_evaluation(path)]) == 4


def test_a_run_that_diverges_was_tried_and_one_that_breaks_was_not(recipe: str, tmp_path: Path) -> None:
    words = ["inner.lr=0.01,1.0e+30", *QUICK, "model.options.batch_norm=false"]
    run_sweep(recipe, words, output=tmp_path / "out", jobs=1)
    values = values_of(tmp_path / "out")
    assert values["1.0e+30"] is None
    assert json.loads((tmp_path / "out/sweep.json").read_text())["choice"][""]["inner.lr"] == "0.01"
    (tmp_path / "out/sweep.json").unlink()
    (tmp_path / "out/inner.lr=0.01/evaluation.jsonl").write_text("garbage\n")
    with pytest.raises(
        UsageError, match=r"1 of 2 runs failed, and not because they diverged.*evaluation.jsonl is damag"
    ):
        run_sweep(recipe, words, output=tmp_path / "out", jobs=1)
    assert not (tmp_path / "out/sweep.json").exists()


def test_the_choice_of_another_sweep_is_not_replaced(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trajshift.runs.sweep.run_jobs", lambda jobs, **options: {})
    monkeypatch.setattr("trajshift.runs.sweep.collect_results", collected)
    run_sweep(recipe, ["method=reptile,leap", "meta_lr=1,2"], output=tmp_path)
    with pytest.raises(
        UsageError, match="contains the choice of a sweep over method=reptile,leap, which would be lost"
    ):
        run_sweep(recipe, ["method=reptile", "meta_lr=1,2,5"], output=tmp_path)
    run_sweep(recipe, ["method=reptile,leap", "meta_lr=1,2,5"], output=tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text())["grid"]["meta_lr"] == ["1", "2", "5"]


def test_without_extend_the_edges_are_kept(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trajshift.runs.sweep.run_jobs", lambda jobs, **options: {})
    monkeypatch.setattr("trajshift.runs.sweep.collect_results", collected)
    fixed = "targets={c: {source: 'digits:upright'}}"
    run_sweep(recipe, ["method=reptile,leap", "meta_lr=1,2,5", fixed], output=tmp_path)
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert saved["choice"]["reptile"]["meta_lr"] == "2"
    assert saved["edges"]["reptile"] == []
    assert "meta_lr=1 is the smallest tried" in saved["edges"]["leap"][0]


def test_a_seed_is_extended_with_the_others() -> None:
    grid = parse_grid(["meta_lr=0.1,0.2", "seed=0,1"])
    results = [
        Result(point=(("meta_lr", rate),), value=value, seeds=2, inner_steps=1)
        for rate, value in (("0.1", 0.5), ("0.2", 0.6))
    ]
    assert ends(results[1], results) == [("meta_lr", 1)]
    assert beyond({"": results[1]}, results, grid) == [
        (("meta_lr", "0.5"), ("seed", "0")),
        (("meta_lr", "0.5"), ("seed", "1")),
    ]


def test_joint_training_has_no_meta_lr_in_any_grid(recipe: str, tmp_path: Path) -> None:
    grid = parse_grid(["method=reptile,mtl", "meta_lr=1,2", f"data.root={tmp_path}"])
    jobs = grid_jobs(recipe, grid, points_of(grid), tmp_path)
    made = [(job.recipe.method, job.recipe.meta.lr) for job in jobs.values()]
    assert made == [("reptile", 1), ("mtl", None), ("reptile", 2)]
    # named by what differs: the folder of the data would make a name too long for the disk
    assert [job.path.name for job in jobs.values()] == [
        "meta_lr=1,method=reptile",
        "meta_lr=null,method=mtl",
        "meta_lr=2,method=reptile",
    ]
    without = parse_grid(["method=reptile,mtl"])
    assert [job.recipe.meta.lr for job in grid_jobs(recipe, without, points_of(without), tmp_path).values()] == [
        0.5,
        None,
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_result_that_is_no_number_is_never_chosen(bad: float) -> None:
    results = [
        Result(point=(("meta_lr", rate),), value=value, seeds=1, inner_steps=1)
        for rate, value in (("0.1", bad), ("0.2", -0.5), ("0.5", -0.1), ("1", bad))
    ]
    assert dict(choose(results)[""].point) == {"meta_lr": "0.5"}
    assert choose(results[:1]) == {}


def test_a_file_that_is_no_choice_of_a_sweep_is_not_replaced(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("my notes")
    with pytest.raises(UsageError, match=r"sweep\.json is not the choice of a sweep"):
        run_sweep(recipe, ["meta_lr=0.1,0.2"], output=tmp_path)
    assert (tmp_path / "sweep.json").read_text() == "my notes"
