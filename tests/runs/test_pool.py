"""Many runs in worker processes: what fails, who waits, how far they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.waiting import wait_until
from trajshift.errors import UsageError
from trajshift.recipes.recipe import load
from trajshift.runs import pool
from trajshift.runs.directory import RunDirectory
from trajshift.runs.job import Job
from trajshift.runs.pool import run_jobs
from trajshift.training import checkpoint

RECIPE = """
threads: 1
horizon: 10
rounds: 2
batch_size: 8
model: {name: conv, options: {width: 4, depth: 1}}
tasks: {a: {source: "digits:upright"}}
tuning: {b: {source: "digits:parity"}}
output: {tensorboard: false}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return "mine.yaml"


def test_a_run_that_kills_its_process_fails_alone(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import os\ndef leave(name): os._exit(9)\n")
    quick = ("rounds=1", "horizon=1")
    bad = Job(path=tmp_path / "bad", recipe=load(recipe, ["tasks.a.source=own:leave", *quick]))
    good = Job(path=tmp_path / "good", recipe=load(recipe, quick))
    failures = run_jobs([bad, good], workers=1, title="both", log=tmp_path / "log.txt")
    assert list(failures) == [tmp_path / "bad"]
    assert "status 9" in str(failures[tmp_path / "bad"])
    assert RunDirectory(tmp_path / "good").is_complete(good.recipe)


def test_a_worker_whose_parent_was_killed_saves_and_ends(recipe: str, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from trajshift.runs.job import Job; from trajshift.runs.pool import run_jobs\n"
        "from trajshift.recipes.recipe import load\n"
        "job = Job(path=Path('run'), recipe=load('mine.yaml', ['rounds=1000000', 'output.log_every=1']))\n"
        "run_jobs([job], workers=1, title='one', log=Path('log.txt'))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = RunDirectory(tmp_path / "run")
    try:
        wait_until((run.path / "timing.jsonl").exists, "the first row")
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: checkpoint.steps(run.path / "checkpoints"), "the worker's checkpoint")
    wait_until(lambda: locks(run), "the worker's end")


def locks(run: RunDirectory) -> bool:
    """Whether nobody else holds the run, as its worker does until it has ended."""
    try:
        run.lock()
    except UsageError:
        return False
    return True


def test_without_a_process_a_run_fails_and_nobody_waits(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*arguments: object, **options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("trajshift.runs.pool.subprocess.Popen", none)
    job = Job(path=tmp_path / "one", recipe=load(recipe, ["rounds=1"]))
    failures = run_jobs([job], workers=1, title="one", log=tmp_path / "log.txt")
    assert "Cannot allocate memory" in str(failures[tmp_path / "one"])


def test_fine_tuning_is_progress_too(recipe: str, tmp_path: Path) -> None:
    """Of 20 steps of training and 2 starts x 3 sizes x 1 task x 7 steps the rows say what is done."""
    made = load(recipe, ["finetune.steps=7"])
    job = Job(path=tmp_path / "run", recipe=made, section="tuning", scratch=True, train_images=(5, 10, 20))
    assert pool._total([job]) == 20 + 42
    job.path.mkdir()
    (job.path / "timing.jsonl").write_text('{"step": 20, "seconds": 1.0}\n')
    (job.path / "evaluation.jsonl").write_text("{}\n{}\n{}")
    assert pool._done([job]) == 20 + 14
    assert pool._done([job], {job.path}) == 62
    kept = load(recipe, ["finetune.steps=7", "output.checkpoint_every=8", "output.keep=2"])
    assert pool._total([Job(path=job.path, recipe=kept, section="tuning", checkpoints=True)]) == 20 + 21
