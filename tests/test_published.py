"""Every published image experiment, at the scale that checks, on caches of random images. No network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import hub
import pytest
import torch

from trajshift import models, worker
from trajshift.cli import main
from trajshift.data.images import image_task
from trajshift.data.prepare import prepare_cache
from trajshift.data.registry import find
from trajshift.errors import UsageError
from trajshift.experiments.published import EXPERIMENTS, SCALES
from trajshift.experiments.runs import experiment_jobs, sweep_choices
from trajshift.presets import METHODS
from trajshift.rows import collect
from trajshift.rundir import RunDirectory

pytest.importorskip("datasets")
pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

PIXELS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches of all sets that the recipes name, two random images of each class for training and one for testing."""
    folder = tmp_path_factory.mktemp("published")
    with hub.offline(folder / "cache"):
        jobs = [job for name in EXPERIMENTS for job in experiment_jobs(name, seeds=1)]
        tasks = [task for job in jobs for task in [*job.recipe.tasks.values(), *job.recipe.targets.values()]]
        for name in sorted({task.source.removeprefix("cache:") for task in tasks}):
            entry = find(find(name).whole or name)
            if not (folder / "data" / entry.name).exists():
                shape = (PIXELS, PIXELS, 3)[: 2 if entry.channels == 1 else 3]
                images = hub.pictures(2 * entry.classes, shape)
                hub.repository(folder / entry.name, entry, images, images[: entry.classes])
                own = {"size": PIXELS}
                prepare_cache(entry.name, folder / "data", copy=folder / entry.name, overrides=own, quiet=True)
    x = torch.zeros(2, 3, PIXELS, PIXELS, dtype=torch.uint8)
    network = models.build("resnet18", image_task("a", (x, torch.arange(2)), outputs=2))
    torch.save(network.state_dict(), folder / "resnet18.pth")
    return folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published = EXPERIMENTS[name]
    own = ["initialization=" + str(root / "resnet18.pth")] if published.study.recipe.startswith("imagenet") else []
    words = ["experiment", name, f"data.root={root / 'data'}", "threads=1", *own]
    out = root / published.study.recipe
    words += ["--scale", "check", "--seeds", "1", "--jobs", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["trajshift", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "failed" not in said
    jobs = experiment_jobs(name, scale="check", seeds=1, overrides=[f"data.root={root / 'data'}", *own], out=out)
    rows, _ = collect([job.path for job in jobs])
    start = "initial weights" if own else "scratch"
    assert len({row["label"] for row in rows}) == len(jobs) + 1
    assert {row["target"] for row in rows if row["label"] == start} == set(jobs[0].recipe.targets)
    assert not any("error" in row for row in rows)
    if published.checkpoints:
        assert len({row["inner_steps"] for row in rows}) == 3
    if published.few_data:
        assert {row["train_images"] for row in rows if row["label"] != start} >= {4, 8}
    assert start in (out / f"{name}.html").read_text()


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("scale", SCALES)
def test_all_runs_of_an_experiment_have_equal_budgets(name: str, scale: str) -> None:
    jobs = experiment_jobs(name, scale=scale)
    assert len({job.path for job in jobs}) == len(jobs) >= 2 * 5
    assert len({job.recipe.total_steps for job in jobs}) == 1
    assert sum(job.scratch for job in jobs) == 5
    assert {job.recipe.seed for job in jobs} == set(range(5))


@pytest.mark.parametrize("scale", SCALES)
def test_experiments_share_their_runs(scale: str) -> None:
    recipes = {}
    for name in EXPERIMENTS:
        for job in experiment_jobs(name, scale=scale, seeds=1):
            assert recipes.setdefault(job.path, job.recipe) == job.recipe


def test_the_published_settings() -> None:
    steps = {name: experiment_jobs(name, seeds=1)[0].recipe.total_steps for name in EXPERIMENTS}
    assert set(steps.values()) == {200_000, 50_000}
    rates = {}
    for name in EXPERIMENTS:
        for job in experiment_jobs(name, seeds=1):
            recipe = job.recipe
            method = METHODS[recipe.method]
            assert method.name == recipe.method
            if recipe.horizon == 1000:
                every = 1 if recipe.method.endswith("shifting") else 1000
                default = min(1.0, 10 / 1000) if every == 1 else method.meta_lr
                rates[name.partition("-")[0], recipe.method] = recipe.meta_lr or default
    assert rates["images", "trajectory-shifting"] == 0.01
    assert rates["images", "reptile"] == 1
    assert rates["images", "leap"] == 0.1
    assert rates["imagenet", "trajectory-shifting"] == 0.001
    assert rates["imagenet", "reptile"] == 1
    horizons = {job.recipe.horizon for job in experiment_jobs("images-horizon", seeds=1)}
    assert horizons == {10, 100, 1000}


def test_rates_of_a_sweep_replace_the_published_ones(tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    choice = {"reptile": {"method": "reptile", "meta_lr": "3"}, "mtl": {"inner.lr": "0.1", "method": "mtl"}}
    file.write_text(json.dumps({"choice": choice}))
    tuned = sweep_choices(file)
    jobs = experiment_jobs("images-meta-train", seeds=1, tuned=tuned)
    rates = {job.recipe.method: (job.recipe.meta_lr, job.recipe.inner.lr) for job in jobs}
    assert rates["reptile"] == (3, 0.01)
    assert rates["mtl"] == (None, 0.1)
    assert rates["leap"] == (None, 0.01)
    jobs = experiment_jobs("images-horizon", seeds=1, tuned=tuned)
    reptile = {job.recipe.horizon: job.recipe.meta_lr for job in jobs if job.recipe.method == "reptile"}
    assert reptile == {10: 1, 100: 1, 1000: 3}
    for text in ("{", json.dumps({"choice": {"": {"meta_lr": "1"}}})):
        file.write_text(text)
        with pytest.raises(UsageError, match=r"sweep\.json"):
            sweep_choices(file)


def test_a_complete_run_is_fine_tuned_with_its_own_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = experiment_jobs("images-ablation", seeds=1, overrides=["threads=1"], out=tmp_path)[0]
    used = []
    monkeypatch.setattr(RunDirectory, "is_complete", lambda run, recipe: True)
    monkeypatch.setattr("trajshift.evaluate.evaluate_runs", lambda *a, **b: used.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert worker.do(json.loads(job.line()))
    finally:
        torch.set_num_threads(before)
    assert used == [1]


def test_refusals() -> None:
    with pytest.raises(UsageError, match="scale is 'smal'"):
        experiment_jobs("images-ablation", scale="smal")
    with pytest.raises(UsageError, match="seeds is 0"):
        experiment_jobs("images-ablation", seeds=0)
