"""`evaluate_runs`: what it computes, what it finds again, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trajshift.errors import UsageError
from trajshift.evaluation.comparison import summary_table
from trajshift.evaluation.evaluate import evaluate
from trajshift.evaluation.evaluation_row import FINAL, INITIAL_WEIGHTS, SCRATCH
from trajshift.evaluation.finetuning import finetune
from trajshift.learners.initialization import Initialization
from trajshift.recipes.build_tasks import build_tasks
from trajshift.recipes.build_trainer import build_trainer, finetune_options, model_factory
from trajshift.recipes.recipe import Recipe, load, to_yaml
from trajshift.runs import evaluation_rows as saved
from trajshift.runs.evaluate_runs import evaluate_runs
from trajshift.runs.evaluation_rows import collect
from trajshift.training import checkpoint

RECIPE = """
horizon: 50
rounds: 8
batch_size: 8
threads: 1
model: {name: conv, options: {width: 3, depth: 1}}
tasks: {upright: {source: "digits:upright"}}
targets:
  six-to-nine: {source: "digits:six-to-nine"}
  digit-and-turn: {source: "digits:digit-and-turn"}
finetune: {steps: 2, batch_size: 8, lr: 0.1, train_images: 12}
"""


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    file = folder / "recipe-of-tests.yaml"
    file.write_text(RECIPE)
    return load(file, overrides)


def phi_of(recipe: Recipe, draw: int) -> Initialization:
    torch.manual_seed(draw)
    module = model_factory(recipe)(build_tasks(recipe, ["upright"])["upright"])
    tensors = {name: p.detach().clone() for name, p in module.named_parameters() if not name.startswith("fc")}
    return Initialization(tensors, {"heads": ["fc"]})


def make_run(folder: Path, name: str, *overrides: str, finished: bool = True) -> Path:
    recipe = recipe_of(folder, *overrides)
    path = folder / name
    path.mkdir()
    (path / "recipe.yaml").write_text(to_yaml(recipe))
    (path / "metrics.jsonl").write_text('{"step": 400, "inner_steps": 800, "tasks": {}}\n')
    if finished:
        phi_of(recipe, len(name)).save(path / "initialization.safetensors")
    return path


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Fine-tunings computed since the last call."""
    import trajshift.runs.evaluate_runs as module

    made: list[Any] = []
    original = module.finetuned_row

    def spy(*arguments: Any) -> Any:
        made.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(module, "finetuned_row", spy)

    def calls() -> int:
        number = len(made)
        made.clear()
        return number

    return calls


def test_rows_hold_what_finetune_gives(tmp_path: Path) -> None:
    path = make_run(tmp_path, "a", "method=reptile", "seed=3")
    rows = evaluate_runs([path])
    assert [row.target for row in rows] == ["six-to-nine", "digit-and-turn"]
    recipe = load(path)
    task = build_tasks(recipe, ["digit-and-turn"])["digit-and-turn"]
    tuned = finetune(phi_of(recipe, 1), task, **finetune_options(recipe))
    row = rows[1]
    assert row.metrics == tuned.metrics
    wanted = {"start": FINAL, "inner_steps": 800, "method": "reptile", "label": "reptile", "seed": 3}
    wanted |= {"train_images": 12, "images": 12, "steps": 2, "run": "a", "section": "targets"}
    assert {name: getattr(row, name) for name in wanted} == wanted
    lines = [json.loads(line) for line in (path / "evaluation.jsonl").read_text().splitlines()]
    assert [line["accuracy"] for line in lines] == [row.metrics["accuracy"] for row in rows]
    assert "run" not in lines[0]


