"""Every published image experiment, at the scale that checks, on caches of random images. No network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import hub
from tests.helpers.jobs import run_jobs_here
from trajshift import models
from trajshift.algorithm.methods import METHODS
from trajshift.cli.main import main
from trajshift.data.augmentation import image_task
from trajshift.data.cache_writer import prepare_cache
from trajshift.data.registry import find
from trajshift.errors import UsageError
from trajshift.experiments.images.catalogue import EXPERIMENTS, SCALES
from trajshift.experiments.images.run import experiment_jobs, run_published
from trajshift.experiments.images.tuned_rates import read_tuned
from trajshift.runs import worker
from trajshift.runs.collect_rows import collect
from trajshift.runs.directory import RunDirectory
from trajshift.runs.job import Job

pytest.importorskip("datasets")
pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.usefixtures("undrawn")
PIXELS = 8
WIDTH = 2


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
    network = models.build_model("resnet20", image_task("a", (x, torch.arange(2)), outputs=2), width=WIDTH)
    torch.save(network.state_dict(), folder / "weights.pth")
    return folder


def small(root: Path, recipe: str) -> list[str]:
    """What makes a recipe's network small, and its weights those of the fixture where it starts from some."""
    words = [f"data.root={root / 'data'}", "threads=1", f"model={{name: resnet20, options: {{width: {WIDTH}}}}}"]
    return words + ([f"initialization={root / 'weights.pth'}"] if recipe.startswith("imagenet") else [])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published = EXPERIMENTS[name]
    recipe = published.study.recipe
    words = ["experiment", name, *small(root, recipe)]
    out = root / recipe
    words += ["--scale", "check", "--seeds", "1", "--jobs", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["trajshift", *words])
    if name != "images-ablation":  # which has a process of its own, as all have outside tests
        monkeypatch.setattr("trajshift.experiments.images.run.run_jobs", run_jobs_here)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "failed" not in said
    jobs = experiment_jobs(name, scale="check", seeds=1, overrides=small(root, recipe), out=out)
    rows, _ = collect([job.path for job in jobs])
    start = "initial weights" if recipe.startswith("imagenet") else "scratch"
    assert len({row.label for row in rows}) == len(jobs) + 1
    assert {row.target for row in rows if row.label == start} == set(jobs[0].recipe.targets)
    assert not any(row.error for row in rows)
    if published.checkpoints:
        assert len({row.inner_steps for row in rows}) == 3
    if published.few_data:
        assert {row.train_images for row in rows if row.label != start} >= {4, 8}
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
    runs = 0
    for name in EXPERIMENTS:
        for job in experiment_jobs(name, scale=scale, seeds=1):
            runs += 1
            assert recipes.setdefault(job.path, job.recipe) == job.recipe
    # shifting and Reptile serve all four of section 4.2 and both of 4.3, Leap and FOMAML++ two
    assert runs - len(recipes) == 3 * 2 + 2 + 2


def test_the_published_settings() -> None:
    steps = {name: experiment_jobs(name, seeds=1)[0].recipe.total_steps for name in EXPERIMENTS}
    assert set(steps.values()) == {200_000, 50_000}
    rates = {}
    for name in EXPERIMENTS:
        for job in experiment_jobs(name, seeds=1):
            recipe = job.recipe
            method = METHODS[recipe.method]
            if recipe.horizon == 1000 and not method.joint:
                default = method.default_meta_lr(recipe.horizon, method.meta_every or 1)
                rates[name.partition("-")[0], recipe.method] = recipe.meta.lr or default
    assert rates["images", "trajectory-shifting"] == 0.01
    assert rates["images", "reptile"] == 1
    assert rates["images", "leap"] == 0.1
    assert rates["imagenet", "trajectory-shifting"] == 0.001
    assert rates["imagenet", "reptile"] == 1
    horizons = {job.recipe.horizon for job in experiment_jobs("images-horizon", seeds=1)}
    assert horizons == {10, 100, 1000}


def swept(file: Path, choice: dict[str, dict[str, str]], **parts: object) -> Path:
    """A sweep.json."""
    summary = {"recipe": "images-meta-train", "horizon": 1000, "choice": choice, "edges": {}, **parts}
    file.write_text(json.dumps(summary))
    return file


def test_rates_of_sweeps_replace_the_published_ones(tmp_path: Path) -> None:
    """Rates alone: the budget of the sweep stays with the sweep."""
    reptile = {"reptile": {"method": "reptile", "meta_lr": "3", "rounds": "2", "finetune.steps": "5"}}
    joint = {"mtl": {"inner.lr": "0.1", "method": "mtl", "meta_lr": "null"}}
    files = [
        swept(tmp_path / "a", reptile),
        swept(tmp_path / "b", joint, edges={"mtl": ["inner.lr=0.1 is the largest"]}),
    ]
    tuned = read_tuned(files, "images-meta-train", 1000)
    assert [note.partition(":")[0] for note in tuned.notes] == ["mtl"]
    jobs = experiment_jobs("images-meta-train", seeds=1, tuned=tuned)
    rates = {job.recipe.method: (job.recipe.meta.lr, job.recipe.inner.lr) for job in jobs}
    assert rates["reptile"] == (3, 0.01)
    assert rates["mtl"] == (None, 0.1)
    assert rates["leap"] == (None, 0.01)
    assert {(job.recipe.rounds, job.recipe.finetune.steps) for job in jobs} == {(200, 1000)}
    jobs = experiment_jobs("images-horizon", seeds=1, tuned=tuned)
    by_horizon = {job.recipe.horizon: job.recipe.meta.lr for job in jobs if job.recipe.method == "reptile"}
    assert by_horizon == {10: 1, 100: 1, 1000: 3}