def test_an_evaluation_cut_short_goes_on_where_it_stopped(tmp_path: Path, count: Callable[[], int]) -> None:
    path = make_run(tmp_path, "a")
    first = evaluate_runs([path])
    assert count() == 2
    file = path / "evaluation.jsonl"
    whole = file.read_text()
    assert evaluate_runs([path]) == first
    assert count() == 0
    file.write_text(whole[: -len(whole.splitlines()[-1]) // 2])  # killed within the second row
    assert evaluate_runs([path]) == first
    assert count() == 1
    assert file.read_text() == whole


def test_other_settings_sizes_or_a_longer_run_are_computed_anew(tmp_path: Path, count: Callable[[], int]) -> None:
    path = make_run(tmp_path, "a")
    evaluate_runs([path])
    evaluate_runs([path], overrides=["finetune.lr=0.01"])
    evaluate_runs([path], train_images=[5, 12, None])
    # Twice two targets, then sizes 5 and all: 12 is there.
    assert count() == 2 + 2 + 4
    evaluate_runs([path], overrides=["output.log_every=7", "rounds=9", "data.root=/else"])
    assert count() == 0
    phi_of(load(path), 77).save(path / "initialization.safetensors")
    _, notes = saved.collect([path])
    assert "8 saved results are left out" in notes[0]
    rows = evaluate_runs([path])
    assert count() == 2
    collected, _ = saved.collect([path])
    assert collected == rows


def test_scratch_once_per_seed_for_all_runs(tmp_path: Path, count: Callable[[], int]) -> None:
    paths = [
        make_run(tmp_path, "a", "method=reptile"),
        make_run(tmp_path, "bb", "method=trajectory-shifting"),
        make_run(tmp_path, "ccc", "method=reptile", "seed=1"),
    ]
    rows = evaluate_runs(paths, scratch=True)
    assert count() == 2 * (3 + 2)
    scratch = [row for row in rows if row.start == SCRATCH]
    assert [row.seed for row in scratch] == [0, 0, 1, 1]
    assert {row.label for row in scratch} == {"scratch"}
    assert {row.inner_steps for row in scratch} == {0}
    evaluate_runs([*reversed(paths)], scratch=True)
    assert count() == 0
    collected, notes = saved.collect(paths)
    assert notes == []
    assert summary_table(collected, train_images=12) == summary_table(rows, train_images=12)
    reptile = next(line for line in summary_table(rows, train_images=12).lines if line.label == "reptile")
    assert reptile.seeds == (0, 1)


def test_checkpoints_with_their_inner_steps(tmp_path: Path, count: Callable[[], int]) -> None:
    changes = ["method=accurate", "horizon=2", "rounds=2", "train_on=[upright]", "meta_lr=0.5"]
    path = make_run(tmp_path, "a", *changes, finished=False)
    with pytest.raises(UsageError, match=r"not finished.*--resume"):
        evaluate_runs([path])
    recipe = load(path)
    trainer = build_trainer(recipe)
    phis = {}
    for event in trainer:
        if event.step in (2, 4):
            checkpoint.save(path / "checkpoints", trainer.meta_step)
            phis[event.step] = trainer.initialization
    rows = evaluate_runs([path], checkpoints=True)
    # Each round of two steps replays its first step once.
    assert [(row.start.step, row.inner_steps) for row in rows[::2]] == [(2, 3), (4, 6)]
    task = build_tasks(recipe, ["six-to-nine"])["six-to-nine"]
    for place, phi in enumerate(phis.values()):
        assert rows[2 * place].metrics["loss"] == finetune(phi, task, **finetune_options(recipe)).metrics["loss"]
    assert rows[0].metrics["loss"] != rows[2].metrics["loss"]
    evaluate_runs([path], checkpoints=True)
    assert count() == 4
    (path / "checkpoints" / "000000002" / "shared.safetensors").write_bytes(b"damaged")
    (path / "evaluation.jsonl").unlink()
    with pytest.raises(UsageError, match=r"damaged: shared\.safetensors"):
        evaluate_runs([path], checkpoints=True)


def test_tuning_tasks_stay_apart_from_targets(tmp_path: Path) -> None:
    path = make_run(tmp_path, "a", 'tuning.held={source: "digits:digit-and-side"}')
    tuning = evaluate_runs([path], targets="tuning")
    targets = evaluate_runs([path])
    assert [row.target for row in tuning] == ["held"]
    assert saved.collect([path])[0] == targets
    assert saved.collect([path], "tuning")[0] == tuning


def test_a_diverging_fine_tuning_is_a_row_with_its_error(tmp_path: Path) -> None:
    path = make_run(tmp_path, "a")
    phi = phi_of(load(path), 1)
    bad = {name: torch.full_like(tensor, float("nan")) for name, tensor in phi.items()}
    Initialization(bad, phi.about).save(path / "initialization.safetensors")
    rows = evaluate_runs([path])
    assert all("the loss at step 1 is nan" in str(row.error) for row in rows)
    assert summary_table(rows, train_images=12).lines[0].average is None


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run directory was given"):
        evaluate_runs([])
    with pytest.raises(UsageError, match=r"without recipe\.yaml"):
        evaluate_runs([tmp_path])
    path = make_run(tmp_path, "a")
    with pytest.raises(UsageError, match="did you mean 'targets'"):
        evaluate_runs([path], targets="target")
    with pytest.raises(UsageError, match="no tasks under tuning"):
        evaluate_runs([path], targets="tuning")


def test_evaluate_in_memory_over_targets_seeds_and_methods(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    targets = build_tasks(recipe, ["six-to-nine", "digit-and-turn"])
    options = {key: value for key, value in finetune_options(recipe).items() if key not in ("seed", "train_images")}
    starts = {"mine": {seed: phi_of(recipe, seed) for seed in (0, 1)}, "scratch": dict.fromkeys((0, 1))}
    seen: list[tuple[int, int, str]] = []
    rows = evaluate(starts, targets, progress=lambda *what: seen.append(what), **options)
    assert len(rows) == len(seen) == 8
    assert seen[0] == (0, 8, "mine seed 0 on six-to-nine")
    summary = summary_table(rows)
    assert [line.label for line in summary.lines] == ["mine", "scratch"]
    assert summary.tests[0].count == 2


def test_without_meta_training_a_run_starts_from_its_initial_weights(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    phi_of(recipe_of(tmp_path), 3).save(weights)
    runs = [make_run(tmp_path, name, f"initialization={weights}", f"method={name}") for name in ("reptile", "leap")]
    phi_of(recipe_of(tmp_path), 3).save(runs[0] / "initialization.safetensors")  # has learned nothing
    rows = evaluate_runs(runs, scratch=True)
    start = [row for row in rows if row.start == INITIAL_WEIGHTS]
    assert [(row.label, row.method, row.inner_steps) for row in start] == [
        ("initial weights", "initial weights", 0)
    ] * 2
    unmoved = {row.target: row.metrics["accuracy"] for row in rows if row.label == "reptile"}
    assert {row.target: row.metrics["accuracy"] for row in start} == unmoved
    collected, _ = collect(runs)
    assert sorted(map(str, collected)) == sorted(map(str, rows))
    assert [line.label for line in summary_table(collected, train_images=12).lines] == [
        "reptile",
        "leap",
        "initial weights",
    ]
    assert evaluate_runs(runs, scratch=True) == rows