@pytest.mark.parametrize(
    ("choice", "parts", "word"),
    [
        ({"": {"meta_lr": "1"}}, {}, "no choice for each method"),
        ({"reptile": 3}, {}, "not a readable"),
        ([1], {}, "not a readable"),
        ({"reptile": {"meta_lr": "1"}}, {"edges": []}, "not a readable"),
        ({"reptile": {"meta_lr": "1"}}, {"edges": {"reptile": 3}}, "not a readable"),
        ({"reptile": {"meta_lr": "1"}}, {"recipe": "digits"}, "sweep of recipe 'digits'"),
        ({"reptile": {"meta_lr": "1"}}, {"horizon": 200}, "at horizon 200"),
        ({"reptile": {"meta_lr": "1", "horizon": "20"}}, {}, "at horizon 20"),
    ],
)
def test_a_sweep_that_does_not_fit_is_refused(
    tmp_path: Path, choice: dict[str, dict[str, str]], parts: dict[str, object], word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        read_tuned([swept(tmp_path / "sweep.json", choice, **parts)], "images-meta-train", 1000)


def test_images_horizon_takes_a_sweep_at_the_horizon_of_its_scale(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Job] = []

    def stop(jobs: Sequence[Job], **options: Any) -> dict[Path, str]:
        made.extend(jobs)
        raise UsageError("stopped")

    monkeypatch.setattr("trajshift.experiments.images.run.run_jobs", stop)
    run = partial(run_published, "images-horizon", scale="check", seeds=1, out=tmp_path / "out")
    choice = {"reptile": {"meta_lr": "3"}}
    with pytest.raises(UsageError, match="stopped"):
        run(tuned=[swept(tmp_path / "two", choice, horizon=2)])
    assert {job.recipe.horizon: job.recipe.meta.lr for job in made if job.recipe.method == "reptile"} == {
        1: 1,
        2: 3,
        4: 1,
    }
    with pytest.raises(UsageError, match="at horizon 1, and this scale has 2"):
        run(tuned=[swept(tmp_path / "one", choice, horizon=1)])


def test_two_sweeps_of_one_method_are_refused(tmp_path: Path) -> None:
    file = swept(tmp_path / "sweep.json", {"reptile": {"meta_lr": "1"}})
    with pytest.raises(UsageError, match="leave one of them out"):
        read_tuned([file, file], "images-meta-train", 1000)


def test_a_complete_run_is_fine_tuned_with_its_own_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = experiment_jobs("images-ablation", seeds=1, overrides=["threads=1"], out=tmp_path)[0]
    used = []
    monkeypatch.setattr(RunDirectory, "is_complete", lambda run, recipe: True)
    monkeypatch.setattr(RunDirectory, "adopt", lambda run, recipe: None)
    monkeypatch.setattr(
        "trajshift.runs.evaluate_runs.evaluate_runs", lambda *a, **b: used.append(torch.get_num_threads())
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        sent = Job.from_line(job.to_line())
        assert sent == job
        assert worker.do(sent)
    finally:
        torch.set_num_threads(before)
    assert used == [1]


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("images-ablation", {"scale": "smal"}, "scale is 'smal'"),
        ("images-ablation", {"seeds": 0}, "seeds is 0"),
        ("images-ablation", {"overrides": ["seed=7"]}, "use --seeds N"),
        ("images-ablation", {"overrides": ["output.name=a"]}, "use --out DIR"),
        ("images-ablation", {"overrides": ["method=reptile"]}, "set method themselves"),
        ("images-ablation", {"overrides": ["meta_lr=1"]}, "rates with --tuned"),
        ("images-horizon", {"overrides": ["rounds=4"]}, "set rounds themselves"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        experiment_jobs(name, **options)


def test_missing_caches_are_named_before_any_training(root: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for cache in (root / "data").iterdir():
        if cache.name not in ("stl10", "quickdraw"):
            (data / cache.name).symlink_to(cache)
    with pytest.raises(UsageError, match=r"no cache of 'quickdraw'.*likewise cache:stl10"):
        run_published("images-ablation", scale="check", seeds=1, overrides=[f"data.root={data}"], out=tmp_path / "out")
    assert not list(tmp_path.glob("out/*seed0"))


def test_full_scale_wants_caches_of_the_registered_sizes(root: Path, tmp_path: Path) -> None:
    run = partial(run_published, "images-ablation", overrides=[f"data.root={root / 'data'}"], seeds=1)
    with pytest.raises(UsageError, match=r"tinyimagenet has images of 8 pixels, but --scale full .* registered 64"):
        run(out=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_what_compares_unequally_is_noted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Methods that were not tuned beside those that were, and caches with other counts than the registered ones."""

    def stop(jobs: Sequence[Job], **options: Any) -> dict[Path, str]:
        raise UsageError("stopped")

    monkeypatch.setattr("trajshift.experiments.images.run.run_jobs", stop)
    words = [f"data.root={root / 'data'}", f"data.size={PIXELS}"]
    run = partial(run_published, "images-ablation", overrides=words, seeds=1, out=tmp_path)
    with pytest.raises(UsageError, match="stopped"):
        run(tuned=[swept(tmp_path / "some", {"reptile": {"meta_lr": "3"}})])
    said = " ".join(capsys.readouterr().out.split())
    assert "not tuned, with the recipe's own rates: trajectory-shifting, no-shifting, random-shifting" in said
    assert "note: tinyimagenet: 400 images in split 'train' were found, 100000 are registered" in said
    with pytest.raises(UsageError, match="--tuned has rates for anil, and this experiment runs trajectory-shifting, "):
        run(tuned=[swept(tmp_path / "none", {"anil": {"meta_lr": "3"}})])


def test_a_page_shows_the_sizes_of_its_own_experiment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """imagenet-few-data leaves more sizes in the runs that imagenet-continue takes up."""
    monkeypatch.setattr("trajshift.experiments.images.run.run_jobs", run_jobs_here)
    words = small(root, "imagenet-continue")
    run = partial(run_published, scale="check", seeds=1, overrides=words, workers=1, out=root / "imagenet-continue")
    run("imagenet-few-data")
    page = run("imagenet-continue").read_text()
    assert "8 training images" in page
    assert "4 training images" not in page


def test_runs_that_fail_end_the_command_with_an_error_and_are_on_the_page(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(jobs: Sequence[Job], **options: Any) -> dict[Path, UsageError]:
        return {**run_jobs_here(jobs[:-1], **options), jobs[-1].path: UsageError("it broke")}

    monkeypatch.setattr("trajshift.experiments.images.run.run_jobs", failing)
    words = small(root, "images-meta-train")
    with pytest.raises(UsageError, match=r"1 of 4 runs failed .*: it broke"):
        run_published(
            "images-ablation", scale="check", seeds=1, overrides=words, workers=1, out=root / "images-meta-train"
        )
    page = (root / "images-meta-train" / "images-ablation.html").read_text()
    assert "reptile-seed0: it broke" in page
    assert "no-shifting" in page
